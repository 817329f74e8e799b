"""Sinks and a sliding window: the static index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from squeeze.registry import register
from squeeze.sparsify.estimate import row_lengths
from squeeze.sparsify.index import MIN_LENGTH, compact
from squeeze.sparsify.tail import dense_tail
from squeeze.types import BlockIndex


@register(source="https://arxiv.org/abs/2309.17453", year=2023)
@dataclass(frozen=True)
class Streaming:
    """Read the first tokens and a window of recent ones, whatever the text.

    Query t reads keys j < sink_tokens and t - window_size < j <= t, rounded outwards to blocks: no
    sink and no token of any query's window is lost. With ``dense_queries`` it is the tri-shape.

    Args:
        sink_tokens: First tokens that every query reads.
        window_size: Recent tokens that every query reads, itself included.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
        dense_queries: Last tokens of the prompt whose queries read everything.
    Cost: nothing is estimated; the index is one list shared by all rows and heads.
    Source: Xiao et al. 2023, https://arxiv.org/abs/2309.17453, section 3.2; as a prefill mask it is
        the A-shape of https://arxiv.org/abs/2407.02490.
    Differs: keys keep the positions of the text; the paper renumbers them inside the cache, for
        lengths beyond the trained context.
    """

    sink_tokens: Annotated[int, Ge(0)] = 64
    window_size: Annotated[int, Ge(1)] = 1024
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    dense_queries: Annotated[int, Ge(0)] = 0
    statistics: ClassVar[tuple[str, ...]] = ()

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> BlockIndex:
        """Return the blocks that hold sinks or a part of the window.

        Args:
            query: ``[B, H, T_q, D]``; only its shape is read.
            keys: ``[B, H_kv, T, D]``; likewise.
            starts: int64 ``[B]``, left-padding tokens, or ``None``; only ``dense_queries`` read it:
                otherwise the list is the same for every row, and blocks past its end are unused.
            scaling: Not read.
            softcap: Not read.
        Returns:
            An index of blocks alone; rows and heads share memory where no tail is dense.
        """
        (B, H), T = query.shape[:2], keys.shape[2]
        size, N = self.block_size, -(-T // self.block_size)
        i = torch.arange(N, device=query.device)[:, None]
        j = torch.arange(N, device=query.device)
        sinks = max(1, -(-self.sink_tokens // size))
        keep = (j <= i) & ((j < sinks) | (j >= (i * size - self.window_size + 1) // size))
        capacity = N * min(N, sinks + (self.window_size + size - 2) // size + 1)
        offsets, ids = compact(j, keep[None, None], capacity)
        index = BlockIndex(size, offsets.expand(B, H, -1), ids.expand(B, H, -1))
        return dense_tail(index, row_lengths(keys, starts), self.dense_queries)
