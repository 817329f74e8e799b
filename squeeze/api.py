"""The Python API: recipe in, squeezed model out; each step is one call of the modules above."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from squeeze import atomic, environment, processes, tensor_parallel
from squeeze import export as export_module
from squeeze import recipe as recipe_module
from squeeze.cache_hook import static_cache
from squeeze.calibrate import Stats, calibrate
from squeeze.compress import compress, fit_tables
from squeeze.distill import distill, reading, sequences
from squeeze.errors import CheckpointError, RecipeError, UnsupportedError, nearest
from squeeze.evaluation import check_tasks, evaluate
from squeeze.evaluation.eight_bits import choose_layers
from squeeze.evaluation.head_budgets import choose_budgets
from squeeze.evaluation.inspection import PARTS, Sensitivity, inspect_layers
from squeeze.evaluation.scoring import Progress
from squeeze.evaluation.sensitivity import measure_and_allocate
from squeeze.evaluation.suite import (
    SPEED_TOKENS,
    calibration_texts,
    calibration_tokens,
    layer_costs,
    measure,
    prefill_density,
    unread_text,
)
from squeeze.evaluation.weight_bits import choose_weights
from squeeze.expert_fit import note_unrouted
from squeeze.export_compressed import export_compressed_tensors
from squeeze.key_biases import find_huge
from squeeze.layerwise import fit_layers, shifts, streamed
from squeeze.loading import load_model, load_tokenizer
from squeeze.model_info import ModelInfo, describe, empty_model, load_config, locate
from squeeze.plan import KV_LOSS, Plan, make_plan, resolve_device
from squeeze.plan_prefill import PREFILL_COSINES, PREFILL_CURVES
from squeeze.prompt import load_prompt, save_prompt
from squeeze.recipe import Recipe
from squeeze.report import Report
from squeeze.swapping import Artifacts, Swap, swap
from squeeze.training_text import training_tokens
from squeeze.types import StoredWeight, Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Artifacts",
    "Result",
    "Swap",
    "evaluate",
    "export",
    "inspect_model",
    "load",
    "load_prompt",
    "load_tokenizer",
    "plan",
    "run",
    "save_prompt",
    "static_cache",
    "swap",
]


# What calibration measures by running the whole dense model, where the device holds it.
RUN_WHOLE = {PREFILL_COSINES, PREFILL_CURVES}
# What to do in place of squeezing a model that is split.
WHOLE_REMEDY = (
    "Squeeze the whole model, which torchrun shares out too; then squeeze.load(folder, "
    "tp_plan='auto'), or squeeze.swap(split_model, artifacts)"
)


@dataclass(frozen=True)
class Result:
    """What a run returns.

    Attributes:
        model: Squeezed; an ordinary Hugging Face model.
        tokenizer: Its tokenizer, ``None`` if the model was passed in and none was needed.
        plan: What was done.
        artifacts: Packed weights and tables.
        report: Quality, bytes and speed beside the dense model; ``None`` without evaluation.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: Plan
    artifacts: Artifacts
    report: Report | None


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: str | Path | PreTrainedModel = "reference",
    *,
    context: int = 8192,
    batch: int = 1,
    device: str | None = None,
    dtype: Any = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    trust_remote_code: bool = False,
    tp_size: int = 1,
) -> Plan:
    """Say what a recipe would do to a model, from its configuration alone.

    Args:
        recipe: Name, path, mapping or ``Recipe``.
        model: Name, path or loaded model.
        context: Tokens to count KV bytes at.
        batch: Rows to count KV bytes at.
        device: ``"cpu"`` or ``"cuda"``; by default a GPU if there is one.
        dtype: By default the checkpoint's own.
        overrides: As ``--set``.
        trust_remote_code: Passed to transformers.
        tp_size: Processes that are to share the model by tensor parallelism; what cannot be split
            over them is refused.
    """
    for name, value in (("context", context), ("batch", batch), ("tp-size", tp_size)):
        if value < 1:
            raise RecipeError(f"--{name}", f"got {value}", "an integer of at least 1", "Raise it")
    parsed = recipe_module.load(recipe, overrides)
    made = make_plan(
        parsed,
        describe(model, trust_remote_code, dtype),
        device=device,
        context=context,
        batch=batch,
    )
    _check_split(model, made, "auto", tp_size, trust_remote_code)
    return made


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: str | Path | PreTrainedModel = "reference",
    output: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: Any = None,
    seed: int | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    tp_plan: Any = None,
) -> Result:
    """Plan, calibrate, compress, swap, evaluate and export.

    Args:
        recipe: Name, path, mapping or ``Recipe``.
        model: Name, path, or a loaded model, which is swapped in place.
        output: Folder to write the checkpoint and the report to; nothing is written without it.
            Work in progress lives beside it and a killed run resumes there.
        device: ``"cpu"`` or ``"cuda"``; by default a GPU if there is one, or the loaded model's.
        dtype: By default the checkpoint's own.
        seed: Overrides the recipe's calibration seed.
        overrides: As ``--set``: ``{"kv_cache.keys.bits": 3}``.
        evaluate: Measure the dense and the squeezed model and make a report.
        overwrite: Replace a finished output folder.
        trust_remote_code: Passed to transformers.
        tokenizer: For a loaded model; by default the one its name or path has.
        progress: Called as ``progress(stage, done, total)``.
        tp_plan: ``"auto"``, or a mapping as transformers takes it: the processes that torchrun
            started, which squeeze and evaluate whole models together, end with one that is split
            over them.

    Raises:
        SqueezeError: what the user can mend; see ``squeeze.errors``.
    """
    parsed = recipe_module.load(recipe, overrides)
    if seed is not None:
        calibration = parsed.calibration.model_copy(update={"seed": seed})
        parsed = parsed.model_copy(update={"calibration": calibration})
    target = Path(output) if output is not None else None
    if target is not None:
        check_output(target, overwrite)
    if evaluate:
        check_tasks(parsed.evaluate.tasks)
    given = isinstance(model, nn.Module)
    if given:
        tensor_parallel.require_whole(model, "run", WHOLE_REMEDY)
    if tp_plan is not None:
        _check_named(given)
        device = processes.join(device)
    if given and device is None:
        device = str(next(model.parameters()).device)  # type: ignore[union-attr]
    device = resolve_device(device)
    info = describe(model, trust_remote_code, dtype)
    made = make_plan(parsed, info, device=device)
    if tp_plan is not None:
        _check_split(model, made, tp_plan, processes.started(), trust_remote_code)
    needs_text = bool(made.statistics) or sequences(made) > 0
    needs_text = needs_text or evaluate or target is not None or not given
    if tokenizer is None and needs_text:
        tokenizer = load_tokenizer(info.source if given else model, trust_remote_code)  # type: ignore[arg-type]
    loaded: Any = model
    if not isinstance(model, nn.Module):
        # Where layers are fitted one by one, one at a time is on the device.
        whole = made.allocation is not None or bool(RUN_WHOLE & set(made.statistics))
        home = "cpu" if streamed(made) and not whole else device
        loaded = load_model(model, device=home, dtype=dtype, trust_remote_code=trust_remote_code)
        # Biases are known now; all else was planned, and refused, before the weights were read.
        info = replace(info, key_biases=find_huge(loaded, info.attention))
        made = make_plan(parsed, info, device=device)
    with _work_folder(target, parsed, info, made) as work:
        made, stats, fitted = _calibrate(loaded, tokenizer, parsed, made, work, progress)
        tables = fit_tables(loaded, made, stats, device)
        quantized = parsed.calibration.inputs == "quantized" and shifts(made)
        if streamed(made) and (quantized or not fitted):
            made, own = _fit_layers(loaded, tokenizer, parsed, made, tables, work, progress)
            fitted |= own
            if not given:
                loaded.to(device)
        artifacts = compress(
            loaded,
            made,
            stats,
            tables=tables,
            folder=work and work / "weights",
            progress=progress,
            fitted=fitted,
        )
        artifacts = _distill(loaded, tokenizer, parsed, artifacts, work, progress)
        dense, costs = None, []
        if evaluate:
            dense = measure(
                loaded,
                tokenizer,
                made,
                parsed,
                squeezed=False,
                folder=work and work / "results",
                progress=progress,
            )
            if parsed.evaluate.sensitivity:
                costs = layer_costs(loaded, tokenizer, artifacts, progress=progress)
        swap(loaded, artifacts, keep_dense=False)
        report = None
        if evaluate and dense is not None:
            squeezed = measure(
                loaded,
                tokenizer,
                made,
                parsed,
                squeezed=True,
                folder=work and work / "results",
                progress=progress,
            )
            density = prefill_density(loaded, tokenizer, parsed)
            report = Report(
                model=info.source,
                recipe=parsed.to_dict(),
                environment=environment.environment(),
                dense=dense,
                squeezed=squeezed,
                effective_bits=made.effective_bits,
                density=_mean(density),
                plan=made.to_dict(),
                density_by_head=density,
                sensitivity=costs,
                conditions=_conditions(loaded, parsed, device),
            )
        if target is not None and work is not None:
            processes.wait()
            if processes.rank() == 0:
                _write(loaded, tokenizer, artifacts, report, parsed, info, target, work, overwrite)
    if tp_plan is not None:
        del loaded  # before its parts are loaded
        loaded = load_model(
            model,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            tp_plan=tp_plan,
        )
        swap(loaded, artifacts, keep_dense=False)
    return Result(loaded, tokenizer, made, artifacts, report)


