"""Allocation of weights: which modules get which method under a bound on mean bits.

A pure step after calibration. Modules that runtimes fuse stay together.
"""

from __future__ import annotations

from dataclasses import replace

from squeeze.allocate import HELD_OUT, pick
from squeeze.calibrate import Stats
from squeeze.plan import Plan, repack, with_weights
from squeeze.plan_weights import mean_bits, with_methods

# What each candidate costs at the end of the model, predicted or measured, and the contenders'
# held-out measurements, in their order.
WEIGHT_LOSS = "weight_loss"
WEIGHT_CONTEST = "weight_contest"


def allocate_weights(plan: Plan, stats: Stats) -> Plan:
    """Choose the methods of a plan with a bound on weights; any other plan is returned as it is.

    The mix under the bound with the least sum of losses is taken if it was measured, as a whole
    and on held-out text, to diverge less from the dense model than the widest uniform choice under
    the bound; else that is. Losses add up only roughly, hence the check.

    Args:
        plan: From ``make_plan``.
        stats: ``weight_loss`` of every open module float32 ``[C]``, by candidate; those of tied
            modules add up. ``weight_contest`` (its ``held_out``) float32 ``[2, 2]``: divergence
            from the dense model and rise of the loss, nats per token, of both ``contenders``.

    Returns:
        The final plan, with what was chosen and why in ``weight_allocation`` and ``notes``.
    """
    allocation = plan.weight_allocation
    if allocation is None:
        return plan
    mix, uniform = weight_contenders(plan, stats)
    (mixed, mixed_rise), (plain, plain_rise) = stats.tensors[WEIGHT_CONTEST][HELD_OUT].tolist()
    bound = f"under a bound of {allocation.mean_bits:.3f} mean bits"
    sizes = [f"{mean_bits(p.weights, allocation):.3f} bits" for p in (mix, uniform)]
    losses = [
        f"{loss:.3g} (loss {rise:+.3g})"
        for loss, rise in ((mixed, mixed_rise), (plain, plain_rise))
    ]
    unit = "nats per token of divergence from the dense model on held-out text"
    if mix.weights == uniform.weights:
        chosen, reason = "uniform", "the losses ask for no difference between modules"
    elif mixed < plain:
        chosen = "mix"
        reason = (
            f"{sizes[0]}, {losses[0]} {unit}; the widest uniform choice: {sizes[1]}, {losses[1]}"
        )
    else:
        chosen = "uniform"
        reason = f"{sizes[1]}, {losses[1]} {unit}, which the best mix does not beat: {losses[0]}"
    what = {"mix": "methods differ between modules", "uniform": "all modules have one method"}
    done = replace(allocation, chosen=chosen, measured={"mix": mixed, "uniform": plain})
    note = f"weights: {what[chosen]}, {bound}: {reason}"
    taken = mix if chosen == "mix" else uniform
    return replace(taken, weight_allocation=done, notes=(*plan.notes, note))


def weight_contenders(plan: Plan, stats: Stats) -> tuple[Plan, Plan]:
    """Return the plan with the best mix by ``weight_loss``, then with the uniform choice."""
    return with_mix(plan, stats), plan


def with_mix(plan: Plan, stats: Stats) -> Plan:
    """Give each group the candidate with which the sum of losses under the bound is least."""
    allocation = plan.weight_allocation
    assert allocation is not None
    rows = {row.module: row for row in plan.weights}
    losses = stats.tensors[WEIGHT_LOSS]
    options = []
    for group in allocation.groups:
        costs = [
            8.0 * sum(repack(rows[name], method).bytes_after for name in group)
            for method in allocation.candidates
        ]
        total = sum(losses[name].double() for name in group)
        options.append(list(zip(costs, total.clamp(min=0).tolist(), strict=True)))  # type: ignore[union-attr]
    values = sum(rows[name].values for group in allocation.groups for name in group)
    picked = pick(options, allocation.mean_bits * values)
    methods = [allocation.candidates[index] for index in picked]
    return with_weights(plan, with_methods(plan.weights, allocation, methods, repack))
