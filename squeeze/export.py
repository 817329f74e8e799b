"""Checkpoints: write a squeezed model so that loading verifies it, and read it back.

A checkpoint is what ``save_pretrained`` writes plus a manifest, ``squeeze.json``: hashes of every
file, the recipe, the plan, versions and seed. It appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from squeeze import atomic
from squeeze.attention import LayerState
from squeeze.compress import assemble, empty_weight
from squeeze.devices import require_tables, stand_on_devices
from squeeze.errors import CheckpointError, RecipeError, nearest
from squeeze.experts import PackedExperts, PackedStack, keep_names, replace_experts
from squeeze.folding import folded_tables
from squeeze.linear import PackedLinear
from squeeze.mixer import rotate
from squeeze.plan import Plan, resolve_implementation
from squeeze.quantizer import SqueezeConfig, SqueezeQuantizer
from squeeze.sparse_inputs import InputState, lay_out
from squeeze.swapping import (
    Artifacts,
    Swap,
    attach_attention,
    attach_inputs,
    attach_mixers,
    finish,
    replace_module,
)
from squeeze.tensor_parallel import processes_of, require_whole, split_loaded
from squeeze.types import Implementation, resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
MANIFEST = "squeeze.json"
FORMATS = ("squeeze", "compressed-tensors")


def save(model: PreTrainedModel, artifacts: Artifacts, folder: Path, tokenizer: Any = None) -> None:
    """Write a swapped model's checkpoint files into ``folder``, without the manifest.

    Args:
        model: With ``artifacts`` swapped in.
        artifacts: Also says which tables the checkpoint holds.
        folder: Made if missing.
        tokenizer: Saved beside the weights when given.
    """
    config = SqueezeConfig(
        artifacts.plan.to_dict(),
        {
            name: {"shape": list(table.shape), "dtype": str(table.dtype).removeprefix("torch.")}
            for name, table in artifacts.tables.items()
        },
        FORMAT_VERSION,
    )
    folder.mkdir(parents=True, exist_ok=True)
    target: Any = model
    held = {k: vars(target).get(k) for k in ("hf_quantizer", "is_quantized", "quantization_method")}
    held_config = getattr(target.config, "quantization_config", None)
    try:
        target.hf_quantizer = SqueezeQuantizer(config, pre_quantized=True)
        target.is_quantized, target.quantization_method = True, config.quant_method
        target.config.quantization_config = config
        with _own_attention(target):
            target.save_pretrained(folder)
    finally:
        for key, value in held.items():
            setattr(target, key, value) if value is not None else vars(target).pop(key, None)
        if held_config is None:
            del target.config.quantization_config
        else:
            target.config.quantization_config = held_config
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """Name the model's own attention implementation while its configuration is written."""
    done: Swap | None = getattr(model, "squeeze_swap", None)
    if done is None or done.dense is None:
        yield
        return
    config = model.config.get_text_config(decoder=True)
    ours = config._attn_implementation
    config._attn_implementation = done.dense
    try:
        yield
    finally:
        config._attn_implementation = ours


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Hash every file of ``folder`` into its manifest and push everything to the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    atomic.write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    for path in folder.rglob("*"):
        if path.is_file():
            atomic.flush(path)
    atomic.flush(folder)


