"""A window and strided blocks, another shard of the context for each key/value head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.index import MIN_LENGTH, compact_segments
from squeeze.sparsify.selection import PAIR_BYTES, segments
from squeeze.types import BlockIndex


@register(source="https://arxiv.org/abs/2407.17678", year=2024)
@dataclass(frozen=True)
class StridedShards:
    """Read a window and every ``stride``-th block, shifted from head to head (S2-Attention).

    Query block i of key/value head g reads block j <= i when i - j < local_blocks, or
    (j + g * step + 1) mod stride = 0 with step = max(1, stride // H_kv), or j = 0. With
    stride <= H_kv the heads together read every block. The query heads of a group read alike.

    Args:
        window_size: Nearest tokens, in whole blocks, the query's own block included.
        stride: One block of so many is read beyond the window; 1 is dense.
        dense_heads: Key/value heads, the last ones, that read everything.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
    Cost: nothing is estimated; one list per key/value head, the same for all rows.
    Source: Lin et al. 2024, https://arxiv.org/abs/2407.17678, section 3;
        https://github.com/linxihui/dkernel, ``get_sparse_attn_mask`` (absolute positions).
    Differs: block 0 is always read. The model was not trained with the pattern, as the paper's
        models were: a text that only one shard holds is lost to the other heads.
    """

    window_size: Annotated[int, Ge(1)] = 1024
    stride: Annotated[int, Ge(1)] = 8
    dense_heads: Annotated[int, Ge(0)] = 0
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    statistics: ClassVar[tuple[str, ...]] = ()

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> BlockIndex:
        """List the window, the head's shard and block 0.

        Args:
            query: ``[B, H, T_q, D]``; only its shape is read.
            keys: ``[B, H_kv, T, D]``; likewise.
            starts: Not read: the lists are the same for every row and blocks past a row's end are
                unused.
            scaling: Not read.
            softcap: Not read.
        Returns:
            Blocks per query head.
        """
        (B, H), (H_kv, T), device = query.shape[:2], keys.shape[1:3], query.device
        N, local = -(-T // self.block_size), -(-self.window_size // self.block_size)
        shift = torch.arange(H_kv, device=device)[:, None, None] * max(1, self.stride // H_kv) + 1
        dense = torch.arange(H_kv, device=device)[:, None, None] >= H_kv - self.dense_heads

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in segments(N, H_kv * N * PAIR_BYTES):
                i = torch.arange(rows.start, rows.stop, device=device)[:, None]
                j = torch.arange(rows.stop, device=device)
                listed = (i - j < local) | (j == 0) | dense | ((j + shift) % self.stride == 0)
                yield j, ((j <= i) & listed)[None]  # [1, H_kv, R, C]

        offsets, ids = (
            lists[:, :, None].expand(B, H_kv, H // H_kv, -1).reshape(B, H, -1)
            for lists in compact_segments(parts(), self._capacity(N, local))
        )
        return BlockIndex(self.block_size, offsets, ids)

    def _capacity(self, N: int, local: int) -> int:
        """Return the most blocks that one head can list."""
        stride = 1 if self.dense_heads else self.stride
        return sum(min(i + 1, 1 + local + -(-(i + 1) // stride)) for i in range(N))
