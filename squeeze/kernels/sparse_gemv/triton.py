"""Triton kernel of the sparse-input linear layer: live columns in, nothing else.

The weight lies by columns, so a channel that is skipped skips ``out`` contiguous values and whole
cache lines. A program owns BN outputs and CHANNELS channels. Every thread reads 16 bytes of DEPTH
columns at a time and leaves out those of dead channels by the mask of the load: nothing is listed
or counted before the first column is under way. The inputs of the next DEPTH columns are read
together with the present ones. All programs of a launch run at once, so that shares whose numbers
of live channels differ by chance even out on the memory, which they share.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.sparse_gemv import streamed

MAX_ROWS = 4  # more rows keep more columns alive than skipping could save
BN = 64  # 128 bytes of a column in bfloat16, read by 8 threads
PIECES = 2  # such reads of one column by a program
LANES = 16  # columns that one load instruction of a program reads
DEPTH = 4  # columns of each lane on their way at a time
STREAMED = True  # False compares the stream with the kernel below
PROGRAMS = 660  # five per multiprocessor of a large GPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEN = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@triton.jit
def _input(
    x, threshold, channel, mask, x_stride, m: tl.constexpr
):  # fmt: skip
    """Row m of x at the channels, float32, 0 where not above the threshold; NaN stays."""
    value = tl.load(x + m * x_stride + channel, mask=mask, other=0.0).to(tl.float32)
    limit = tl.load(threshold + channel, mask=mask, other=float("inf"))
    return tl.where(tl.abs(value) <= limit, 0.0, value)


@triton.jit
def _live(
    x, threshold, lane, in_features, x_stride,
    M: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Whether each of DEPTH channels per lane counts for any row; a tuple of bool ``[LANES]``.

    ALIGNED: DEPTH divides ``in_features``.
    """
    found = ()
    for d in tl.static_range(DEPTH):
        mask = lane + (0 if ALIGNED else d) < in_features
        live = _input(x, threshold, lane + d, mask, x_stride, 0) != 0.0
        for m in tl.static_range(1, M):
            live = live | (_input(x, threshold, lane + d, mask, x_stride, m) != 0.0)
        found = found + (live,)  # noqa: RUF005
    return found


