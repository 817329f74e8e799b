"""Tile functions of ``ternary``: a token's digit is read by one multiplication.

Byte row ``r`` of a run of 128 tokens holds the tokens ``r + 25 i``; multiplying by ``3**i`` brings
token ``i``'s digit to the top of the byte. The three tokens that five rows of 25 leave over are
read one by one and multiplied in float32. A scale shared by a whole channel of the block is folded
into the query, or into the output; one shared by a whole token into the scores, or the weights.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply, multiply_add
from squeeze.kernels.decode_attention.protected import COMPONENTS as PROTECTED
from squeeze.kernels.decode_attention.protected import add_scores, add_values

COMPONENTS = ("codes", "tail", "scale", *PROTECTED)
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: see the names in ``score``."""
    channel = format.granularity == "channel"
    folded = format.group_size == (length if channel else head_dim)
    mode = (0 if channel else 1) if folded else 2
    width = max(16, triton.next_power_of_2(head_dim))
    return (length, head_dim, width, mode, int(channel), format.group_size, format.protected)


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: one."""
    return (1, head_dim, max(16, triton.next_power_of_2(head_dim)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows."""
    return 2


@triton.jit
def _digits(packed, power, dtype: tl.constexpr):
    """Read the digit that ``power`` brings to the top of each byte, as -1, 0 or 1."""
    digit = (((packed.to(tl.int32) * power) & 255) * 3) >> 8
    # Under the exponent of 2**23, 1024 or 128 the digit is a number without a conversion.
    if dtype == tl.float16:
        result = (digit | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1025.0
    elif dtype == tl.bfloat16:
        result = (digit | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 129.0
    else:
        result = (digit | 0x4B000000).to(tl.float32, bitcast=True) - 8388609.0
    return result.to(dtype)


@triton.jit
def _power(field):
    """``3**field`` for fields 0 to 4."""
    odd = tl.where(field % 2 == 1, 3, 1)
    return odd * tl.where(field >= 4, 81, tl.where(field >= 2, 9, 1))


@triton.jit
def _codes(tables, block, slab, dtype: tl.constexpr, META: tl.constexpr):
    """Load one head's codes ``[L, width]``; 0 past D and for the last three tokens of a run."""
    LENGTH: tl.constexpr = META[0]
    D: tl.constexpr = META[1]
    token = tl.arange(0, LENGTH)
    place = token % 128
    channel = tl.arange(0, META[2])
    base = tl.load(tables[0] + block).to(tl.pointer_type(tl.uint8))
    base = tl.multiple_of(base, 16) + slab * (LENGTH // 128 * 25 * D)
    offsets = ((token // 128) * 25 + place % 25)[:, None] * D + channel[None, :]
    mask = (place < 125)[:, None] & (channel < D)[None, :]
    # Byte 128 is five zeros.
    packed = tl.load(base + offsets, mask=mask, other=128)
    return _digits(packed, _power(place // 25)[:, None], dtype)


@triton.jit
def _tail(tables, block, slab, number: tl.constexpr, META: tl.constexpr):
    """Load the codes of a block's ``number``-th left-over token, float32 ``[width]``."""
    D: tl.constexpr = META[1]
    BYTES: tl.constexpr = (3 * META[1] + 4) // 5
    channel = tl.arange(0, META[2])
    value = (number % 3) * D + channel
    base = tl.load(tables[1] + block).to(tl.pointer_type(tl.uint8))
    base += slab * (META[0] // 128 * BYTES) + (number // 3) * BYTES
    packed = tl.load(base + value % BYTES, mask=channel < D, other=128)
    codes = _digits(packed, _power(value // BYTES), tl.float32)
    return codes * _scale(tables, block, slab, _place(number), channel, META)


@triton.jit
def _place(number: tl.constexpr):
    """Position in the block of its ``number``-th left-over token."""
    return number // 3 * 128 + 125 + number % 3


@triton.jit
def _scale(tables, block, slab, token, channel, META: tl.constexpr):
    """Load the float32 scales of values; 1 when they are folded into something else."""
    D: tl.constexpr = META[1]
    if META[3] == 2:
        if META[4]:
            index = token // META[5] * D + channel
        else:
            index = token * (D // META[5]) + channel // META[5]
        base = _scales(tables, block, slab, META)
        result = tl.load(base + index, mask=channel < D, other=0.0).to(tl.float32)
    else:
        result = 1.0
    return result


@triton.jit
def _scales(tables, block, slab, META: tl.constexpr):
    """Point to the scales of one head's block."""
    base = tl.load(tables[2] + block).to(tl.pointer_type(tl.float16))
    return base + slab * (META[0] * META[1] // META[5])


@triton.jit
def _folded(tables, block, slab, META: tl.constexpr):
    """Load the scales that are folded: float32 ``[width]`` (channel) or ``[L]`` (token)."""
    base = _scales(tables, block, slab, META)
    if META[3] == 0:
        channel = tl.arange(0, META[2])
        result = tl.load(base + channel, mask=channel < META[1], other=0.0)
    else:
        result = tl.load(base + tl.arange(0, META[0]))
    return result.to(tl.float32)


@triton.jit
def _values(tables, block, slab, dtype: tl.constexpr, META: tl.constexpr):
    """Load one head's block ``[L, width]``, scaled unless scales are folded."""
    codes = _codes(tables, block, slab, dtype, META)
    if META[3] == 2:
        token = tl.arange(0, META[0])[:, None]
        scale = _scale(tables, block, slab, token, tl.arange(0, META[2])[None, :], META)
        codes = (codes.to(tl.float32) * scale).to(dtype)
    return codes


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts with one block of keys.

    META: block length L, head size D, the same as a power of two, how scales enter (0 folded per
    channel, 1 folded per token, 2 on every value), granularity is channel, values of a group,
    protected tokens of 128.
    """
    LEFT: tl.constexpr = META[0] // 128 * 3
    dtype: tl.constexpr = query[0].dtype
    wide = query[0].to(tl.float32)
    if META[3] == 0:
        wide *= _folded(tables, block, slab, META)[None, :]
    keys = _values(tables, block, slab, dtype, META)
    result = multiply(wide.to(dtype), tl.trans(keys))
    token = tl.arange(0, META[0])[None, :]
    for number in tl.static_range(0, LEFT):
        alone = tl.sum(wide * _tail(tables, block, slab, number, META)[None, :], 1)
        result += tl.where(token == _place(number), alone[:, None], 0.0)
    if META[3] == 1:
        result *= _folded(tables, block, slab, META)[None, :]
    if META[6] > 0:
        result = add_scores(tables, block, slab, query, result, 3, META[6], META[1], META[1])
    return result


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` (float32) times one block of values to the output parts."""
    LEFT: tl.constexpr = META[0] // 128 * 3
    whole = weights
    if META[3] == 1:
        weights *= _folded(tables, block, slab, META)[None, :]
    values = _values(tables, block, slab, dtype, META)
    total = tl.zeros_like(output[0]) if META[3] == 0 else output[0]
    total = multiply_add(weights.to(dtype), values, total)
    token = tl.arange(0, META[0])[None, :]
    for number in tl.static_range(0, LEFT):
        weight = tl.sum(tl.where(token == _place(number), weights, 0.0), 1)
        total += weight[:, None] * _tail(tables, block, slab, number, META)[None, :]
    if META[3] == 0:
        total = output[0] + total * _folded(tables, block, slab, META)[None, :]
    result = (total,)
    if META[6] > 0:
        result = add_values(tables, block, slab, whole, result, 3, META[6], META[1], META[1])
    return result
