"""Pooled blocks for heads whose pooled estimate can be trusted, lines and diagonals for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn.functional import pad

from squeeze.kernels.prefill_index.api import sampled_mass
from squeeze.registry import register
from squeeze.sparsify.estimate import (
    Span,
    aligned,
    pooled_bytes,
    pooled_weights,
    scores,
)
from squeeze.sparsify.selection import list_blocks, mass_floor, per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation


@register(source="https://arxiv.org/abs/2502.20766", year=2025)
@dataclass(frozen=True)
class Flexprefill:
    """Choose per head between query-aware blocks and vertical lines with diagonals (FlexPrefill).

    The prompt's last block_size queries give each block of keys its true attention a and the
    attention b = softmax(scaling * mean(q) . mean(K_j)) that pooling expects. A head whose
    sqrt(JSD(a, b)) < ``threshold`` reads the fewest blocks of the whole pooled map that hold
    ``mass`` of it. Any other head reads vertical lines and diagonals, both one block wide: the
    fewest that hold ``mass`` of the last queries' attention. The best ``min_budget`` tokens of
    lines, and as many of diagonals, are read by all heads.

    Args:
        mass: Share of the attention to read, gamma; 1 reads everything.
        threshold: Divergence below which a head trusts its pooled map, tau, in 0..0.83.
        min_budget: Width of the lines, and of the diagonals, that every head reads, in tokens.
        max_density: Most of its causal blocks that a query block may list, required ones first,
            then by pooled weight; at least 16 blocks.
        max_tokens: Most tokens that a query block may list, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely. On an H200 the index takes as long as
            dense attention at 16384 tokens and 21% of its time at 32768.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The share of each query head in place of ``mass``; calibration fills it in where
            the recipe has ``attention.mean_density``.
    Cost: block_size * T + (T / block_size)^2 products of head size per head.
    Source: Lai et al. 2025, https://arxiv.org/abs/2502.20766, algorithms 1 to 4.
    Differs: columns and offsets are pooled into blocks before the fewest are counted; an offset
        belongs to the two block diagonals that it crosses; the pooled map's floor comes from a
        histogram instead of a sort of all pairs; a bound on the list; blocks of 64 by default; the
        minimum is 256 tokens, not 1024.
    """

    mass: Annotated[float, Gt(0), Le(1)] = 0.9
    threshold: Annotated[float, Ge(0), Le(1)] = 0.1
    min_budget: Annotated[int, Ge(0)] = 256
    max_density: Annotated[float, Gt(0), Le(1)] = 0.5
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = 32768
    dense_queries: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "mass"
    ladder: ClassVar[tuple[float, ...]] = (
        0.4, 0.5, 0.6, 0.7, 0.8, 0.86, 0.9, 0.94, 0.97, 0.99, 1.0,
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
        """Judge every head, find its blocks or its lines, and list.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bounds the scores, or ``None``.
            implementation: Of what has a kernel.
        Returns:
            Blocks per query head, made without waiting for the device.
        """
        size, (H, T_q), T = self.block_size, query.shape[1:3], keys.shape[2]
        span = Span.of(query, keys, starts, size)
        lengths, k = span.lengths, span.key_means(keys)
        mass = per_head(self.mass, self.heads, query)
        mass = mass.squeeze(-1) if isinstance(mass, Tensor) else mass  # [H, 1]
        weigh = pooled_weights(query, keys, span, scaling, softcap, means=k)
        # First, as it keeps the device busy while the many short steps that follow are launched.
        floor = mass_floor(weigh, span, H, mass, implementation)
        rows = range(T - min(T_q, size), T)
        columns, diagonals = sampled_mass(
            query, keys, starts, scaling, softcap, [rows], size, implementation=implementation
        )
        sampled = lengths.clamp(max=min(T_q, size))  # queries of each row
        lines = self._lines(columns, starts) / sampled[:, None, None]
        expected = self._expected(query, k, lengths, scaling, softcap)
        trusted = root_divergence(lines, expected) < self.threshold  # [B, H]
        vertical, slash = self._cover(torch.stack((lines, diagonals)), trusted, mass)
        # Distance d stands at N - 1 - d, so that a row of the map is a window of these.
        backwards, last = pad(slash.flip(-1), (0, span.blocks)), span.blocks - 1

        def lines_and_diagonals(rows: range) -> Tensor:
            windows = backwards.unfold(-1, rows.stop, 1)
            windows = windows[:, :, last - rows.stop + 1 : last - rows.start + 1].flip(2)
            return vertical[:, :, None, : rows.stop] | windows

        index = list_blocks(
            weigh,
            lengths,
            size,
            span.blocks,
            heads=H,
            first=span.first,
            implementation=implementation,
            pair_bytes=pooled_bytes(implementation),
            share=self.max_density,
            most=-(-self.max_tokens // size),
            floor=floor.masked_fill(~trusted[..., None, None], torch.inf),
            require=lines_and_diagonals,
        )
        return dense_tail(index, span.lengths, self.dense_queries)

    def _lines(self, columns: Tensor, starts: Tensor | None) -> Tensor:
        """Sum attention by key, ``[B, H, T]``, over each block of keys, ``[B, H, N]``."""
        columns = aligned(columns[..., None], starts, self.block_size)  # [B, H, N * size, 1]
        return columns.unflatten(2, (-1, self.block_size)).sum((3, 4))

    def _expected(
        self, query: Tensor, k: Tensor, lengths: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """Return the attention of the last queries' mean to the means of keys, ``[B, H, N]``."""
        last = query[:, :, -self.block_size :].float()  # [B, H, R, D]
        age = torch.arange(last.shape[2], 0, -1, device=query.device)
        real = (age <= lengths[:, None])[:, None, :, None]
        mean = (last * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
        blocks = torch.arange(k.shape[2], device=query.device)
        hidden = (blocks * self.block_size >= lengths[:, None])[:, None]
        logits = scores(mean, k, scaling, softcap).squeeze(2)
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)

    def _cover(self, weights: Tensor, trusted: Tensor, mass: float | Tensor) -> Tensor:
        """Mark the fewest blocks that hold ``mass``, or the least budget, of ``[2, B, H, N]``."""
        values, order = weights.sort(dim=-1, descending=True, stable=True)
        before = pad(values.cumsum(-1)[..., :-1], (1, 0))
        needed = before < mass * values.sum(-1, keepdim=True)
        needed = needed | (mass >= 1.0)
        rank = torch.arange(weights.shape[-1], device=weights.device)
        taken = (needed & ~trusted[..., None]) | (rank * self.block_size < self.min_budget)
        return torch.zeros_like(taken).scatter_(-1, order, taken)


def root_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the square root of the Jensen-Shannon divergence, in nats, over the last dimension."""
    m = (p + q) / 2
    half = torch.where(m > 0, m, 1.0)
    halves = torch.xlogy(p, p / half) + torch.xlogy(q, q / half)
    return (halves.sum(-1) / 2).clamp(min=0).sqrt()
