"""Least squares in codebook entries, for errors measured by a Hessian.

Shapes: R rows, n columns, K entries. Rows stand in S equal groups in order, each of which has a
Hessian ``[n, n]``; S = 1 where one serves all. Everything is float32, indices int64. The other half
of the work, descent over indices, is ``kernels.index_descent``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WORKING = 2**24  # float32 values in flight while codebooks are fitted


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Scale ``[S, n, n]`` to a mean diagonal of one, and add a share of that to the diagonal.

    Columns that calibration never saw keep a curvature; a zero Hessian becomes the identity.
    """
    size = hessian.shape[-1]
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    unit = torch.where(mean > 0, hessian / mean.clamp(min=1e-30), 0.0)
    return unit + damping * torch.eye(size, device=hessian.device) * torch.where(
        mean > 0, 1.0, 1.0 / damping
    )


def times(x: Tensor, hessian: Tensor) -> Tensor:
    """Multiply rows ``[R, m]`` by the ``[S, m, n]`` of their groups."""
    return (x.view(len(hessian), -1, x.shape[1]) @ hessian).flatten(0, 1)


def loss(error: Tensor, hessian: Tensor) -> Tensor:
    """``e^T H e`` of every row, ``[R]``."""
    return (times(error, hessian) * error).sum(1)


def normal(
    hessian: Tensor, gradient: Tensor, scale: Tensor, indices: Tensor, entries: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Normal equations of the entries that ``rows`` rows share over one run of columns.

    Args:
        hessian: The run's ``[S, m, m]``.
        gradient: Its part of the gradient, ``[R, m]``.
        scale: What multiplies the entries in each row, ``[R]``.
        indices: Its part, ``[R, m]``.
        entries: K.
        rows: Rows sharing a codebook; the last block may be short.
    Returns:
        ``[G, K, K]`` and ``[G, K]``: the loss's curvature and half its slope in the entries.
    """
    groups, size = len(hessian), indices.shape[1]
    height = len(indices) // groups
    blocks = -(-len(indices) // rows)
    matrix = gradient.new_zeros(blocks, entries, entries)
    slope = gradient.new_zeros(blocks, entries)
    step = max(1, WORKING // (entries * size))
    for group in range(groups):
        for first in range(group * height, (group + 1) * height, step):
            part = slice(first, min(first + step, (group + 1) * height))
            member = (
                torch.nn.functional.one_hot(indices[part], entries).mT * scale[part, None, None]
            )
            owner = torch.arange(part.start, part.stop, device=scale.device) // rows
            matrix.index_add_(0, owner, member @ hessian[group] @ member.mT)
            slope.index_add_(0, owner, (member @ gradient[part, :, None]).squeeze(-1))
    return matrix, slope


def solve(matrix: Tensor, slope: Tensor) -> Tensor:
    """Step to the least loss; entries that no index names stay where they are.

    A ridge of 1e-6 of the mean curvature keeps near-singular systems near the present entries.
    """
    size = matrix.shape[-1]
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    ridge = 1e-6 * mean[:, None, None] * torch.eye(size, device=matrix.device)
    return -torch.linalg.solve((matrix + ridge).double(), slope.double()).float()


def round_entries(entries: Tensor, matrix: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Round ``[G, K]``, each making up for the rounding of those before it."""
    curvature = matrix.diagonal(dim1=1, dim2=2)
    result = rounding(entries)
    for _ in range(2):
        for k in range(entries.shape[1]):
            pull = (matrix[:, k] * (result - entries)).sum(1) - curvature[:, k] * (
                result[:, k] - entries[:, k]
            )
            best = entries[:, k] - pull / curvature[:, k].clamp(min=1e-30)
            used = curvature[:, k] > 0
            result[:, k] = rounding(torch.where(used, best, entries[:, k]))
    return result
