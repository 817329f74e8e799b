"""What one run measures of a model: quality, bytes and speed, and which layers hurt."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeeze import atomic, processes, reference
from squeeze.errors import RecipeError
from squeeze.evaluation import evaluate
from squeeze.evaluation.latency import latency
from squeeze.evaluation.memory import weight_bytes
from squeeze.evaluation.scoring import (
    Progress,
    encode,
    excerpts,
    forward,
    max_positions,
    scoring,
    start_tokens,
)
from squeeze.evaluation.sensitivity import layer_sensitivity
from squeeze.measurement import Measurement
from squeeze.plan import Plan
from squeeze.recipe_values import Calibration, Recipe
from squeeze.swapping import Artifacts, swap

# Where KV bytes per token and speed are counted.
SPEED_TOKENS = 8192
BFLOAT16_BYTES = 2
# Counts in a recipe hold at this length and shrink in proportion at longer ones.
COUNTED_AT = 2048


def calibration_texts(settings: Calibration) -> Sequence[str]:
    """Read the texts that calibration draws from.

    Raises:
        RecipeError: ``data`` is neither ``"books"`` nor a file.
    """
    if settings.data == "books":
        return reference.calibration_passages()
    path = Path(settings.data)
    if not path.is_file():
        raise RecipeError(
            "calibration.data",
            f"no file {settings.data!r}",
            "'books', or a path to a .txt or .json file",
            "Check the path",
        )
    content = path.read_text(encoding="utf-8")
    return json.loads(content) if path.suffix == ".json" else [content]


def calibration_tokens(tokenizer: Any, settings: Calibration) -> Tensor:
    """Draw the calibration sequences.

    Args:
        tokenizer: Of the model.
        settings: ``data`` is ``"books"`` (shipped passages), or a path to a ``.txt`` file or to a
            ``.json`` list of texts.

    Returns:
        Token ids int64 ``[samples, length]``, each row beginning with BOS where there is one.

    Raises:
        RecipeError: the data is unknown or too short.
    """
    head = start_tokens(tokenizer)
    body = settings.length - len(head)
    joined = "\n".join(calibration_texts(settings))
    rows = []
    for first in _places(settings, len(joined)):
        ids = encode(tokenizer, joined[first : first + 8 * settings.length])
        if len(ids) < body:
            raise RecipeError(
                "calibration.data",
                f"a sample has {len(ids)} tokens",
                f"at least {body}, as calibration.length asks",
                "Give more text, or lower calibration.length",
            )
        rows.append(head + ids[:body])
    return torch.tensor(rows)


def _places(settings: Calibration, characters: int) -> list[int]:
    """Draw where each sample begins; eight characters a token are more than enough."""
    generator = random.Random(settings.seed)
    most = max(1, characters - 8 * settings.length)
    return [generator.randrange(most) for _ in range(settings.samples)]


def unread_text(settings: Calibration) -> str:
    """Return what ``calibration_tokens`` leaves of the text, all of it if that is under a tenth."""
    joined = "\n".join(calibration_texts(settings))
    parts, end = [], 0
    for first in sorted(_places(settings, len(joined))):
        parts.append(joined[end:first])
        end = max(end, first + 8 * settings.length)
    left = "\n".join(part for part in (*parts, joined[end:]) if part)
    return left if 10 * len(left) >= len(joined) else joined


def measure(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    recipe: Recipe,
    *,
    squeezed: bool,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure a model as the recipe's ``evaluate`` section asks.

    Args:
        model: Dense or squeezed.
        tokenizer: Its tokenizer.
        plan: Names the targeted layers.
        recipe: Says tasks, modes, lengths and counts.
        squeezed: Whether the plan is in force; the dense cache is counted in bfloat16.
        folder: Finished tasks are saved here and found again by a resumed run.
        progress: Called as ``progress(stage, done, total)``.
    """
    results = []
    label = "squeezed" if squeezed else "dense"
    for mode in recipe.evaluate.modes:
        for length in usable_lengths(model, recipe.evaluate.lengths):
            for task in recipe.evaluate.tasks:
                path = folder / f"{label}-{task}-{mode}-{length}.json" if folder else None
                results.append(
                    _task(model, tokenizer, task, mode, length, recipe, path, progress, label)
                )
    most = max_positions(model) or SPEED_TOKENS + 16
    steps = 16
    tokens = min(SPEED_TOKENS, most - steps)
    speed = latency(model, prompt_tokens=tokens, decode_tokens=steps, repeats=1)
    per_token = speed["kv_bytes"] / (tokens + steps)
    if not squeezed:
        per_token *= BFLOAT16_BYTES / model.dtype.itemsize
    return Measurement.from_results(
        results,
        weight_bytes=weight_bytes(model),
        kv_bytes_per_token=per_token,
        prefill_seconds=speed["prefill_seconds"],
        decode_ms_per_token=speed["decode_ms_per_token"],
        linear_bytes=sum(r.bytes_after if squeezed else r.bytes_before for r in plan.weights)
        or None,
        peak_memory_bytes=speed["peak_bytes"],
    )


