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

from squeeze.kernels.prefill_index.api import add_masses, select_blocks
from squeeze.kernels.prefill_index.reference import ranked as ranked
from squeeze.sparsify.estimate import PAIR_BYTES as PAIR_BYTES
from squeeze.sparsify.estimate import Span, pooled_bytes
from squeeze.types import BlockIndex, Implementation

# Bytes that one segment of query blocks may take while it is scored and sorted.
SCRATCH_BYTES = 1 << 28
# Blocks that every query block may list, however small the share it is granted.
LEAST_BLOCKS = 16
# Weights, bins and their integers of one pair of blocks in ``mass_floor``.
FLOOR_BYTES = 20


def per_head(
    single: float, heads: Sequence[float], query: Tensor, dtype: torch.dtype = torch.float32
) -> float | Tensor:
    """Return one number for all heads, or ``[H, 1, 1]`` of ``dtype`` where each has its own.

    Raises:
        ValueError: there are not as many numbers as query heads.
    """
    if not heads:
        return single
    if len(heads) != query.shape[1]:
        raise ValueError(f"{len(heads)} budgets for {query.shape[1]} query heads")
    return _constant(tuple(heads), query.device, dtype)[:, None, None]


@functools.lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # A copy to a GPU waits for it; each layer's numbers are copied once.
    return torch.tensor(values, device=device, dtype=dtype)


def segments(blocks: int, row_bytes: int, first: int = 0) -> Iterator[range]:
    """Split the query blocks from ``first`` on: each part takes about ``SCRATCH_BYTES``."""
    step = max(1, SCRATCH_BYTES // max(1, row_bytes))
    for start in range(first, blocks, step):
        yield range(start, min(start + step, blocks))


def triangle(blocks: int, pair_bytes: int, first: int = 0) -> Iterator[range]:
    """Split the query blocks from ``first`` on where rows ``r`` take ``len(r) * r.stop`` pairs."""
    parts, stop, pairs = [], blocks, SCRATCH_BYTES // max(1, pair_bytes)
    while stop > first:
        parts.append(range(max(first, stop - max(1, pairs // stop)), stop))
        stop = parts[-1].start
    yield from reversed(parts)


def budget(row: int, share: float, least: int = LEAST_BLOCKS, most: int = 0) -> int:
    """Return how many blocks query block ``row`` may list: a share of those it may read.

    At most ``most``, where that is not 0, and at least ``least``.
    """
    blocks = math.ceil(share * (row + 1))
    return min(row + 1, max(least, min(blocks, most or blocks)))


@functools.lru_cache(maxsize=256)
def total_budget(
    first: int, blocks: int, share: float, least: int = LEAST_BLOCKS, most: int = 0
) -> int:
    """Add up the budgets of query blocks ``first`` to ``blocks - 1``; every layer asks the same."""
    return sum(budget(row, share, least, most) for row in range(first, blocks))


def _scaled(
    shares: float | Tensor, first: int, blocks: int, least: int, most: int, device: torch.device
) -> Tensor:
    """Return the budgets of query blocks, int32 ``[blocks - first]``, or ``[H, ...]`` of heads'."""
    rows = torch.arange(first + 1, blocks + 1, device=device).double()
    return (rows * shares).ceil().clamp(min=least, max=most).int()


# Every layer of a prompt asks for the same.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _limits(
    share: float, first: int, blocks: int, least: int, most: int, device: torch.device
) -> Tensor:
    """Return what ``_scaled`` does of one number."""
    return _scaled(share, first, blocks, least, most, device)


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
    most: int = 0,
    mass: float | Tensor = 1.0,
    limit: Tensor | None = None,
    floor: Tensor | None = None,
    require: Callable[[range], Tensor] | None = None,
    pair_bytes: int = PAIR_BYTES,
    implementation: Implementation = Implementation.REFERENCE,
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
        most: Blocks that a query block may take however many it may read; 0: no such bound.
        mass: Share of a row's weight to reach, one number or float32 ``[H, 1, 1]``; 1 takes
            everything within the budget.
        limit: Most blocks that a query block of each head may take, as a share of those it may
            read, float64 ``[H, 1, 1]`` of at most ``share``; or ``None``. The memory is counted in
            float64: a share that float32 rounds up would list more than there is room for.
        floor: Smallest weight to take, broadcastable to ``[B, H, R, C]``, or ``None``.
        require: Marks blocks to take first, bool, broadcastable to ``[B, H, R, rows.stop]``.
        pair_bytes: Scratch memory of one pair of blocks.
        implementation: Of the selection.
    """
    capacity = total_budget(first, blocks, share, least, most)
    shape, zeros = (lengths.shape[0], heads), functools.partial(torch.zeros, dtype=torch.int32)
    counts, offsets = (zeros(*shape, n, device=lengths.device) for n in (blocks, blocks + 1))
    # The last slot takes what is not listed.
    ids = zeros(*shape, capacity + 1, device=lengths.device)
    bounds = first, blocks, least, budget(blocks - 1, share, least, most), lengths.device
    limits = _limits(share, *bounds) if limit is None else _scaled(limit.squeeze(-1), *bounds)
    for rows in triangle(blocks, shape[0] * heads * pair_bytes, first):
        select_blocks(
            weigh(rows),
            rows.start,
            limits[..., rows.start - first : rows.stop - first],
            lengths,
            size,
            mass,
            floor,
            None if require is None else require(rows),
            counts,
            offsets,
            ids,
            implementation=implementation,
        )
    return BlockIndex(size, offsets, ids)


def mass_floor(
    weigh: Callable[[range], Tensor],
    span: Span,
    heads: int,
    mass: float | Tensor,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Find, per head, the weight from which on blocks hold ``mass`` of the weight of all rows.

    A histogram of weights, 32 bins an octave down to 2^-32, stands in for sorting all pairs; the
    floor is a bin's lower edge, so that a head reads at most one bin more than it needs.

    Args:
        weigh: As for ``list_blocks``; what lies after a query block's own weighs 0.
        span: Of the call.
        heads: Query heads, H.
        mass: Share of the weight of the whole map, one number or float32 ``[H, 1]``.
        implementation: Of the histogram.
    Returns:
        float32 ``[B, H, 1, 1]``; 0 where every block is needed.
    """
    B, octave, bins = span.lengths.shape[0], 32, 1024
    held = torch.zeros(B, heads, bins, dtype=torch.int64, device=span.lengths.device)
    triton = implementation is Implementation.TRITON
    pair_bytes = pooled_bytes(implementation) if triton else FLOOR_BYTES
    for rows in triangle(span.blocks, B * heads * pair_bytes, span.first):
        weights = weigh(rows)
        if span.starts is not None:
            padding = (span.query_counts(span.size) == 0)[:, None, :, None]
            weights = weights.masked_fill(span.part(padding, rows), 0.0)
        # Integers: sums of floats would depend on the order in which a GPU adds them.
        add_masses(weights, octave, 2.0**40, held, implementation=implementation)
    enough = (held.cumsum(-1) < mass * held.sum(-1, keepdim=True)).sum(-1)  # [B, H], bin
    floor = torch.exp2(-(enough + 1).float() / octave)
    return floor.masked_fill(enough >= bins - 1, 0.0)[..., None, None]
