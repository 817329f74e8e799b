"""Build a ``BlockIndex`` from lists, read it back as a mask, and count what it computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeeze.kernels.prefill_index.reference import compact as compact
from squeeze.types import BlockIndex

# Tokens from which policies act by default. On an H200 against cuDNN's dense attention, 32 query
# heads of 128, ``vertical_slash`` runs 0.66 times as fast at 8192 tokens, index included, 1.29
# times at 16384 (1.0 ms for the index and 1.8 against 3.6) and 3.2 times at 32768.
MIN_LENGTH = 16384
COLUMN_TILE = 64
RUN = 8  # averages in one run of ``BlockIndex.pooled_ids``


def compact_segments(
    segments: Iterable[tuple[Tensor, Tensor]], capacity: int, skipped: int = 0
) -> tuple[Tensor, Tensor]:
    """Pack what ``compact`` packs, a few query blocks at a time.

    The scratch memory is one segment's, so no mask of all block pairs ever exists.

    Args:
        segments: Candidates and keep mask ``[B, H, R, C]`` of consecutive query blocks; R and C
            may differ from one to the next.
        capacity: As for ``compact``.
        skipped: Query blocks before those of the segments, which keep nothing.
    Returns:
        As ``compact`` does, for all query blocks.
    """
    counts: list[Tensor] = []
    ids = torch.empty(0)
    for candidates, keep in segments:
        if not counts:
            shape = (*keep.shape[:2], capacity + 1)
            ids = torch.zeros(shape, dtype=torch.int32, device=keep.device)
            listed = torch.zeros(*keep.shape[:2], 1, dtype=torch.int64, device=keep.device)
        flat = keep.flatten(-2)  # [B, H, R * C]
        slots = (flat.cumsum(-1) + (listed - 1)).masked_fill_(~flat, capacity)
        values = candidates.to(torch.int32).expand(keep.shape).flatten(-2)
        ids.scatter_(-1, slots, values)
        counts.append(keep.sum(-1))
        listed = listed + flat.sum(-1, keepdim=True)
    return pad(torch.cat(counts, -1).cumsum(-1), (1 + skipped, 0)).to(torch.int32), ids


def from_masks(blocks: Tensor, columns: Tensor | None, block_size: int) -> BlockIndex:
    """Build an index from explicit masks; for tests and small inputs.

    Args:
        blocks: bool ``[B, H, N, N]``, true where query block i reads key block j; j <= i.
        columns: bool ``[B, H, N, T]``, true where query block i reads token t alone, or ``None``.
        block_size: Tokens per block.
    """
    N = blocks.shape[-1]
    ids = torch.arange(N, device=blocks.device)
    offsets, block_ids = compact(ids, blocks, N * (N + 1) // 2)
    if columns is None:
        return BlockIndex(block_size, offsets, block_ids)
    ids = torch.arange(columns.shape[-1], device=blocks.device)
    column_offsets, column_ids = compact(ids, columns, columns.shape[-1] * N)
    return BlockIndex(block_size, offsets, block_ids, column_offsets, column_ids)


def to_dense_mask(index: BlockIndex, length: int) -> Tensor:
    """Write an index out as the token mask it stands for, causality included; for tests.

    What is read as an average is not in the mask.

    Args:
        index: Of B rows and H heads.
        length: Tokens, T, those that are keys alone included.
    Returns:
        bool ``[B, H, T, T]`` by position; true where the query (third dimension) reads the key.
    """
    size, rows = index.block_size, torch.arange(length)
    B, H, N = index.block_offsets.shape[0], index.block_offsets.shape[1], -(-length // size)
    mask = torch.zeros(B, H, length, length, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(N)).tolist():
        queries = slice(i * size, (i + 1) * size)
        order = rows.clone()
        if index.permutation is not None:
            own = i * size // index.segment_size * index.segment_size
            order[:own] = index.permutation[b, h, :own]
        for j in _listed(index.block_offsets, index.block_ids, b, h, i):
            mask[b, h, queries, order[j * size : (j + 1) * size]] = True
        if index.column_offsets is not None and index.column_ids is not None:
            mask[b, h, queries, _listed(index.column_offsets, index.column_ids, b, h, i)] = True
    return mask & (rows[:, None] >= rows)


def density(index: BlockIndex, lengths: Tensor, begins: Tensor | None = None) -> Tensor:
    """Return the share of the causal query-key pairs that an index computes, tiles in full.

    computed = sum over query blocks of rows * (blocks * block_size + ceil(columns / 64) * 64 +
    ceil(8 * runs / 64) * 64), with only real queries counted; density = min(1, computed / causal),
    where causal is the sum of t + 1 over queries at positions t. The masked half of a diagonal tile
    counts as computed, which overstates a sparse head a little; the minimum makes a full list
    exactly 1.

    Args:
        index: Of B rows and H heads.
        lengths: Real tokens of each row, integers ``[B]``, positive.
        begins: Position of each row's first query, below its length; 0 if not given.
    Returns:
        float64 ``[B, H]`` on the index's device.
    """
    size, offsets = index.block_size, index.block_offsets
    lengths = lengths.to(offsets.device, torch.int64)
    firsts = torch.arange(offsets.shape[-1] - 1, device=offsets.device) * size
    rows = (lengths[:, None] - firsts).clamp(0, size)  # [B, N]
    pairs = lengths * (lengths + 1)
    if begins is not None:
        begins = begins.to(offsets.device, torch.int64)
        rows = rows - (begins[:, None] - firsts).clamp(0, size)
        pairs = pairs - begins * (begins + 1)
    computed = offsets.diff().long() * size
    for single, each in ((index.column_offsets, 1), (index.pooled_offsets, RUN)):
        if single is not None:
            tiles = (single.diff().long() * each + COLUMN_TILE - 1) // COLUMN_TILE
            computed = computed + tiles * COLUMN_TILE
    causal = (pairs / 2.0)[:, None]
    return ((rows[:, None] * computed).sum(-1).double() / causal).clamp(max=1.0)


def _listed(offsets: Tensor, ids: Tensor, b: int, h: int, i: int) -> list[int]:
    first, end = int(offsets[b, h, i]), int(offsets[b, h, i + 1])
    return [int(value) for value in ids[b, h, first:end]]
