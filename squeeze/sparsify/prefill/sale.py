"""Blocks kept by the largest element of a low-bit estimate, relative to sinks and neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify import selection
from squeeze.sparsify.estimate import Span, aligned, block_counts, later, scores
from squeeze.sparsify.index import NEVER
from squeeze.sparsify.selection import PAIR_BYTES, list_blocks, per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation

ELEMENT_BYTES = 8  # of one estimated score and what it is made from


@register(source="https://arxiv.org/abs/2505.24179", year=2025)
@dataclass(frozen=True)
class Sale:
    """Read the blocks of which one element weighs enough by a 4-bit estimate of all scores (SALE).

    Of query i the sinks and the nearest keys, block 0, the own block and the one before, give the
    exact l_i = sum_j exp(s_ij). A block is read when the relative score exp(s'_ij) / l_i of any of
    its elements reaches ``threshold``. s' comes from queries and keys less their means over the
    row, rounded to ``bits`` with one scale per token; what the queries' mean adds stays exact.

    Args:
        threshold: Relative score that keeps a block, tau; 0 reads everything.
        bits: Of the rounded queries and keys.
        max_density: Most of its causal blocks that a query block may list, those of the largest
            element first; at least 16 blocks.
        max_tokens: Most tokens that a query block may list, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely; all, unless it is set. The estimate
            multiplies every query with every key, as dense attention does, in float32: on an H200
            the index takes 16 times as long as cuDNN's dense attention at 65536 tokens.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The threshold of each query head in place of ``threshold``; calibration fills it in
            where the recipe has ``attention.mean_density``.
    Cost: T^2 / 2 low-bit products of head size per head; segments of 256 MiB.
    Source: Ji et al. 2025, https://arxiv.org/abs/2505.24179, sections 3.1 to 3.3;
        https://github.com/BirdChristopher/SALE.
    Differs: blocks of keys of 64 or 128, not 32; a scale per token; integers are multiplied in
        floating point, exactly (Hopper has no 4-bit products); per-head thresholds come from
        ``squeeze.budgets``, not from halving until an error is met; a bound on the list.
    """

    threshold: Annotated[float, Ge(0)] = 0.01
    bits: Annotated[int, Ge(2), Le(8)] = 4
    max_density: Annotated[float, Gt(0), Le(1)] = 0.5
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = NEVER
    dense_queries: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(0)] = 0
    heads: tuple[Annotated[float, Ge(0)], ...] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_implementation: ClassVar[bool] = True
    tuned: ClassVar[str] = "threshold"
    ladder: ClassVar[tuple[float, ...]] = (
        0.6, 0.3, 0.15, 0.08, 0.04, 0.02, 0.01, 0.005, 0.002, 0.0005, 0.0,
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
        """Round, estimate and list.

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
        size, H = self.block_size, query.shape[1]
        span = Span.of(query, keys, starts, size)
        estimate = _Estimate(query, keys, span, scaling, softcap, self.bits)

        def nearest(rows: range) -> Tensor:
            own = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
            return torch.arange(rows.stop, device=query.device) == own - 1

        threshold = per_head(self.threshold, self.heads, query)
        floor = torch.as_tensor(threshold, dtype=torch.float32, device=query.device)
        index = list_blocks(
            estimate.weigh,
            span.lengths,
            size,
            span.blocks,
            heads=H,
            first=span.first,
            implementation=implementation,
            share=self.max_density,
            most=-(-self.max_tokens // size),
            floor=floor / (1 + floor),
            require=nearest,
            # Some query blocks at a time, as blocks of keys after them are estimated in vain.
            pair_bytes=PAIR_BYTES + 4 * size * ELEMENT_BYTES,
        )
        return dense_tail(index, span.lengths, self.dense_queries)


class _Estimate:
    """Low-bit scores of all pairs, reduced to their largest relative score per pair of blocks.

    Without softcap keys may lose their mean: it changes all scores of a query alike.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        span: Span,
        scaling: float,
        softcap: float | None,
        bits: int,
    ) -> None:
        self.span, self.scaling, self.softcap = span, scaling, softcap
        k = aligned(keys, span.starts, span.size).float()
        real = (block_counts(span.lengths, k.shape[2], 1) > 0)[:, None, :, None]
        if softcap is None:
            k = (k - k.sum(2, keepdim=True) / span.lengths[:, None, None, None]) * real
        self.q = span.queries(query)
        self.real = (span.query_counts(1) > 0)[:, None, :, None]  # [B, 1, queries, 1]
        count = span.query_counts(1).sum(-1).clamp(min=1)[:, None, None, None]
        self.mean = self.q.sum(2, keepdim=True, dtype=torch.float32) / count
        # What the queries' mean adds to each key's score stands behind the key, one per head of
        # its group, so that one product gives the whole score.
        H, H_kv = self.mean.shape[1], k.shape[1]
        added = (self.mean.view(*self.mean.shape[:1], H_kv, H // H_kv, -1) @ k.mT).mT
        self.k, self.bits, self.small = k, bits, torch.cat((rounded(k, bits), added), -1)

    def _with_mean(self, low: Tensor) -> Tensor:
        """Put behind each query a one for its head's place in ``small``."""
        G = self.small.shape[-1] - low.shape[-1]
        ones = torch.eye(G, device=low.device).repeat(low.shape[1] // G, 1)  # [H, G]
        return torch.cat((low, ones[:, None].expand(*low.shape[:3], G)), -1)

    def weigh(self, rows: range) -> Tensor:
        """Return r / (1 + r) of each block's largest relative score, ``[B, H, R, rows.stop]``."""
        span, size = self.span, self.span.size
        q = span.part(self.q, rows).float()  # [B, H, R * size, D]
        total = self._nearby(q, rows)
        hidden = ~span.part(self.real, rows)
        total = total.masked_fill(hidden, torch.inf)
        low = self._with_mean(rounded(q - self.mean, self.bits))
        step = max(1, selection.SCRATCH_BYTES // (q.shape[:3].numel() * size * ELEMENT_BYTES))
        parts = []
        for first in range(0, rows.stop, step):
            end = min(first + step, rows.stop)
            keys = slice(first * size, end * size)
            found = scores(low, self.small[:, :, keys], self.scaling, None)
            found = found.unflatten(-1, (-1, size)).amax(-1)  # [B, H, R * size, C]
            if self.softcap is not None:
                found = self.softcap * torch.tanh(found / self.softcap)
            parts.append((found - total).unflatten(2, (-1, size)).amax(3))  # [B, H, R, C]
        return torch.cat(parts, -1).sigmoid()

    def _nearby(self, q: Tensor, rows: range) -> Tensor:
        """Return ln l_i over block 0, the own and the one before, ``[B, H, R * size, 1]``."""
        size, R = self.span.size, len(rows)
        own = torch.arange(rows.start, rows.stop, device=q.device)
        blocks = torch.stack((torch.zeros_like(own), own - 1, own), 1)  # [R, 3]
        dropped = torch.stack((own < 1, own < 2, own < 0), 1)  # listed twice, or before block 0
        keys = self.k.unflatten(2, (-1, size))[
            :, :, blocks.clamp(min=0)
        ]  # [B, H_kv, R, 3, size, D]
        B, H_kv, _, _, _, D = keys.shape  # [B, H_kv, R, 3, size, D]
        grouped = (q * self.scaling).view(B, H_kv, -1, R, size, D).transpose(2, 3)
        logits = grouped.flatten(3, 4) @ keys.flatten(3, 4).mT  # [B, H_kv, R, G * size, 3 * size]
        logits = logits.unflatten(3, (-1, size)).unflatten(-1, (3, size))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        above = later(range(size), size, q.device)  # [size, size]
        logits[..., 2, :].masked_fill_(above, -torch.inf)
        logits.masked_fill_(dropped[:, None, None, :, None], -torch.inf)
        total = logits.flatten(-2).logsumexp(-1)  # [B, H_kv, R, G, size]
        return total.transpose(2, 3).reshape(B, -1, R * size, 1)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Round each token to symmetric integers of ``bits``, times its scale; float32."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / most
    return (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round() * scale