def publish(folder: Path, output: Path, overwrite: bool) -> None:
    """Make ``folder`` appear as ``output`` by one rename."""
    old = output.with_name(f".{output.name}.old")
    if overwrite and output.exists():
        if old.exists():
            shutil.rmtree(old)
        os.replace(output, old)
    os.replace(folder, output)
    atomic.flush(output.parent)
    if old.exists():
        shutil.rmtree(old)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: missing, not JSON, or of a newer format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
    except FileNotFoundError as error:
        raise CheckpointError(
            str(folder),
            f"no {MANIFEST} there",
            "a folder that squeeze wrote",
            "Check the path, or run 'squeeze run' again",
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(
            str(path),
            "is not a manifest",
            "the file that squeeze wrote",
            "Restore it, or run 'squeeze run' again",
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            str(path),
            f"checkpoint format {version} is newer than this squeeze",
            f"up to {FORMAT_VERSION}",
            "Upgrade squeeze",
        )
    return manifest  # type: ignore[no-any-return]


def verify(folder: Path, *, content: bool = True) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Args:
        folder: The checkpoint.
        content: Hash the files too; without it names and sizes are compared.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the message names it.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest.get("files", {}).items():
        path = folder / name
        remedy = "Copy the checkpoint again, or run 'squeeze run' again"
        if not path.is_file():
            raise CheckpointError(
                str(path), "is missing", f"the files that {MANIFEST} lists", remedy
            )
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise CheckpointError(
                str(path),
                f"has {size} bytes",
                f"{facts['bytes']} bytes, as {MANIFEST} says",
                remedy,
            )
        if content and _sha256(path) != facts["sha256"]:
            raise CheckpointError(
                str(path),
                f"its content is not what {MANIFEST} says",
                f"SHA-256 {facts['sha256'][:16]}...",
                remedy,
            )
    config = _read_config(folder)
    if config.get("plan") != json.loads(json.dumps(manifest.get("plan"))):
        raise CheckpointError(
            str(folder),
            f"the plans in config.json and {MANIFEST} differ",
            "one checkpoint's files together",
            "Copy the checkpoint again as a whole",
        )
    return manifest


def _read_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config") or {}


def rebuild(model: PreTrainedModel, config: SqueezeConfig) -> None:
    """Give an empty model the modules of a squeezed checkpoint, still without values."""
    if int(config.format_version) > FORMAT_VERSION:
        raise CheckpointError(
            "config.json",
            f"checkpoint format {config.format_version} is newer than this squeeze",
            f"up to {FORMAT_VERSION}",
            "Upgrade squeeze",
        )
    plan = Plan.from_dict(config.plan)
    device = torch.device("meta")
    stacks = {
        row.module: PackedStack(empty_weight(row, device))  # type: ignore[arg-type]
        for row in plan.weights
        if row.experts
    }
    replace_experts(model, stacks)
    for row in plan.weights:
        if row.experts:
            continue
        linear: Any = model.get_submodule(row.module)
        replacement = PackedLinear.from_weight(
            empty_weight(row, device),  # type: ignore[arg-type]
            linear.bias,
            dtype=linear.weight.dtype,
            implementation=Implementation.REFERENCE,
        )
        replace_module(model, row.module, replacement)
        # Some owners would initialise weights that are not there; all they hold is in the files.
        owner: Any = model.get_submodule(row.module.rpartition(".")[0])
        owner._is_hf_initialized = True
    done = Swap(model)
    done.restorable = not plan.weights
    tables = {
        name: torch.empty(facts["shape"], dtype=resolve_dtype(facts["dtype"]), device=device)
        for name, facts in config.tables.items()
    }
    attach_attention(done, plan, tables)
    attach_mixers(done, plan, tables)
    attach_inputs(done, plan, tables)
    finish(done)


def choose_implementations(model: PreTrainedModel) -> None:
    """Resolve what computes each squeezed module, now that the device is known."""
    device = str(next(model.parameters()).device)
    chosen = Implementation(resolve_implementation(device))
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedStack | LayerState | InputState):
            module.implementation = chosen
    for module in model.modules():
        if isinstance(getattr(module, "squeeze", None), InputState):
            lay_out(module)
    keep_names(model)


def spread(model: PreTrainedModel, config: SqueezeConfig) -> bool:
    """Follow where a loaded model was put: layers on devices, parts of layers in processes.

    Returns:
        Whether this process holds a part of the model.

    Raises:
        UnsupportedError: something of it cannot go there.
    """
    done: Swap | None = getattr(model, "squeeze_swap", None)
    if done is not None:
        require_tables(model)
        done.hooks += stand_on_devices(model)
    split_loaded(model, Plan.from_dict(config.plan))
    return processes_of(model) is not None


def note_folds(model: PreTrainedModel) -> None:
    """Let a loaded model know of the key scales that its weights hold already."""
    done: Swap | None = getattr(model, "squeeze_swap", None)
    if done is not None:
        done.folded = folded_tables(dict(model.named_buffers()))


def dequantize(model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
    """Replace packed layers by dense ones holding the same values, and drop the rest.

    Raises:
        UnsupportedError: this process has a part of the model.
    """
    require_whole(model, "dequantize", "Load the model whole")
    dtype = resolve_dtype(dtype or model.dtype)
    done: Swap | None = getattr(model, "squeeze_swap", None)
    if done is not None:
        done.detach_inputs()
    rotated = done.rotated if done is not None else set()
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            replace_module(model, name, module.dense(dtype))
            vars(model).pop("_weight_conversions", None)
        if isinstance(module, PackedLinear):
            weight = module.reconstruct()
            if name in rotated:
                weight = rotate(weight)
            weight = weight.to(dtype)
            dense = nn.Linear(
                weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta"
            )
            dense.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
            replace_module(model, name, dense)
    if done is not None:
        done.detach_mixers()
        done.scales = {}  # the weights made above belong to scaled inputs
        done.unfold()
        done.detach_attention()
        del model.squeeze_swap, model.squeeze_statistics
    return model


def artifacts_of(folder: Path) -> Artifacts:
    """Read the artifacts out of a checkpoint, verified.

    Raises:
        CheckpointError: the checkpoint is damaged or not one.
    """
    manifest = verify(folder)
    plan = Plan.from_dict(manifest["plan"])
    tensors = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensors[key] = file.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(
            str(path),
            f"is not safetensors ({error})",
            "the file squeeze wrote",
            "Copy the checkpoint again",
        ) from error
    weights = {}
    for row in plan.weights:
        prefix = f"{row.module}."
        stored = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        weights[row.module] = assemble(row, stored)
    tables = {name: tensors[name] for name in _read_config(folder).get("tables", {})}
    return Artifacts(plan, weights, tables)


def check_format(name: str) -> str:
    """Return a known export format's name.

    Raises:
        RecipeError: it is not known.
    """
    if name not in FORMATS:
        raise RecipeError(
            "--format", f"unknown format {name!r}", ", ".join(FORMATS), nearest(name, FORMATS)
        )
    return name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
