"""Choose by calibration the layers whose prefill attention is multiplied in eight bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeeze.calibrate import Stats
from squeeze.evaluation.head_budgets import (
    COMPARED,
    SAMPLES,
    Watcher,
    quoting_samples,
    settle,
    watching,
)
from squeeze.evaluation.scoring import Progress, forward, max_positions, scoring
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.plan import Plan
from squeeze.plan_prefill import PREFILL_COSINES, PrefillPlan
from squeeze.types import BlockIndex

FILE = "prefill_cosines.safetensors"


def choose_layers(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    texts: Sequence[str],
    min_cosine: float,
    length: int,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Measure what eight bits keep of every head on calibration text; keep the layers that bear it.

    Args:
        model: Dense; unchanged on return.
        tokenizer: Its tokenizer.
        plan: With eight bits in every layer that may have them.
        texts: Of calibration.
        min_cosine: What every head of a layer must keep.
        length: Tokens of a sample; what the model's positions hold, if they hold less.
        seed: Draws places in the text.
        folder: The finished cosines are saved here and found again by a resumed run.
        progress: Called as ``progress("eight bits", samples done, samples)``.

    Raises:
        RecipeError: there is not enough text.
    """

    def measure() -> Stats:
        tokens = min(length, max_positions(model) or length)
        rows = quoting_samples(tokenizer, texts, tokens, SAMPLES, seed)
        return measure_cosines(model, plan.prefill, rows, progress=progress)

    path = folder / FILE if folder else None
    return settle(path, measure, lambda stats: keep_layers(plan, stats, min_cosine))


def keep_layers(plan: Plan, stats: Stats, min_cosine: float) -> Plan:
    """Take eight bits from the layers with a head below a cosine.

    Args:
        plan: With eight bits in every layer that may have them.
        stats: ``prefill_cosines`` of these layers' modules, float32 ``[H]``.
        min_cosine: What every head of a layer must keep.

    Returns:
        The plan, each such layer with its least ``cosine``, and a note that counts them.
    """
    least = stats.tensors[PREFILL_COSINES]
    rows = [
        row if row.quantize is None else _kept(row, float(least[row.module].min()), min_cosine)
        for row in plan.prefill
    ]
    asked = ", ".join(sorted({row.quantize for row in plan.prefill if row.quantize}))
    kept = sum(row.quantize is not None for row in rows)
    where = f"on {stats.tokens} tokens of calibration text in {stats.samples} samples"
    if kept:
        note = (
            f"prefill: {kept} of {len(least)} layers multiply in {asked}: every head of theirs "
            f"keeps a cosine of {min_cosine:g} {where}"
        )
    else:
        note = (
            f"prefill: no layer multiplies in {asked}: each has a head under a cosine of "
            f"{min_cosine:g} (attention.min_cosine) {where}"
        )
    return replace(plan, prefill=tuple(rows), notes=(*plan.notes, note))


def _kept(row: PrefillPlan, cosine: float, min_cosine: float) -> PrefillPlan:
    """Note a layer's cosine, and take its eight bits where that is below the bound."""
    if cosine >= min_cosine:
        return replace(row, cosine=cosine)
    how = "dense" if row.policy is None else row.implementation
    return replace(row, cosine=cosine, quantize=None, quantize_min_length=0, implementation=how)


def measure_cosines(
    model: Any,
    prefill: Sequence[PrefillPlan],
    rows: Sequence[Sequence[int]],
    *,
    progress: Progress | None = None,
) -> Stats:
    """Run samples densely and attend in eight bits beside it, to everything and by the policy.

    Returns:
        ``prefill_cosines``: of each module with eight bits float32 ``[H]``, the cosine of a head's
        output with the same attention in the model's own precision, over the last quarter of a
        sample's queries; the least of samples and of what is attended to.
    Cost: per layer and sample two dense attentions, and two more with their index under a policy,
        on a quarter of the queries.
    """
    watched: dict[str, Watcher] = {
        row.module: _Cosines(model, row) for row in prefill if row.quantize is not None
    }
    with scoring(model), watching(model, watched), torch.no_grad():
        for done, row in enumerate(rows, 1):
            forward(model, torch.tensor([row], device=model.device), keep=1, use_cache=False)
            if progress is not None:
                progress("eight bits", done, len(rows))
    cosines = {name: watcher.total for name, watcher in watched.items()}
    return Stats({PREFILL_COSINES: cosines}, len(rows), sum(map(len, rows)))


class _Cosines(Watcher):
    """One attention layer: the least cosines of its heads so far, ``[H]``."""

    def __init__(self, model: Any, row: PrefillPlan) -> None:
        super().__init__(model, row.module, row.policy, row.implementation)
        self.quantize = row.quantize
        self.total = torch.ones(())

    def measure(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Add one sample, ``[1, H, T, D]``."""
        last = query[:, :, -(query.shape[2] // COMPARED) :]
        lists: list[BlockIndex | None] = [None]
        if self.policy is not None:
            lists.append(self.index(query, keys, scaling, softcap))
        call: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
        call["implementation"] = self.implementation
        for index in lists:
            exact, rough = (
                block_sparse_attention(last, keys, values, index, quantize=to, **call)[0]
                for to in (None, self.quantize)
            )
            self.total = torch.minimum(self.total, cosine_by_head(exact, rough).cpu())


def cosine_by_head(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each head's outputs ``[1, H, T, D]`` as one vector, float32 ``[H]``.

    Two that are nothing but zeros are the same.
    """
    a, b = x[0].double().flatten(1), y[0].double().flatten(1)
    scale = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / scale.clamp(min=torch.finfo(torch.float64).tiny)
    return cosine.where((scale > 0) | a.any(1) | b.any(1), 1.0).float()
