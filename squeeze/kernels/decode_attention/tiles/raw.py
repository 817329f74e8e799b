"""Tile functions of blocks kept in the model's dtype: component ``x``, ``[L, D]``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply, multiply_add

COMPONENTS = ("x",)
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: tokens, channels, channels rounded up to a power of two."""
    return (length, head_dim, max(16, triton.next_power_of_2(head_dim)))


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: one."""
    return (1, head_dim, max(16, triton.next_power_of_2(head_dim)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows."""
    return 2


@triton.jit
def _load(tables, block, slab, dtype, META: tl.constexpr):
    """Load one head's block ``[L, width]``, zero past D."""
    LENGTH: tl.constexpr = META[0]
    D: tl.constexpr = META[1]
    address = tl.load(tables[0] + block).to(tl.pointer_type(dtype))
    base = tl.multiple_of(address, 16) + slab * (LENGTH * D)
    channels = tl.arange(0, META[2])
    offsets = tl.arange(0, LENGTH)[:, None] * D + channels[None, :]
    if META[2] == D:
        tile = tl.load(base + offsets)
    else:
        tile = tl.load(base + offsets, mask=channels[None, :] < D, other=0.0)
    return tile


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
