"""Input scales inside a model's own parameters: free at run time, exact, and undone bit for bit.

A weight method may multiply the columns of a weight by powers of two before it rounds them. Then
its inputs have to be divided: by the norm or the linear layer that makes them, which all modules
that read the same inputs share. What reads them and stays dense is multiplied in turn, so that the
model computes what it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.errors import UnsupportedError
from squeeze.plan import WeightPlan
from squeeze.plan_scaling import readers
from squeeze.tensor_parallel import local
from squeeze.types import IntegerWeight, StoredWeight, Tensors

Scales = dict[str, tuple[Tensor, int]]


def exponents_of(weights: Mapping[str, StoredWeight]) -> Tensors:
    """Select the exponents of those packed weights that have any."""
    return {
        name: weight.exponents
        for name, weight in weights.items()
        if isinstance(weight, IntegerWeight) and weight.exponents is not None
    }


def parameter_scales(
    model: nn.Module, rows: Iterable[WeightPlan], exponents: Mapping[str, Tensor]
) -> Scales:
    """Say by which powers of two the parameters of a model are to be multiplied.

    Args:
        model: Dense.
        rows: Plans of the packed modules, whole layers.
        exponents: Module name to int8 ``[in]``.

    Returns:
        Dotted parameter name to int8 exponents and the dimension that they run along.
    """
    scales: Scales = {}
    rows = list(rows)
    packed = {row.module for row in rows}
    modules: dict[str, Any] = dict(model.named_modules())
    for row in rows:
        if not row.producer or row.module not in exponents:
            continue
        found = exponents[row.module]
        for kind in ("weight", "bias"):
            if getattr(modules[row.producer], kind, None) is not None:
                scales[f"{row.producer}.{kind}"] = (-found, 0)
        for name in readers(row.producer):
            if name not in packed:
                scales[f"{name}.weight"] = (found, 1)
    return scales


@torch.no_grad()
def scale(model: nn.Module, scales: Scales) -> None:
    """Multiply a model's parameters, in place.

    Raises:
        UnsupportedError: a value underflows, so that the model could not be restored; nothing is
            changed then.
    """
    for name, (found, dim) in scales.items():
        parameter, found = local(model.get_parameter(name), found, dim)
        once = _scaled(parameter, found, dim)
        if not torch.equal(_scaled(once, -found, dim), parameter):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"swap: {name}",
                f"its values underflow in {dtype} when the inputs of a layer are scaled",
                "bfloat16, float32",
                "Load the model in bfloat16, or set scaling: none",
            )
    for name, (found, dim) in scales.items():
        parameter, found = local(model.get_parameter(name), found, dim)
        parameter.copy_(_scaled(parameter, found, dim))


@torch.no_grad()
def unscale(model: nn.Module, scales: Scales) -> None:
    """Undo ``scale``."""
    for name, (found, dim) in scales.items():
        parameter, found = local(model.get_parameter(name), found, dim)
        parameter.copy_(_scaled(parameter, -found, dim))


def _scaled(x: Tensor, exponents: Tensor, dim: int) -> Tensor:
    """Multiply by ``2**exponents`` along a dimension, in the dtype of ``x``."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * torch.exp2(exponents.cpu().double()).to(x).view(shape)
