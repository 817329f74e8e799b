"""The product of a block with its head's matrix, computed by the kernel that encodes it."""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from squeeze.kernels.kv_encode.layout import DEPTH, LEAST_COLUMNS, Range, columns

# Columns of a program: with few blocks so few that PROGRAMS of them run side by side, and never
# more than keep VALUES in registers.
MOST, PROGRAMS, VALUES = 64, 128, 8192
WARPS, STAGES = 8, 4


class Product(NamedTuple):
    """How a program multiplies.

    Attributes:
        items: Columns, within one range and one group.
        constants: Compile-time arguments.
        warps: Warps.
    """

    items: int
    constants: dict[str, int]
    warps: int


def describe(part: Range, slabs: int, length: int, head_dim: int, count: int) -> Product:
    """Choose the columns of a program for ``count`` groups in a head's range; more blocks, more."""
    most = VALUES // length // (2 if part.bits in (1, 3) else 1)
    wanted = triton.next_power_of_2(max(1, slabs * count // PROGRAMS))
    items = min(max(LEAST_COLUMNS, wanted), MOST, max(LEAST_COLUMNS, most), columns(part))
    return Product(items, {"HEAD": head_dim, "DEPTH": DEPTH, "STAGES": STAGES}, WARPS)


@triton.jit
def rotated(
    x,
    matrix,
    token,
    channel,
    stride,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
    ITEMS: tl.constexpr,
    HEAD: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply FIELDS rectangles of tokens ``[MEMBERS, HEAD]`` by the same columns of a matrix.

    Float32 without tensor cores: a product is added to a sum with one rounding, in the channels'
    order, so a result depends neither on the tile sizes nor on the number of blocks.

    Args:
        x: The head's block, rows of HEAD adjacent channels, ``stride`` apart.
        matrix: The head's, float32 ``[HEAD, HEAD]``, from the range's first column on.
        token: First rectangle's tokens ``[MEMBERS, 1]``; the others are ROWS further each.
        channel: Columns ``[1, ITEMS]``.
    Returns:
        A tuple of FIELDS tiles, float32 ``[MEMBERS, ITEMS]``.
    """
    tiles = ()
    for _ in tl.static_range(FIELDS):
        tiles = tiles + (tl.zeros([MEMBERS, ITEMS], tl.float32),)  # type: ignore[assignment]
    for first in tl.range(0, HEAD, DEPTH, num_stages=STAGES):
        depth = first + tl.arange(0, DEPTH)
        factors = tl.load(matrix + depth[:, None] * HEAD + channel)
        sums = ()
        for field in tl.static_range(FIELDS):
            places = (token + field * ROWS).to(tl.int64) * stride + depth[None, :]
            values = tl.load(x + places).to(tl.float32)
            total = tl.dot(values, factors, tiles[field], input_precision="ieee")
            sums = sums + (total,)  # type: ignore[assignment]
        tiles = sums
    return tiles
