"""Compression: a plan and what calibration measured, turned into artifacts, module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from squeeze import atomic, mixer, registry
from squeeze.attention import table_name
from squeeze.calibrate import Stats
from squeeze.expert_fit import fit_experts
from squeeze.folding import FOLDED, exponents, folded_tables, scaled
from squeeze.linear import reconstruct, unfolded
from squeeze.plan import Plan, WeightPlan, build_method
from squeeze.scaling import exponents_of, parameter_scales
from squeeze.swapping import Artifacts, chain
from squeeze.types import ExpertWeights, PackedWeight, StoredWeight, Tensors


def compress(
    model: nn.Module,
    plan: Plan,
    stats: Stats | None,
    *,
    tables: Tensors | None = None,
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    fitted: Mapping[str, StoredWeight] | None = None,
) -> Artifacts:
    """Fit what the plan names, one module at a time.

    Args:
        model: The dense model.
        plan: What to do.
        stats: Holds every statistic that ``plan.statistics`` names, but for those of modules in
            ``fitted``; may be ``None`` if none is left.
        tables: What ``fit_tables`` returned, if it was called.
        folder: Finished modules are saved here and found again by a resumed run.
        progress: Called as ``progress("compress", done, total)``.
        fitted: Modules that were fitted as the plan says already.

    Returns:
        Artifacts on the CPU.
    """
    if tables is None:
        tables = fit_tables(model, plan, stats)
    weights = fit_weights(
        model, plan, stats, tables, folder=folder, progress=progress, fitted=fitted
    )
    return Artifacts(plan, weights, tables)


@torch.no_grad()
def fit_tables(
    model: nn.Module, plan: Plan, stats: Stats | None, device: torch.device | str | None = None
) -> Tensors:
    """Fit the cache formats, transforms, mixers' scales and thresholds that a plan names.

    Args:
        model: The dense model.
        plan: What to do.
        stats: Holds the statistics that these ask for.
        device: Where to fit; by default where the model is.

    Returns:
        Dotted buffer name to table, on the CPU.
    """
    home = next(model.parameters()).device
    tables = _tables(plan, stats, home if device is None else torch.device(device))
    tables |= _mixer_tables(plan, stats)
    return tables | _thresholds(model, plan, stats)


@torch.no_grad()
def fit_weights(
    model: nn.Module,
    plan: Plan,
    stats: Stats | None,
    tables: Tensors,
    *,
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    fitted: Mapping[str, StoredWeight] | None = None,
    targets: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> dict[str, StoredWeight]:
    """Fit the weights that a plan names, those whose inputs have common scales together.

    Args:
        model: The dense model.
        plan: What to do.
        stats: Holds what the weights' methods ask for.
        tables: All that the model's weights will be folded with.
        folder: Finished modules are saved here and found again by a resumed run.
        progress: Called as ``progress("compress", done, total)``.
        fitted: Modules that are fitted already.
        targets: By module, what to fit in place of its weight, float32 ``[out, in]``.
        device: Where to fit; by default where the model is.

    Returns:
        Module name to packed weight, on the CPU.
    """
    rotated = {row.rotates for row in plan.mixers}
    paths = {r.module: folder and folder / f"{r.module}.safetensors" for r in plan.weights}
    weights = dict(fitted or {})
    left = [row for row in plan.weights if row.module not in weights]
    found = {row.module: _resume(paths[row.module], row) for row in left}
    weights |= {module: weight for module, weight in found.items() if weight is not None}
    dense = _Dense(model, targets or {}, device)
    folds = exponents(model, folded_tables(tables))
    scales = _input_exponents(dense, plan, stats, folds, exponents_of(weights))
    rows = parameter_scales(model, plan.weights, scales)
    folds |= {name: exponent for name, (exponent, dim) in rows.items() if dim == 0}
    for done, row in enumerate(plan.weights):
        if row.module not in weights:
            fold, columns = folds.get(f"{row.module}.weight"), scales.get(row.module)
            turned = row.module in rotated
            weights[row.module] = _fit(dense, row, stats, paths[row.module], fold, columns, turned)
        if progress:
            progress("compress", done + 1, len(plan.weights))
    return weights


@torch.no_grad()
def dense_weights(model: nn.Module, artifacts: Artifacts) -> Tensors:
    """Write out what packed weights stand for in the dense model, float32 ``[out, in]``.

    Key scales, input scales and rotations are taken out; experts are named by their numbers.
    """
    folds = row_exponents(model, artifacts)
    rotated = {row.rotates for row in artifacts.plan.mixers}
    result: Tensors = {}
    for row in artifacts.plan.weights:
        weight = artifacts.weights[row.module]
        if isinstance(weight, ExpertWeights):
            for expert in range(weight.experts):
                result[f"{row.module}.{expert}"] = reconstruct(unfolded(weight.expert(expert)))
            continue
        values, fold = reconstruct(unfolded(weight)), folds.get(f"{row.module}.weight")
        values = mixer.rotate(values) if row.module in rotated else values
        result[row.module] = values if fold is None else scaled(values, -fold)
    return result


@dataclass(frozen=True)
class _Dense:
    """The weights to fit: a model's, or others in their place."""

    model: nn.Module
    targets: Mapping[str, Tensor]
    device: torch.device | None

    def weight(self, module: str) -> Tensor:
        """Return a linear layer's weight, float32 ``[out, in]``."""
        held: Any = self.model.get_submodule(module)
        weight: Tensor = self.targets.get(module, held.weight)
        return weight.detach().to(self.device).float()


