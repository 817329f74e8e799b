"""Export to compressed-tensors: the same numbers in a format that other runtimes load.

Integers become ``pack-quantized``, as many bits as they have. Palettes, for which the format has no
place, become int8 or E4M3 weights with a scale per output channel (``int-quantized``,
``float-quantized``): exact, because their entries are that already. Cache and attention settings
stay behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from squeeze import atomic
from squeeze.errors import UnsupportedError
from squeeze.kernels.integer_linear.api import scales, signed_codes
from squeeze.linear import reconstruct
from squeeze.swapping import Artifacts
from squeeze.types import ClusteredWeight, IntegerWeight, Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Widths that do not divide 32 cross word boundaries; readers before this one leave gaps instead.
DENSE_READER = "0.18.0"
INTEGERS = "pack-quantized"
CHANNELS = {"int": "int-quantized", "float": "float-quantized"}
Scheme: TypeAlias = tuple[dict[str, Any], str]  # what a group of modules says, and its format


def export_compressed_tensors(
    model: PreTrainedModel, artifacts: Artifacts, folder: Path, tokenizer: Any = None
) -> None:
    """Write a swapped model as a compressed-tensors checkpoint.

    Args:
        model: With ``artifacts`` swapped in.
        artifacts: Integer weights, and palettes with int8 or float8 entries.
        folder: Made if missing.
        tokenizer: Saved beside the weights when given.
    Raises:
        UnsupportedError: something in the model cannot be said in that format; nothing is written.
    """
    if any(row.method for row in artifacts.plan.mixers):
        raise UnsupportedError(
            "export",
            "the activations of this model's mixers are rounded, and their outputs rotated",
            "formats that can say so",
            "Use --format squeeze",
        )
    state = {k: v for k, v in model.state_dict().items() if ".squeeze." not in k}
    schemes: dict[str, Scheme] = {}
    for name, weight in artifacts.weights.items():
        for part in weight.tensors():
            state.pop(f"{name}.{part}")
        if isinstance(weight, IntegerWeight):
            tensors, schemes[name] = _integers(name, weight, model.dtype)
        elif isinstance(weight, ClusteredWeight):
            tensors, schemes[name] = _channels(name, weight)
        else:
            raise UnsupportedError(
                f"export: {name}",
                "it holds packed experts in one parameter",
                "linear layers",
                "Use --format squeeze, or ignore the experts",
            )
        state |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    config = json.loads(model.config.to_json_string(use_diff=True))
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config["quantization_config"] = _quantization_config(schemes, dense)
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    kept = {k: v.contiguous() for k, v in state.items() if k not in tied}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    atomic.write_text(folder / "config.json", json.dumps(config, indent=2))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _channels(name: str, weight: ClusteredWeight) -> tuple[Tensors, Scheme]:
    """Look the entries up: int8 or E4M3 ``[out, in]``, and a scale per output channel.

    Rounded inputs are asked of the reader, who scales tokens by ``amax / 448``, which is less than
    ours where that is no power of two: the weights are the same, outputs nearly.
    """
    if weight.outlier_values is not None:
        raise UnsupportedError(
            f"export: {name}",
            "it has sparse outliers",
            "palettes without them",
            "Run the recipe with sparse_outliers: 0",
        )
    if weight.scale is None:
        raise UnsupportedError(
            f"export: {name}",
            f"its codebook entries are {weight.codebook.dtype}",
            "int8 or float8 entries with a row scale",
            "Run the recipe with entries: int8",
        )
    integers = weight.codebook.dtype == torch.int8
    kind, dtype = ("int", torch.int8) if integers else ("float", torch.float8_e4m3fn)
    entries = reconstruct(replace(weight, scale=None)).to(dtype)
    tensors = {"weight": entries, "weight_scale": weight.scale.float().view(-1, 1)}
    group = {"weights": _scheme(8, True, None, kind)}
    if weight.inputs:
        group["input_activations"] = _float8_tokens()
    return tensors, (group, CHANNELS[kind])


def _integers(name: str, weight: IntegerWeight, dtype: torch.dtype) -> tuple[Tensors, Scheme]:
    """Pack codes as one stream of bits per row, least significant first."""
    group_size = weight.group_size if weight.scale.shape[1] > 1 else None
    if group_size and weight.shape[1] % group_size:
        raise UnsupportedError(
            f"export: {name}",
            f"its rows of {weight.shape[1]} end in a part of a group of {group_size}",
            "groups that divide the rows",
            "Choose another group_size, or 0 for whole rows",
        )
    if weight.exponents is not None and not weight.folded and weight.exponents.any():
        raise UnsupportedError(
            f"export: {name}",
            "its inputs are scaled, and no norm or linear layer of this model could take that",
            "weights that stand alone",
            "Set scaling: none for this module, or use --format squeeze",
        )
    codes, zeros = signed_codes(weight)
    scale = scales(weight).float()
    narrow = scale.to(dtype)  # the dtype that readers compute in, where it holds the scales
    tensors = {
        "weight_packed": _pack(codes, weight.bits),
        "weight_scale": narrow if torch.equal(narrow.float(), scale) else scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zero is not None:
        tensors["weight_zero_point"] = _pack(zeros.t(), weight.bits).t().contiguous()
    group = {"weights": _scheme(weight.bits, weight.zero is None, group_size)}
    if weight.row_scale is not None:
        group["input_activations"] = _float8_tokens()
    return tensors, (group, INTEGERS)


def _float8_tokens() -> dict[str, Any]:
    """Describe inputs that the reader rounds to E4M3, each token under its own scale."""
    return _scheme(8, True, None, "float") | {"strategy": "token", "dynamic": True}


def _pack(values: Tensor, bits: int) -> Tensor:
    """Write int8 ``[n, m]`` plus ``2**(bits - 1)`` as bits of int32 ``[n, ceil(m bits / 32)]``."""
    count = values.shape[1]
    runs = torch.nn.functional.pad(values.to(torch.int64) + 2 ** (bits - 1), (0, -count % 32))
    runs = runs.unflatten(1, (-1, 32))  # 32 values fill ``bits`` words
    words = runs.new_zeros(*runs.shape[:2], bits + 1)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= runs[..., i] << shift
        words[..., word + 1] |= words[..., word] >> 32
        words[..., word] &= 2**32 - 1
    words = words[..., :bits].flatten(1)[:, : -(-count * bits // 32)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _scheme(
    bits: int, symmetric: bool, group_size: int | None, kind: str = "int"
) -> dict[str, Any]:
    """Describe weights, or inputs, to the library."""
    sharing = {"strategy": "group", "group_size": group_size} if group_size else {}
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": "channel",
        "dynamic": False,
    } | sharing


def _quantization_config(schemes: Mapping[str, Scheme], dense: list[str]) -> dict[str, Any]:
    """Group modules by scheme; where there is one alone it is that of every linear layer."""
    import compressed_tensors

    groups: dict[str, dict[str, Any]] = {}
    for name, (said, form) in schemes.items():
        key = json.dumps((said, form))
        group = groups.setdefault(key, {"targets": [], "format": form} | said)
        group["targets"].append(name)
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": dense,
        "global_compression_ratio": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "version": compressed_tensors.__version__,
    }
