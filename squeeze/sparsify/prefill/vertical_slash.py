"""Vertical lines and diagonals found from the last queries of the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from squeeze.kernels.prefill_index.api import choose_lines, list_lines, sampled_mass
from squeeze.registry import register
from squeeze.sparsify.estimate import Span
from squeeze.sparsify.index import MIN_LENGTH
from squeeze.sparsify.selection import per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation


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
        dense_queries: Last tokens of the prompt whose queries read everything.
        budget_length: Tokens that both budgets are meant for: a prompt of T more has sqrt(T /
            budget_length) times as much of either; 0: they are the same at every length.
        scale: Multiplies both budgets.
        heads: The factor of each query head in place of ``scale``; calibration fills it in where
            the recipe has ``attention.mean_density``.
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
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    dense_queries: Annotated[int, Ge(0)] = 0
    budget_length: Annotated[int, Ge(0)] = 0
    scale: Annotated[float, Ge(0)] = 1.0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "scale"
    ladder: ClassVar[tuple[float, ...]] = (0.04, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9, 1.25, 1.7, 2.4)

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> BlockIndex:
        """Estimate, select, and list what every block of queries reads.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bound of the scores, ``softcap * tanh(score / softcap)``, or ``None``.
            implementation: Of what has a kernel.
        Returns:
            Blocks and columns per query head, on the query's device, made without waiting for it.
        """
        T = keys.shape[2]
        if 0 < self.budget_length < T:
            return self._grown(T).index(query, keys, starts, scaling, softcap, implementation)
        span, size = Span.of(query, keys, starts, self.block_size), self.block_size
        scale = per_head(self.scale, self.heads, query)
        most = max(self.heads, default=self.scale)
        nearest = 1 + -(-(self.window_size - 1) // size)
        samples = self._samples(T, query.shape[2])
        columns, diagonals = sampled_mass(
            query, keys, starts, scaling, softcap, samples, size, implementation=implementation
        )
        chosen = choose_lines(
            columns,
            diagonals,
            starts,
            size,
            nearest,
            _number(self.verticals * scale),
            _number(self.slashes / size * scale),
            (
                min(math.ceil(self.verticals * most), T),
                min(max(math.ceil(self.slashes / size * most), nearest), span.blocks),
            ),
            implementation=implementation,
        )
        lists = list_lines(
            *chosen, span.lengths, size, span.blocks, span.first, implementation=implementation
        )
        index = BlockIndex(size, *lists)
        return dense_tail(index, span.lengths, self.dense_queries)

    def _grown(self, T: int) -> VerticalSlash:
        """Return the policy with the budgets of a prompt of T tokens."""
        growth = math.sqrt(T / self.budget_length)
        verticals, slashes = (round(growth * budget) for budget in (self.verticals, self.slashes))
        return replace(self, verticals=verticals, slashes=slashes, budget_length=0)

    def _samples(self, T: int, T_q: int) -> list[range]:
        """Return the tokens whose queries are read, one progression per pass over the keys."""
        steps = [(T - 1, 1)]
        steps += [(T - 1 - i * self.stride // self.passes, self.stride) for i in range(self.passes)]
        return [
            range(last, max(T - T_q - 1, last - self.last_queries * stride), -stride)[::-1]
            for last, stride in steps
            if last >= T - T_q
        ]


def _number(budget: float | Tensor) -> int | Tensor:
    """Round a budget, or each head's ``[H, 1, 1]``, up to whole entries; int32 ``[H]``."""
    return budget.ceil().int().flatten() if isinstance(budget, Tensor) else math.ceil(budget)
