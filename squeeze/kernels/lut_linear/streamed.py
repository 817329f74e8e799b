"""Launch the linear layer for few rows of x, and write x and float16 codebooks as bytes for it.

x is taken in blocks of 512 channels, each block of a row with a scale of its own: a number is
``scale * (256 high + low)`` with both bytes signed, 15 bits and a sign below the block's largest.
Rounding that, relative to the block's root mean square, is at most a quarter of what rounding a
weight to bfloat16 is. Float16 entries become ``scale * (254 high + low)`` by rows of the weight.

Bytes lie in the order of the second operand of an m16n8k32 product: those of block s, value group
c, pair p, column n, lane t are ``pieces[s, 2 c + p, n, t]``: sixteen bytes of channels
``(4 b + c) u + 16 s + 4 t + 2 p + q`` at ``8 q + b``. Column 2 m is row m's high bytes, 2 m + 1 its
low ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.types import ClusteredWeight

STEP_WORDS = 16  # words of each plane in a step, 512 channels
UNROLLED = 8  # steps of a warp, all in the code
ROWS = 32  # rows of x up to which this is the kernel to choose
SMALLEST = tl.constexpr(2.0**-100)  # a block whose largest number is below this counts as zeros


@triton.jit
def _split_x(
    x, pieces, factors, x_count, in_features, x_stride, u: tl.constexpr, OVERLAP: tl.constexpr
):
    """Write one row's block as bytes, with its scale and scale times the sum of its integers."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    step = tl.program_id(0)
    m = tl.program_id(1)
    spot = tl.arange(0, 64)  # 16 c + 4 t + 2 p + q
    j = step * 16 + spot % 16
    field = tl.arange(0, 8)
    channel = (4 * field[None, :] + (spot // 16)[:, None]) * u + j[:, None]
    keep = (j < u)[:, None] & (channel < in_features)
    value = tl.load(x + m.to(tl.int64) * x_stride + channel, mask=keep, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(value))
    some = peak > SMALLEST
    inverse = tl.where(some, 32512.0 / tl.where(some, peak, 1.0), 0.0)
    # A number that is not finite makes the scale, and with it every output, not a number.
    scale = peak * (1.0 / 32512.0) + tl.sum(tl.sum(value * 0.0, 1), 0)
    whole = (value * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    high = (whole + 128) >> 8
    low = whole - high * 256
    place = ((step * 8 + (spot // 16) * 2 + spot // 2 % 2) * (2 * x_count) + 2 * m) * 4
    place = (place + spot // 4 % 4) * 4 + spot % 2 * 2
    half = tl.arange(0, 2)
    target = pieces.to(tl.pointer_type(tl.int32)) + place[:, None] + half[None, :]
    tl.store(target, _words(high))
    tl.store(target + 16, _words(low))
    total = tl.sum(tl.sum(whole, 1), 0).to(tl.float32)
    row = factors + 2 * (step * x_count + m)
    tl.store(row, scale)
    tl.store(row + 1, scale * total)


@triton.jit
def _words(numbers):
    """Put the low bytes of int32 ``[64, 8]`` into words ``[64, 2]``."""
    shift = 8 * (tl.arange(0, 8) % 4)
    return tl.sum(tl.reshape((numbers & 255) << shift[None, :], (64, 2, 4)), 2)


@triton.jit
def _split_entries(
    codebook, tables, scales, out_features, ROWS: tl.constexpr, CODES: tl.constexpr,
    BR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write each row's float16 entries as a table of high bytes, one of low ones and a scale."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    keep = row < out_features
    code = tl.arange(0, CODES)[None, :]
    base = (row // ROWS).to(tl.int64)[:, None] * CODES + code
    entry = tl.load(codebook + base, mask=keep[:, None], other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(entry), 1)
    inverse = 32258.0 / tl.where(peak > 0.0, peak, 1.0)
    whole = (entry * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    high = (whole + 127 + 254 * 128) // 254 - 128
    target = tables + row.to(tl.int64)[:, None] * (2 * CODES) + code
    tl.store(target, high.to(tl.int8), mask=keep[:, None])
    tl.store(target + CODES, (whole - high * 254).to(tl.int8), mask=keep[:, None])
    tl.store(scales + row, peak * (1.0 / 32258.0) + tl.sum(entry * 0.0, 1), mask=keep)


def fits(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``, and is the one to choose."""
    u = weight.indices.shape[1] // weight.bits
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and 0 < len(x) <= ROWS
        and weight.bits in (2, 3, 4)
        and weight.codebook.shape[1] == 1
        and u % 4 == 0
        and weight.indices.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def lut_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` for ``x`` ``[rows, in]`` that ``fits``.

    On GPUs that can, each kernel starts while the one before it ends and reads weights then. So
    the kernel that wrote a weight must have ended when a kernel before this call began.
    """
    from squeeze.kernels.lut_linear import gluon

    out_features, in_features = weight.shape
    count = len(x)
    overlap = torch.cuda.get_device_capability(x.device) >= (9, 0)
    early = {"launch_pdl": True} if overlap else {}
    u = weight.indices.shape[1] // weight.bits
    tiles, column_tiles, ahead = _tiles(count)
    warps, turns = _split(u)
    steps = warps * turns
    pieces = x.new_empty(steps * 1024 * count, dtype=torch.int8)
    factors = x.new_empty(steps * count * 2, dtype=torch.float32)
    tables, scale, plain = weight.codebook, weight.scale, weight.codebook.dtype == torch.int8
    if not plain:
        tables, scale = _entries(weight, overlap, early)
    _split_x[(steps, count)](
        x, pieces, factors, count, in_features, x.stride(0),
        u=u, OVERLAP=overlap, num_warps=2, **early,
    )  # fmt: skip
    y = x.new_empty(count, out_features)
    grid = (triton.cdiv(count, 4 * column_tiles), triton.cdiv(out_features, 16 * tiles))
    gluon.multiply[grid](
        pieces, factors, weight.indices, tables, scale, bias, y, count, out_features,
        u=u, STEPS=turns, WARPS=warps, TILES=tiles, COLUMN_TILES=column_tiles,
        AHEAD=ahead,
        PIECES=1 if plain else 2, SHARED=weight.rows if plain else 1, BITS=weight.bits,
        SCALED=scale is not None, BIASED=bias is not None, OVERLAP=overlap,
        num_warps=warps, **early,
    )  # fmt: skip
    return y


def _entries(
    weight: ClusteredWeight, overlap: bool, early: dict[str, bool]
) -> tuple[Tensor, Tensor]:
    """Tables int8 ``[out, 2, codes]`` of float16 entries, and their scales float32 ``[out]``."""
    out_features, codes = weight.shape[0], 2**weight.bits
    tables = weight.indices.new_empty(out_features, 2, codes, dtype=torch.int8)
    scales = weight.indices.new_empty(out_features, dtype=torch.float32)
    _split_entries[(triton.cdiv(out_features, 64),)](
        weight.codebook, tables, scales, out_features,
        ROWS=weight.rows, CODES=codes, BR=64, OVERLAP=overlap, num_warps=4, **early,
    )  # fmt: skip
    if weight.scale is not None:
        scales *= weight.scale.float()
    return tables, scales


def _tiles(count: int) -> tuple[int, int, bool]:
    """Sixteens of weight rows per warp, eights of byte columns, and whether words wait a step."""
    column_tiles = 1 if count <= 4 else 2 if count <= 8 else 4
    return 1, column_tiles, True


def _split(u: int) -> tuple[int, int]:
    """Warps of a program and steps of each, not many of them past the end."""
    steps = triton.cdiv(u, STEP_WORDS)
    for warps in (4, 8, 16, 2):
        turns = triton.cdiv(steps, warps)
        if turns <= UNROLLED and warps * turns * 4 <= steps * 5:
            return warps, turns
    return 1, steps
