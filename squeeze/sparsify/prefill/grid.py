"""A grid of columns and diagonals at a regular stride, as tokens of images and videos need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Len
from torch import Tensor
from torch.nn.functional import pad

from squeeze.registry import register
from squeeze.sparsify.estimate import Span, aligned, offset_mass, sampled_weights
from squeeze.sparsify.index import compact, compact_segments
from squeeze.sparsify.selection import PAIR_BYTES, list_blocks, segments
from squeeze.types import BlockIndex


@register(source="https://arxiv.org/abs/2504.16083", year=2025)
@dataclass(frozen=True)
class Grid:
    """Read columns and diagonals at the stride, and phase, that each head shows (MMInference).

    Positions of vision tokens count from the start of their run. Of each stride s, A = the
    attention of the prompt's last queries gives the mass of the columns at the best phase and that
    of the distances divisible by s; the stride whose lines hold most above an even spread is the
    head's. Queries read its columns, whole blocks along its diagonals, a window, and every text
    token; a block with a text query reads everything, so text sees all modalities.

    Args:
        strides: Candidates, in tokens: of a row or a frame of the images at hand.
        window_size: Nearest tokens, always read.
        last_queries: Queries at the end of the prompt that the estimate reads.
        max_text: Most text tokens that every query reads, the first ones.
        max_density: Most of its causal blocks that a query block may list, the nearest first; at
            least 16 blocks.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
    Cost: last_queries * T products of head size per head; 4 bytes per column and query block, and
        per block that ``max_density`` allows.
    Source: Li et al. 2025, https://arxiv.org/abs/2504.16083, sections 3.1 and 3.2 (grid heads,
        query- and key-boundary of modalities).
    Differs: rows are not permuted: a diagonal costs two blocks per query block, so that strides
        under four blocks gain nothing, and columns are gathered; text keys are read by all instead
        of having a pattern of their own; heads are not assigned patterns offline. Without token
        types all tokens count as vision.
    """

    strides: Annotated[tuple[Annotated[int, Ge(64)], ...], Len(1, 16)] = (256, 512, 1024)
    window_size: Annotated[int, Ge(1)] = 512
    last_queries: Annotated[int, Ge(1)] = 64
    max_text: Annotated[int, Ge(0)] = 4096
    max_density: Annotated[float, Gt(0), Le(1)] = 1.0
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = 20480
    statistics: ClassVar[tuple[str, ...]] = ()
    asks_types: ClassVar[bool] = True

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        types: Tensor | None = None,
    ) -> BlockIndex:
        """Find each head's grid and list it.

        Args:
            query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
            keys: After RoPE, ``[B, H_kv, T, D]``.
            starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
            scaling: Multiplies the dot products.
            softcap: Bounds the scores, or ``None``.
            types: Of the T tokens, int ``[B, T]``, 0 for text; ``None``: all are vision.
        Returns:
            Blocks and columns per query head, made without waiting for the device.
        """
        size, T, H = self.block_size, keys.shape[2], query.shape[1]
        span = Span.of(query, keys, starts, size)
        text = torch.zeros(len(query), span.blocks * size, dtype=torch.bool, device=query.device)
        if types is not None:
            marks = (types == 0).to(query.device)[:, None, :, None].to(query.dtype)
            text = aligned(marks, starts, size)[:, 0, :, 0] > 0  # [B, N * size], by position
        rows = range(T - min(query.shape[2], self.last_queries), T)
        weights = sampled_weights(query, keys, T - span.lengths, scaling, softcap, rows)
        offsets = offset_mass(weights, rows)
        columns = aligned(weights.sum(2)[..., None], starts, size).squeeze(-1)  # by position
        stride, phase, place = self._choose(columns, offsets, text)  # [B, H] twice, [B, N * size]
        lines = (place[:, None] - phase[..., None]) % stride[..., None] == 0
        lines &= ~text[:, None]
        lines[..., :size] = False
        asking = text.unflatten(-1, (-1, size)).any(-1) & text.any(-1, keepdim=True)  # [B, N]

        def near(rows: range) -> Tensor:
            i = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
            away = (i - torch.arange(rows.stop, device=query.device)).clamp(min=0) * size
            left = away % stride[..., None, None]  # [B, H, R, C]
            listed = (left < size) | (stride[..., None, None] - left < size)
            listed |= away < self.window_size - 1 + size
            return listed | asking[:, None, rows.start : rows.stop, None]

        index = list_blocks(
            lambda rows: columns.new_zeros(len(query), H, len(rows), rows.stop),
            span.lengths,
            size,
            span.blocks,
            heads=H,
            first=span.first,
            share=self.max_density,
            floor=columns.new_full((1, 1, 1, 1), torch.inf),
            require=near,
        )
        text = text & (text.cumsum(-1) <= self.max_text)
        most = span.blocks * size // min(self.strides) + 1 + 2 * self.max_text * (types is not None)
        offsets, ids = self._columns(lines | text[:, None], min(most, T), near, span)
        return replace(index, column_offsets=offsets, column_ids=ids)

    def _choose(
        self, columns: Tensor, offsets: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each head's stride and phase, and every token's place in its run of vision."""
        positions = torch.arange(text.shape[-1], device=text.device)
        place = positions - torch.where(text, positions + 1, 0).cummax(-1).values  # [B, N * size]
        place = place.clamp(min=0)
        columns = columns.masked_fill(text[:, None], 0.0)
        total = columns.sum(-1) + offsets.sum(-1)
        gains, phases = [], []
        for stride in self.strides:
            bins = columns.new_zeros(*columns.shape[:2], stride)
            bins.scatter_add_(-1, (place % stride)[:, None].expand_as(columns), columns)
            best, phase = bins.max(-1)
            regular = pad(offsets, (0, -offsets.shape[-1] % stride)).unflatten(-1, (-1, stride))
            gains.append(best + regular[..., 1:, 0].sum(-1) - 2 * total / stride)
            phases.append(phase)
        chosen = torch.stack(gains).argmax(0)  # [B, H]
        own = torch.zeros_like(chosen)
        for number, stride in enumerate(self.strides):
            own = own.masked_fill(chosen == number, stride)
        phase = torch.stack(phases).gather(0, chosen[None])[0]
        return own, phase, place

    def _columns(
        self, wanted: Tensor, most: int, near: Callable[[range], Tensor], span: Span
    ) -> tuple[Tensor, Tensor]:
        """List, per query block, the wanted columns before it that no listed block holds.

        ``wanted`` is bool ``[B, H, N * size]``, by position; the first ``most`` count.
        """
        size, N, device = span.size, span.blocks, wanted.device
        wanted[..., :size] = False  # block 0 is always read
        wanted &= wanted.cumsum(-1) <= most
        ends, ids = compact(torch.arange(N * size, device=device), wanted[:, :, None], most)
        real = torch.arange(most, device=device) < ends[..., -1:]
        ids = ids[..., :most].masked_fill(~real, N * size)[:, :, None]  # [B, H, 1, most]

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            row_bytes = wanted.shape[0] * wanted.shape[1] * (N + most) * PAIR_BYTES
            for rows in segments(N, row_bytes, span.first):
                i = torch.arange(rows.start, rows.stop, device=device)[:, None]
                holding = (ids // size).expand(-1, -1, len(rows), -1)
                covered = near(rows).gather(-1, holding.clamp(max=rows.stop - 1).long())
                inside = i * size < span.lengths[:, None, None, None]
                yield ids, (holding < i) & ~covered & inside

        capacity = sum(min(most, i * size) for i in range(span.first, N))
        return compact_segments(parts(), capacity, span.first)
