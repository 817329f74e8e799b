"""Blocks read exactly, as averages of 2, 4 or 8 tokens, or not at all, by their weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.kernels.prefill_index.api import select_levels
from squeeze.registry import register
from squeeze.sparsify.estimate import Span, antidiagonal_bytes, antidiagonal_weights
from squeeze.sparsify.index import RUN
from squeeze.sparsify.selection import LEAST_BLOCKS, budget, per_head, total_budget, triangle
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation


@register(source="https://arxiv.org/abs/2512.04025", year=2025)
@dataclass(frozen=True)
class Pyramid:
    """Read heavy blocks exactly and lighter ones as averages of ever more tokens (PSA).

    Each query block orders the blocks that it may read: block 0 and its own, then by the weight
    that ``antidiagonal`` estimates. Blocks are read exactly until ``full`` of the weight is, then
    as averages of 2 keys and values until ``half`` is, of 4 until ``quarter`` is, of 8 until
    ``eighth`` is; the rest are skipped. An average of m keys has ln m added to its score, so that
    it weighs as m tokens.

    Args:
        full: Share of the estimated attention to read exactly; 1 reads everything.
        half: Share to have read when averages of 2 tokens end; at least ``full`` counts.
        quarter: Likewise for averages of 4.
        eighth: Likewise for averages of 8.
        max_density: Most of its causal blocks that a query block may read exactly; at least 16.
        max_averaged: Most of its causal blocks that it may read at each other level.
        stride: Tokens per cell of the estimate.
        max_tokens: Most tokens that it may read exactly, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely. On an H200 the index takes 31% of the time
            of dense attention at 16384 tokens and 10% at 32768, and averages slow the kernel.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The share of each query head in place of ``full``; calibration fills it in where
            the recipe has ``attention.mean_density``.
    Cost: the estimate of ``antidiagonal``; 4 bytes per 8 averages listed; averages of keys and
        values, 7/8 of their size, while attending.
    Source: Li et al. 2025, https://arxiv.org/abs/2512.04025, section 3 (pyramid, multi-level mask,
        attention with the log of the pooling ratio);
        https://github.com/ziplab/Pyramid-Sparse-Attention, ``transfer_attn_to_mask``.
    Differs: bounds on every level, so that the memory of the lists is known beforehand; levels do
        not also depend on how alike the keys of a block are.
    """

    full: Annotated[float, Gt(0), Le(1)] = 0.85
    half: Annotated[float, Gt(0), Le(1)] = 0.9
    quarter: Annotated[float, Gt(0), Le(1)] = 0.95
    eighth: Annotated[float, Gt(0), Le(1)] = 1.0
    max_density: Annotated[float, Gt(0), Le(1)] = 0.5
    max_averaged: Annotated[float, Ge(0), Le(1)] = 0.25
    stride: Literal[4, 8, 16, 32] = 16
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = 20480
    dense_queries: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "full"
    ladder: ClassVar[tuple[float, ...]] = (
        0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 1.0,
    )  # fmt: skip

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> BlockIndex:
        """Estimate, order, and list blocks and averages.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bounds the mean score of a cell, or ``None``.
            implementation: Of what has a kernel.
        Returns:
            Blocks and averages per query head, made without waiting for the device.
        """
        (B, H), T, size, device = query.shape[:2], keys.shape[2], self.block_size, query.device
        span = Span.of(query, keys, starts, size)
        N, first = span.blocks, span.first
        call = (query, keys, span, self.stride, scaling, softcap, implementation)
        weigh = antidiagonal_weights(*call)
        full = per_head(self.full, self.heads, query)
        exact, averaged = self._lists(B, H, first, N, device)
        pair_bytes = antidiagonal_bytes(size, self.stride, implementation)
        for rows in triangle(N, B * H * pair_bytes, first):
            select_levels(
                weigh(rows),
                rows.start,
                self._limits(rows, device),
                span.lengths,
                size,
                T,
                (full, self.half, self.quarter, self.eighth),
                exact,
                averaged,
                implementation=implementation,
            )
        (_, offsets, ids), (_, pooled_offsets, pooled_ids) = exact, averaged
        index = BlockIndex(size, offsets, ids, pooled_offsets=pooled_offsets, pooled_ids=pooled_ids)
        return dense_tail(index, span.lengths, self.dense_queries)

    def _limits(self, rows: range, device: torch.device) -> Tensor:
        """Return the most blocks of each level and row, int32 ``[4, R]``."""
        own = torch.arange(rows.start, rows.stop, device=device).double() + 1
        exact = (own * self.max_density).ceil()
        bound = -(-self.max_tokens // self.block_size)
        most = budget(rows.stop - 1, self.max_density, most=bound)
        exact = exact.clamp(min=LEAST_BLOCKS, max=most)
        averaged = (own * self.max_averaged).ceil()
        return torch.stack((exact, averaged, averaged, averaged)).int()

    def _lists(
        self, B: int, H: int, first: int, N: int, device: torch.device
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return empty counts, offsets and ids of blocks and of averages; the last slot is free."""
        bound = -(-self.max_tokens // self.block_size)
        each = sum((self.block_size >> h) // RUN for h in (1, 2, 3))
        capacities = (
            total_budget(first, N, self.max_density, most=bound),
            each * total_budget(first, N, self.max_averaged, least=0),
        )
        exact, averaged = (
            [
                torch.zeros(B, H, n, dtype=torch.int32, device=device)
                for n in (N, N + 1, capacity + 1)
            ]
            for capacity in capacities
        )
        return exact, averaged
