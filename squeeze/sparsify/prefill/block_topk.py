"""A fixed number of blocks per block of queries, found from pooled queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.estimate import Span, pooled_bytes, pooled_weights
from squeeze.sparsify.index import MIN_LENGTH
from squeeze.sparsify.selection import list_blocks, per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation


@register(source="https://arxiv.org/abs/2407.02490", year=2024)
@dataclass(frozen=True)
class BlockTopk:
    """Read, per block of queries, the key blocks whose mean the mean query weighs most.

    Block j weighs softmax_j(scaling * mean(Q_i) . mean(K_j)) for query block i. It reads block 0
    and its own, then the heaviest, ``budget`` tokens in all or ``share`` of its causal blocks,
    whichever is more.

    Args:
        budget: Tokens that every query block reads; rounds up to blocks, at least two.
        share: Share of the causal blocks to read where that is more than the budget.
        max_tokens: Most tokens that a query block reads for its share; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The share of each query head in place of ``share``; calibration fills it in where
            the recipe has ``attention.mean_density``.
    Cost: one pass over queries and keys and a product of (T / block_size)^2 / 2 per head.
    Source: Jiang et al. 2024, https://arxiv.org/abs/2407.02490, algorithm 3 (block-sparse heads).
    Differs: every head follows it (the paper picks a pattern per head offline); block 0 and the
        diagonal are always read; ``share`` is ours; the default budget is 20 blocks, not 100.
    """

    budget: Annotated[int, Ge(0)] = 1280
    share: Annotated[float, Ge(0), Le(1)] = 0.0
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    dense_queries: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "share"
    ladder: ClassVar[tuple[float, ...]] = (0.0, 0.04, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> BlockIndex:
        """Pool, weigh and list.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bounds the scores of means, or ``None``.
            implementation: Of what has a kernel.
        Returns:
            Blocks per query head, made without waiting for the device.
        """
        size = self.block_size
        span = Span.of(query, keys, starts, size)
        share = per_head(self.share, self.heads, query, torch.float64)
        index = list_blocks(
            pooled_weights(query, keys, span, scaling, softcap),
            span.lengths,
            size,
            span.blocks,
            heads=query.shape[1],
            first=span.first,
            implementation=implementation,
            pair_bytes=pooled_bytes(implementation),
            share=max(self.heads, default=self.share),
            most=-(-self.max_tokens // size),
            limit=share if isinstance(share, Tensor) else None,
            least=max(2, -(-self.budget // size)),
        )
        return dense_tail(index, span.lengths, self.dense_queries)