def _check_named(given: bool) -> None:
    """Refuse to split a model of which every process has the whole.

    Raises:
        UnsupportedError: the model was passed in.
    """
    if given:
        raise UnsupportedError(
            "run: tp_plan",
            "the model was passed in whole",
            "the name or path of a model, which is read in parts",
            "Pass its name, or load it with tp_plan and use squeeze.swap(model, artifacts)",
        )


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something, before any work.

    Raises:
        CheckpointError: it exists and is not empty, and ``overwrite`` is not set; or it holds
            something that squeeze did not write, which is never overwritten.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(
            f"--output {output}",
            "is not empty",
            "a new or empty folder",
            "Choose another, or pass --overwrite",
        )
    if not (output / export_module.MANIFEST).is_file():
        raise CheckpointError(
            f"--output {output}",
            "holds files that squeeze did not write",
            "a folder that an earlier run wrote",
            "Choose another",
        )


@contextmanager
def _work_folder(
    output: Path | None, recipe: Recipe, info: ModelInfo, made: Plan
) -> Iterator[Path | None]:
    """Give a folder for work in progress; it goes once the output is there."""
    if output is None:
        yield None
        return
    output = output.absolute()
    work = output.with_name(f".{output.name}.partial")
    versions = environment.environment()["versions"]
    key = json.dumps(
        {
            "recipe": recipe.to_dict(),
            "model": fingerprint(info),
            "versions": versions,
            "device": made.device,
            "dtype": info.dtype,
        },
        sort_keys=True,
    )
    marker = work / "key.json"
    ours = marker.is_file() and marker.read_text(encoding="utf-8") == key
    if processes.rank() == 0 and not ours:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        atomic.write_text(marker, key)
    processes.wait()
    yield work
    processes.wait()
    if processes.rank() == 0:
        shutil.rmtree(work)


