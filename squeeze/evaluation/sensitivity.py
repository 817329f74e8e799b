"""How much each layer, squeezed alone, costs at the end of the model, and what follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from squeeze import recipe as recipe_module
from squeeze.allocate import CONTEST, HELD_OUT, allocate, contenders
from squeeze.attention import LayerState
from squeeze.cache import LayerSpec, Side
from squeeze.calibrate import Stats
from squeeze.compress import compress
from squeeze.errors import CheckpointError
from squeeze.evaluation.perplexity import books_perplexity
from squeeze.evaluation.probe import Probe, Windows, make_windows
from squeeze.evaluation.scoring import Progress, max_positions
from squeeze.plan import KV_LOSS, Plan, with_cache
from squeeze.plan_cache import packed_row
from squeeze.quant.kv._raw import RawBlocks
from squeeze.swapping import Artifacts, settings, swap

PARTIAL = "kv_loss.partial.safetensors"
RUN = "kv_loss_run"
SIDES = ("keys", "values")

Layer = TypeVar("Layer")


def layer_sensitivity(
    model: Any,
    tokenizer: Any,
    apply: Callable[[Layer], AbstractContextManager[Any]],
    layers: Iterable[Layer],
    *,
    mode: str = "decode",
    length: int = 512,
    limit: int = 4,
    text: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[Layer, float]:
    """Measure the rise of the loss when one layer at a time is squeezed.

    The loss at the end of the model is what counts: a layer may be reconstructed badly and not be
    missed, or reconstructed well and be missed.

    Args:
        model: Any Hugging Face causal language model, dense.
        tokenizer: Its tokenizer.
        apply: Returns a context manager inside which exactly that layer is squeezed.
        layers: What to pass to ``apply``, one after another; numbers or names.
        mode: As in ``books_perplexity``.
        length: Tokens of a window.
        limit: Number of windows.
        text: Texts to cut windows from; the shipped validation books if not given.
        progress: Called with ``"sensitivity"``, layers done, and their number.

    Returns:
        For each layer the rise of the mean negative log-likelihood, nats per token; negative where
        squeezing happened to help.
    """
    chosen = list(layers)

    def loss() -> float:
        result = books_perplexity(
            model, tokenizer, mode=mode, length=length, limit=limit, text=text
        )
        nll: float = result["nll"]
        return nll

    dense = loss()
    rises = {}
    for done, layer in enumerate(chosen, 1):
        with apply(layer):
            rises[layer] = loss() - dense
        if progress is not None:
            progress("sensitivity", done, len(chosen))
    return rises


def measure_losses(
    model: Any,
    windows: Windows,
    plan: Plan,
    stats: Stats | None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Measure every candidate format on every layer and side that a plan leaves to choose.

    Args:
        model: Dense; it is swapped meanwhile and restored.
        windows: What to measure on.
        plan: Has an ``allocation``; its weights and its prefill policy are left out.
        stats: Holds what the candidates are fitted with.
        folder: Progress is saved here after every layer, and a killed run resumes there.
        progress: Called as ``progress("sensitivity", layers done, layers)``.

    Returns:
        ``stats`` with ``kv_loss`` of each such module, float32 ``[2, C, 2]``: keys and values;
        candidate; divergence and rise of the loss (see ``Probe.measure``). NaN stands where one
        side has fewer candidates than the other.

    Raises:
        CheckpointError: ``folder`` holds the progress of another run.
    Cost: one short forward for each layer, side and candidate, and the prompts' dense caches.
    """
    assert plan.allocation is not None
    rows = [row for row in plan.kv_cache if row.layer in plan.allocation.layers]
    path = folder / PARTIAL if folder else None
    run = _fingerprint(windows, plan)
    found = _resume(path, run)
    variants, counts = _variants(plan)
    probe = Probe(model, windows)
    specs = [layer_specs(model, variant, stats) for variant in variants]
    with _packing(model, variants, stats):
        for done, row in enumerate(rows, 1):
            if row.module not in found:
                alone = [one.get(row.layer) for one in specs]
                found[row.module] = _layer_losses(probe, row.layer, alone, counts)
                if path is not None:
                    Stats({KV_LOSS: found, RUN: {RUN: run}}, 0, 0).save(path)
            if progress is not None:
                progress("sensitivity", done, len(rows))
    return _with(stats, windows, KV_LOSS, found)


def measure_contenders(
    model: Any, windows: Windows, plans: Sequence[Plan], stats: Stats | None
) -> Tensor:
    """Measure the caches of plans as a whole.

    Returns:
        float32 ``[N, 2]``: divergence and rise of the loss of each plan (see ``Probe.measure``).
    """
    probe = Probe(model, windows)
    specs = [layer_specs(model, plan, stats) for plan in plans]
    with _packing(model, plans, stats):
        return torch.tensor([probe.measure(one) for one in specs])


