"""Tile functions of ``affine``: codes go to the tensor cores, scales and zeros stay outside.

A code ``c`` enters a product as ``OFFSET + c``, which is the code's bits under the exponent of
128 (bfloat16) or 1024 (float16): no conversion is executed. What the operand beside it lost to
rounding is corrected for the middle code ``MID``, so only deviations from it see that error:
``sum a c = sum round(a) (OFFSET + c) - (OFFSET + MID) sum round(a) + MID sum a``. Per-channel key
scales are folded into the query and per-token value scales into the weights.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply, multiply_add

COMPONENTS = ("codes", "scale", "zero")
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: see the names in ``score``."""
    channel = format.granularity == "channel"
    _, wide, width = parts(format, head_dim)
    tokens = format.group_size if channel else length
    return (format.bits, int(channel), int(format.symmetric), length, head_dim, wide, width, tokens)


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: count, channels, power of two."""
    wide = head_dim if format.granularity == "channel" else format.group_size
    return (head_dim // wide, wide, max(16, triton.next_power_of_2(wide)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows.

    One warp unpacks in registers, as eight rows of words are all that a 2-bit block of 128 tokens
    has; codes of two planes do not fit its registers.
    """
    return 1 if format.bits in (2, 4) else 2


@triton.jit
def _stack(low, high, ACROSS: tl.constexpr):
    """Put two tiles one after the other along their tokens, without moving registers.

    Tokens are the rows of a tile of values, and the columns (ACROSS) of a transposed tile of keys.
    """
    if ACROSS:
        both = tl.permute(tl.join(low, high), (0, 2, 1))
        result = tl.reshape(both, (low.shape[0], 2 * low.shape[1]))
    else:
        both = tl.permute(tl.join(low, high), (2, 0, 1))
        result = tl.reshape(both, (2 * low.shape[0], low.shape[1]))
    return result


@triton.jit
def _stack_halves(low, high, ACROSS: tl.constexpr):
    """Put both 16-bit halves of the words together: see ``_alternate`` for the values' order.

    Two neighbours along the reduced dimension share a register of a tensor-core operand. Of keys
    these are channels, so the halves are stacked; of values they are tokens, so each word already
    is such a register when its halves alternate. The rows of words, at least eight, then fill the
    places of the reduced dimension that lie in other threads.
    """
    if ACROSS:
        result = _stack(low, high, True)
    else:
        both = tl.permute(tl.join(low, high), (0, 2, 1))
        result = tl.reshape(both, (2 * low.shape[0], low.shape[1]))
    return result


