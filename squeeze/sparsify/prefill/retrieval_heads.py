"""Heads that read everything beside heads that read sinks and a window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.estimate import row_lengths
from squeeze.sparsify.index import MIN_LENGTH, compact_segments
from squeeze.sparsify.selection import PAIR_BYTES, per_head, segments
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex


@register(source="https://arxiv.org/abs/2410.10819", year=2024)
@dataclass(frozen=True)
class RetrievalHeads:
    """Let retrieval heads read everything and the others sinks and a window (DuoAttention, LServe).

    Query t of a streaming head reads keys j < sink_tokens and t - window_size < j <= t, rounded
    outwards to blocks; a retrieval head reads all j <= t. Which is which is chosen once for the
    model, by what the heads lose on calibration text.

    Args:
        retrieval: 1: heads read everything; 0: they stream. Without calibration all retrieve.
        sink_tokens: First tokens that streaming heads read.
        window_size: Recent tokens that they read, the query itself included.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: 1 or 0 of each query head in place of ``retrieval``; calibration fills it in where
            the recipe has ``attention.mean_density``.
    Cost: nothing is estimated; the lists of retrieval heads take 2 * (T / block_size)^2 bytes each,
        and those of streaming heads as much where a layer has both.
    Source: Xiao et al. 2024, https://arxiv.org/abs/2410.10819, section 3; Yang et al. 2025, LServe,
        https://arxiv.org/abs/2502.14866, section 3.2 (streaming heads in prefill).
    Differs: nothing is trained: in place of gates learned on passkeys, heads are chosen by the
        error that streaming makes of their layer's output (``squeeze.budgets``); query heads are
        chosen one by one, not by key/value head, since prefill saves no memory of the cache; the
        window is 1024 tokens, not 8192.
    """

    retrieval: Annotated[float, Ge(0), Le(1)] = 1.0
    sink_tokens: Annotated[int, Ge(0)] = 128
    window_size: Annotated[int, Ge(1)] = 1024
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    dense_queries: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    tuned: ClassVar[str] = "retrieval"
    ladder: ClassVar[tuple[float, ...]] = (0.0, 1.0)

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> BlockIndex:
        """List everything, or sinks and window, head by head.

        Args:
            query: ``[B, H, T_q, D]``; only its shape is read.
            keys: ``[B, H_kv, T, D]``; likewise.
            starts: int64 ``[B]``, left-padding tokens, or ``None``; only ``dense_queries`` read it:
                otherwise the lists are the same for every row, and blocks past its end are unused.
            scaling: Not read.
            softcap: Not read.
        Returns:
            An index of blocks alone; rows share memory where no tail is dense.
        """
        (B, H), T, size, device = query.shape[:2], keys.shape[2], self.block_size, query.device
        N, sinks = -(-T // size), max(1, -(-self.sink_tokens // size))
        retrieves = per_head(self.retrieval, self.heads, query) >= 0.5  # one, or [H, 1, 1]

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in segments(N, H * N * PAIR_BYTES):
                i = torch.arange(rows.start, rows.stop, device=device)[:, None]
                j = torch.arange(rows.stop, device=device)
                nearest = (i * size - self.window_size + 1) // size
                keep = (j <= i) & ((j < sinks) | (j >= nearest) | retrieves)
                yield j, keep.expand(1, H, -1, -1)

        offsets, ids = compact_segments(parts(), self._capacity(N, sinks))
        index = BlockIndex(size, offsets.expand(B, H, -1), ids.expand(B, H, -1))
        return dense_tail(index, row_lengths(keys, starts), self.dense_queries)

    def _capacity(self, N: int, sinks: int) -> int:
        """Return the most blocks that one head can list."""
        if max(self.heads, default=self.retrieval) >= 0.5:
            return N * (N + 1) // 2
        return N * min(N, sinks + (self.window_size + self.block_size - 2) // self.block_size + 1)
