"""Triton kernel of the sparse-input linear layer: live columns in, nothing else.

The weight lies by columns, so a channel that is skipped skips ``out`` contiguous values and whole
cache lines. A program owns BN outputs and CHANNELS channels. It lists its live channels itself (a
prefix sum, and a few kilobytes through the L2 cache), so that no launch and no counter stands
before the reads, then gathers their columns BK at a time. Shares of programs differ by chance
alone: with CHANNELS = 512, half of them live, by about 4%.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 4  # more rows keep more columns alive than skipping could save
BN = 128  # 256 bytes of a column in bfloat16
PROGRAMS = 396  # three per multiprocessor of a large GPU


@triton.jit
def _live(x, threshold, channel, mask, x_stride, M: tl.constexpr):
    """Whether any of the rows of x exceeds the threshold of each channel; NaN does."""
    limit = tl.load(threshold + channel, mask=mask, other=float("inf"))
    live = tl.zeros(channel.shape, tl.int32)
    for m in tl.static_range(M):
        value = tl.load(x + m * x_stride + channel, mask=mask, other=0.0).to(tl.float32)
        live = tl.where(tl.abs(value) <= limit, live, 1)
    return live


@triton.jit
def _gemv_kernel(
    x, weight, threshold, bias, scratch, y, out_features, in_features, x_stride, column_stride,
    M: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, CHANNELS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[s, m, o] = sum over the live channels i of share s of x[m, i] W[o, i].

    Products and sums in float32, one tile [BK, BN] per row of x, reduced once at the end. With
    SPLIT = 1 the result is final and has the bias; otherwise ``_sum_kernel`` adds the shares up.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, CHANNELS)
    channel = part * CHANNELS + place
    live = _live(x, threshold, channel, channel < in_features, x_stride, M)
    listed = scratch + (tile.to(tl.int64) * SPLIT + part) * CHANNELS
    tl.store(listed + tl.cumsum(live, 0) - 1, channel, mask=live > 0)
    count = tl.sum(live, 0)
    tl.debug_barrier()
    rows = tile * BN + tl.arange(0, BN)
    row_mask = rows < out_features
    sums = (tl.zeros((BK, BN), tl.float32),) * M
    for k in range(0, count, BK):
        inside = k + tl.arange(0, BK) < count
        found = tl.load(listed + k + tl.arange(0, BK), mask=inside, other=0)
        start = weight + found.to(tl.int64)[:, None] * column_stride
        entry = tl.load(start + rows[None, :], mask=inside[:, None] & row_mask[None, :], other=0.0)
        entry = entry.to(tl.float32)
        new = ()
        for m in tl.static_range(M):
            value = tl.load(x + m * x_stride + found, mask=inside, other=0.0).to(tl.float32)
            if M > 1:  # a channel may be listed for another row
                limit = tl.load(threshold + found, mask=inside, other=0.0)
                value = tl.where(tl.abs(value) <= limit, 0.0, value)
            new = new + (sums[m] + entry * value[:, None],)  # noqa: RUF005
        sums = new
    for m in tl.static_range(M):
        total = tl.sum(sums[m], 0)
        if BIASED and SPLIT == 1:
            total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
        target = y + (part * M + m).to(tl.int64) * out_features + rows
        tl.store(target, total.to(y.dtype.element_ty), mask=row_mask)


@triton.jit
def _sum_kernel(
    partial, bias, y, size, out_features,
    BIASED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up SPLIT partial results in float32, in order, and the bias."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(SPLIT):
        total += tl.load(partial + part * size + place, mask=mask, other=0.0)
    if BIASED:
        total += tl.load(bias + place % out_features, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)


def channels_per_program(out_features: int, in_features: int) -> int:
    """Choose the largest share that still gives every multiprocessor its programs."""
    tiles = triton.cdiv(out_features, BN)
    for channels in (2048, 1024, 512):
        if tiles * triton.cdiv(in_features, channels) >= PROGRAMS:
            return channels
    return 256


def sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """Launch the kernels on checked tensors: at most MAX_ROWS rows, the weight by columns."""
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows = flat.shape[0]
    y = x.new_empty(rows, out_features)
    if not y.numel():
        return y.view(*x.shape[:-1], out_features)
    channels = channels_per_program(out_features, in_features)
    tiles, split = triton.cdiv(out_features, BN), triton.cdiv(in_features, channels)
    scratch = torch.empty(tiles * split * channels, dtype=torch.int32, device=x.device)
    partial = y if split == 1 else x.new_empty(split, rows, out_features, dtype=torch.float32)
    given = y if bias is None else bias
    _gemv_kernel[tiles, split](
        flat, weight, threshold, given, scratch, partial, out_features, in_features,
        flat.stride(0), weight.stride(1), M=rows, BIASED=bias is not None, SPLIT=split,
        CHANNELS=channels, BN=BN, BK=64 // triton.next_power_of_2(rows), num_warps=4,
    )  # fmt: skip
    if split > 1:
        _sum_kernel[(triton.cdiv(y.numel(), 256),)](
            partial, given, y, y.numel(), out_features,
            BIASED=bias is not None, SPLIT=split, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)
