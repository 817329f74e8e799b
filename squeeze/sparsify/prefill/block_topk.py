"""A fixed number of blocks per block of queries, found from pooled queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.estimate import aligned, block_means, causal_softmax, row_lengths, scores
from squeeze.sparsify.selection import list_blocks
from squeeze.types import BlockIndex


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
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
    Cost: one pass over queries and keys and a product of (T / block_size)^2 / 2 per head.
    Source: Jiang et al. 2024, https://arxiv.org/abs/2407.02490, algorithm 3 (block-sparse heads).
    Differs: every head follows it (the paper picks a pattern per head offline); block 0 and the
        diagonal are always read; ``share`` is ours; the default budget is 20 blocks, not 100.
    """

    budget: Annotated[int, Ge(0)] = 1280
    share: Annotated[float, Ge(0), Le(1)] = 0.0
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
        """Pool, weigh and list.

        Args:
            query: After RoPE, ``[B, H, T, D]``.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bounds the scores of means, or ``None``.
        Returns:
            Blocks per query head, made without waiting for the device.
        """
        size, lengths = self.block_size, row_lengths(query, starts)
        q, k = (block_means(aligned(x, starts, size), lengths, size) for x in (query, keys))

        def weigh(rows: range) -> Tensor:
            logits = scores(q[:, :, rows.start : rows.stop], k[:, :, : rows.stop], scaling, softcap)
            return causal_softmax(logits, rows)

        return list_blocks(
            weigh,
            lengths,
            size,
            q.shape[2],
            heads=query.shape[1],
            share=self.share,
            least=max(2, -(-self.budget // size)),
        )
