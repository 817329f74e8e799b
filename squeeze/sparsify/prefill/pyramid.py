"""Blocks read exactly, as averages of 2, 4 or 8 tokens, or not at all, by their weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn.functional import pad

from squeeze.registry import register
from squeeze.sparsify.estimate import Span, antidiagonal_bytes, antidiagonal_weights
from squeeze.sparsify.index import MIN_LENGTH, RUN, compact_segments
from squeeze.sparsify.selection import (
    LEAST_BLOCKS,
    PAIR_BYTES,
    budget,
    per_head,
    ranked,
    segments,
)
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
        min_length: Shorter prompts are attended densely.
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
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
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
        span, kept = Span.of(query, keys, starts, size), []
        N, lengths, first = span.blocks, span.lengths, span.first
        call = (query, keys, span, self.stride, scaling, softcap, implementation)
        weigh = antidiagonal_weights(*call)
        full = per_head(self.full, self.heads, query)
        pair_bytes = max(PAIR_BYTES, antidiagonal_bytes(size, self.stride, implementation))
        for rows in segments(N, B * H * N * pair_bytes, first):
            weights = weigh(rows)
            order, _ = ranked(weights, rows)
            ends = self._ends(weights.gather(-1, order), rows, full)  # [B, H, R, 4]
            real = torch.arange(rows.start, rows.stop, device=device) * size < lengths[:, None]
            exact, averaged = self._most(rows.stop - 1)
            order = order[..., : min(rows.stop, exact + 3 * averaged)].int()
            kept.append((order, ends * real[:, None, :, None]))
        most = [self._most(i) for i in range(first, N)]
        exact_total, averaged_total = (sum(part) for part in zip(*most, strict=True))
        offsets, ids = compact_segments(self._exact(kept, N), exact_total, first)
        each = sum((size >> h) // RUN for h in (1, 2, 3))
        runs = self._runs(kept, [averaged for _, averaged in most], T)
        pooled = compact_segments(runs, each * averaged_total, first)
        index = BlockIndex(size, offsets, ids, pooled_offsets=pooled[0], pooled_ids=pooled[1])
        return dense_tail(index, lengths, self.dense_queries)

    def _most(self, row: int) -> tuple[int, int]:
        """Return how many blocks query block ``row`` may read exactly, and at each other level."""
        exact = budget(row, self.max_density, most=-(-self.max_tokens // self.block_size))
        return exact, budget(row, self.max_averaged, least=0)

    def _ends(self, weights: Tensor, rows: range, full: float | Tensor) -> Tensor:
        """Return the ranks at which each level ends, ``[B, H, R, 4]``, for weights by rank."""
        own = torch.arange(rows.start, rows.stop, device=weights.device) + 1
        before = pad(weights.cumsum(-1)[..., :-1], (1, 0))
        end, ends = torch.zeros_like(own), []
        for level, mass in enumerate((full, self.half, self.quarter, self.eighth)):
            if not isinstance(mass, Tensor) and mass == 1.0:
                wanted = own.expand(weights.shape[:-1])
            else:
                wanted = (before < mass * weights.sum(-1, keepdim=True)).sum(-1)
            share = self.max_averaged if level else self.max_density
            most = (own.double() * share).ceil().long()
            most = most if level else most.clamp(min=LEAST_BLOCKS, max=self._most(rows.stop - 1)[0])
            wanted = wanted.clamp(min=0 if level else 2)
            end = torch.minimum(torch.maximum(wanted, end), end + most).minimum(own)
            ends.append(end)
        return torch.stack(ends, -1)

    def _exact(self, kept: list[tuple[Tensor, Tensor]], N: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the blocks to read exactly, ascending, for ``compact_segments``."""
        for order, ends in kept:
            taken = torch.arange(order.shape[-1], device=order.device) < ends[..., :1]
            ids = order.masked_fill(~taken, N).sort(dim=-1).values
            yield ids, ids < N

    def _runs(
        self, kept: list[tuple[Tensor, Tensor]], most: list[int], T: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the runs of averages, as ``BlockIndex`` numbers them, for ``compact_segments``."""
        last = -1
        for order, ends in kept:
            last += order.shape[2]
            parts = []
            for h in (1, 2, 3):
                ranks = ends[..., h - 1, None] + torch.arange(most[last], device=order.device)
                keep = ranks < ends[..., h, None]  # [B, H, R, W]
                each = (self.block_size >> h) // RUN
                base = sum(T // (RUN << level) for level in range(1, h))
                numbers = order.gather(-1, ranks.clamp(max=order.shape[-1] - 1))[..., None] * each
                numbers = numbers + torch.arange(base, base + each, device=order.device)
                keep = keep[..., None].expand_as(numbers)
                parts.append((numbers.flatten(-2), keep.flatten(-2)))
            yield torch.cat([part[0] for part in parts], -1), torch.cat([p[1] for p in parts], -1)
