"""Add the products of a weight's corrections to outputs that lack them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from squeeze.types import ClusteredWeight


@triton.jit
def _add(
    x, values, columns, offsets, y, count, out_features, x_stride,
    BM: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Add one weight row's corrections to ``BM`` rows of y."""
    row = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    own = m < count
    first = tl.load(offsets + row)
    last = tl.load(offsets + row + 1)
    total = tl.zeros((BM,), tl.float32)
    for start in range(first, last, BJ):
        j = start + tl.arange(0, BJ)
        keep = j < last
        value = tl.load(values + j, mask=keep, other=0.0).to(tl.float32)
        column = tl.load(columns + j, mask=keep, other=0).to(tl.int32) & 0xFFFF
        place = m.to(tl.int64)[:, None] * x_stride + column[None, :]
        number = tl.load(x + place, mask=own[:, None] & keep[None, :], other=0.0).to(tl.float32)
        total += tl.sum(number * value[None, :], 1)
    target = y + m.to(tl.int64) * out_features + row
    before = tl.load(target, mask=own, other=0.0).to(tl.float32)
    tl.store(target, (before + total).to(y.dtype.element_ty), mask=own)


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
    grid = (weight.shape[0], triton.cdiv(len(flat), rows))
    if len(flat):
        _add[grid](
            flat, weight.outlier_values, weight.outlier_columns, weight.outlier_offsets, y,
            len(flat), weight.shape[0], flat.stride(0), BM=rows, BJ=32, num_warps=1,
        )  # fmt: skip
    return y
