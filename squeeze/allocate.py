"""Allocation: which layer's keys and values get which format under a bound on mean bits.

A pure step after calibration. What it reads was measured at the end of the model, in decode mode:
reconstruction error picks the wrong layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from squeeze import recipe as recipe_module
from squeeze.calibrate import Stats
from squeeze.plan import KV_LOSS, Plan, with_cache
from squeeze.plan_cache import (
    AMORTISED_TOKENS,
    Allocation,
    KVPlan,
    packed_row,
    side_bits,
    uniform_rows,
)
from squeeze.recipe import Recipe

# Held-out measurements of the contenders, in their order.
CONTEST = "kv_contest"
HELD_OUT = "held_out"
# Choices whose summed losses differ by less, relatively, count as equal while they are compared.
SAME_LOSS = 1 / 256
Option = tuple[float, float]


def allocate(plan: Plan, stats: Stats) -> Plan:
    """Choose the formats of a plan with a bound on mean bits; any other plan is returned as it is.

    The mix under the bound with the least sum of measured losses is taken if it was measured, as a
    whole and on held-out text, to diverge less from the dense model than every uniform choice
    under the bound; else the best uniform choice is. Losses add up only roughly, hence the check.

    One layer's blocks hold all its KV heads in one tensor, so heads of a layer share a format.

    Args:
        plan: From ``make_plan``.
        stats: ``kv_loss`` of every attention module float32 ``[2, C, 2]``: keys and values;
            candidate; divergence and rise of the loss, nats per token. ``kv_contest`` (its
            ``held_out``) float32 ``[N, 2]``: likewise of all ``contenders``; without it the mix is
            taken unchecked.

    Returns:
        The final plan, with what was chosen and why in ``allocation`` and ``notes``.
    """
    if plan.allocation is None:
        return plan
    plans = contenders(plan, stats)
    contest = stats.tensors.get(CONTEST, {}).get(HELD_OUT)
    if contest is None:
        return _decided(plans[0], plan.allocation, "mix", {}, "it was not measured as a whole")
    losses, rises = contest.double().T.tolist()
    uniform = min(range(1, len(plans)), key=lambda i: losses[i])
    measured = {"mix": losses[0], "uniform": losses[uniform]}
    mix, best = (f"{losses[i]:.2g} (loss {rises[i]:+.2g})" for i in (0, uniform))
    unit = "nats per token of divergence from the dense model on held-out text"
    if plans[0].kv_cache == plans[uniform].kv_cache:
        reason = "the measured losses ask for no difference between layers"
        return _decided(plans[uniform], plan.allocation, "uniform", measured, reason)
    if losses[0] < losses[uniform]:
        reason = f"{mix} {unit}, the best uniform choice {best}"
        return _decided(plans[0], plan.allocation, "mix", measured, reason)
    reason = f"{best} {unit}, which the best mix does not beat with {mix}"
    return _decided(plans[uniform], plan.allocation, "uniform", measured, reason)


def contenders(plan: Plan, stats: Stats) -> tuple[Plan, ...]:
    """Return the plan with the best mix by ``kv_loss``, then with each widest uniform choice."""
    assert plan.allocation is not None
    recipe = recipe_module.load(plan.recipe)
    choices = [best_mix(recipe, plan, stats), *uniform_rows(recipe, plan.kv_cache, plan.allocation)]
    return tuple(with_cache(plan, rows) for rows in choices)


def best_mix(recipe: Recipe, plan: Plan, stats: Stats) -> tuple[KVPlan, ...]:
    """Give each open layer the candidates with the least sum of losses under the bound."""
    assert plan.allocation is not None and recipe.kv_cache is not None
    candidates = recipe.kv_cache.candidates
    assert candidates is not None
    sides = (candidates.keys, candidates.values)
    chosen = [row for row in plan.kv_cache if row.layer in plan.allocation.layers]
    groups = [
        [(cost_bits(side, row), loss) for side, loss in zip(options, losses, strict=False)]
        for row in chosen
        for options, losses in zip(sides, _losses(stats, row), strict=True)
    ]
    picks = iter(pick(groups, _budget(plan)))
    rows = {}
    for row in chosen:
        keys, values = sides[0][next(picks)], sides[1][next(picks)]
        rows[row.layer] = packed_row(recipe, row, keys, values, plan.allocation.implementation)
    return tuple(rows.get(row.layer, row) for row in plan.kv_cache)


def cost_bits(side: Any, row: KVPlan) -> float:
    """Count the bits that one token takes on one side of a layer, its share of tables included."""
    bits, table_bytes = side_bits(side, row)
    return bits * row.kv_heads * row.head_dim + 8 * table_bytes / AMORTISED_TOKENS


def pick(groups: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """Take one option of each group, costs within the budget, the sum of losses least.

    Dynamic programming over the choices that no other one beats in both cost and loss; choices
    whose losses differ relatively by less than 1/256 count as equal, so few are kept.

    Args:
        groups: Options ``(cost, loss)``.
        budget: Bound of the summed costs; the cheapest options fit.
    """
    least = [min(cost for cost, _ in group) for group in groups]
    reserve = sum(least)
    slack = 1e-9 * max(1.0, abs(budget))
    states: list[tuple[float, float, Any]] = [(0.0, 0.0, None)]
    for group, own in zip(groups, least, strict=True):
        reserve -= own
        grown = [
            (cost + more, loss + worse, (index, path))
            for cost, loss, path in states
            for index, (more, worse) in enumerate(group)
            if cost + more + reserve <= budget + slack
        ]
        states = _front(grown)
    path, picked = states[-1][2], []
    while path is not None:
        index, path = path
        picked.append(index)
    return picked[::-1]


def _front(states: list[tuple[float, float, Any]]) -> list[tuple[float, float, Any]]:
    """Keep, by rising cost, the states with a lower loss than every cheaper one."""
    kept: list[tuple[float, float, Any]] = []
    for state in sorted(states, key=lambda item: item[:2]):
        if not kept or state[1] < kept[-1][1] * (1 - SAME_LOSS):
            kept.append(state)
    return kept


def _budget(plan: Plan) -> float:
    """Bits that the open layers may take for one token, both sides together."""
    assert plan.allocation is not None
    full = [row for row in plan.kv_cache if row.keys or "16 bits" in row.reason]
    sizes = {row.layer: row.kv_heads * row.head_dim for row in full}
    total = plan.allocation.mean_bits * 2 * sum(sizes.values())
    taken = sum(
        (row.key_bits + row.value_bits) * sizes[row.layer]
        + 8 * row.constant_bytes / AMORTISED_TOKENS
        for row in full
        if row.layer not in plan.allocation.layers
    )
    return total - taken


def _losses(stats: Stats, row: KVPlan) -> list[list[float]]:
    """Divergences of one layer's candidates, ``[2][C]``; rounding may leave some under zero."""
    found: list[list[float]] = stats.tensors[KV_LOSS][row.module][..., 0].clamp(min=0).tolist()
    return found


def _decided(
    plan: Plan, allocation: Allocation, chosen: str, measured: dict[str, float], reason: str
) -> Plan:
    what = {
        "mix": "formats differ between layers",
        "uniform": "all layers that were to be chosen have one format",
    }
    bound = f"under a bound of {allocation.mean_bits:.3f} mean bits"
    note = f"KV cache: {what[chosen]}, {bound}: {reason}"
    done = replace(allocation, chosen=chosen, measured=measured)
    return replace(plan, allocation=done, notes=(*plan.notes, note))
