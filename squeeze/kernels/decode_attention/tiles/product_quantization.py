"""Tile functions of ``product_quantization``: centroids are gathered from a codebook in the cache.

Channel range ``i`` of a head holds component ``i`` of every sub-vector, so a range's tile is one
gather by the codes of the block. The codebook of a head stays in the processor's first-level cache;
no dense copy of the keys or values is written.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply, multiply_add

COMPONENTS = ("codes",)
PARAMETERS = ("codebook",)


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts but for the number of KV heads: see the names in ``score``."""
    _, count, width = parts(format, head_dim)
    return (format.bits, length, count, width, format.subvector)


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: count, channels, power of two."""
    count = head_dim // format.subvector
    return (format.subvector, count, max(16, triton.next_power_of_2(count)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows."""
    return 2


@triton.jit
def _plane(base, token, column, inside, LOW: tl.constexpr, WIDTH: tl.constexpr, META: tl.constexpr):
    """Read the plane of WIDTH bits that begins at bit LOW of the codes: ``[L, M]``."""
    ROWS: tl.constexpr = META[1] * WIDTH // 32
    FIRST: tl.constexpr = META[1] * LOW // 32
    words = tl.load(base + (FIRST + token % ROWS) * META[2] + column, mask=inside, other=0)
    fields = (words >> (token // ROWS * WIDTH)) & (2**WIDTH - 1)
    return fields << LOW


@triton.jit
def _codes(tables, block, slab, META: tl.constexpr):
    """Read one head's codes, int32 ``[L, width]``, and which of them exist."""
    BITS: tl.constexpr = META[0]
    LENGTH: tl.constexpr = META[1]
    COUNT: tl.constexpr = META[2]
    token = tl.arange(0, LENGTH)[:, None]
    column = tl.arange(0, META[3])[None, :]
    inside = (token >= 0) & (column < COUNT)
    if BITS == 8:
        bytes = tl.load(tables[0] + block).to(tl.pointer_type(tl.uint8)) + slab * (LENGTH * COUNT)
        codes = tl.load(bytes + token * COUNT + column, mask=inside, other=0).to(tl.int32)
    else:
        size: tl.constexpr = LENGTH * BITS // 32 * COUNT
        base = tl.load(tables[0] + block).to(tl.pointer_type(tl.int32)) + slab * size
        codes = _plane(base, token, column, inside, 0, 4, META)
        if BITS >= 6:
            codes |= _plane(base, token, column, inside, 4, 2, META)
        if BITS % 2:
            codes |= _plane(base, token, column, inside, BITS - 1, 1, META)
    return codes, inside


@triton.jit
def _places(tables, block, slab, META: tl.constexpr):
    """Point at the first component of every centroid of a block ``[L, width]``."""
    codes, inside = _codes(tables, block, slab, META)
    head = (slab % META[5]).to(tl.int32) * 2 ** META[0]
    column = tl.arange(0, META[3])[None, :]
    return tables[1] + ((head + codes) * META[2] + column) * META[4], inside


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts (model dtype) with one block of keys.

    META: bits of a code, block length L, sub-vectors, the same as a power of two, channels of a
    sub-vector, KV heads.
    """
    COUNT: tl.constexpr = len(query)
    places, inside = _places(tables, block, slab, META)
    LENGTH: tl.constexpr = META[1]
    result = tl.zeros((query[0].shape[0], LENGTH), tl.float32)
    for part in tl.static_range(0, COUNT):
        tile = tl.load(places + part, mask=inside, other=0.0)
        result += multiply(query[part], tl.trans(tile).to(query[part].dtype))
    return result


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` (float32) times one block of values to the output parts."""
    COUNT: tl.constexpr = len(output)
    places, inside = _places(tables, block, slab, META)
    operand = weights.to(dtype)
    result = ()
    for part in tl.static_range(0, COUNT):
        tile = tl.load(places + part, mask=inside, other=0.0).to(dtype)
        result = result + (multiply_add(operand, tile, output[part]),)
    return result
