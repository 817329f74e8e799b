"""Triton: list chosen columns and block diagonals for every query block."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _prepare(
    columns, distances, before, covered, V, S, blocks, size,
    WIDTH: tl.constexpr, TILE: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Count the columns before each block of one head, and mark the distances that it reads."""
    program = tl.program_id(0).to(tl.int64)
    own = covered + program * (blocks + 1)
    for first in range(0, blocks + 1, TILE):
        block = first + tl.arange(0, TILE)
        inside = block <= blocks
        low = tl.zeros((TILE,), tl.int32)
        high = low + V
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            open = low < high
            column = tl.load(columns + program * V + middle, mask=inside & open, other=0)
            less = open & (column.to(tl.int32) < block * size)
            low = tl.where(less, middle + 1, low)
            high = tl.where(open & (less == 0), middle, high)
        tl.store(before + program * (blocks + 1) + block, low, mask=inside)
        tl.store(own + block, tl.zeros((TILE,), tl.uint8), mask=inside)
    tl.debug_barrier()
    s = tl.arange(0, WIDTH)
    distance = tl.load(distances + program * S + s, mask=s < S, other=0).to(tl.int32)
    tl.store(own + distance, tl.full((WIDTH,), 1, tl.uint8), mask=s < S)


@triton.jit
def _count(
    distances, before, lengths, counts, heads, S, first, blocks, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the blocks and the columns of a tile of query blocks.

    ``before`` holds how many columns lie before each block. A query block lists all before its own
    but those of the blocks that its diagonals read.
    """
    program = tl.program_id(1).to(tl.int64)
    rows = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < blocks
    ends = before + program * (blocks + 1)
    listed = tl.full((ROWS,), 1, tl.int32)
    columns = tl.zeros((ROWS,), tl.int32)
    if COLUMNS:
        columns = tl.load(ends + rows, mask=inside, other=0).to(tl.int32)
    for s in range(S):
        away = rows - tl.load(distances + program * S + s).to(tl.int32)
        found = inside & (away >= 0)
        listed += (away > 0).to(tl.int32)
        if COLUMNS:
            own = tl.load(ends + away, mask=found & (away < rows), other=0).to(tl.int32)
            after = tl.load(ends + away + 1, mask=found & (away < rows), other=0).to(tl.int32)
            columns -= after - own
    real = rows * size < tl.load(lengths + program // heads).to(tl.int32)
    place = counts + program * blocks + rows
    tl.store(place, tl.where(real, listed, 0), mask=inside)
    if COLUMNS:
        place += tl.num_programs(1).to(tl.int64) * blocks
        tl.store(place, tl.where(real, columns, 0), mask=inside)


@triton.jit
def _write(
    columns, distances, covered, before, offsets, block_ids, column_ids,
    V, S, first, blocks, size, block_capacity, column_capacity,
    WIDTH: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one query block's ids behind those of the query blocks before."""
    program = tl.program_id(1).to(tl.int64)
    row = first + tl.program_id(0)
    place = offsets + program * (blocks + 1) + row
    begin = tl.load(place)
    if tl.load(place + 1) > begin:
        s = tl.arange(0, WIDTH)
        away = row - tl.load(distances + program * S + s, mask=s < S, other=blocks).to(tl.int32)
        keep = away > 0
        slots = begin + tl.cumsum(keep.to(tl.int32), 0)  # block 0 takes the first
        target = block_ids + program * block_capacity
        tl.store(target + slots, away, mask=keep)
        tl.store(target + begin, 0)
    if COLUMNS:
        place += tl.num_programs(1).to(tl.int64) * (blocks + 1)
        begin = tl.load(place)
        if tl.load(place + 1) > begin:
            target = column_ids + program * column_capacity
            number = tl.load(before + program * (blocks + 1) + row).to(tl.int32)
            for v in range(0, number, TILE):
                own = v + tl.arange(0, TILE)
                ids = tl.load(columns + program * V + own, mask=own < number, other=0)
                away = row - (ids // size).to(tl.int32)
                read = tl.load(covered + program * (blocks + 1) + away, mask=own < number, other=1)
                keep = read == 0
                slots = begin + tl.cumsum(keep.to(tl.int32), 0) - 1
                tl.store(target + slots, ids.to(tl.int32), mask=keep)
                begin += tl.sum(keep.to(tl.int32), 0)


@functools.lru_cache(maxsize=256)
def _capacities(first: int, blocks: int, V: int, S: int, size: int) -> tuple[int, int]:
    """Return the most blocks and columns that one head can list; every layer asks the same."""
    rows = range(first, blocks)
    return sum(min(row, S) + 1 for row in rows), sum(min(V, max(0, row - 1) * size) for row in rows)


def list_lines(
    columns: Tensor, distances: Tensor, lengths: Tensor, size: int, blocks: int, first: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Launch; arguments and results are those of ``api.list_lines``."""
    B, H, V = columns.shape
    S, device, several = distances.shape[-1], columns.device, 2 if V else 1
    distances, columns = distances.contiguous(), columns.contiguous()
    before = torch.empty(B, H, blocks + 1, dtype=torch.int32, device=device)
    covered = torch.empty(B, H, blocks + 1, dtype=torch.uint8, device=device)
    if V:
        _prepare[(B * H,)](
            columns, distances, before, covered, V, S, blocks, size,
            WIDTH=triton.next_power_of_2(S), TILE=512, HALVINGS=V.bit_length(), num_warps=4,
        )  # fmt: skip
    # One piece of memory: counts behind offsets.
    offsets, counts = torch.zeros(
        several * B * H * (2 * blocks + 1), dtype=torch.int32, device=device
    ).split((several * B * H * (blocks + 1), several * B * H * blocks))
    offsets = offsets.view(several, B, H, blocks + 1)
    counts = counts.view(several, B, H, blocks)
    rows = blocks - first
    _count[(triton.cdiv(rows, 64), B * H)](
        distances, before, lengths, counts, H, S, first, blocks, size, ROWS=64, COLUMNS=V > 0,
        num_warps=2,
    )  # fmt: skip
    torch.cumsum(counts, -1, dtype=torch.int32, out=offsets[..., 1:])
    block_capacity, column_capacity = _capacities(first, blocks, V, S, size)
    block_ids = torch.empty(B, H, block_capacity, dtype=torch.int32, device=device)
    column_ids = torch.empty(B, H, column_capacity if V else 0, dtype=torch.int32, device=device)
    _write[(rows, B * H)](
        columns, distances, covered, before, offsets, block_ids, column_ids,
        V, S, first, blocks, size, block_capacity, column_capacity,
        WIDTH=max(32, triton.next_power_of_2(S)), TILE=1024, COLUMNS=V > 0, num_warps=4,
    )  # fmt: skip
    return offsets[0], block_ids, offsets[1] if V else None, column_ids if V else None