@triton.jit
def _alternate(weights):
    """Reorder the tokens of ``[M, L]`` to 0, L/2, 1, L/2 + 1, ..., in registers."""
    halves = tl.reshape(weights, (weights.shape[0], 2, weights.shape[1] // 2))
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (weights.shape[0], weights.shape[1]))


@triton.jit
def _spread(words, STEP: tl.constexpr, STOP: tl.constexpr, ACROSS: tl.constexpr):
    """Stack the words shifted by 0, STEP, 2 STEP, ... below STOP bits: field after field."""
    for level in tl.static_range(0, 5):
        if STEP << level < STOP:
            words = _stack(words, words >> (STEP << level), ACROSS)
    return words


@triton.jit
def _plane(base, rows, FIRST: tl.constexpr, part, ACROSS: tl.constexpr, META: tl.constexpr):
    """Load word rows of one plane for one channel range: ``[R, width]``, or its transpose.

    Transposed while still packed, the words reach the tensor cores' register layout before they
    are unpacked, so only packed bytes pass through shared memory.
    """
    D: tl.constexpr = META[4]
    channel = tl.arange(0, META[6])
    columns = channel + part * META[5]
    if ACROSS:
        offsets = columns[:, None] + (FIRST + rows)[None, :] * D
        mask = (channel < META[5])[:, None]
    else:
        offsets = (FIRST + rows)[:, None] * D + columns[None, :]
        mask = (channel < META[5])[None, :]
    if META[5] == META[6]:
        words = tl.load(base + offsets)
    else:
        words = tl.load(base + offsets, mask=mask, other=0)
    return words


@triton.jit
def _codes(
    tables, block, slab, part, group, dtype: tl.constexpr, ACROSS: tl.constexpr, META: tl.constexpr
):
    """Unpack one token group of one channel range as ``OFFSET + code``.

    ``[tokens, width]``, or with ACROSS its transpose.
    """
    BITS: tl.constexpr = META[0]
    LENGTH: tl.constexpr = META[3]
    PLANE: tl.constexpr = 2 if BITS < 4 else 4
    ROWS: tl.constexpr = LENGTH * PLANE // 32
    SPAN: tl.constexpr = 32 * META[7] // LENGTH
    address = tl.load(tables[0] + block).to(tl.pointer_type(tl.int32))
    base = tl.multiple_of(address, 16) + slab * (LENGTH * BITS // 32 * META[4])
    row = tl.arange(0, ROWS)
    words = _plane(base, row, 0, part, ACROSS, META) >> (group * SPAN)
    # With all 32 bits in use both 16-bit halves are masked at once and separated last.
    STOP: tl.constexpr = 16 if SPAN == 32 else SPAN
    FIELD: tl.constexpr = (2**PLANE - 1) * 0x10001
    codes = _spread(words, PLANE, STOP, ACROSS) & FIELD
    if BITS == 3:
        # A row of the one-bit plane serves two rows of the two-bit plane, at odd and even bits.
        half: tl.constexpr = ROWS // 2
        single = _plane(base, row % half, ROWS, part, ACROSS, META) >> (group * SPAN)
        odd = row // half
        single = single >> (odd[None, :] if ACROSS else odd[:, None])
        codes = codes | ((_spread(single, 2, STOP, ACROSS) & 0x10001) << 2)
    if BITS == 8:
        high = _plane(base, row, ROWS, part, ACROSS, META) >> (group * SPAN)
        codes = codes | ((_spread(high, PLANE, STOP, ACROSS) & FIELD) << 4)
    return _as_float(codes, SPAN == 32, BITS, dtype, ACROSS)


@triton.jit
def _as_float(
    codes, HALVES: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, ACROSS: tl.constexpr
):
    """Turn codes, one per 16-bit half or one per word, into ``OFFSET + code`` of ``dtype``."""
    if dtype == tl.float16 or (dtype == tl.bfloat16 and BITS < 8):
        codes = codes | (0x64006400 if dtype == tl.float16 else 0x43004300)
        low = codes.to(tl.int16)
        if HALVES:
            low = _stack_halves(low, (codes >> 16).to(tl.int16), ACROSS)
        result = low.to(dtype, bitcast=True)
    else:
        if HALVES:
            codes = _stack_halves(codes & 0xFFFF, codes >> 16, ACROSS)
        # 2**23 + code in float32; the difference is the code, exact in every dtype used here.
        wide = ((codes & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
        result = (wide - 8388608.0).to(dtype)
    return result


@triton.jit
def _constants(tables, block, slab, part, group, META: tl.constexpr):
    """Load scale and zero as float32: ``[width]`` (channel) or ``[tokens]`` (token)."""
    D: tl.constexpr = META[4]
    GROUPS: tl.constexpr = META[3] // META[7] if META[1] else D // META[5]
    if META[1]:
        index = tl.arange(0, META[6])
        inside = index < D
        index = group * D + index
        size: tl.constexpr = GROUPS * D
    else:
        index = tl.arange(0, META[3]) * GROUPS + part
        inside = index >= 0
        size: tl.constexpr = GROUPS * META[3]
    half: tl.constexpr = tl.pointer_type(tl.float16)
    scales = tl.multiple_of(tl.load(tables[1] + block).to(half), 16) + slab * size
    scale = tl.load(scales + index, mask=inside, other=0.0).to(tl.float32)
    if META[2]:
        zero = scale * -(2.0 ** (META[0] - 1))
    else:
        zeros = tl.multiple_of(tl.load(tables[2] + block).to(half), 16) + slab * size
        zero = tl.load(zeros + index, mask=inside, other=0.0).to(tl.float32)
    return scale, zero


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts (model dtype) with one block of keys.

    META: bits, granularity is channel, symmetric, block length L, head size D, channels of a
    part, the same rounded up to a power of two, tokens sharing constants.
    """
    dtype: tl.constexpr = query[0].dtype
    SMALL: tl.constexpr = 128.0 if dtype == tl.bfloat16 and META[0] < 8 else 0.0
    OFFSET: tl.constexpr = 1024.0 if dtype == tl.float16 else SMALL
    MID: tl.constexpr = (2 ** META[0] - 1) / 2
    if META[1]:
        result = _score_channel(tables, block, slab, query[0], OFFSET, MID, META)
    else:
        result = _score_token(tables, block, slab, query, OFFSET, META)
    return result


@triton.jit
def _score_token(tables, block, slab, query, OFFSET: tl.constexpr, META: tl.constexpr):
    """Scale each channel range's product per token; the query is a tuple of ranges."""
    LENGTH: tl.constexpr = META[3]
    COUNT: tl.constexpr = len(query)
    result = tl.zeros((query[0].shape[0], LENGTH), tl.float32)
    for part in tl.static_range(0, COUNT):
        scale, zero = _constants(tables, block, slab, part, 0, META)
        codes = _codes(tables, block, slab, part, 0, query[part].dtype, True, META)
        product = multiply(query[part], codes)
        total = tl.sum(query[part].to(tl.float32), 1)
        result += product * scale[None, :] + total[:, None] * (zero - OFFSET * scale)[None, :]
    return result


@triton.jit
def _score_channel(
    tables, block, slab, query, OFFSET: tl.constexpr, MID: tl.constexpr, META: tl.constexpr
):
    """Fold each token group's scales into the query ``[M, width]``; one product per group."""
    GROUPS: tl.constexpr = META[3] // META[7]
    wide = query.to(tl.float32)
    products = ()
    for group in tl.static_range(0, GROUPS):
        scale, zero = _constants(tables, block, slab, 0, group, META)
        operand = query * scale.to(query.dtype)[None, :]
        middle = (zero + MID * scale)[None, :]
        bias = tl.sum(wide * middle - operand.to(tl.float32) * (OFFSET + MID), 1)
        codes = _codes(tables, block, slab, 0, group, query.dtype, True, META)
        product = multiply(operand, codes)
        products = products + (product + bias[:, None],)
    return _concatenate(products)


@triton.jit
def _join_pairs(tiles):
    """Put every second tile ``[M, T]`` to the right of its predecessor: ``[M, 2 T]`` each."""
    PAIRS: tl.constexpr = len(tiles) // 2
    joined = ()
    for i in tl.static_range(0, PAIRS):
        both = tl.permute(tl.join(tiles[2 * i], tiles[2 * i + 1]), (0, 2, 1))
        joined = joined + (tl.reshape(both, (both.shape[0], 2 * both.shape[2])),)
    return joined


@triton.jit
def _concatenate(tiles):
    """Put 1, 2, 4 or 8 tiles ``[M, T]`` side by side, in order."""
    for _ in tl.static_range(0, 3):
        if len(tiles) > 1:
            tiles = _join_pairs(tiles)
    return tiles[0]


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` (float32) times one block of values to the output parts."""
    SMALL: tl.constexpr = 128.0 if dtype == tl.bfloat16 and META[0] < 8 else 0.0
    OFFSET: tl.constexpr = 1024.0 if dtype == tl.float16 else SMALL
    MID: tl.constexpr = (2 ** META[0] - 1) / 2
    if META[1]:
        first = _accumulate_channel(
            tables, block, slab, weights, output[0], OFFSET, MID, dtype, META
        )
        result = (first,)
    else:
        result = _accumulate_token(tables, block, slab, weights, output, OFFSET, MID, dtype, META)
    return result


@triton.jit
def _accumulate_token(
    tables,
    block,
    slab,
    weights,
    output,
    OFFSET: tl.constexpr,
    MID: tl.constexpr,
    dtype: tl.constexpr,
    META: tl.constexpr,
):
    """Fold each token's scales into the weights; one product per channel range."""
    COUNT: tl.constexpr = len(output)
    result = ()
    for part in tl.static_range(0, COUNT):
        scale, zero = _constants(tables, block, slab, part, 0, META)
        operand = (weights * scale[None, :]).to(dtype)
        middle = (zero + MID * scale)[None, :]
        bias = tl.sum(weights * middle - operand.to(tl.float32) * (OFFSET + MID), 1)
        codes = _codes(tables, block, slab, part, 0, dtype, False, META)
        product = multiply_add(_alternate(operand), codes, output[part])
        result = result + (product + bias[:, None],)
    return result


@triton.jit
def _halve(tiles):
    """Split every tile ``[M, T]`` into its first and its second half, in order."""
    COUNT: tl.constexpr = len(tiles)
    halves = ()
    for i in tl.static_range(0, COUNT):
        both = tl.reshape(tiles[i], (tiles[i].shape[0], 2, tiles[i].shape[1] // 2))
        first, second = tl.split(tl.permute(both, (0, 2, 1)))
        halves = halves + (first, second)
    return halves


@triton.jit
def _accumulate_channel(
    tables,
    block,
    slab,
    weights,
    output,
    OFFSET: tl.constexpr,
    MID: tl.constexpr,
    dtype: tl.constexpr,
    META: tl.constexpr,
):
    """Scale each token group's product per channel; output is ``[M, width]``."""
    GROUPS: tl.constexpr = META[3] // META[7]
    tiles = (weights,)
    for _ in tl.static_range(0, 3):
        if len(tiles) < GROUPS:
            tiles = _halve(tiles)
    for group in tl.static_range(0, GROUPS):
        scale, zero = _constants(tables, block, slab, 0, group, META)
        operand = tiles[group].to(dtype)
        total = tl.sum(tiles[group], 1)
        lost = total * MID - tl.sum(operand.to(tl.float32), 1) * (OFFSET + MID)
        codes = _codes(tables, block, slab, 0, group, dtype, False, META)
        if GROUPS == 1:
            operand = _alternate(operand)
        product = multiply(operand, codes) + lost[:, None]
        output += product * scale[None, :] + total[:, None] * zero[None, :]
    return output
