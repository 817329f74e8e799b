"""Blocks kept by the largest element of a low-bit estimate, relative to sinks and neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.kernels.prefill_index.api import round_keys, round_queries, weigh_elements
from squeeze.registry import register
from squeeze.sparsify.estimate import Span, aligned
from squeeze.sparsify.selection import PAIR_BYTES, list_blocks, per_head
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex, Implementation

ELEMENT_BYTES = 12  # of one estimated score and what it is made from


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
        query_stride: Only the first query of each block and every so many-th after it estimate; 1:
            all do, as in the source, whose low-bit products are faster than Hopper's.
        max_density: Most of its causal blocks that a query block may list, those of the largest
            element first; at least 16 blocks.
        max_tokens: Most tokens that a query block may list, at least 16 blocks; 0: no such bound.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
        dense_queries: Last tokens of the prompt whose queries read everything.
        heads: The threshold of each query head in place of ``threshold``; calibration fills it in
            where the recipe has ``attention.mean_density``.
    Cost: T^2 / (2 query_stride) low-bit products of head size per head; segments of 256 MiB. Dense
        attention has twice T^2 / 2 products, and Hopper's fastest, of eight bits, are twice as fast
        as its own: at equal efficiency the estimate of all queries takes a quarter of its time.
    Source: Ji et al. 2025, https://arxiv.org/abs/2505.24179, sections 3.1 to 3.3;
        https://github.com/BirdChristopher/SALE.
    Differs: one query of ``query_stride`` estimates, and a block whose queries begin after its last
        that would reads everything; blocks of keys of 64 or 128, not 32; a scale per token;
        integers are multiplied in floating point, exactly (Hopper has no 4-bit products); per-head
        thresholds come from ``squeeze.budgets``, not from halving until an error is met; a bound on
        the list.
    """

    threshold: Annotated[float, Ge(0)] = 0.01
    bits: Annotated[int, Ge(2), Le(8)] = 4
    query_stride: Literal[1, 2, 4, 8] = 8
    max_density: Annotated[float, Gt(0), Le(1)] = 0.5
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = 32768
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
        numbers = (self.bits, self.query_stride)
        estimate = _Estimate(query, keys, span, scaling, softcap, *numbers, implementation)

        def nearest(rows: range) -> Tensor:
            own = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
            return torch.arange(rows.stop, device=query.device) == own - 1

        floor = per_head(self.threshold, self.heads, query)
        if not isinstance(floor, Tensor):  # filled in, not copied: that would wait for the device
            floor = torch.full((1, 1, 1), floor, dtype=torch.float32, device=query.device)
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
            pair_bytes=_pair_bytes(size // self.query_stride, implementation),
        )
        return dense_tail(index, span.lengths, self.dense_queries)


def _pair_bytes(each: int, implementation: Implementation) -> int:
    """Return the scratch memory of a pair of blocks, which bounds how many are weighed at once."""
    if implementation is Implementation.TRITON:
        return 4
    # Some query blocks at a time, as blocks of keys after them are estimated in vain.
    return PAIR_BYTES + 4 * each * ELEMENT_BYTES


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
        stride: int,
        implementation: Implementation,
    ) -> None:
        self.span, self.softcap, self.stride = span, softcap, stride
        self.implementation = implementation
        q, keys = span.queries(query)[:, :, ::stride], aligned(keys, span.starts, span.size)
        if softcap is None:
            key_mean = keys.sum(2, keepdim=True, dtype=torch.float32)
            key_mean = key_mean / span.lengths[:, None, None, None]
        else:
            key_mean = keys.new_zeros(*keys.shape[:2], 1, keys.shape[-1], dtype=torch.float32)
        mean = q.sum(2, keepdim=True, dtype=torch.float32)
        begin, end = (-(-n // stride) for n in (span.begins, span.lengths))
        mean = mean / (end - begin).clamp(min=1)[:, None, None, None]
        self.keys = round_keys(keys, key_mean, mean, scaling, bits, implementation=implementation)
        codes, scales, totals = round_queries(
            q,
            keys,
            mean,
            key_mean,
            span.begins,
            span.lengths,
            span.size,
            span.first,
            stride,
            scaling,
            softcap,
            bits,
            implementation=implementation,
        )
        self.queries = codes, scales, self._unseen(totals)

    def _unseen(self, totals: Tensor) -> Tensor:
        """Have a block read everything whose queries begin after the last that would estimate."""
        span, stride = self.span, self.stride
        if stride == 1 or (span.starts is None and span.before % stride == 0):
            return totals
        end = span.blocks * span.size
        place = torch.arange(span.first * span.size, end, stride, device=totals.device)
        begins = span.begins[:, None]
        unseen = (place < begins) & (begins < place + stride)
        unseen &= (place + stride) % span.size == 0
        return totals.masked_fill(unseen[:, None], -torch.inf)

    def weigh(self, rows: range) -> Tensor:
        """Return r / (1 + r) of each block's largest relative score, ``[B, H, R, rows.stop]``."""
        size, first = self.span.size, self.span.first
        numbers = (size, first, self.stride, self.softcap, rows)
        call = (*self.queries, *self.keys, *numbers)
        return weigh_elements(*call, implementation=self.implementation).sigmoid_()
