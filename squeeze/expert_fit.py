"""Fit the matrices of a mixture of experts, each with what its own tokens told of it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.calibrate import Stats
from squeeze.experts import expert_matrices
from squeeze.plan import Plan, WeightPlan
from squeeze.plan_table import ranges
from squeeze.types import ExpertWeights, PackedWeight


def fit_experts(
    model: nn.Module,
    row: WeightPlan,
    method: Any,
    stats: Stats | None,
    device: torch.device | None = None,
) -> ExpertWeights:
    """Fit every expert's matrix of one fused parameter.

    Args:
        model: Dense.
        row: Names the parameter.
        method: A weight method.
        stats: Names experts ``<parameter>.<number>``. Those that no calibration token was routed
            to are missing, and their errors count alike.
        device: Where to fit; by default where the model is.

    Returns:
        The packed weights, on the CPU.
    """
    fitted = []
    for expert, matrix in enumerate(expert_matrices(model, row.module)):
        weight = matrix.detach().to(device).float().contiguous()
        needed = {
            name: _measured(stats, name, f"{row.module}.{expert}", weight)
            for name in method.statistics
        }
        if getattr(method, "scales_inputs", False):
            needed["exponents"] = method.input_exponents([weight], needed["hessian"])
        fitted.append(method.fit(weight, needed))
    return stacked(fitted)


def stacked(weights: list[PackedWeight]) -> ExpertWeights:
    """Join packed matrices of one shape and method, moved to the CPU."""
    names = weights[0].tensors()
    tensors = {name: torch.stack([w.tensors()[name].cpu() for w in weights]) for name in names}
    return ExpertWeights(weights[0].with_tensors(tensors))


def note_unrouted(plan: Plan, stats: Stats | None) -> Plan:
    """Say in the plan which experts no calibration token was routed to."""
    silent: dict[int, set[str]] = {}
    for row in plan.weights if stats else ():
        measured = [stats.tensors[n] for n in _statistics(row, stats)]  # type: ignore[union-attr]
        for expert in range(row.experts if measured else 0):
            if not any(f"{row.module}.{expert}" in found for found in measured):
                layer = next((int(x) for x in re.findall(r"\.(\d+)\.", row.module)), 0)
                silent.setdefault(layer, set()).add(f"{layer}.{expert}")
    if not silent:
        return plan
    count = sum(map(len, silent.values()))
    note = (
        f"{count} experts of layers {ranges(list(silent))} got no calibration token: their "
        "weights are fitted without importance"
    )
    return replace(plan, notes=(*plan.notes, note))


def _statistics(row: WeightPlan, stats: Stats | None) -> list[str]:
    """Name what calibration measured of this row's experts."""
    prefix = f"{row.module}."
    held = stats.tensors if stats else {}
    return [n for n, found in held.items() if any(key.startswith(prefix) for key in found)]


def _measured(stats: Stats | None, statistic: str, name: str, weight: Tensor) -> Tensor:
    """Look a statistic up; where nothing was measured, all errors count alike."""
    found = stats.tensors.get(statistic, {}).get(name) if stats else None
    if found is not None:
        return found.to(weight.device)
    out_features, in_features = weight.shape
    neutral = {
        "fisher": lambda: torch.ones(out_features, in_features),
        "hessian": lambda: torch.eye(in_features),
        "guided_hessian": lambda: torch.eye(in_features)[None],
        "output_hessian": lambda: torch.eye(out_features),
    }
    return neutral[statistic]().to(weight.device)
