"""Tile functions of ``graded``: one channel range for each width, all read alike.

The query arrives in the format's basis, cut into the same ranges. A range without bits costs
nothing: it adds nothing to a score, and its part of the output stays as it is.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.bits import PLANES
from squeeze.kernels.decode_attention.product import multiply_add

COMPONENTS = ("codes", "scale", "zero")
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: see the names in ``score``."""
    _, wide, width = parts(format, head_dim)
    rows = sum(format.widths) * length // 8
    result = [length, wide, width, format.group_size, format.live, rows]
    first = 0
    for bits in format.widths:
        planes = (8,) if bits == 8 else PLANES.get(bits, ())
        result += [first, *planes, *[0] * (3 - len(planes))]
        first += bits * length // 8
    return tuple(result)


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: count, channels, power of two."""
    wide = head_dim // len(format.widths)
    return (len(format.widths), wide, max(16, triton.next_power_of_2(wide)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows."""
    return 2


@triton.jit
def _plane(base, FIRST: tl.constexpr, BITS: tl.constexpr, META: tl.constexpr):
    """Read the fields of one plane for all tokens: ``[L, width]``."""
    ROWS: tl.constexpr = META[0] * BITS // 8
    token = tl.arange(0, META[0])[:, None]
    channel = tl.arange(0, META[2])[None, :]
    places = (FIRST + token % ROWS) * META[1] + channel
    packed = tl.load(base + places, mask=channel < META[1], other=0)
    return (packed.to(tl.int32) >> (token // ROWS * BITS)) & (2**BITS - 1)


@triton.jit
def _codes(table, block, slab, part: tl.constexpr, META: tl.constexpr):
    """Load one range's codes ``[L, width]`` as float32 numbers."""
    FIRST: tl.constexpr = META[6 + 4 * part]
    LOW: tl.constexpr = META[7 + 4 * part]
    MIDDLE: tl.constexpr = META[8 + 4 * part]
    HIGH: tl.constexpr = META[9 + 4 * part]
    base = tl.load(table + block).to(tl.pointer_type(tl.uint8)) + slab * (META[5] * META[1])
    codes = _plane(base, FIRST, LOW, META)
    if MIDDLE > 0:
        codes |= _plane(base, FIRST + META[0] * LOW // 8, MIDDLE, META) << LOW
    if HIGH > 0:
        first: tl.constexpr = FIRST + META[0] * (LOW + MIDDLE) // 8
        codes |= _plane(base, first, HIGH, META) << (LOW + MIDDLE)
    # 2**23 + code in float32.
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _constants(table, block, slab, part: tl.constexpr, META: tl.constexpr):
    """Load one range's float16 constants as float32, ``[1 or L, width]``."""
    GROUPS: tl.constexpr = META[0] // META[3]
    COLUMNS: tl.constexpr = META[1] * META[4]
    TOKENS: tl.constexpr = 1 if GROUPS == 1 else META[0]
    group = tl.arange(0, TOKENS)[:, None] // META[3]
    channel = tl.arange(0, META[2])[None, :]
    base = tl.load(table + block).to(tl.pointer_type(tl.float16)) + slab * (GROUPS * COLUMNS)
    places = base + group * COLUMNS + part * META[1] + channel
    return tl.load(places, mask=channel < META[1], other=0.0).to(tl.float32)


@triton.jit
def _values(tables, block, slab, part: tl.constexpr, dtype: tl.constexpr, META: tl.constexpr):
    """Load one range of one head's block, ``[L, width]``."""
    codes = _codes(tables[0], block, slab, part, META)
    scale = _constants(tables[1], block, slab, part, META)
    zero = _constants(tables[2], block, slab, part, META)
    return (codes * scale + zero).to(dtype)


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts with one block of keys.

    META: block length L, channels of a range, the same as a power of two, tokens sharing
    constants, ranges with bits, rows of bytes; then of every range its first row and the widths of
    its up to three planes.
    """
    LIVE: tl.constexpr = META[4]
    LENGTH: tl.constexpr = META[0]
    result = tl.zeros((query[0].shape[0], LENGTH), tl.float32)
    for part in tl.static_range(0, LIVE):
        keys = _values(tables, block, slab, part, query[part].dtype, META)
        result = multiply_add(query[part], tl.trans(keys), result)
    return result


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` (float32) times one block of values to the output parts."""
    COUNT: tl.constexpr = len(output)
    result = ()
    for part in tl.static_range(0, COUNT):
        if part < META[4]:
            values = _values(tables, block, slab, part, dtype, META)
            result = result + (multiply_add(weights.to(dtype), values, output[part]),)
        else:
            result = result + (output[part],)
    return result
