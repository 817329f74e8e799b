"""Vertical lines and diagonals found from the last queries of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import pad

from squeeze.registry import register
from squeeze.sparsify.estimate import block_diagonals, sampled_weights
from squeeze.sparsify.index import compact
from squeeze.types import BlockIndex


@register(source="https://arxiv.org/abs/2407.02490", year=2024)
@dataclass(frozen=True)
class VerticalSlash:
    """Read, per head, the key columns and diagonals that the prompt's last queries weigh most.

    With A = softmax(scaling * Q K^T) over sampled queries, column j scores sum_i A[i, j] and the
    diagonal at distance o scores sum_i A[i, i - o]. The best ``verticals`` columns are read by
    every later query. Diagonals are read as whole blocks: distance d in blocks scores the mass that
    it would compute, sum_o diagonal[o] * max(0, 1 - |o - d * block_size| / block_size), and the
    best ``slashes / block_size`` distances are kept.

    Args:
        verticals: Columns per head, in tokens.
        slashes: Width of all diagonals of a head together, in tokens; rounds up to blocks.
        window_size: Nearest distances, always among the slashes, in tokens.
        last_queries: Queries at the end of the prompt that the estimate reads.
        passes: Times that it reads as many further queries, ``stride`` apart, back from the last
            one; each pass begins ``stride / passes`` tokens earlier than the one before.
        stride: Distance between the queries of a pass, in tokens.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
    Cost: 1 + passes products of last_queries x T per head; 12 * last_queries * T bytes a head while
        estimating; the index takes at most 4 * T / block_size * (verticals + slashes / block_size)
        bytes per head.
    Source: Jiang et al. 2024, https://arxiv.org/abs/2407.02490, section 3.2 and appendix C.
    Differs: offsets are pooled into block diagonals before the selection instead of after it, so
        that the budget bounds the work; the estimate also samples earlier queries, since the last
        64 alone miss columns that the text before the question needs (prefill perplexity of the
        embedded model, 8192 tokens); budgets are the same for all heads (nothing is searched
        offline); block 0 is always read and takes no column, in place of 30 forced columns.
    """

    verticals: Annotated[int, Ge(0)] = 3000
    slashes: Annotated[int, Ge(0)] = 1600
    window_size: Annotated[int, Ge(1)] = 100
    last_queries: Annotated[int, Ge(1)] = 64
    passes: Annotated[int, Ge(0)] = 4
    stride: Annotated[int, Ge(1)] = 16
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = 1024
    statistics: ClassVar[tuple[str, ...]] = ()

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> BlockIndex:
        """Estimate, select, and list what every block of queries reads.

        Args:
            query: After RoPE, ``[B, H, T, D]``.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bound of the scores, ``softcap * tanh(score / softcap)``, or ``None``.
        Returns:
            Blocks and columns per query head, on the query's device, made without waiting for it.
        """
        B, _, T, _ = query.shape
        if starts is None:
            starts = torch.zeros(B, dtype=torch.int64, device=query.device)
        lengths = (T - starts)[:, None, None]  # [B, 1, 1]
        columns = diagonals = torch.zeros((), device=query.device)
        for rows in self._samples(T):
            weights = sampled_weights(query, keys, starts, scaling, softcap, rows)
            columns = columns + weights.sum(-2)  # [B, H, T]
            diagonals = diagonals + block_diagonals(weights, rows, self.block_size)
        chosen = self._choose_columns(columns, starts, lengths)
        distances = self._choose_distances(diagonals, lengths)
        return self._list(chosen, distances, lengths, T)

    def _samples(self, T: int) -> list[range]:
        """Return the tokens whose queries are read, one progression per pass over the keys."""
        steps = [(T - 1, 1)]
        steps += [(T - 1 - i * self.stride // self.passes, self.stride) for i in range(self.passes)]
        return [
            range(last, max(-1, last - self.last_queries * stride), -stride)[::-1]
            for last, stride in steps
            if last >= 0
        ]

    def _choose_columns(self, mass: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """Return the positions of the best columns, ascending, ``[B, H, V]``; T fills up."""
        T = mass.shape[-1]
        positions = torch.arange(T, device=mass.device)
        tokens = (positions + starts[:, None]) % T  # [B, T], where in the batch a position lies
        mass = mass.gather(-1, tokens[:, None].expand_as(mass))  # [B, H, T], by position
        mass = mass.masked_fill((positions < self.block_size) | (positions >= lengths), -1.0)
        mass, best = mass.topk(min(self.verticals, T), sorted=False)
        return best.masked_fill(mass < 0, T).sort().values

    def _choose_distances(self, mass: Tensor, lengths: Tensor) -> Tensor:
        """Return the best distances in blocks, descending, ``[B, H, S]``; N fills up."""
        N = mass.shape[-1]
        distances = torch.arange(N, device=mass.device)
        nearest = 1 + -(-(self.window_size - 1) // self.block_size)
        mass = mass.masked_fill(distances < nearest, torch.inf)
        mass = mass.masked_fill(distances * self.block_size >= lengths, -1.0)
        count = min(N, max(-(-self.slashes // self.block_size), nearest))
        mass, best = mass.topk(count, sorted=False)
        return best.masked_fill(mass < 0, N).sort(descending=True).values

    def _list(self, columns: Tensor, distances: Tensor, lengths: Tensor, T: int) -> BlockIndex:
        """Lay the choices out per query block: its blocks, then the columns outside them."""
        size, N = self.block_size, -(-T // self.block_size)
        i = torch.arange(N, device=columns.device)[:, None]
        real = (i * size < lengths)[:, None]  # [B, 1, N, 1]
        blocks = pad((i - distances[:, :, None]).clamp(min=0), (1, 0))  # [B, H, N, 1 + S]
        keep = pad(blocks[..., 1:] > 0, (1, 0), value=True) & real
        capacity = sum(min(row, distances.shape[-1]) + 1 for row in range(N))
        offsets, ids = compact(blocks, keep, capacity)
        if columns.shape[-1] == 0:
            return BlockIndex(size, offsets, ids)
        covered = torch.zeros(*distances.shape[:2], N + 1, dtype=torch.bool, device=ids.device)
        covered.scatter_(-1, distances, True)
        away = (i - columns[:, :, None] // size).clamp(min=0)  # [B, H, N, V]; 0 is always covered
        keep = ~covered.gather(-1, away.flatten(-2)).view(away.shape) & real
        capacity = sum(min(columns.shape[-1], max(0, row - 1) * size) for row in range(N))
        return BlockIndex(size, offsets, ids, *compact(columns[:, :, None], keep, capacity))
