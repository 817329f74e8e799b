"""Top-p over pooled blocks, with blocks that their mean does not describe always read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.estimate import (
    aligned,
    block_counts,
    block_means,
    causal_softmax,
    row_lengths,
    scores,
)
from squeeze.sparsify.selection import list_blocks
from squeeze.types import BlockIndex


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
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
    Cost: one pass over queries and keys and a product of (T / block_size)^2 / 2 per head.
    Source: Zhang et al. 2025, https://arxiv.org/abs/2502.18137, section 3.2 to 3.4;
        https://github.com/thu-ml/SpargeAttn, ``get_block_map_meansim``.
    Differs: block 0 and the diagonal always, and counted in the mass; the block that crosses
        ``mass`` is kept; equal blocks of queries and keys; a bound on the list; one setting for all
        heads (the source tunes each); products with values are not skipped inside the kernel.
    """

    mass: Annotated[float, Gt(0), Le(1)] = 0.95
    similarity: Annotated[float, Ge(-1), Le(1)] = 0.0
    max_density: Annotated[float, Gt(0), Le(1)] = 0.5
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
        """Pool, judge the pooling, weigh and list.

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
        q, k = (aligned(x, starts, size) for x in (query, keys))
        center = k.sum(2, keepdim=True, dtype=torch.float32) / lengths[:, None, None, None]
        varied_q = self_similarity(q, lengths, size, None) <= self.similarity  # [B, H, N]
        varied_k = self_similarity(k, lengths, size, center) <= self.similarity
        q_means, k_means = (block_means(x, lengths, size) for x in (q, k))
        groups = query.shape[1] // keys.shape[1]
        varied_k = varied_k.repeat_interleave(groups, 1)[:, :, None]  # [B, H, 1, N]

        def weigh(rows: range) -> Tensor:
            means = q_means[:, :, rows.start : rows.stop], k_means[:, :, : rows.stop]
            logits = scores(*means, scaling, softcap)
            logits = logits.masked_fill(varied_k[..., : rows.stop], -torch.inf)
            return causal_softmax(logits, rows)

        def varied(rows: range) -> Tensor:
            return varied_q[:, :, rows.start : rows.stop, None] | varied_k[..., : rows.stop]

        return list_blocks(
            weigh,
            lengths,
            size,
            q_means.shape[2],
            heads=query.shape[1],
            share=self.max_density,
            mass=self.mass,
            require=varied,
        )


def self_similarity(x: Tensor, lengths: Tensor, size: int, center: Tensor | None) -> Tensor:
    """Return the mean cosine over all pairs of real tokens of each block, float32 ``[B, H, N]``.

    It equals the squared length of the mean of the unit vectors. ``x [B, H, N * size, D]`` is what
    ``aligned`` returns; ``center [B, H, 1, D]`` is subtracted first. Blocks of padding give 0.
    """
    x = x.float() if center is None else x.float() - center
    units = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    real = block_counts(lengths, x.shape[2], 1) > 0  # [B, T]
    units = units * real[:, None, :, None]
    return block_means(units, lengths, size).square().sum(-1)
