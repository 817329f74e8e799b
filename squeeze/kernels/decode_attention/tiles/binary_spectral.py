"""Tile functions of ``binary_spectral``: channel ranges as wide as the 2-bit part.

The query arrives in the format's basis. Range 0 holds the 2-bit channels, every other range 1-bit
coefficients, whose bit ``b`` is the number ``b * 2 s - s``: both are ``code * step + zero``.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply_add
from squeeze.kernels.decode_attention.protected import COMPONENTS as PROTECTED
from squeeze.kernels.decode_attention.protected import add_scores, add_values

COMPONENTS = ("codes", "signs", "scale", "zero", *PROTECTED)
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: see the names in ``score``."""
    _, wide, width = parts(format, head_dim)
    return (length, head_dim, wide, width, format.group_size, format.protected)


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: count, channels, power of two."""
    wide = int(format.outliers * head_dim)
    return (head_dim // wide, wide, max(16, triton.next_power_of_2(wide)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows."""
    return 2


@triton.jit
def _codes(tables, block, slab, part: tl.constexpr, META: tl.constexpr):
    """Load one range's codes ``[L, width]`` as float32 numbers 0 to 3, or 0 and 1."""
    LENGTH: tl.constexpr = META[0]
    BITS: tl.constexpr = 2 if part == 0 else 1
    COLUMNS: tl.constexpr = META[2] if part == 0 else META[1] - META[2]
    FIRST: tl.constexpr = 0 if part == 0 else (part - 1) * META[2]
    ROWS: tl.constexpr = LENGTH * BITS // 8
    base = tl.load(tables[1 if part > 0 else 0] + block).to(tl.pointer_type(tl.uint8))
    base += slab * (ROWS * COLUMNS) + FIRST
    token = tl.arange(0, LENGTH)[:, None]
    channel = tl.arange(0, META[3])[None, :]
    packed = tl.load(base + token % ROWS * COLUMNS + channel, mask=channel < META[2], other=0)
    code = (packed.to(tl.int32) >> (token // ROWS * BITS)) & (2**BITS - 1)
    # 2**23 + code in float32.
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _constants(table, block, slab, part: tl.constexpr, COLUMNS: tl.constexpr, META: tl.constexpr):
    """Load one range's float16 constants as float32, ``[1 or L, width]``."""
    GROUPS: tl.constexpr = META[0] // META[4]
    TOKENS: tl.constexpr = 1 if GROUPS == 1 else META[0]
    group = tl.arange(0, TOKENS)[:, None] // META[4]
    channel = tl.arange(0, META[3])[None, :]
    base = tl.load(table + block).to(tl.pointer_type(tl.float16)) + slab * (GROUPS * COLUMNS)
    places = base + group * COLUMNS + part * META[2] + channel
    return tl.load(places, mask=channel < META[2], other=0.0).to(tl.float32)


@triton.jit
def _values(tables, block, slab, part: tl.constexpr, dtype: tl.constexpr, META: tl.constexpr):
    """Load one range of one head's block, ``[L, width]``."""
    codes = _codes(tables, block, slab, part, META)
    scale = _constants(tables[2], block, slab, part, META[1], META)
    if part == 0:
        values = codes * scale + _constants(tables[3], block, slab, 0, META[2], META)
    else:
        values = codes * (2.0 * scale) - scale
    return values.to(dtype)


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts with one block of keys.

    META: block length L, head size D, channels of a range, the same as a power of two, tokens
    sharing constants, protected tokens of 128.
    """
    COUNT: tl.constexpr = len(query)
    LENGTH: tl.constexpr = META[0]
    result = tl.zeros((query[0].shape[0], LENGTH), tl.float32)
    for part in tl.static_range(0, COUNT):
        keys = _values(tables, block, slab, part, query[part].dtype, META)
        result = multiply_add(query[part], tl.trans(keys), result)
    if META[5] > 0:
        result = add_scores(tables, block, slab, query, result, 4, META[5], META[1], META[2])
    return result


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` (float32) times one block of values to the output parts."""
    COUNT: tl.constexpr = len(output)
    result = ()
    for part in tl.static_range(0, COUNT):
        values = _values(tables, block, slab, part, dtype, META)
        result = result + (multiply_add(weights.to(dtype), values, output[part]),)
    if META[5] > 0:
        result = add_values(tables, block, slab, weights, result, 4, META[5], META[1], META[2])
    return result
