"""Tile functions of ``affine``: codes are expanded to the model's dtype as they are loaded.

This is the form that runs everywhere and takes every option. Short calls over whole blocks of the
common options go to ``kernels/decode_attention/gluon.py``, which reads the same bytes.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply, multiply_add

COMPONENTS = ("codes", "scale", "zero")
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: see the names in ``_load``."""
    channel = format.granularity == "channel"
    width = max(16, triton.next_power_of_2(head_dim))
    return (
        format.bits,
        int(channel),
        int(format.symmetric),
        length,
        head_dim,
        width,
        format.group_size,
    )


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: one."""
    return (1, head_dim, max(16, triton.next_power_of_2(head_dim)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows."""
    return 2


@triton.jit
def _plane(base, tokens, columns, FIRST: tl.constexpr, BITS: tl.constexpr, META: tl.constexpr):
    """Read the fields of one plane for all tokens: ``[L, width]``; garbage past D."""
    ROWS: tl.constexpr = META[3] * BITS // 8
    places = (FIRST + tokens % ROWS)[:, None] * META[4] + columns[None, :]
    if META[4] == META[5]:
        bytes = tl.load(base + places)
    else:
        bytes = tl.load(base + places, mask=columns[None, :] < META[4], other=0)
    return (bytes.to(tl.int32) >> (tokens // ROWS * BITS)[:, None]) & (2**BITS - 1)


@triton.jit
def _constants(table, block, slab, tokens, columns, META: tl.constexpr):
    """Load scales or zeros as float32, one for every value: ``[L, width]``."""
    D: tl.constexpr = META[4]
    GROUP: tl.constexpr = META[6]
    half: tl.constexpr = tl.pointer_type(tl.float16)
    base = tl.load(table + block).to(half) + slab * (META[3] * D // GROUP)
    if META[1]:
        places = (tokens // GROUP)[:, None] * D + columns[None, :]
    else:
        places = tokens[:, None] * (D // GROUP) + (columns // GROUP)[None, :]
    return tl.load(base + places, mask=columns[None, :] < D, other=0.0).to(tl.float32)


@triton.jit
def _load(tables, block, slab, dtype: tl.constexpr, META: tl.constexpr):
    """Decode one head's block ``[L, width]``, zero past D.

    META: bits, granularity is channel, symmetric, block length L, head size D, the same rounded up
    to a power of two, group size.
    """
    BITS: tl.constexpr = META[0]
    LENGTH: tl.constexpr = META[3]
    D: tl.constexpr = META[4]
    tokens = tl.arange(0, LENGTH)
    columns = tl.arange(0, META[5])
    address = tl.load(tables[0] + block).to(tl.pointer_type(tl.uint8))
    base = tl.multiple_of(address, 16) + slab * (LENGTH * BITS // 8 * D)
    if BITS == 3:
        codes = _plane(base, tokens, columns, 0, 2, META)
        codes |= _plane(base, tokens, columns, LENGTH // 4, 1, META) << 2
    else:
        codes = _plane(base, tokens, columns, 0, BITS, META)
    scale = _constants(tables[1], block, slab, tokens, columns, META)
    if META[2]:
        values = (codes.to(tl.float32) - 2.0 ** (BITS - 1)) * scale
    else:
        zero = _constants(tables[2], block, slab, tokens, columns, META)
        values = codes.to(tl.float32) * scale + zero
    return values.to(dtype)


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts with one block of keys."""
    keys = _load(tables, block, slab, query[0].dtype, META)
    return multiply(query[0], tl.trans(keys))


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` times one block of values to the output parts."""
    values = _load(tables, block, slab, dtype, META)
    return (multiply_add(weights.to(dtype), values, output[0]),)
