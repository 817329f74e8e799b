"""Remainders of protected tokens, added to what tile functions made of the coarse codes.

Three components, tables FIRST to FIRST + 2 of a side: of every 128 tokens the positions of COUNT,
their 4-bit remainders, two tokens in a byte, and a scale for each; see ``quant.kv._protected``.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

COMPONENTS = ("kept_at", "kept", "kept_scale")


@triton.jit
def _place(tables, block, slab, number, FIRST: tl.constexpr, COUNT: tl.constexpr, LENGTH):
    """Position in the block of its ``number``-th protected token."""
    base = tl.load(tables[FIRST] + block).to(tl.pointer_type(tl.uint8))
    base += slab * (LENGTH // 128 * COUNT)
    return tl.load(base + number).to(tl.int32) + number // COUNT * 128


@triton.jit
def _remainder(
    tables,
    block,
    slab,
    number,
    part: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    LENGTH: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Load one range of channels of that token's remainder, float32 ``[width]``."""
    channel = tl.arange(0, WIDTH)
    base = tl.load(tables[FIRST + 1] + block).to(tl.pointer_type(tl.uint8))
    base += slab * (LENGTH // 128 * COUNT // 2 * D) + part * CHANNELS
    row = number // COUNT * (COUNT // 2) + number % (COUNT // 2)
    packed = tl.load(base + row * D + channel, mask=channel < CHANNELS, other=0)
    code = (packed.to(tl.int32) >> (number % COUNT // (COUNT // 2) * 4)) & 15
    scales = tl.load(tables[FIRST + 2] + block).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + slab * (LENGTH // 128 * COUNT) + number).to(tl.float32)
    return (code.to(tl.float32) - 7.5) * scale


@triton.jit
def add_scores(
    tables,
    block,
    slab,
    query,
    scores,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add to scores ``[M, L]`` what the remainders make of the query parts, CHANNELS in each."""
    PARTS: tl.constexpr = len(query)
    LENGTH: tl.constexpr = scores.shape[1]
    WIDTH: tl.constexpr = query[0].shape[1]
    token = tl.arange(0, LENGTH)[None, :]
    for number in tl.range(0, LENGTH // 128 * COUNT):
        alone = tl.zeros((scores.shape[0],), tl.float32)
        for part in tl.static_range(0, PARTS):
            row = _remainder(
                tables, block, slab, number, part, FIRST, COUNT, LENGTH, D, CHANNELS, WIDTH
            )
            alone += tl.sum(query[part].to(tl.float32) * row[None, :], 1)
        place = _place(tables, block, slab, number, FIRST, COUNT, LENGTH)
        scores += tl.where(token == place, alone[:, None], 0.0)
    return scores


@triton.jit
def add_values(
    tables,
    block,
    slab,
    weights,
    output,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add weights ``[M, L]`` times the remainders to the output parts, CHANNELS in each."""
    PARTS: tl.constexpr = len(output)
    LENGTH: tl.constexpr = weights.shape[1]
    WIDTH: tl.constexpr = output[0].shape[1]
    token = tl.arange(0, LENGTH)[None, :]
    for number in tl.static_range(0, LENGTH // 128 * COUNT):
        place = _place(tables, block, slab, number, FIRST, COUNT, LENGTH)
        weight = tl.sum(tl.where(token == place, weights, 0.0), 1)
        result = ()
        for part in tl.static_range(0, PARTS):
            row = _remainder(
                tables, block, slab, number, part, FIRST, COUNT, LENGTH, D, CHANNELS, WIDTH
            )
            result = result + (output[part] + weight[:, None] * row[None, :],)
        output = result
    return output