def fingerprint(info: ModelInfo) -> list[Any]:
    """Identify a model's files by name, size and time of change."""
    folder = Path(locate(info.source))
    files = sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors"))
    stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return [info.source, info.model_type, info.parameter_bytes, stamps]


def _calibrate(
    model: Any, tokenizer: Any, recipe: Recipe, made: Plan, work: Path | None, progress: Any
) -> tuple[Plan, Stats | None, dict[str, StoredWeight]]:
    """Measure what the plan's methods ask of the whole model, and settle what the recipe left open.

    Settling weights fits them; these come back too.
    """
    folder, stats = work and work / "statistics", None
    needed = set(made.statistics) - {KV_LOSS, *RUN_WHOLE} - streamed(made)
    if needed:
        tokens = calibration_tokens(tokenizer, recipe.calibration).to(model.device)
        stats = calibrate(
            model,
            tokens,
            needed,
            folder=folder,
            progress=progress,
            experts=any(row.experts for row in made.weights),
            device=made.device,
        )
        made = note_unrouted(made, stats)
    if made.allocation is not None:
        made, stats = measure_and_allocate(
            model,
            tokenizer,
            made,
            stats,
            calibration_texts(recipe.calibration),
            seed=recipe.calibration.seed,
            folder=folder,
            progress=progress,
        )
    if recipe.attention is not None and recipe.attention.mean_density is not None:
        made = choose_budgets(
            model,
            tokenizer,
            made,
            calibration_texts(recipe.calibration),
            recipe.attention.mean_density,
            recipe.attention.length,
            seed=recipe.calibration.seed,
            folder=folder,
            progress=progress,
        )
    if recipe.attention is not None and recipe.attention.quantize is not None:
        made = choose_layers(
            model,
            tokenizer,
            made,
            calibration_texts(recipe.calibration),
            recipe.attention.min_cosine,
            recipe.attention.length,
            seed=recipe.calibration.seed,
            folder=folder,
            progress=progress,
        )
    fitted: dict[str, StoredWeight] = {}
    if made.weight_allocation is not None and stats is not None:
        made, stats, fitted = choose_weights(
            model,
            tokenizer,
            made,
            stats,
            unread_text(recipe.calibration),
            seed=recipe.calibration.seed,
            folder=work and work / "candidates",
            progress=progress,
        )
    return made, stats, fitted


