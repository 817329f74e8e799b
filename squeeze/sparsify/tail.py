"""Let the last queries of a prompt read everything, whatever a policy listed for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeeze.types import BlockIndex


def dense_tail(index: BlockIndex, lengths: Tensor, tokens: int) -> BlockIndex:
    """List every block up to the diagonal for the query blocks that hold a row's last tokens.

    What a prompt ends with, mostly a question, decides the answer and costs little: ``tokens``
    rows of T / 2 on average. No estimate is good enough to starve it.

    Args:
        index: Of any policy; its columns, averages and order of keys stay for the other queries.
        lengths: Real tokens of each row, int64 ``[B]``.
        tokens: Of each row, from its end on; rounds up to whole query blocks, 0 changes nothing.
    Returns:
        A new index, made without waiting for the device.
    Cost: 4 bytes per key block and head for each of the query blocks, and a copy of the list.
    Source: Li et al. 2024, https://arxiv.org/abs/2412.10319 (tri-shape: an A-shape whose last rows
        are dense).
    Differs: it ends any policy's index, and the density counts it.
    """
    if tokens == 0:
        return index
    size, offsets, device = index.block_size, index.block_offsets, index.block_offsets.device
    (B, H), N = offsets.shape[:2], offsets.shape[-1] - 1
    most = min(N, (tokens + size - 2) // size + 1)  # query blocks that so many tokens may touch
    first = (lengths - tokens).clamp(min=0) // size  # [B]
    rows = first[:, None] + torch.arange(most, device=device)  # [B, K]
    counts = (rows + 1) * (rows * size < lengths[:, None])
    ends = pad(counts.cumsum(-1), (1, 0))  # [B, K + 1]
    at = first[:, None, None].expand(B, H, 1)
    begin = offsets.gather(-1, at)

    blocks = torch.arange(N, device=device)
    ids = pad(index.block_ids, (0, most * N))  # its last slot takes what is not listed
    slots = begin[..., None] + ends[:, None, :-1, None] + blocks  # [B, H, K, N]
    unlisted = (blocks >= counts[..., None])[:, None]
    slots = slots.masked_fill(unlisted, ids.shape[-1] - 1).flatten(-2)
    ids.scatter_(-1, slots, blocks.int().repeat(most).expand(slots.shape))

    places = torch.arange(N + 1, device=device)
    after = ends.gather(-1, (places - first[:, None]).clamp(0, most))[:, None] + begin
    moved = torch.where(places <= first[:, None, None], offsets, after).to(torch.int32)
    columns, averages = (
        None if single is None else single.minimum(single.gather(-1, at))
        for single in (index.column_offsets, index.pooled_offsets)
    )
    return replace(
        index,
        block_offsets=moved,
        block_ids=ids,
        column_offsets=columns,
        pooled_offsets=averages,
    )
