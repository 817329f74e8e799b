"""Triton kernel of descent over indices: a lane per row, a block of columns per launch.

Where the reference adds each change to the slopes of all later columns of a block, a lane sums the
changes of earlier columns when it comes to a column: the same terms in the same order, and nothing
but the changes to keep. They pass through memory, written and read by the same lane. No sums over
lanes, no atomics: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # columns visited between two updates of the whole gradient
ROWS = 32  # of a program, one warp
UNROLL = 16  # earlier columns on their way at a time


@triton.jit
def _nearest(vertex, middles, rows, mask, ENTRIES: tl.constexpr, LEVELS: tl.constexpr):
    """How many of ``ENTRIES - 1`` ascending middles, ``rows`` apart, are below a vertex; int32."""
    code = tl.zeros_like(vertex).to(tl.int32)
    for level in tl.static_range(LEVELS):
        more = code + (1 << (LEVELS - 1 - level))
        inside = mask & (more < ENTRIES)
        middle = tl.load(middles + (more - 1) * rows, mask=inside, other=float("inf"))
        code = tl.where(vertex > middle, more, code)
    return code


@triton.jit(do_not_specialize=["first", "width", "height", "rows", "size", "columns"])
def _descent_kernel(
    values, found, gradient, change, hessian, tables, middles,
    first, width, height, rows, size, columns,
    ENTRIES: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Step once along each of ``width`` columns from ``first`` on.

    ``values``, ``found``, ``gradient`` and ``change`` ``[width, rows]`` are the block's; ``rows``
    are ``height`` of each group; ``change`` starts finite. ``hessian`` ``[S, size, size]``,
    ``tables`` ``[B, ENTRIES, rows]`` and ``middles`` ``[B, ENTRIES - 1, rows]`` are whole.
    Program: (rows of a group, group).
    """
    group = tl.program_id(1).to(tl.int64)
    inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = inside < height
    row = (tl.program_id(1) * height + inside).to(tl.int32)
    near = hessian + (group * size + first) * size + first
    value = tl.load(values + row, mask=mask, other=0.0)
    slope = tl.load(gradient + row, mask=mask, other=0.0)
    for i in range(0, width):
        place = i * rows + row
        later = mask & (i + 1 < width)
        next_value = tl.load(values + place + rows, mask=later, other=0.0)
        next_slope = tl.load(gradient + place + rows, mask=later, other=0.0)
        for start in range(0, i, UNROLL):
            for u in tl.static_range(UNROLL):
                j = start + u
                factor = tl.load(near + j * size + i, mask=j < i, other=0.0)
                slope += factor * tl.load(change + j * rows + row, mask=mask, other=0.0)
        vertex = value - slope / tl.load(near + i * size + i)
        run = tl.cast((first + i) // columns, tl.int64)
        below = middles + run * (ENTRIES - 1) * rows
        code = _nearest(vertex, below + row, rows, mask, ENTRIES, LEVELS)
        choices = tables + run * ENTRIES * rows
        best = tl.load(choices + code * rows + row, mask=mask, other=0.0)
        tl.store(values + place, best, mask=mask)
        tl.store(found + place, code.to(tl.int64), mask=mask)
        tl.store(change + place, best - value, mask=mask)
        tl.debug_barrier()
        value, slope = next_value, next_slope


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
        values: float32 ``[n, S, r]``, contiguous, what ``found`` stands for; changed in place.
        found: int64 ``[n, S, r]``, contiguous; changed in place.
        columns: Columns of a run.
        cycles: Most passes.
    """
    size, groups, height = dense.shape
    hessian = hessian.contiguous()
    entries = tables.shape[3]
    ranked = tables.flatten(0, 1).permute(1, 2, 0).contiguous()  # [B, K, R]
    middles = (ranked[:, 1:] + ranked[:, :-1]) / 2
    change = torch.zeros(BLOCK, groups, height, dtype=torch.float32, device=dense.device)
    grid = (triton.cdiv(height, ROWS), groups)
    for _ in range(cycles):
        before = found.clone()
        gradient = _gradient(values - dense, hessian)
        for first in range(0, size, BLOCK):
            end = min(first + BLOCK, size)
            part = slice(first, end)
            _descent_kernel[grid](
                values[part], found[part], gradient[part], change, hessian, ranked, middles,
                first, end - first, height, groups * height, size, columns,
                ENTRIES=entries, LEVELS=(entries - 1).bit_length(), ROWS=ROWS, UNROLL=UNROLL,
                num_warps=1,
            )  # fmt: skip
            if end < size:  # columns before it have been visited: the next pass begins anew
                rest = gradient[end:].transpose(0, 1)
                rest.baddbmm_(hessian[:, part, end:].mT, change.transpose(0, 1))
        if torch.equal(before, found):
            break


def _gradient(error: Tensor, hessian: Tensor) -> Tensor:
    """Slope of half the loss in each weight, ``[n, S, r]``, contiguous."""
    return (hessian.mT @ error.transpose(0, 1)).transpose(0, 1).contiguous()
