"""Top-p over pooled blocks, with blocks that their mean does not describe always read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.estimate import (
    Span,
    aligned,
    pooled_bytes,
    pooled_weights,
)
from squeeze.sparsify.selection import list_blocks, per_head, segments
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation

# Of the float32 copy that ``self_similarity`` makes of each value it reads.
VALUE_BYTES = 4


@register(source="https://arxiv.org/abs/2502.18137", year=2025)
@dataclass(frozen=True)
class Sparge:
    """Read the fewest pooled blocks that hold most of the attention, and those that vary inside.

    A block's self-similarity is the mean cosine of all pairs of its tokens, keys after subtracting
    their mean over the row. Where it is at most ``similarity`` the mean says little: such a block
    of queries reads everything, such a block of keys is read by all. Among the other blocks of
    keys, block j weighs softmax_j(scaling * mean(Q_i) . mean(K_j)), and the heaviest are read
    until ``mass`` is reached. Block 0 and the diagonal are always read.

    Args:
        mass: Share of the pooled attention to read, tau; 1 reads everything.
        similarity: Least self-similarity, theta; -1 trusts every mean.
        max_density: Most of its causal blocks that a query block may list; at least 16 blocks.
            What varies inside comes first.
        max_tokens: Most tokens that a query block may list, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely. On an H200 the index takes 55% of the time
            of dense attention at 16384 tokens and 16% at 32768.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The share of each query head in place of ``mass``; calibration fills it in where
            the recipe has ``attention.mean_density``.
    Cost: one pass over queries and keys and a product of (T / block_size)^2 / 2 per head.
    Source: Zhang et al. 2025, https://arxiv.org/abs/2502.18137, section 3.2 to 3.4;
        https://github.com/thu-ml/SpargeAttn, ``get_block_map_meansim``.
    Differs: block 0 and the diagonal always, and counted in the mass; the last block, where it is
        not full, weighs by the keys it has; the block that crosses ``mass`` is kept; equal blocks
        of queries and keys; a bound on the list; of the settings that the source tunes per head
        only the mass is; products with values are not skipped inside the kernel.
    """

    mass: Annotated[float, Gt(0), Le(1)] = 0.95
    similarity: Annotated[float, Ge(-1), Le(1)] = 0.0
    max_density: Annotated[float, Gt(0), Le(1)] = 0.5
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = 20480
    dense_queries: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "mass"
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
        """Pool, judge the pooling, weigh and list.

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
        lengths, k = span.lengths, aligned(keys, starts, size)
        center = k.sum(2, keepdim=True, dtype=torch.float32) / lengths[:, None, None, None]
        counts = span.query_counts(1), span.key_counts(1)
        varied_q = self_similarity(span.queries(query), counts[0], size, None) <= self.similarity
        varied_k = self_similarity(k, counts[1], size, center) <= self.similarity  # [B, H_kv, N]
        groups = query.shape[1] // keys.shape[1]
        varied_k = varied_k.repeat_interleave(groups, 1)[:, :, None]  # [B, H, 1, N]

        def varied(rows: range) -> Tensor:
            return span.part(varied_q[..., None], rows) | varied_k[..., : rows.stop]

        index = list_blocks(
            pooled_weights(query, keys, span, scaling, softcap, varied_k),
            lengths,
            size,
            span.blocks,
            heads=query.shape[1],
            first=span.first,
            implementation=implementation,
            pair_bytes=pooled_bytes(implementation),
            share=self.max_density,
            most=-(-self.max_tokens // size),
            mass=per_head(self.mass, self.heads, query),
            require=varied,
        )
        return dense_tail(index, span.lengths, self.dense_queries)


def self_similarity(x: Tensor, counts: Tensor, size: int, center: Tensor | None) -> Tensor:
    """Return the mean cosine over all pairs of real tokens of each block, float32 ``[B, H, N]``.

    It equals the squared length of the mean of the unit vectors. ``x [B, H, N * size, D]`` is what
    ``aligned`` returns, ``counts`` int64 ``[B, N * size]`` is 1 for its real tokens; ``center
    [B, H, 1, D]`` is subtracted first. Blocks of padding give 0.
    """
    (B, H, _, D), real = x.shape, counts[:, None, :, None]  # [B, 1, N * size, 1]
    total = x.new_empty(B, H, x.shape[2] // size, D, dtype=torch.float32)
    # Without a center all are found at once.
    inverse = _inverse_lengths(x, real) if center is None else real
    # In parts: float32 copies of all queries would take more memory than the index.
    for blocks in segments(x.shape[2] // size, VALUE_BYTES * B * H * size * D):
        tokens = slice(blocks.start * size, blocks.stop * size)
        part = x[:, :, tokens]
        if center is None:
            units = part * inverse[:, :, tokens]
        else:
            units = part - center
            units *= _inverse_lengths(units, real[:, :, tokens])
        total[:, :, blocks.start : blocks.stop] = units.unflatten(2, (-1, size)).sum(3)
    number = counts.unflatten(1, (-1, size)).sum(-1).clamp(min=1)[:, None, :, None]
    return (total / number).square().sum(-1)


def _inverse_lengths(x: Tensor, real: Tensor) -> Tensor:
    """Return one over the length of every vector, float32 ``[B, H, T, 1]``; 0 for padding."""
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return real / lengths.clamp_(min=torch.finfo(torch.float32).tiny)
