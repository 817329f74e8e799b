"""Descent over indices in torch, a column of all rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # columns visited between two updates of the whole gradient


def descend(
    dense: Tensor,
    hessian: Tensor,
    tables: Tensor,
    values: Tensor,
    found: Tensor,
    columns: int,
    cycles: int,
) -> None:
    """Visit all columns ``cycles`` times, or until nothing changes.

    Args:
        dense: float32 ``[n, S, r]``.
        hessian: float32 ``[S, n, n]``.
        tables: float32 ``[S, r, B, K]``, ascending.
        values: float32 ``[n, S, r]``, what ``found`` stands for; changed in place.
        found: int64 ``[n, S, r]``; changed in place.
        columns: Columns of a run.
        cycles: Most passes.
    """
    middles = (tables[..., 1:] + tables[..., :-1]) / 2
    curvature = hessian.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    size = len(dense)
    for _ in range(cycles):
        before = found.clone()
        gradient = _spread(values - dense, hessian)
        for first in range(0, size, BLOCK):
            part = slice(first, min(first + BLOCK, size))
            local, old = gradient[part].clone(), values[part].clone()
            near = hessian[:, part, part].permute(1, 2, 0).unsqueeze(-1).contiguous()
            for i in range(len(local)):
                column = first + i
                vertex = values[column] - local[i] / curvature[:, column]
                run = column // columns
                code = (vertex.unsqueeze(-1) > middles[:, :, run]).sum(-1)
                value = tables[:, :, run].gather(-1, code.unsqueeze(-1)).squeeze(-1)
                local[i + 1 :] += near[i, i + 1 :] * (value - values[column])
                values[column], found[column] = value, code
            gradient += _spread(values[part] - old, hessian[:, part])
        if torch.equal(before, found):
            break


def _spread(change: Tensor, hessian: Tensor) -> Tensor:
    """Gradient ``[n, S, r]`` that a change ``[m, S, r]`` makes, through ``[S, m, n]``."""
    return (hessian.mT @ change.transpose(0, 1)).transpose(0, 1)
