"""Triton: count the queries of a block that are routed to each chunk of keys."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

GATES = 32768  # of the queries to one product, held in registers
TILE = 64  # queries to one product, at most
DEPTH = 32  # channels of one product, half as many of fewer queries


@triton.jit
def _gates(
    q_rows, q_t, q_d, k_rows, k_part, rows, width,
    D: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply TILE queries with the parts that the means were split into, ``[TILE, COLUMNS]``.

    Hopper multiplies 64 rows at a time: fewer queries stand for the columns of the product.
    """
    columns = tl.arange(0, COLUMNS)
    if TILE < 64:
        gates = tl.zeros((COLUMNS, TILE), tl.float32)
    else:
        gates = tl.zeros((TILE, COLUMNS), tl.float32)
    for step in range(PARTS * (WIDE // DEPTH)):
        channels = step // PARTS * DEPTH + tl.arange(0, DEPTH)
        inside = (channels < D)[None, :]
        q = tl.load(q_rows + rows[:, None] * q_t + channels[None, :] * q_d, mask=inside, other=0.0)
        pointers = k_rows + step % PARTS * k_part + columns[:, None] * D + channels[None, :]
        k = tl.load(pointers, mask=(columns < width)[:, None] & inside, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        if TILE < 64:
            gates = tl.dot(k, tl.trans(q), gates, input_precision="ieee")
        else:
            gates = tl.dot(q, tl.trans(k), gates, input_precision="ieee")
    if TILE < 64:
        gates = tl.trans(gates)
    return gates


@triton.jit
def _threshold(gates, visible, number):
    """Find the gate from which on ``number`` of a row are taken, or all that are visible.

    Halving the range of each row ends where that many are left, or where no number lies between
    the ends: then what equals the lower one is more than there is room for.

    Returns:
        The gate, and how many of those that equal it are taken at most, by row.
    """
    low = tl.min(tl.where(visible, gates, 3e38), 1)  # no infinity: it has no middle
    top = tl.max(tl.where(visible, gates, -3e38), 1)
    high = top + tl.abs(top) * 1e-6 + 1e-30
    low = tl.where(number > 0, low, 3e38)
    count = tl.sum((gates >= low[:, None]).to(tl.int32), 1)
    middle = low * 0.5 + high * 0.5
    between = (count > number) & (middle > low) & (middle < high)
    while tl.max(between.to(tl.int32), 0) > 0:
        found = tl.sum((gates >= middle[:, None]).to(tl.int32), 1)
        up = between & (found >= number)
        down = between & (found < number)
        low = tl.where(up, middle, low)
        count = tl.where(up, found, count)
        high = tl.where(down, middle, high)
        middle = low * 0.5 + high * 0.5
        between = (count > number) & (middle > low) & (middle < high)
    above = tl.sum((gates > low[:, None]).to(tl.int32), 1)
    return low, tl.where(count > number, number - above, gates.shape[1])


@triton.jit
def _route(
    query, means, real, numbers, out, q_strides, k_strides, real_stride, single, heads, first,
    blocks, width,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, PER_HEAD: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Count, for one block of queries, the votes that each chunk gets."""
    r = blocks - 1 - tl.program_id(0)
    program = tl.program_id(1)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    q_rows = query + b * q_strides[0] + h * q_strides[1]
    k_rows = means + b * k_strides[1] + h // GROUPS * k_strides[2]
    number = tl.load(numbers + h) if PER_HEAD else single
    columns = tl.arange(0, COLUMNS)
    own = (first + r * SIZE) // CHUNK  # of all the block's queries
    visible = (columns < own)[None, :]
    votes = tl.zeros((COLUMNS,), tl.int32)
    for part in range(SIZE // TILE):
        rows = (r * SIZE + part * TILE + tl.arange(0, TILE)).to(tl.int64)
        gates = _gates(
            q_rows, q_strides[2], q_strides[3], k_rows, k_strides[0], rows, tl.minimum(width, own),
            D, WIDE, DEPTH, PARTS, COLUMNS, TILE, UPCAST,
        )  # fmt: skip
        gates = tl.where(visible, gates, -float("inf"))
        low, ties = _threshold(gates, visible, number)
        last = tl.zeros((TILE,), tl.int32) - 1
        equal = tl.zeros((TILE,), tl.int32)
        few = ties < COLUMNS
        # Of too many equals the first are taken.
        while tl.max((few & (equal < ties)).to(tl.int32), 0) > 0:
            same = (gates == low[:, None]) & (columns[None, :] > last[:, None])
            following = tl.min(tl.where(same, columns[None, :], COLUMNS), 1)
            last = tl.where(few & (equal < ties), following, last)
            equal += 1
        last = tl.where(few, last, COLUMNS)
        counted = tl.load(real + b * real_stride + rows) != 0
        taken = (gates > low[:, None]) | (
            (gates == low[:, None]) & (columns[None, :] <= last[:, None])
        )
        taken = taken & visible & counted[:, None]
        votes += tl.sum(taken.to(tl.int32), 0)
    target = out + (program.to(tl.int64) * blocks + r) * width
    tl.store(target + columns, votes.to(tl.float32) / SIZE, mask=columns < width)


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
    """Launch; arguments and results are those of ``api.route_chunks``. One launch.

    Products of bfloat16 queries run on tensor cores, those of others in float32.
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
    (B, H, queries, D), (H_kv, width) = query.shape, parts.shape[2:4]
    columns, wide = max(32, triton.next_power_of_2(width)), max(16, triton.next_power_of_2(D))
    blocks, per_head = queries // size, isinstance(numbers, Tensor)
    tile = min(TILE, GATES // columns)
    out = torch.empty(B, H, blocks, width, dtype=torch.float32, device=query.device)
    _route[(blocks, B * H)](
        query, parts, real, numbers if per_head else None, out,
        query.stride(), parts.stride()[:3], real.stride(0), 0 if per_head else numbers,
        H, first, blocks, width,
        GROUPS=H // H_kv, CHUNK=chunk_size, SIZE=size, D=D, WIDE=wide,
        DEPTH=min(DEPTH * tile // TILE, wide), PARTS=parts.shape[0], PER_HEAD=per_head,
        COLUMNS=columns, TILE=tile,
        UPCAST=query.dtype != torch.bfloat16 or triton.knobs.runtime.interpret,
        num_warps=min(16, max(4, columns // 32)),
    )  # fmt: skip
    return out
