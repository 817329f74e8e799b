"""Chunks that single queries ask for: mixture of block attention, without training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.kernels.prefill_index.api import MOST_CHUNKS, route_chunks
from squeeze.registry import register
from squeeze.sparsify.estimate import FEW, Span, aligned, block_means, pooled_bytes
from squeeze.sparsify.index import MIN_LENGTH
from squeeze.sparsify.selection import list_blocks, per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation


@register(source="https://arxiv.org/abs/2502.13189", year=2025)
@dataclass(frozen=True)
class Moba:
    """Route every query to the chunks of keys whose mean it meets best (MoBA).

    Token t reads its own chunk, up to t, and among the chunks before it the ``top_k - 1`` with the
    largest gate q[t] . mean(K_chunk). A block of queries reads every chunk that one of its queries
    was routed to, those of most queries first, until its budget is spent, and block 0.

    Args:
        top_k: Chunks per query, its own included.
        chunk_size: Tokens that share a gate.
        max_density: Most of its causal blocks that a query block may list; at least 16 blocks.
        max_tokens: Most tokens that a query block may list, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The chunks per query of each query head in place of ``top_k``; calibration fills it
            in where the recipe has ``attention.mean_density``.
    Cost: T^2 / (2 chunk_size) products of head size per head; segments of 256 MiB while routing,
        and by the kernel as much again for gates.
    Source: Lu et al. 2025, https://arxiv.org/abs/2502.13189, section 2.2, equations 5 to 8;
        small chunks: FlashMoBA, https://arxiv.org/abs/2511.11571.
    Differs: the model was not trained with it. The union over a block of queries is read by all of
        them, so a query reads more than its own chunks, unless the budget cuts chunks that few
        asked for; block 0 is always read; chunks of 128 tokens, not thousands.
    """

    top_k: Annotated[int, Ge(1)] = 8
    chunk_size: Literal[128, 256, 512, 1024, 2048, 4096] = 128
    max_density: Annotated[float, Gt(0), Le(1)] = 0.25
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    dense_queries: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "top_k"
    ladder: ClassVar[tuple[float, ...]] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 4096)

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> BlockIndex:
        """Gate, count the queries that each chunk got, and list blocks.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Not read: the order of gates does not depend on it.
            softcap: Likewise.
            implementation: Of what has a kernel.
        Returns:
            Blocks per query head, made without waiting for the device.
        """
        size, per_chunk = self.block_size, self.chunk_size // self.block_size
        span, H = Span.of(query, keys, starts, size), query.shape[1]
        q, k = span.queries(query), self._means(keys, span)
        real = span.query_counts(1) > 0  # [B, queries]
        earlier = per_head(self.top_k, self.heads, query) - 1  # chunks, beside the own
        most = math.ceil(max(self.heads, default=self.top_k)) - 1
        routed = k.shape[2] <= MOST_CHUNKS
        routing = implementation if routed else Implementation.REFERENCE

        def weigh(rows: range) -> Tensor:
            share = route_chunks(
                span.part(q, rows),
                k[:, :, : -(-rows.stop // per_chunk)],
                real[:, (rows.start - span.first) * size : (rows.stop - span.first) * size],
                earlier,
                most,
                self.chunk_size,
                size,
                rows.start * size,
                implementation=routing,
            )  # [B, H, R, chunks]
            return share.repeat_interleave(per_chunk, -1)[..., : rows.stop]

        def own_chunk(rows: range) -> Tensor:
            own = torch.arange(rows.start, rows.stop, device=q.device)[:, None] // per_chunk
            return torch.arange(rows.stop, device=q.device) // per_chunk == own

        index = list_blocks(
            weigh,
            span.lengths,
            size,
            span.blocks,
            heads=H,
            first=span.first,
            implementation=implementation,
            share=self.max_density,
            most=-(-self.max_tokens // size),
            floor=torch.full((1, 1, 1, 1), 0.5 / size, device=q.device),
            require=own_chunk,
            pair_bytes=self._pair_bytes(most, implementation, routing),
        )
        return dense_tail(index, span.lengths, self.dense_queries)

    def _means(self, keys: Tensor, span: Span) -> Tensor:
        """Average the keys of every chunk, float32 ``[B, H_kv, chunks, D]``."""
        k = aligned(keys, span.starts, self.chunk_size)
        return block_means(k, span.lengths, self.chunk_size)

    def _pair_bytes(
        self, most: int, implementation: Implementation, routing: Implementation
    ) -> int:
        """Return the scratch memory of a pair of blocks: its gates, the share and the selection."""
        if routing is Implementation.TRITON:
            return pooled_bytes(routing)  # the kernel's gates do not grow with the rows
        gate = 5 if most <= FEW else 24  # a number and its mask; what ``topk`` sorts, too
        return pooled_bytes(implementation) + gate * self.block_size**2 // self.chunk_size
