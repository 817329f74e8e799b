"""Check the arguments of descent over indices and choose what does the steps."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels.index_descent import reference
from squeeze.kernels.linear_checks import by_triton
from squeeze.types import Implementation

PLACE = "kernels.index_descent"


def look_up(table: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Read ``[R, n]`` out of a table ``[R, B, K]`` whose runs have ``columns`` columns."""
    run = torch.arange(indices.shape[1], device=indices.device) // columns
    return table.flatten(1).gather(1, indices + run * table.shape[2])


def descend(
    weight: Tensor,
    hessian: Tensor,
    table: Tensor,
    indices: Tensor,
    columns: int,
    cycles: int,
    implementation: Implementation | None = None,
) -> Tensor:
    """Give each weight in turn the entry that lowers the loss most, all others held.

    The loss of a row is ``e^T H e`` of its error e. With the others held, it is a parabola in one
    weight, whose best entry is the one nearest to its vertex: no step raises the loss. Rows do not
    interact and move together. Within a block of columns only the block's gradient is kept up to
    date; the rest follows by one product.

    Args:
        weight: float32 ``[R, n]``.
        hessian: float32 ``[S, n, n]``, positive diagonal; the rows stand in S equal groups.
        table: float32 ``[R, B, K]``, ascending: what each index stands for in each run.
        indices: int64 ``[R, n]``, where to start.
        columns: Columns of a run; the last may be short.
        cycles: Passes over all columns; a pass that changes nothing is the last.
        implementation: ``reference``, in torch, or ``triton``. ``None`` is ``triton`` wherever it
            runs on a GPU, else ``reference``. Either repeats itself to the bit; sums of the other
            are rounded otherwise, and a vertex between two entries may fall to either.
    Returns:
        The new indices, int64 ``[R, n]``.
    Raises:
        ValueError: shapes or dtypes, or ``auto``.
        DeviceError: ``triton`` without Triton, a GPU or the interpreter.
    Cost: O(R n) memory. The reference: 4 R n^2 operations a cycle, and about ten small launches a
        column. The kernel: 3 R n^2, and three launches a block of columns.
    """
    _check(weight, hessian, table, indices, columns)
    groups, size = len(hessian), weight.shape[1]
    kernel = by_triton(PLACE, weight, implementation)
    # Columns first: steps read and write whole columns.
    found = indices.view(groups, -1, size).permute(2, 0, 1).contiguous()
    values = look_up(table, indices, columns).view(groups, -1, size).permute(2, 0, 1).contiguous()
    dense = weight.view(groups, -1, size).permute(2, 0, 1)
    tables = table.view(groups, -1, *table.shape[1:])
    if kernel and weight.numel():
        from squeeze.kernels.index_descent import triton

        triton.descend(dense, hessian, tables, values, found, columns, cycles)
    else:
        reference.descend(dense, hessian, tables, values, found, columns, cycles)
    return found.permute(1, 2, 0).reshape(weight.shape)


def _check(weight: Tensor, hessian: Tensor, table: Tensor, indices: Tensor, columns: int) -> None:
    """Refuse shapes and dtypes that the steps would misread."""
    rows, size = weight.shape
    if hessian.shape[1:] != (size, size) or not len(hessian) or rows % len(hessian):
        raise ValueError(f"hessian is {tuple(hessian.shape)}, the weight {tuple(weight.shape)}")
    if table.ndim != 3 or len(table) != rows or columns < 1 or table.shape[1] * columns < size:
        received = f"table is {tuple(table.shape)}, the weight {tuple(weight.shape)}"
        raise ValueError(f"{received}, runs have {columns} columns")
    if indices.shape != weight.shape or indices.dtype != torch.int64:
        raise ValueError(f"indices are {indices.dtype} {tuple(indices.shape)}")
    if {weight.dtype, hessian.dtype, table.dtype} != {torch.float32}:
        raise ValueError("weight, hessian and table must be float32")
