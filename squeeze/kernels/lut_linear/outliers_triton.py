"""Add the products of a weight's corrections to outputs that lack them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from squeeze.types import ClusteredWeight


@triton.jit
def _add(
    x, values, columns, offsets, y, count, out_features, x_stride,
    BM: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Add the corrections of ``BR`` weight rows to ``BM`` rows of y."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    own = m < count
    there = row < out_features
    first = tl.load(offsets + row, mask=there, other=0)
    last = tl.load(offsets + row + 1, mask=there, other=0)
    source = x + m.to(tl.int64) * x_stride
    total = tl.zeros((BM, BR), tl.float32)
    for start in range(0, tl.max(last - first, 0), BJ):
        j = first[:, None] + start + tl.arange(0, BJ)[None, :]
        keep = j < last[:, None]
        value = tl.load(values + j, mask=keep, other=0.0).to(tl.float32)
        column = tl.load(columns + j, mask=keep, other=0).to(tl.int32) & 0xFFFF
        place = source[:, None, None] + column[None, :, :]
        number = tl.load(place, mask=own[:, None, None] & keep[None, :, :], other=0.0)
        total += tl.sum(number.to(tl.float32) * value[None, :, :], 2)
    target = y + m.to(tl.int64)[:, None] * out_features + row[None, :]
    keep = own[:, None] & there[None, :]
    before = tl.load(target, mask=keep, other=0.0).to(tl.float32)
    tl.store(target, (before + total).to(y.dtype.element_ty), mask=keep)


def add_outliers(x: Tensor, weight: ClusteredWeight, y: Tensor) -> Tensor:
    """Add ``x @ corrections.T`` to ``y``, in place.

    Args:
        x: ``[..., in]``.
        weight: Has corrections.
        y: ``[..., out]``, contiguous.
    """
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows = 1 if len(flat) == 1 else 16
    own = 8 if rows == 1 else 2  # weight rows of a program
    grid = (triton.cdiv(weight.shape[0], own), triton.cdiv(len(flat), rows))
    if len(flat):
        _add[grid](
            flat, weight.outlier_values, weight.outlier_columns, weight.outlier_offsets, y,
            len(flat), weight.shape[0], flat.stride(0), BM=rows, BR=own, BJ=32, num_warps=1,
        )  # fmt: skip
    return y