def usable_lengths(model: Any, lengths: Sequence[int]) -> list[int]:
    """Keep the lengths that the model's positions hold; questions of needle come on top."""
    most = max_positions(model)
    room = [n for n in lengths if most is None or n <= most]
    return room or [most or min(lengths)]


def _task(
    model: Any,
    tokenizer: Any,
    task: str,
    mode: str,
    length: int,
    recipe: Recipe,
    path: Path | None,
    progress: Progress | None,
    label: str,
) -> dict[str, Any]:
    done = processes.from_first(lambda: path and path.is_file() and path.read_text("utf-8"))
    if done:
        return json.loads(done)  # type: ignore[no-any-return]
    wanted = recipe.evaluate.facts if task == "needle" else recipe.evaluate.windows
    limit = max(1, wanted * COUNTED_AT // length) if length > COUNTED_AT else wanted

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{label} {stage} {mode} {length}", done, total)

    result = evaluate(
        model,
        tokenizer,
        [task],
        mode=mode,
        length=length,
        limit=limit,
        seed=recipe.calibration.seed,
        progress=report,
    )
    if path is not None and processes.rank() == 0:
        atomic.write_text(path, json.dumps(result))
    return result


def prefill_density(model: Any, tokenizer: Any, recipe: Recipe) -> list[list[float]]:
    """Prefill one window of the books at the longest length and read what was computed.

    Returns:
        Computed over causal query-key pairs, per layer and query head.
    """
    length = max(usable_lengths(model, recipe.evaluate.lengths))
    head = start_tokens(tokenizer)
    texts = [book["text"] for book in reference.validation_books()]
    window = head + excerpts(tokenizer, texts, length - len(head), 1)[0]
    ids = torch.tensor([window], device=model.device)
    if not hasattr(model, "squeeze_statistics"):
        config = model.config.get_text_config(decoder=True)
        return [[1.0] * config.num_attention_heads] * config.num_hidden_layers
    with scoring(model):
        forward(model, ids, keep=1, use_cache=False)
    return model.squeeze_statistics()["density"]  # type: ignore[no-any-return]


def layer_costs(
    model: Any,
    tokenizer: Any,
    artifacts: Artifacts,
    *,
    length: int = 1024,
    windows: int = 2,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure the rise of the loss when one layer's weights, or cache, are squeezed alone.

    Args:
        model: Dense; it is swapped and restored for every row.
        tokenizer: Its tokenizer.
        artifacts: Of the whole model.
        length: Tokens of a window.
        windows: Number of windows.
        progress: Called as ``progress("sensitivity", done, total)``.

    Returns:
        Rows ``{"layer", "bits", "part", "loss_increase"}``, nats per token, in decode mode.
    """
    parts = {key: part for key in _parts(artifacts) if (part := only(artifacts, *key)) is not None}

    @contextmanager
    def apply(key: tuple[str, int]) -> Iterator[None]:
        with swap(model, parts[key]):
            yield

    most = max_positions(model)
    length = min(length, most) if most else length
    rises = layer_sensitivity(
        model, tokenizer, apply, list(parts), length=length, limit=windows, progress=progress
    )
    return [
        {"layer": layer, "part": part, "loss_increase": rise, "bits": _bits(parts[part, layer])}
        for (part, layer), rise in rises.items()
    ]


def _parts(artifacts: Artifacts) -> list[tuple[str, int]]:
    layers = range(1 + max((row.layer for row in artifacts.plan.kv_cache), default=-1))
    weighted = {number for row in artifacts.plan.weights if (number := layer_of(row.module)) >= 0}
    return [("weights", layer) for layer in sorted(weighted)] + [("kv_cache", n) for n in layers]


def layer_of(module: str) -> int:
    """Read the layer's number off a module's dotted name; -1 where it has none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), -1)


def only(artifacts: Artifacts, part: str, layer: int) -> Artifacts | None:
    """Cut artifacts down to one layer's weights or cache; ``None`` when nothing is left."""
    plan = artifacts.plan
    weights = tuple(r for r in plan.weights if part == "weights" and layer_of(r.module) == layer)
    # Every layer keeps its row, so that the attention function finds each layer's state.
    caches = tuple(
        row if row.layer == layer else replace(row, keys=None, values=None)
        for row in plan.kv_cache
        if part == "kv_cache"
    )
    if not weights and not any(row.keys for row in caches):
        return None
    mixers = tuple(r for r in plan.mixers if weights and layer_of(r.module) == layer)
    smaller = replace(
        plan, weights=weights, kv_cache=caches, prefill=(), mixers=mixers, activations=()
    )
    return Artifacts(
        smaller, {r.module: artifacts.weights[r.module] for r in weights}, artifacts.tables
    )


def _bits(artifacts: Artifacts) -> float:
    plan = artifacts.plan
    if plan.weights:
        count = sum(row.values for row in plan.weights)
        return 8 * sum(row.bytes_after for row in plan.weights) / count
    row = next(row for row in plan.kv_cache if row.keys)
    return (row.key_bits + row.value_bits) / 2
