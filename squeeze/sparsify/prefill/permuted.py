"""Keys sorted inside segments, so that heavy ones share blocks, then pooled blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.kernels.prefill_index.api import sampled_mass
from squeeze.registry import register
from squeeze.sparsify import selection
from squeeze.sparsify.estimate import Span, aligned, causal_softmax, pooled_bytes, scores
from squeeze.sparsify.selection import list_blocks, per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation


@register(source="https://arxiv.org/abs/2510.21270", year=2025)
@dataclass(frozen=True)
class Permuted:
    """Sort the keys of each segment by weight, then read the fewest blocks of them (PBS-Attn).

    The prompt's last block_size queries weigh every key; the keys of each complete segment are
    sorted by that, the heaviest first, head by head, and values with them. A query block reads its
    own segment up to itself, in order, and of the sorted blocks of earlier segments the heaviest by
    softmax_j(scaling * mean(Q_i) . mean(K_j)) until ``mass`` of that weight is read.

    Args:
        mass: Share of the pooled attention to earlier segments to read; 1 reads everything.
        segment_size: Tokens that are sorted together.
        max_density: Most of its causal blocks that a query block may list; at least 16 blocks.
        max_tokens: Most tokens that a query block may list, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely. On an H200 the index takes 61% of the time
            of dense attention at 16384 tokens and 14% at 32768.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The share of each query head in place of ``mass``; calibration fills it in where
            the recipe has ``attention.mean_density``.
    Cost: block_size * T + (T / block_size)^2 / 2 products of head size per head, one pass over the
        keys per query head in pieces of 256 MiB; 4 bytes per key and query head for the order. The
        kernel gathers keys by that order and copies none.
    Source: Wang et al. 2025, https://arxiv.org/abs/2510.21270, section 4;
        https://github.com/xinghaow99/pbs-attn, ``permute_states``.
    Differs: the order is a list of positions instead of copied keys; the own segment is read in
        order, which halves its work and leaves one masked block; token 0 stays in block 0; the last
        queries' attention is causal; blocks of 64 as well as 128.
    """

    mass: Annotated[float, Gt(0), Le(1)] = 0.9
    segment_size: Literal[128, 256, 512, 1024] = 256
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
        """Sort, pool and list.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bounds the scores, or ``None``.
            implementation: Of what has a kernel.
        Returns:
            Blocks and the order of keys per query head, made without waiting for the device.
        """
        size, T, segment = self.block_size, keys.shape[2], self.segment_size
        span, per_segment = Span.of(query, keys, starts, size), segment // size
        rows = range(T - min(query.shape[2], size), T)
        weights, _ = sampled_mass(
            query, keys, starts, scaling, softcap, [rows], size, implementation=implementation
        )  # [B, H, T]
        order = self._order(aligned(weights[..., None], starts, size).squeeze(-1), T)  # [B, H, P]
        q, k = span.query_means(query), self._means(keys, order, span)

        def own_segment(rows: range) -> Tensor:
            i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            return torch.arange(rows.stop, device=q.device) >= i // per_segment * per_segment

        def weigh(rows: range) -> Tensor:
            logits = scores(span.part(q, rows), k[:, :, : rows.stop], scaling, softcap)
            return causal_softmax(logits.masked_fill(own_segment(rows), -torch.inf), rows)

        index = list_blocks(
            weigh,
            span.lengths,
            size,
            span.blocks,
            heads=query.shape[1],
            first=span.first,
            implementation=implementation,
            share=self.max_density,
            most=-(-self.max_tokens // size),
            pair_bytes=pooled_bytes(implementation),
            mass=per_head(self.mass, self.heads, query),
            require=own_segment,
        )
        index = replace(index, permutation=order.int(), segment_size=segment)
        return dense_tail(index, span.lengths, self.dense_queries)

    def _order(self, weights: Tensor, T: int) -> Tensor:
        """Return the positions of the complete segments, sorted inside each, int64 ``[B, H, P]``.

        ``weights [B, H, >= T]`` are by position.
        """
        segment = self.segment_size
        count = T // segment
        weights = weights[..., : count * segment].unflatten(-1, (count, segment)).clone()
        weights[..., :1, 0] = torch.inf
        order = weights.argsort(dim=-1, descending=True, stable=True)
        firsts = torch.arange(count, device=weights.device)[:, None] * segment
        return (order + firsts).flatten(-2)

    def _means(self, keys: Tensor, order: Tensor, span: Span) -> Tensor:
        """Average the sorted keys of every block, float32 ``[B, H, N, D]``; 0 after the last.

        Blocks that no complete segment holds are read in order only, so they need no mean.
        """
        (B, H, P), (H_kv, _, D) = order.shape, keys.shape[1:]
        size, T = self.block_size, keys.shape[2]
        means = keys.new_zeros(B, H, span.blocks, D, dtype=torch.float32)
        starts = 0 if span.starts is None else span.starts[:, None, None]
        heads = torch.arange(B * H, device=keys.device).view(B, H, 1) // (H // H_kv)
        places = heads * T + (order + starts).clamp(max=T - 1)  # of rows of [B * H_kv * T, D]
        flat = keys.flatten(0, 2)
        step = max(1, selection.SCRATCH_BYTES // (B * H * size * D * 8)) * size
        for first in range(0, P, step):
            part = places[..., first : first + step]
            found = flat.index_select(0, part.flatten()).view(B, H, -1, size, D)
            blocks = slice(first // size, first // size + found.shape[2])
            means[:, :, blocks] = found.sum(3, dtype=torch.float32) / size
        return means