def weight_method(row: WeightPlan) -> Any:
    """Build the method of one row of the plan."""
    return build_method(row.method)


def row_exponents(model: nn.Module, artifacts: Artifacts) -> Tensors:
    """Say by which powers of two the rows of weights were multiplied before they were fitted."""
    folds = exponents(model, folded_tables(artifacts.tables))
    scales = exponents_of(artifacts.weights)
    rows = parameter_scales(model, artifacts.plan.weights, scales)
    return folds | {name: exponent for name, (exponent, dim) in rows.items() if dim == 0}


def _fit(
    dense: _Dense,
    row: WeightPlan,
    stats: Stats | None,
    path: Path | None,
    fold: Tensor | None,
    columns: Tensor | None,
    turned: bool,
) -> StoredWeight:
    method = weight_method(row)
    if row.experts:
        return _keep(row, fit_experts(dense.model, row, method, stats, dense.device), path)
    weight = dense.weight(row.module)
    measured = stats.tensors if stats else {}
    needed = {name: measured[name][row.module].to(weight.device) for name in method.statistics}
    if fold is not None:
        # The module will hold scaled rows, whose errors count by the square of the inverse.
        weight = scaled(weight, fold)
        if "fisher" in needed:
            needed["fisher"] = scaled(needed["fisher"], -2 * fold)
        if "output_hessian" in needed:
            needed["output_hessian"] = scaled(scaled(needed["output_hessian"], -fold).mT, -fold)
    if turned:
        weight = mixer.rotate(weight)
    if columns is not None:
        needed["exponents"] = columns.to(weight.device)
    fitted: PackedWeight = method.fit(weight, needed)
    return _keep(row, fitted, path)


def _keep(row: WeightPlan, fitted: StoredWeight, path: Path | None) -> StoredWeight:
    """Bring a fitted weight to the CPU, and write it where a resumed run will find it."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in fitted.tensors().items()}
    if path is not None:
        with atomic.replacing(path) as draft:
            save_file(tensors, draft)
    return assemble(row, tensors)


def _input_exponents(
    dense: _Dense, plan: Plan, stats: Stats | None, folds: Tensors, known: Tensors
) -> Tensors:
    """Search the input scales of modules whose methods have such, those of a producer together."""
    groups: dict[str, list[WeightPlan]] = {}
    for row in plan.weights:
        if getattr(weight_method(row), "scales_inputs", False) and not row.experts:
            groups.setdefault(row.producer or row.module, []).append(row)
    result: Tensors = {}
    for rows in groups.values():
        found = next((known[row.module] for row in rows if row.module in known), None)
        if found is None:
            assert stats is not None
            weights = []
            for row in rows:
                weight, fold = dense.weight(row.module), folds.get(f"{row.module}.weight")
                weights.append(weight if fold is None else scaled(weight, fold))
            hessian = stats.tensors["hessian"][rows[0].module].to(weights[0].device)
            found = weight_method(rows[0]).input_exponents(weights, hessian)
        result |= {row.module: found.cpu().clone() for row in rows}  # each stores its own
    return result


def _resume(path: Path | None, row: WeightPlan) -> StoredWeight | None:
    if path is None or not path.is_file():
        return None
    try:
        return assemble(row, load_file(path))
    except (SafetensorError, KeyError):
        return None  # written by a run that was killed before the rename was durable


def empty_weight(row: WeightPlan, device: torch.device) -> StoredWeight:
    """Allocate the packed weight that one row of the plan describes, with undefined contents."""
    empty: PackedWeight = weight_method(row).empty(*row.shape, device)
    if row.experts:
        stacks = {n: t.new_empty(row.experts, *t.shape) for n, t in empty.tensors().items()}
        return ExpertWeights(empty.with_tensors(stacks))
    return replace(empty, folded=True) if row.producer else empty  # type: ignore[arg-type]


def assemble(row: WeightPlan, tensors: Mapping[str, Tensor]) -> StoredWeight:
    """Put stored tensors back into the packed weight that one row of the plan describes.

    Raises:
        KeyError: one of its tensors is missing.
    """
    empty = empty_weight(row, torch.device("meta"))
    return empty.with_tensors({name: tensors[name] for name in empty.tensors()})


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


def _mixer_tables(plan: Plan, stats: Stats | None) -> Tensors:
    """Choose the activation scales of every mixer: dotted buffer name to float32 ``[1]``."""
    tables: Tensors = {}
    for row in plan.mixers:
        if row.method is None:
            continue
        assert stats is not None
        method = build_method(row.method)
        (name,) = method.mixer_statistics
        scales = method.fit_mixer(mixer.by_point(stats.tensors[name][row.module]))
        tables |= {f"{row.module}.squeeze.{point}": scale for point, scale in scales.items()}
    return tables


def _thresholds(model: nn.Module, plan: Plan, stats: Stats | None) -> Tensors:
    """Choose the input thresholds of every sparse linear layer, float32 ``[in]``, by buffer."""
    tables: Tensors = {}
    for row in plan.activations:
        parameters = {key: value for key, value in row.method.items() if key != "method"}
        method = registry.get("activations", row.method["method"])(**parameters)
        measured = stats.tensors if stats else {}
        needed = {name: measured[name][row.module] for name in method.statistics}
        weight: Any = model.get_submodule(row.module).weight
        threshold = method.fit(weight, needed)
        tables[f"{row.module}.squeeze.threshold"] = threshold.cpu().contiguous()
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
