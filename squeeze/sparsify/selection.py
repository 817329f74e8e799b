"""How prefill policies turn weights of blocks into lists.

They work through the query blocks in segments, so that the scratch memory is bounded and what is
kept grows with the selection, not with the square of the blocks. Nothing waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeeze.sparsify.estimate import later
from squeeze.sparsify.index import compact_segments
from squeeze.types import BlockIndex

# Bytes that one segment of query blocks may take while it is scored and sorted.
SCRATCH_BYTES = 1 << 28
# Scores, sorted values and ids, running sums and slots of one pair of blocks.
PAIR_BYTES = 48
# Blocks that every query block may list, however small the share it is granted.
LEAST_BLOCKS = 16


def per_head(single: float, heads: Sequence[float], query: Tensor) -> float | Tensor:
    """Return one number for all heads, or float32 ``[H, 1, 1]`` where each has its own.

    Raises:
        ValueError: there are not as many numbers as query heads.
    """
    if not heads:
        return single
    if len(heads) != query.shape[1]:
        raise ValueError(f"{len(heads)} budgets for {query.shape[1]} query heads")
    return _constant(tuple(heads), query.device)[:, None, None]


@functools.lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    # A copy to a GPU waits for it; each layer's numbers are copied once.
    return torch.tensor(values, device=device)


def segments(blocks: int, row_bytes: int, first: int = 0) -> Iterator[range]:
    """Split the query blocks from ``first`` on: each part takes about ``SCRATCH_BYTES``."""
    step = max(1, SCRATCH_BYTES // max(1, row_bytes))
    for start in range(first, blocks, step):
        yield range(start, min(start + step, blocks))


def budget(row: int, share: float, least: int = LEAST_BLOCKS) -> int:
    """Return how many blocks query block ``row`` may list: a share of those it may read."""
    return min(row + 1, max(least, math.ceil(share * (row + 1))))


def list_blocks(
    weigh: Callable[[range], Tensor],
    lengths: Tensor,
    size: int,
    blocks: int,
    *,
    heads: int,
    first: int = 0,
    share: float = 1.0,
    least: int = LEAST_BLOCKS,
    mass: float | Tensor = 1.0,
    limit: Tensor | None = None,
    floor: Tensor | None = None,
    require: Callable[[range], Tensor] | None = None,
    pair_bytes: int = PAIR_BYTES,
) -> BlockIndex:
    """List, per query block, the blocks of most weight.

    A query block takes block 0 and its own, then what ``require`` marks, then the others by
    falling weight, the nearer of two equals first, until what it took weighs ``mass`` of its row,
    or weights fall below ``floor``, or its budget is spent.

    Args:
        weigh: Gives, for query blocks ``rows``, weights ``[B, H, R, rows.stop]`` in 0..1; what lies
            after a query block's own is ignored.
        lengths: Real tokens of each row, int64 ``[B]``.
        size: Tokens per block.
        blocks: Query blocks, N.
        heads: Query heads, H.
        first: Query block to begin with; those before it list nothing.
        share: Most of the blocks that it may read which a query block may take.
        least: Blocks that a query block may take however small the share.
        mass: Share of a row's weight to reach, one number or float32 ``[H, 1, 1]``; 1 takes
            everything within the budget.
        limit: Most blocks that a query block of each head may take, as a share of those it may
            read, float32 ``[H, 1, 1]`` of at most ``share``; or ``None``.
        floor: Smallest weight to take, broadcastable to ``[B, H, R, C]``, or ``None``.
        require: Marks blocks to take first, bool, broadcastable to ``[B, H, R, rows.stop]``.
        pair_bytes: Scratch memory of one pair of blocks.
    """
    capacity = sum(budget(row, share, least) for row in range(first, blocks))

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in segments(blocks, lengths.shape[0] * heads * blocks * pair_bytes, first):
            own = torch.arange(rows.start, rows.stop, device=lengths.device)
            most = budget(rows.stop - 1, share, least)
            shares = share if limit is None else limit.double().squeeze(-1)  # [H, 1]
            limits = ((own + 1).double() * shares).ceil().clamp(min=least, max=most)
            needed = None if require is None else require(rows)
            keep = _choose(weigh(rows), rows, limits, most, mass, floor, needed)
            real = own * size < lengths[:, None]  # [B, R]
            yield torch.arange(rows.stop, device=keep.device), keep & real[:, None, :, None]

    return BlockIndex(size, *compact_segments(parts(), capacity, first))


def mass_floor(
    weigh: Callable[[range], Tensor],
    lengths: Tensor,
    size: int,
    blocks: int,
    *,
    heads: int,
    mass: float | Tensor,
    first: int = 0,
    begins: Tensor | None = None,
    pair_bytes: int = PAIR_BYTES,
) -> Tensor:
    """Find, per head, the weight from which on blocks hold ``mass`` of the weight of all rows.

    A histogram of weights, 32 bins an octave down to 2^-32, stands in for sorting all pairs; the
    floor is a bin's lower edge, so that a head reads at most one bin more than it needs.

    Args:
        weigh, lengths, size, blocks, heads, first, pair_bytes: As for ``list_blocks``.
        mass: Share of the weight of the whole map, one number or float32 ``[H, 1]``.
        begins: Position of each row's first query, int64 ``[B]``, or ``None`` for 0.
    Returns:
        float32 ``[B, H, 1, 1]``; 0 where every block is needed.
    """
    B, octave, bins = lengths.shape[0], 32, 1024
    shape = (B, heads, bins)
    held = torch.zeros(shape, dtype=torch.int64, device=lengths.device)
    for rows in segments(blocks, B * heads * blocks * pair_bytes, first):
        weights = weigh(rows)
        own = torch.arange(rows.start, rows.stop, device=weights.device)
        hidden = later(rows, weights.shape[-1], weights.device)
        padding = (own * size >= lengths[:, None])[:, None, :, None]
        if begins is not None:
            padding = padding | ((own + 1) * size <= begins[:, None])[:, None, :, None]
        weights = weights.masked_fill(hidden | padding, 0.0).flatten(-2)
        bin_of = (-octave * weights.log2()).clamp(0, bins - 1).long()
        # Integers: sums of floats would depend on the order in which a GPU adds them.
        held.scatter_add_(-1, bin_of, (weights.double() * 2**40).long())
    enough = (held.cumsum(-1) < mass * held.sum(-1, keepdim=True)).sum(-1)  # [B, H], bin
    floor = torch.exp2(-(enough + 1).float() / octave)
    return floor.masked_fill(enough >= bins - 1, 0.0)[..., None, None]


def ranked(weights: Tensor, rows: range, require: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Order the blocks of each query block as ``list_blocks`` takes them.

    Returns:
        Block ids int64 ``[B, H, R, C]``, those after the query block's own last; and a mark of what
        is always taken, bool, broadcastable to it.
    """
    device, C = weights.device, weights.shape[-1]
    own = torch.arange(rows.start, rows.stop, device=device)[:, None]
    always = (torch.arange(C, device=device) == own) | (torch.arange(C, device=device) == 0)
    wanted = always if require is None else always | require
    # Weights reach 1: two more put what is required first, four more block 0 and the diagonal.
    rank = (weights + 2.0 * wanted + 4.0 * always).masked_fill(later(rows, C, device), -1.0)
    backwards = rank.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    return C - 1 - backwards, wanted


def _choose(
    weights: Tensor,
    rows: range,
    limits: Tensor,
    most: int,
    mass: float | Tensor,
    floor: Tensor | None,
    require: Tensor | None,
) -> Tensor:
    """Mark what ``list_blocks`` says, bool ``[B, H, R, C]``."""
    hidden = later(rows, weights.shape[-1], weights.device)
    weights = weights.masked_fill(hidden, 0.0)
    order, wanted = ranked(weights, rows, require)
    order = order[..., :most]
    allowed = torch.arange(most, device=weights.device) < limits[..., None]
    taken = torch.ones_like(order, dtype=torch.bool)
    if isinstance(mass, Tensor) or mass < 1.0:
        sorted_weights = weights.gather(-1, order)
        before = pad(sorted_weights.cumsum(-1)[..., :-1], (1, 0))
        missing = before < mass * weights.sum(-1, keepdim=True)
        taken &= missing | (mass >= 1.0) if isinstance(mass, Tensor) else missing
    if floor is not None:
        taken &= weights.gather(-1, order) >= floor
    taken |= wanted.expand_as(weights).gather(-1, order)
    keep = torch.zeros_like(weights, dtype=torch.bool)
    return keep.scatter_(-1, order, taken & allowed) & ~hidden
