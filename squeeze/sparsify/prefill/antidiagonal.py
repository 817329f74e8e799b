"""Blocks found from strided antidiagonals of the score matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.estimate import Span, antidiagonal_bytes, antidiagonal_weights
from squeeze.sparsify.index import MIN_LENGTH
from squeeze.sparsify.selection import list_blocks, per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation


@register(source="https://arxiv.org/abs/2503.16428", year=2025)
@dataclass(frozen=True)
class Antidiagonal:
    """Read the fewest blocks that hold most of the attention, judged by antidiagonals (XAttention).

    Tokens form cells of S = ``stride``. The score of a query cell a and a key cell c is the mean
    along their antidiagonal, scaling / S * sum_t q[a S + S - 1 - t] . k[c S + t], which meets every
    vertical line of the cell once and every diagonal at an odd distance. Softmax over the cells
    c <= a; a block weighs the sum over its (block_size / S)^2 cells. Each query block takes block 0
    and its own, then the heaviest, until ``threshold`` of the weight is read.

    Args:
        threshold: Share of the estimated attention to read; 1 reads everything.
        stride: Tokens per cell, S; the estimate costs 1 / S of the dense scores. 16 halves it, but
            at a density of 0.29 raises the embedded model's perplexity by 1.19%, 8 by 0.77%.
        max_density: Most of its causal blocks that a query block may list; at least 16 blocks.
        max_tokens: Most tokens that a query block may list, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The share of each query head in place of ``threshold``; calibration fills it in where
            the recipe has ``attention.mean_density``.
    Cost: T^2 / (2 S) products of head size per head; segments of 256 MiB while estimating.
    Source: Xu et al. 2025, https://arxiv.org/abs/2503.16428, algorithm 1;
        https://github.com/mit-han-lab/x-attention, ``xattn_estimate``, ``find_blocks_chunked``.
    Differs: the paper searches thresholds per head by dynamic programming, ours come from
        ``squeeze.budgets``; ``max_density`` bounds the list, so that its memory is known
        beforehand; blocks of 64 as well as 128.
    """

    threshold: Annotated[float, Gt(0), Le(1)] = 0.95
    stride: Literal[4, 8, 16, 32] = 8
    max_density: Annotated[float, Gt(0), Le(1)] = 0.5
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    dense_queries: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "threshold"
    ladder: ClassVar[tuple[float, ...]] = (
        0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0,
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
        """Estimate cells, sum them to blocks and list the heaviest.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bounds the mean score of a cell, or ``None``.
            implementation: Of what has a kernel.
        Returns:
            Blocks per query head, made without waiting for the device.
        """
        size = self.block_size
        span = Span.of(query, keys, starts, size)
        index = list_blocks(
            antidiagonal_weights(query, keys, span, self.stride, scaling, softcap, implementation),
            span.lengths,
            size,
            span.blocks,
            heads=query.shape[1],
            first=span.first,
            implementation=implementation,
            share=self.max_density,
            most=-(-self.max_tokens // size),
            mass=per_head(self.threshold, self.heads, query),
            pair_bytes=antidiagonal_bytes(size, self.stride, implementation),
        )
        return dense_tail(index, span.lengths, self.dense_queries)
