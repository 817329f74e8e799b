"""Tile functions of ``float8``: E4M3 bits are shifted under the operand's own exponent.

An E4M3 number's exponent and fraction, moved into place in a float16, read as the number times
``2**-8``, and in a bfloat16 as the number times ``2**-120``: no conversion instruction is needed,
subnormal numbers included. The missing power of two is multiplied into what stays outside the
tile: for bfloat16 partly into the other operand, so that no product leaves float32's range.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply, multiply_add

COMPONENTS = ("codes", "scale")
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: tokens, channels, the same as a power of two, tokens of a scale."""
    tokens = format.block_length if format.scale == "head" else 1
    return (length, head_dim, max(16, triton.next_power_of_2(head_dim)), tokens)


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: one."""
    return (1, head_dim, max(16, triton.next_power_of_2(head_dim)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows."""
    return 2


@triton.jit
def _values(tables, block, slab, dtype: tl.constexpr, META: tl.constexpr):
    """Load one head's block ``[L, width]`` as numbers times ``2**-8`` or, bfloat16, ``2**-120``."""
    LENGTH: tl.constexpr = META[0]
    D: tl.constexpr = META[1]
    SHIFT: tl.constexpr = 4 if dtype == tl.bfloat16 else 7
    HALF: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    address = tl.load(tables[0] + block).to(tl.pointer_type(tl.uint8))
    base = tl.multiple_of(address, 16) + slab * (LENGTH * D)
    channels = tl.arange(0, META[2])
    offsets = tl.arange(0, LENGTH)[:, None] * D + channels[None, :]
    if META[2] == D:
        codes = tl.load(base + offsets)
    else:
        codes = tl.load(base + offsets, mask=channels[None, :] < D, other=0)
    return _shifted(codes, SHIFT).to(HALF, bitcast=True).to(dtype)


@triton.jit
def _shifted(codes, SHIFT: tl.constexpr):
    """Move the sign of an E4M3 number to bit 15 and the rest SHIFT bits up, as uint16."""
    wide = codes.to(tl.uint16)
    return ((wide & 0x80) << 8) | ((wide & 0x7F) << SHIFT)


@triton.jit
def _scales(tables, block, slab, META: tl.constexpr):
    """Load each token's scale, float32 ``[L]``."""
    half: tl.constexpr = tl.pointer_type(tl.float16)
    scales = tl.load(tables[1] + block).to(half) + slab * (META[0] // META[3])
    return tl.load(scales + tl.arange(0, META[0]) // META[3]).to(tl.float32)


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts with one block of keys.

    META: block length L, head size D, the same as a power of two, tokens sharing a scale.
    """
    dtype: tl.constexpr = query[0].dtype
    IN: tl.constexpr = 2.0**96 if dtype == tl.bfloat16 else 1.0
    OUT: tl.constexpr = 2.0**24 if dtype == tl.bfloat16 else 2.0**8
    keys = _values(tables, block, slab, dtype, META)
    operand = (query[0].to(tl.float32) * IN).to(dtype)
    scales = _scales(tables, block, slab, META) * OUT
    return multiply(operand, tl.trans(keys)) * scales[None, :]


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` (float32) times one block of values to the output parts."""
    IN: tl.constexpr = 2.0**96 if dtype == tl.bfloat16 else 2.0**8
    OUT: tl.constexpr = 2.0**24 if dtype == tl.bfloat16 else 1.0
    values = _values(tables, block, slab, dtype, META)
    scales = _scales(tables, block, slab, META) * IN
    operand = (weights * scales[None, :]).to(dtype)
    if dtype == tl.bfloat16:
        result = output[0] + multiply(operand, values) * OUT
    else:
        result = multiply_add(operand, values, output[0])
    return (result,)