def _fit_layers(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    made: Plan,
    tables: Tensors,
    work: Path | None,
    progress: Any,
) -> tuple[Plan, dict[str, StoredWeight]]:
    """Measure and fit weights layer by layer, where statistics of all at once would be large."""
    return fit_layers(
        model,
        made,
        calibration_tokens(tokenizer, recipe.calibration),
        tables,
        quantized=recipe.calibration.inputs == "quantized",
        device=made.device,
        folder=work and work / "layers",
        progress=progress,
    )


def _distill(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    artifacts: Artifacts,
    work: Path | None,
    progress: Any,
) -> Artifacts:
    """Train the weights whose methods ask for it, on other excerpts of the calibration text."""
    count = sequences(artifacts.plan)
    if not count:
        return artifacts
    folder = work and work / "distill"
    tokens = training_tokens(
        model,
        tokenizer,
        recipe.calibration,
        count,
        folder=folder,
        progress=progress,
        **reading(artifacts.plan),
    )
    return distill(model, artifacts, tokens, folder=folder, progress=progress)


def _mean(rows: list[list[float]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values) if values else 1.0


def _conditions(model: Any, recipe: Recipe, device: str) -> dict[str, Any]:
    return {
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": recipe.calibration.seed,
        "threads": torch.get_num_threads(),
        "speed_tokens": SPEED_TOKENS,
    }


def _write(
    model: Any,
    tokenizer: Any,
    artifacts: Artifacts,
    report: Report | None,
    recipe: Recipe,
    info: ModelInfo,
    output: Path,
    work: Path,
    overwrite: bool,
) -> None:
    folder = work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    export_module.save(model, artifacts, folder, tokenizer)
    if report is not None:
        report.save(folder)
    source = locate(info.source)
    export_module.write_manifest(
        folder,
        {
            "source": info.source if info.source == "reference" else source,
            "recipe": recipe.to_dict(),
            "plan": artifacts.plan.to_dict(),
            "seed": recipe.calibration.seed,
            "environment": environment.environment(),
        },
    )
    export_module.publish(folder, output.absolute(), overwrite)


def load(
    path: str | Path, *, device: str | None = None, dtype: Any = None, tp_plan: Any = None
) -> PreTrainedModel:
    """Load a squeezed checkpoint, verified against its manifest.

    Args:
        path: A folder that ``run`` wrote.
        device: ``"cpu"`` or ``"cuda"``; by default a GPU if there is one.
        dtype: By default the checkpoint's own.
        tp_plan: ``"auto"``, or a mapping as transformers takes it, splits the model over the
            processes that torchrun started, each on its GPU if there are any.

    Raises:
        CheckpointError: files are missing, damaged, or of a newer format.
        UnsupportedError: a layer cannot be split over that many processes.
    """
    folder = Path(path)
    manifest = export_module.verify(folder, content=False)  # the quantizer hashes while it loads
    if tp_plan is not None:
        _check_split(folder, Plan.from_dict(manifest["plan"]), tp_plan, processes.started())
    model = load_model(folder, device=resolve_device(device), dtype=dtype, tp_plan=tp_plan)
    export_module.choose_implementations(model)
    return model


def _check_split(
    model: str | Path | PreTrainedModel, made: Plan, tp_plan: Any, size: int, trust: bool = False
) -> None:
    """Refuse what cannot be split over ``size`` processes, by the model's configuration alone."""
    if size == 1:
        return
    held: Any = model if isinstance(model, nn.Module) else empty_model(load_config(model, trust))
    styles = {**held.tp_plan, **tp_plan} if isinstance(tp_plan, Mapping) else held.tp_plan
    tensor_parallel.check(made, styles, size)


def export(
    source: str | Path,
    format: str = "squeeze",
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a squeezed checkpoint in another format.

    Args:
        source: A folder that ``run`` wrote.
        format: ``"squeeze"`` (a verified copy) or ``"compressed-tensors"``.
        output: Default: the source's name with the format appended.
        overwrite: Replace a finished output folder.
    """
    export_module.check_format(format)
    folder = Path(source)
    target = Path(output) if output else folder.with_name(f"{folder.name}-{format}")
    check_output(target, overwrite)
    manifest = export_module.verify(folder)
    work = target.absolute().with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    if format == "squeeze":
        shutil.copytree(folder, work)
    else:
        model = load(folder, device="cpu")
        artifacts = export_module.artifacts_of(folder)
        export_compressed_tensors(model, artifacts, work, load_tokenizer(folder))
    facts = {k: v for k, v in manifest.items() if k not in ("files", "format_version")}
    if format == "squeeze":
        export_module.write_manifest(work, facts)
    export_module.publish(work, target.absolute(), overwrite)
    return target


def inspect_model(
    model: str | Path | PreTrainedModel,
    *,
    bits: Sequence[int] = (2, 3, 4),
    parts: Sequence[str] = PARTS,
    mean_bits: float | None = None,
    tokenizer: Any = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure how much loss each layer adds when it alone is squeezed, and say what follows.

    Args:
        model: Name, path or loaded dense model.
        bits: Nominal widths to try on weights, keys and values.
        parts: Any of ``weights``, ``keys``, ``values``; keys and values go together.
        mean_bits: Bound of the recommended ``kv_cache``; by default halfway between the widths.
        tokenizer: For a loaded model; by default the one its name or path has.
        seed: Of the calibration text.
        device: ``"cpu"`` or ``"cuda"``; by default a GPU if there is one.
        dtype: By default the checkpoint's own.
        trust_remote_code: Passed to transformers.
        progress: Called as ``progress(stage, done, total)``.
    """
    for width in bits:
        if width not in (2, 3, 4, 8):
            raise RecipeError("--bits", f"got {width}", "2, 3, 4, 8", "Choose among these")
    for part in parts:
        if part not in PARTS:
            hint = nearest(part, PARTS) or "Choose among these"
            raise RecipeError("--parts", f"unknown part {part!r}", ", ".join(PARTS), hint)
    tensor_parallel.require_whole(model, "inspect", "Load it without tp_plan")
    loaded: Any = model
    if not isinstance(model, nn.Module):
        loaded = load_model(
            model,
            device=resolve_device(device),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    if tokenizer is None:
        source = loaded.config._name_or_path if isinstance(model, nn.Module) else model
        tokenizer = load_tokenizer(source, trust_remote_code)
    return inspect_layers(
        loaded,
        tokenizer,
        bits,
        parts=parts,
        mean_bits=mean_bits,
        seed=seed or 0,
        progress=progress,
    )
