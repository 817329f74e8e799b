"""Triton: count the queries of a block that are routed to each chunk of keys.

Gates of some query blocks at a time are multiplied into scratch memory, and one warp per query then
finds which it takes: held by a whole program, they would wait for its slowest query.
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

SCRATCH_BYTES = 1 << 28  # of gates
TILE = 128  # queries and chunks of one product, half as many in float32
DEPTH = 128  # channels of one product, a quarter as many in float32
QUERIES = 16  # to one program that votes


@triton.jit(do_not_specialize=["first", "queries", "width"])
def _gates(
    query, means, gates, q_strides, k_strides, heads, first, queries, width, padded,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply TILE queries with TILE of the means, all parts that those were split into.

    -inf stands for a query's own chunk and those after it.
    """
    begin = tl.program_id(0) * TILE
    column = tl.program_id(1) * TILE
    program = tl.program_id(2)
    rows = (begin + tl.arange(0, TILE)).to(tl.int64)
    columns = (column + tl.arange(0, TILE)).to(tl.int64)
    found = tl.zeros((TILE, TILE), tl.float32)
    if column < (first + tl.minimum(begin + TILE, queries) - 1) // CHUNK:
        b = (program // heads).to(tl.int64)
        h = (program % heads).to(tl.int64)
        q_rows = query + b * q_strides[0] + h * q_strides[1] + rows[:, None] * q_strides[2]
        k_rows = means + b * k_strides[1] + h // GROUPS * k_strides[2] + columns[:, None] * D
        for channel in tl.static_range(0, WIDE, DEPTH):
            channels = (channel + tl.arange(0, DEPTH))[None, :]
            inside = channels < D
            there = (rows < queries)[:, None] & inside
            q = tl.load(q_rows + channels * q_strides[3], mask=there, other=0.0)
            if UPCAST:
                q = q.to(tl.float32)
            for part in range(PARTS):
                pointers = k_rows + part * k_strides[0] + channels
                k = tl.load(pointers, mask=(columns < width)[:, None] & inside, other=0.0)
                if UPCAST:
                    k = k.to(tl.float32)
                found = tl.dot(q, tl.trans(k), found, input_precision="ieee")
    own = (first + begin + tl.arange(0, TILE)) // CHUNK
    found = tl.where((column + tl.arange(0, TILE))[None, :] < own[:, None], found, -float("inf"))
    target = gates + (program.to(tl.int64) * queries + rows)[:, None] * padded + columns[None, :]
    tl.store(target, found, mask=(rows < queries)[:, None])


@triton.jit
def _threshold(gates, number):
    """Find the gate from which on ``number`` of a query are taken, or all that are not -inf.

    Halving the range ends where that many are left, or where no number lies between the ends: then
    what equals the lower one is more than there is room for.

    Returns:
        The gate, and how many are at least as large.
    """
    low = tl.min(tl.where(gates > -3e38, gates, 3e38), 0)  # no infinity: it has no middle
    top = tl.maximum(tl.max(gates, 0), -3e38)
    high = top + tl.abs(top) * 1e-6 + 1e-30
    low = tl.where(number > 0, low, 3e38)
    count = tl.sum((gates >= low).to(tl.int32), 0)
    middle = low * 0.5 + high * 0.5
    while (count > number) & (middle > low) & (middle < high):
        found = tl.sum((gates >= middle).to(tl.int32), 0)
        up = found >= number
        low = tl.where(up, middle, low)
        count = tl.where(up, found, count)
        high = tl.where(up, high, middle)
        middle = low * 0.5 + high * 0.5
    return low, count


@triton.jit(do_not_specialize=["queries", "start", "width"])
def _vote(
    gates, real, numbers, out, real_stride, single, heads, queries, padded, start, blocks, width,
    SIZE: tl.constexpr, PER_HEAD: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Count, for QUERIES queries of one block, the votes that each chunk gets, and add them."""
    begin = tl.program_id(0) * QUERIES
    program = tl.program_id(1)
    number = tl.load(numbers + program % heads) if PER_HEAD else single
    columns = tl.arange(0, COLUMNS)
    rows = gates + (program.to(tl.int64) * queries + begin) * padded
    marks = real + (program // heads).to(tl.int64) * real_stride + start * SIZE + begin
    votes = tl.zeros((COLUMNS,), tl.int32)
    for row in range(QUERIES):
        if tl.load(marks + row) != 0:
            found = tl.load(
                rows + row * padded + columns, mask=columns < padded, other=-float("inf")
            )
            low, count = _threshold(found, number)
            taken = found >= low
            if count > number:  # of too many equals the first are taken
                last = -1
                for _ in range(number - tl.sum((found > low).to(tl.int32), 0)):
                    following = (found == low) & (columns > last)
                    last = tl.min(tl.where(following, columns, COLUMNS), 0)
                taken = (found > low) | (taken & (columns <= last))
            votes += taken.to(tl.int32)
    target = out + (program.to(tl.int64) * blocks + start + begin // SIZE) * width
    # Shares are multiples of 1 / SIZE: their sums are exact in any order.
    tl.atomic_add(target + columns, votes.to(tl.float32) / SIZE, mask=votes > 0, sem="relaxed")


def split(means: Tensor, dtype: torch.dtype) -> Tensor:
    """Write float32 means as a sum of bfloat16 parts for queries of that type, ``[parts, ...]``.

    Three parts have all 24 bits, and their products with bfloat16 are exact in float32.
    """
    if dtype != torch.bfloat16:
        return means[None].contiguous()
    parts = []
    for _ in range(3):
        parts.append(means.bfloat16())
        means = means - parts[-1]
    return torch.stack(parts)


def route_chunks(
    query: Tensor,
    means: Tensor,
    real: Tensor,
    number: float | Tensor,
    most: int,
    chunk_size: int,
    size: int,
    first: int,
) -> Tensor:
    """Launch; arguments and results are those of ``api.route_chunks``.

    Two launches per 256 MiB of gates. Products of bfloat16 queries run on tensor cores, those of
    others in float32.
    """
    numbers = number.ceil().int().contiguous() if isinstance(number, Tensor) else ceil(number)
    parts, marks = split(means, query.dtype), real.contiguous().view(torch.uint8)
    return launch(query, parts, marks, numbers, chunk_size, size, first)


def launch(
    query: Tensor,
    parts: Tensor,
    real: Tensor,
    numbers: int | Tensor,
    chunk_size: int,
    size: int,
    first: int,
) -> Tensor:
    """Launch, with what ``split`` returned, marks as uint8, and numbers of heads as int32."""
    (B, H), blocks = query.shape[:2], query.shape[2] // size
    out = torch.zeros(B, H, blocks, parts.shape[3], dtype=torch.float32, device=query.device)
    stop = blocks
    while stop > 0:
        # Fewer chunks concern the blocks before: later ones make what all have room for.
        width = min(parts.shape[3], -(-(first + stop * size) // chunk_size))
        padded = triton.cdiv(width, TILE) * TILE
        start = max(0, stop - max(1, SCRATCH_BYTES // (4 * B * H * size * padded)))
        part = query[:, :, start * size : stop * size]
        gates = _multiply(part, parts, chunk_size, first + start * size, width, padded)
        per_head, columns = isinstance(numbers, Tensor), max(32, triton.next_power_of_2(width))
        _vote[(part.shape[2] // QUERIES, B * H)](
            gates, real, numbers if per_head else None, out,
            real.stride(0), 0 if per_head else numbers, H, part.shape[2], padded, start,
            blocks, parts.shape[3],
            SIZE=size, PER_HEAD=per_head, COLUMNS=columns, QUERIES=QUERIES, num_warps=1,
        )  # fmt: skip
        stop = start
    return out


def _multiply(
    query: Tensor, parts: Tensor, chunk_size: int, first: int, width: int, padded: int
) -> Tensor:
    """Return the gates of queries and the first ``width`` means, ``[B, H, queries, padded]``."""
    (B, H, queries, D), wide = query.shape, max(16, triton.next_power_of_2(query.shape[3]))
    half = query.dtype == torch.bfloat16
    tile, depth = (TILE, DEPTH) if half else (TILE // 2, DEPTH // 4)
    gates = torch.empty(B, H, queries, padded, dtype=torch.float32, device=query.device)
    _gates[(triton.cdiv(queries, tile), triton.cdiv(padded, tile), B * H)](
        query, parts, gates, query.stride(), parts.stride()[:3], H, first, queries, width, padded,
        GROUPS=H // parts.shape[2], CHUNK=chunk_size, D=D, WIDE=wide, DEPTH=min(depth, wide),
        PARTS=parts.shape[0], TILE=tile, UPCAST=not half or triton.knobs.runtime.interpret,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return gates