def measure_and_allocate(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    stats: Stats | None,
    texts: Sequence[str],
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, Stats]:
    """Measure losses on one half of the texts, choose, and check the choice on the other half.

    Args:
        model: Dense; restored afterwards.
        tokenizer: Its tokenizer.
        plan: Has an ``allocation``.
        stats: Holds what the candidates are fitted with.
        texts: Of calibration.
        seed: Draws the facts hidden in them.
        folder: As in ``measure_losses``; the finished statistics are saved there too.
        progress: Called as ``progress(stage, done, total)``.

    Returns:
        The final plan, and ``stats`` with ``kv_loss`` and ``kv_contest``.
    """
    joined, most = "\n".join(texts), max_positions(model)
    half = len(joined) // 2
    windows, held_out = (
        make_windows(tokenizer, text, most=most, seed=seed + index)
        for index, text in enumerate((joined[:half], joined[half:]))
    )
    stats = measure_losses(model, windows, plan, stats, folder=folder, progress=progress)
    contest = measure_contenders(model, held_out, contenders(plan, stats), stats)
    stats = _with(stats, held_out, CONTEST, {HELD_OUT: contest})
    if folder is not None:
        stats.save(folder / "kv_loss.safetensors")
    return allocate(plan, stats), stats


def layer_specs(model: nn.Module, plan: Plan, stats: Stats | None) -> dict[int, LayerSpec]:
    """Fit the formats of a plan's cache and return how each packed layer stores."""
    tables = compress(model, _cache_only(plan), stats).tables
    device = next(model.parameters()).device
    specs = {}
    for row in plan.kv_cache:
        if row.keys:
            prefix = f"{row.module}.squeeze."
            own = {
                name.removeprefix(prefix): table.to(device)
                for name, table in tables.items()
                if name.startswith(prefix)
            }
            state = LayerState("", settings(row, plan), None, row.implementation, own)
            specs[row.layer] = state.spec()
    return specs


def _layer_losses(
    probe: Probe, layer: int, specs: Sequence[LayerSpec | None], counts: tuple[int, int]
) -> Tensor:
    """Losses ``[2, C, 2]`` of one layer with one side packed and all else dense."""
    losses = torch.full((2, len(specs), 2), torch.nan)
    exact = Side(RawBlocks(), {})
    for index, spec in enumerate(specs):
        for side in range(2):
            if index < counts[side]:
                # Where a candidate keeps the layer as it is, there is nothing to measure.
                alone = spec and (replace(spec, values=exact), replace(spec, keys=exact))[side]
                found = probe.measure({layer: alone}) if alone else (0.0, 0.0)
                losses[side, index] = torch.tensor(found)
    return losses


def _variants(plan: Plan) -> tuple[list[Plan], tuple[int, int]]:
    """Plans with every open layer at the first, second, ... candidates; candidates per side."""
    recipe, allocation = recipe_module.load(plan.recipe), plan.allocation
    assert allocation is not None and recipe.kv_cache is not None
    candidates = recipe.kv_cache.candidates
    assert candidates is not None
    keys, values = candidates.keys, candidates.values
    plans = []
    for index in range(max(len(keys), len(values))):
        key, value = (side[min(index, len(side) - 1)] for side in (keys, values))
        rows = [
            packed_row(recipe, row, key, value, allocation.implementation)
            if row.layer in allocation.layers
            else row
            for row in plan.kv_cache
        ]
        plans.append(with_cache(plan, rows))
    return plans, (len(keys), len(values))


@contextmanager
def _packing(model: Any, plans: Sequence[Plan], stats: Stats | None) -> Iterator[None]:
    """Let the model attend over packed caches of any of the plans."""
    plan = next((p for p in plans if any(row.keys for row in p.kv_cache)), None)
    if plan is None:
        yield
        return
    alone = _cache_only(plan)
    tables = compress(model, alone, stats).tables
    with swap(model, Artifacts(alone, {}, tables)):
        yield


def _cache_only(plan: Plan) -> Plan:
    return replace(plan, weights=(), prefill=())


def _with(stats: Stats | None, windows: Windows, name: str, tensors: dict[str, Tensor]) -> Stats:
    """Add one statistic; where there was none before, the windows are what was read."""
    tokens = windows.prompts.numel() + windows.tails.numel()
    before = stats or Stats({}, len(windows.prompts), tokens)
    return replace(before, tensors={**before.tensors, name: tensors})


def _fingerprint(windows: Windows, plan: Plan) -> Tensor:
    """Tell runs apart that must not continue one another, int64 ``[4]``."""
    asked = json.dumps([plan.recipe, plan.model, plan.dtype, plan.device], sort_keys=True)
    digest = hashlib.sha256(asked.encode())
    for tokens in (windows.prompts, windows.tails):
        digest.update(tokens.numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)


def _resume(path: Path | None, run: Tensor) -> dict[str, Tensor]:
    """Read what a killed run measured."""
    if path is None or not path.exists():
        return {}
    tensors = Stats.load(path).tensors
    if not torch.equal(tensors.get(RUN, {}).get(RUN, torch.empty(0)), run):
        raise CheckpointError(
            str(path),
            "progress of another model, recipe or text",
            remedy="Remove the file or choose another folder",
        )
    return tensors[KV_LOSS]