@triton.jit
def _columns(
    start, rows, out_features, column_stride, live,
    DEPTH: tl.constexpr, PIECES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Read the live ones of DEPTH columns per lane, 0 for dead ones.

    A tuple of DEPTH * PIECES tiles ``[LANES, BN]``, neighbours along the columns.
    """
    columns = ()
    for d in tl.static_range(DEPTH):
        for piece in tl.static_range(PIECES):
            keep = live[d][:, None] & (rows + piece * BN < out_features)[None, :]
            place = start + (d * column_stride + piece * BN)
            column = tl.load(place, mask=keep, other=0.0, cache_modifier=".cg")
            columns = columns + (column,)  # noqa: RUF005
    return columns


@triton.jit
def _number(entry, SLOW: tl.constexpr):
    """Change to float32; bfloat16 two at a time."""
    if entry.dtype == tl.bfloat16 and not SLOW:
        number = tl.inline_asm_elementwise(
            WIDEN, "=f,=f,r", [entry], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        number = entry.to(tl.float32)
    return number


@triton.jit
def _gemv_kernel(
    x, weight, threshold, bias, y, out_features, in_features, x_stride, column_stride,
    M: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, CHANNELS: tl.constexpr,
    LANES: tl.constexpr, DEPTH: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr,
    ALIGNED: tl.constexpr, SLOW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y[s, m, o] = sum over the live channels i of share s of x[m, i] W[o, i].

    A program has PIECES * BN outputs and CHANNELS channels. Products and sums in float32, PIECES
    tiles [LANES, BN] per row of x, reduced once at the end. With SPLIT = 1 the result is final and
    has the bias; otherwise ``_sum_kernel`` adds the shares up. With OVERLAP the launch may begin
    before the one that makes x ends, and lets the next begin.
    """
    part = tl.program_id(1)
    rows = tl.program_id(0) * (PIECES * BN) + tl.arange(0, BN)
    lane = part * CHANNELS + tl.arange(0, LANES) * DEPTH
    start = weight + lane.to(tl.int64)[:, None] * column_stride + rows[None, :]
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    live = _live(x, threshold, lane, in_features, x_stride, M, DEPTH, ALIGNED)
    sums = (tl.zeros((LANES, BN), tl.float32),) * (PIECES * M)
    for _ in range(0, CHANNELS, LANES * DEPTH):
        columns = _columns(start, rows, out_features, column_stride, live, DEPTH, PIECES, BN)
        # Compilers would put each read right before its use. They cannot move it past a barrier,
        # nor the reads of x before one, which every use waits for.
        tl.debug_barrier()
        for d in tl.static_range(DEPTH):
            mask = lane + (0 if ALIGNED else d) < in_features
            new = ()
            for i in tl.static_range(PIECES * M):
                if M == 1:  # what is dead meets 0
                    value = tl.load(x + lane + d, mask=mask, other=0.0).to(tl.float32)
                else:
                    value = _input(x, threshold, lane + d, mask, x_stride, i % M)
                entry = _number(columns[d * PIECES + i // M], SLOW)
                new = new + (sums[i] + entry * value[:, None],)  # noqa: RUF005
            sums = new
        start += LANES * DEPTH * column_stride
        lane += LANES * DEPTH
        live = _live(x, threshold, lane, in_features, x_stride, M, DEPTH, ALIGNED)
    for i in tl.static_range(PIECES * M):
        place = rows + i // M * BN
        keep = place < out_features
        total = tl.sum(sums[i], 0)
        if BIASED and SPLIT == 1:
            total += tl.load(bias + place, mask=keep, other=0.0).to(tl.float32)
        target = y + (part * M + i % M).to(tl.int64) * out_features + place
        tl.store(target, total.to(y.dtype.element_ty), mask=keep)


@triton.jit
def _sum_kernel(
    partial, bias, y, size, out_features,
    BIASED: tl.constexpr, SPLIT: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up SPLIT partial results in float32, SHARES (a power of two) at once, and the bias."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SHARES)
    mask = place < size
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    parts = tl.load(
        partial + share[:, None] * size + place[None, :],
        mask=(share < SPLIT)[:, None] & mask[None, :],
        other=0.0,
    )
    total = tl.sum(parts, 0)
    if BIASED:
        total += tl.load(bias + place % out_features, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)


def channels_per_program(out_features: int, in_features: int, step: int) -> int:
    """Choose the share of a program, in whole steps, so that all programs run at once."""
    shares = max(1, PROGRAMS // triton.cdiv(out_features, PIECES * BN))
    return triton.cdiv(triton.cdiv(in_features, step), shares) * step


def sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """Launch the kernels on checked tensors: at most MAX_ROWS rows, the weight by columns."""
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows = flat.shape[0]
    y = x.new_empty(rows, out_features)
    if not y.numel():
        return y.view(*x.shape[:-1], out_features)
    if STREAMED and streamed.fits(flat, weight):
        y = streamed.sparse_gemv(flat, weight, threshold, bias)
        return y.view(*x.shape[:-1], out_features)
    depth = DEPTH if rows <= 2 else DEPTH // 2  # more would take the registers of other programs
    channels = channels_per_program(out_features, in_features, LANES * depth)
    grid = triton.cdiv(out_features, PIECES * BN), triton.cdiv(in_features, channels)
    split = grid[1]
    partial = y if split == 1 else x.new_empty(split, rows, out_features, dtype=torch.float32)
    given = y if bias is None else bias
    overlap = _overlaps(x.device)
    options = {"num_warps": 4} | ({"launch_pdl": True} if overlap else {})
    _gemv_kernel[grid](
        flat, weight, threshold, given, partial, out_features, in_features,
        flat.stride(0), weight.stride(1), M=rows, BIASED=bias is not None, SPLIT=split,
        CHANNELS=channels, LANES=LANES, DEPTH=depth, BN=BN, PIECES=PIECES,
        ALIGNED=in_features % depth == 0, SLOW=INTERPRETED, OVERLAP=overlap, **options,
    )  # fmt: skip
    if split > 1:
        add_shares(partial, bias, y)
    return y.view(*x.shape[:-1], out_features)


def add_shares(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Launch the sum over shares ``[shares, rows, out]`` in float32, plus the bias, into y."""
    overlap = _overlaps(y.device)
    options = {"num_warps": 4} | ({"launch_pdl": True} if overlap else {})
    _sum_kernel[(triton.cdiv(y.numel(), 32),)](
        partial, y if bias is None else bias, y, y.numel(), y.shape[1],
        BIASED=bias is not None, SPLIT=len(partial),
        SHARES=triton.next_power_of_2(len(partial)), BLOCK=32, OVERLAP=overlap, **options,
    )  # fmt: skip


def _overlaps(device: torch.device) -> bool:
    """Whether a launch may begin before the one ahead of it has ended."""
    return device.type != "cpu" and torch.cuda.get_device_capability(device) >= (9, 0)
