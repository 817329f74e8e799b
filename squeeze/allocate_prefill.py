"""Budgets of heads: how much of the attention map each query head reads under a mean density.

A pure step after calibration, as ``allocate`` is for the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from squeeze import registry
from squeeze.calibrate import Stats
from squeeze.plan import Plan
from squeeze.plan_prefill import PREFILL_CURVES

# Density and loss of one head at one budget of the policy's ladder.
Point = tuple[float, float]


def allocate_prefill(plan: Plan, stats: Stats, mean_density: float) -> Plan:
    """Give every head the budget with which all lose least together.

    Args:
        plan: With a prefill policy that has a ``ladder`` of budgets.
        stats: ``prefill_curves`` of every attention module with the policy, float32 ``[H, C, 2]``:
            query head; budget of the ladder; density and loss.
        mean_density: Bound on the mean of the densities over heads and layers.

    Returns:
        The plan, each layer's policy with its ``heads``, and a note that says what was chosen.
    """
    rows = [row for row in plan.prefill if row.policy is not None]
    curves = {row.module: stats.tensors[PREFILL_CURVES][row.module].tolist() for row in rows}
    ladder = registry.get("prefill", rows[0].policy["method"]).ladder  # type: ignore
    picks = iter(spread([head for row in rows for head in curves[row.module]], mean_density))
    chosen = {row.module: [next(picks) for _ in curves[row.module]] for row in rows}
    prefill = tuple(
        replace(row, policy={**row.policy, "heads": [ladder[c] for c in chosen[row.module]]})
        if row.policy is not None
        else row
        for row in plan.prefill
    )
    densities = [
        curve[pick][0]
        for module, heads in chosen.items()
        for curve, pick in zip(curves[module], heads, strict=True)
    ]
    values = [ladder[pick] for heads in chosen.values() for pick in heads]
    mean = sum(densities) / len(densities)
    bound = f"at most {mean_density} allowed"
    if mean > mean_density:
        bound = f"over the bound of {mean_density}: no budget reads less"
    note = (
        f"prefill: budgets of {len(values)} heads between {min(values)} and {max(values)}, mean "
        f"density {mean:.3f} on {stats.tokens} tokens of calibration text in {stats.samples} "
        f"samples, {bound}"
    )
    return replace(plan, prefill=prefill, notes=(*plan.notes, note))


def spread(curves: Sequence[Sequence[Point]], mean_density: float) -> list[int]:
    """Choose one point of each head so that the losses sum to little under a mean density.

    Each head starts at its cheapest point and moves along the lower convex hull of its points, the
    step that saves most loss per density first; for budgets that hulls reach this is the optimum.

    Returns:
        Indices into each head's points. Where even the cheapest are over the bound, these.
    """
    hulls = [_hull(points) for points in curves]
    steps = []
    for head, hull in enumerate(hulls):
        for number, (low, high) in enumerate(pairwise(hull)):
            (cost, loss), (more, less) = curves[head][low], curves[head][high]
            steps.append((-(loss - less) / (more - cost), head, number, more - cost))
    left = mean_density * len(curves) - sum(
        curve[hull[0]][0] for curve, hull in zip(curves, hulls, strict=True)
    )
    at = [0] * len(curves)
    for _, head, number, cost in sorted(steps):
        if number == at[head] and cost <= left:
            left -= cost
            at[head] += 1
    return [hull[place] for hull, place in zip(hulls, at, strict=True)]


def _hull(points: Sequence[Point]) -> list[int]:
    """Return the points of the lower convex hull that a lower loss leads to, by density."""
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        cost, loss = points[index]
        if kept and (loss >= points[kept[-1]][1] or cost <= points[kept[-1]][0]):
            continue
        while len(kept) > 1:
            (first, worst), (second, middle) = points[kept[-2]], points[kept[-1]]
            if (worst - middle) * (cost - second) > (middle - loss) * (second - first):
                break
            kept.pop()
        kept.append(index)
    return kept
