"""Compression: a plan and what calibration measured, turned into artifacts, module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from squeeze import atomic, registry
from squeeze.attention import table_name
from squeeze.calibrate import Stats
from squeeze.folding import FOLDED, exponents, folded_tables, scaled
from squeeze.plan import Plan, WeightPlan
from squeeze.swapping import Artifacts, chain
from squeeze.types import ClusteredWeight, Tensors


@torch.no_grad()
def compress(
    model: nn.Module,
    plan: Plan,
    stats: Stats | None,
    *,
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Artifacts:
    """Fit what the plan names, one module at a time.

    Args:
        model: The dense model.
        plan: What to do.
        stats: Holds every statistic that ``plan.statistics`` names; may be ``None`` if none.
        folder: Finished modules are saved here and found again by a resumed run.
        progress: Called as ``progress("compress", done, total)``.

    Returns:
        Artifacts on the CPU.
    """
    tables = _tables(plan, stats, next(model.parameters()).device)
    folds, weights = exponents(model, folded_tables(tables)), {}
    for done, row in enumerate(plan.weights):
        path = folder / f"{row.module}.safetensors" if folder else None
        fold = folds.get(f"{row.module}.weight")
        weights[row.module] = _resume(path, row) or _fit(model, row, stats, path, fold)
        if progress:
            progress("compress", done + 1, len(plan.weights))
    return Artifacts(plan, weights, tables)


def weight_method(row: WeightPlan) -> Any:
    """Build the method of one row of the plan."""
    return registry.get("weights", row.method["method"])(
        **{key: value for key, value in row.method.items() if key != "method"}
    )


def _fit(
    model: nn.Module,
    row: WeightPlan,
    stats: Stats | None,
    path: Path | None,
    fold: Tensor | None,
) -> ClusteredWeight:
    method = weight_method(row)
    module: Any = model.get_submodule(row.module)
    weight = module.weight.detach().float()
    importance = None
    for name in method.statistics:
        assert stats is not None
        importance = stats.tensors[name][row.module].to(weight.device)
    if fold is not None:
        # The module will hold scaled rows, whose errors count by the square of the inverse.
        weight = scaled(weight, fold)
        importance = None if importance is None else scaled(importance, -2 * fold)
    fitted: ClusteredWeight = method.fit(weight, importance)
    tensors = {"indices": fitted.indices.cpu(), "codebook": fitted.codebook.cpu()}
    if fitted.scale is not None:
        tensors["scale"] = fitted.scale.cpu()
    if path is not None:
        with atomic.replacing(path) as draft:
            save_file(tensors, draft)
    return assemble(method, row, tensors)


def _resume(path: Path | None, row: WeightPlan) -> ClusteredWeight | None:
    if path is None or not path.is_file():
        return None
    try:
        return assemble(weight_method(row), row, load_file(path))
    except (SafetensorError, KeyError):
        return None  # written by a run that was killed before the rename was durable


def assemble(method: Any, row: WeightPlan, tensors: Mapping[str, Tensor]) -> ClusteredWeight:
    """Put stored tensors back into the clustered weight that one row of the plan describes."""
    empty: ClusteredWeight = method.empty(*row.shape, torch.device("meta"))
    return replace(
        empty,
        indices=tensors["indices"],
        codebook=tensors["codebook"],
        scale=tensors.get("scale"),
    )


def _tables(plan: Plan, stats: Stats | None, device: torch.device) -> Tensors:
    tables: Tensors = {}
    for row in plan.kv_cache:
        for side, settings in (("keys", row.keys), ("values", row.values)):
            measured = _of_side(side, row.module, stats, device)
            for stage, method in chain(settings) if settings else ():
                needed = {name: measured[name] for name in method.statistics}
                fitted = method.fit(needed)
                if hasattr(method, "apply"):
                    measured = _transformed(measured, method, fitted)
                for name, table in fitted.items():
                    full = f"{row.module}.squeeze.{table_name(side, stage, name)}"
                    tables[full] = table.detach().cpu().contiguous()
    return tables


def _transformed(measured: Tensors, method: Any, fitted: Tensors) -> Tensors:
    """Bring what was measured of keys or values into the basis of a fitted transform."""
    result = dict(measured)
    for name in ("kv_samples", "key_mean"):
        if name in measured:
            # A mean [H_kv, D] is taken for one token.
            single = measured[name].ndim == 2
            x = measured[name].float().unsqueeze(-2) if single else measured[name].float()
            if FOLDED in fitted:
                x = x / torch.exp2(fitted[FOLDED].float()).unsqueeze(-2)
            x = method.apply(x, fitted)
            result[name] = x.squeeze(-2) if single else x
    return result


def _of_side(side: str, module: str, stats: Stats | None, device: torch.device) -> Tensors:
    """Select what was measured of one attention module's keys or values."""
    index = 0 if side == "keys" else 1
    found = {
        n: t[module].to(device) for n, t in (stats.tensors if stats else {}).items() if module in t
    }
    return {n: x[index] if n.startswith("kv_") else x for n, x in found.items()}
