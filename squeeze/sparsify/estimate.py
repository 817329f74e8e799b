"""What prefill policies estimate with: rows in position order, block means, scores, weights.

N blocks of ``size`` tokens cover T tokens, counted from each row's first real token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from squeeze.kernels.prefill_index.api import weigh_cells
from squeeze.kernels.prefill_index.reference import later as later
from squeeze.kernels.prefill_index.reference_estimates import aligned as aligned
from squeeze.kernels.prefill_index.reference_estimates import block_diagonals as block_diagonals
from squeeze.kernels.prefill_index.reference_estimates import causal_softmax as causal_softmax
from squeeze.kernels.prefill_index.reference_estimates import offset_mass as offset_mass
from squeeze.kernels.prefill_index.reference_estimates import sampled_weights as sampled_weights
from squeeze.kernels.prefill_index.reference_estimates import scores as scores
from squeeze.types import Implementation

# Scores, sorted values and ids, running sums and slots of one pair of blocks, in bytes.
PAIR_BYTES = 48
# Scores and weights of one pair of cells of ``antidiagonal_weights``.
CELL_BYTES = 16


@dataclass(frozen=True)
class Span:
    """Where the queries of a call stand among its keys, by position.

    Attributes:
        size: Tokens per block.
        blocks: Blocks of keys, N.
        first: Block that holds the first query; 0 for a padded batch, whose rows begin at places
            that only the device knows.
        starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
        lengths: int64 ``[B]``, real tokens of each row.
        begins: int64 ``[B]``, position of each row's first query.
        tokens: Of the keys, padding included, T.
    """

    size: int
    blocks: int
    first: int
    starts: Tensor | None
    lengths: Tensor
    begins: Tensor
    tokens: int

    @classmethod
    def of(cls, query: Tensor, keys: Tensor, starts: Tensor | None, size: int) -> Span:
        """Describe a call whose queries ``[B, H, T_q, D]`` are the last of ``T`` tokens."""
        T, before = keys.shape[2], keys.shape[2] - query.shape[2]
        pads = starts if starts is not None else torch.zeros_like(_rows(query))
        first = before // size if starts is None else 0
        begins = (before - pads).clamp(min=0)
        return cls(size, -(-T // size), first, starts, T - pads, begins, T)

    def queries(self, query: Tensor) -> Tensor:
        """Return ``aligned`` queries from block ``first`` on, zeros where there are none."""
        return aligned(query, self.starts, self.size, self.tokens, self.first)

    def query_counts(self, size: int) -> Tensor:
        """Return the queries in every ``size`` tokens from block ``first`` on, int64 ``[B, n]``."""
        each = self.size // size
        first, count = self.first * each, (self.blocks - self.first) * each
        earlier = block_counts(self.begins, first + count, size)
        return (block_counts(self.lengths, first + count, size) - earlier)[:, first:].clamp(min=0)

    def query_means(self, query: Tensor) -> Tensor:
        """Average the queries of every block from ``first`` on, float32 ``[B, H, n, D]``."""
        return _means(self.queries(query), self.query_counts(self.size), self.size)

    def key_means(self, keys: Tensor) -> Tensor:
        """Average the keys of every block, float32 ``[B, H_kv, N, D]``."""
        return block_means(aligned(keys, self.starts, self.size), self.lengths, self.size)

    def part(self, x: Tensor, rows: range) -> Tensor:
        """Take query blocks ``rows`` out of what ``queries`` or ``query_means`` returned."""
        each = x.shape[2] // (self.blocks - self.first)
        return x[:, :, (rows.start - self.first) * each : (rows.stop - self.first) * each]


def _rows(query: Tensor) -> Tensor:
    return torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)


def row_lengths(keys: Tensor, starts: Tensor | None) -> Tensor:
    """Return the real tokens of each row, int64 ``[B]``, of ``keys [B, H, T, D]``."""
    lengths = _rows(keys) + keys.shape[2]
    return lengths if starts is None else lengths - starts


def block_means(x: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Average the real tokens of every block, float32 ``[B, H, N, D]``; 0 where there are none.

    ``x [B, H, N * size, D]`` is what ``aligned`` returns.
    """
    return _means(x, block_counts(lengths, x.shape[2] // size, size), size)


def _means(x: Tensor, counts: Tensor, size: int) -> Tensor:
    total = x.unflatten(2, (-1, size)).sum(3, dtype=torch.float32)
    return total / counts.clamp(min=1)[:, None, :, None]


def block_counts(lengths: Tensor, blocks: int, size: int) -> Tensor:
    """Return the real tokens of every block, int64 ``[B, N]``."""
    firsts = torch.arange(blocks, device=lengths.device) * size
    return (lengths[:, None] - firsts).clamp(0, size)


def pooled_weights(
    query: Tensor,
    keys: Tensor,
    span: Span,
    scaling: float,
    softcap: float | None,
    left_out: Tensor | None = None,
) -> Callable[[range], Tensor]:
    """Weigh blocks of keys by their mean: softmax_j(scaling * mean(Q_i) . mean(K_j)).

    A block that the end of the row cuts to n of ``size`` tokens has ln(n / size) added to its
    score. Without it the few keys of the last block, whose mean is longer than that of many, take
    most of the weight of the prompt's last queries.

    Args:
        query: ``[B, H, T_q, D]``.
        keys: ``[B, H_kv, T, D]``.
        span: Of the call.
        scaling: Multiplies the dot products.
        softcap: Bounds the scores of means, or ``None``.
        left_out: Marks blocks of keys that get no weight, bool ``[B, H, 1, N]``.
    Returns:
        What ``list_blocks`` calls for the weights of query blocks.
    """
    q, k = span.query_means(query), span.key_means(keys)
    filled = block_counts(span.lengths, span.blocks, span.size) / span.size
    bonus = filled.log()[:, None, None]  # [B, 1, 1, N]

    def weigh(rows: range) -> Tensor:
        logits = scores(span.part(q, rows), k[:, :, : rows.stop], scaling, softcap)
        logits += bonus[..., : rows.stop]
        if left_out is not None:
            logits.masked_fill_(left_out[..., : rows.stop], -torch.inf)
        return causal_softmax(logits, rows)

    return weigh


def pooled_bytes(implementation: Implementation) -> int:
    """Return the scratch memory of ``pooled_weights`` and a selection per pair of blocks."""
    return 16 if implementation is Implementation.TRITON else PAIR_BYTES


def antidiagonal_weights(
    query: Tensor,
    keys: Tensor,
    span: Span,
    stride: int,
    scaling: float,
    softcap: float | None,
    implementation: Implementation = Implementation.REFERENCE,
) -> Callable[[range], Tensor]:
    """Weigh blocks by antidiagonals of cells of ``stride`` tokens; see ``prefill/antidiagonal``.

    Returns:
        What ``list_blocks`` calls for the weights of query blocks; a full block's sum to 1.
    """

    def weigh(rows: range) -> Tensor:
        call = (query, keys, span.starts, stride, span.size, scaling, softcap, rows)
        return weigh_cells(*call, implementation=implementation)

    return weigh


def antidiagonal_bytes(size: int, stride: int, implementation: Implementation) -> int:
    """Return the scratch memory of ``antidiagonal_weights`` and a selection per pair of blocks."""
    if implementation is Implementation.TRITON:
        return 4  # the weights: what the kernels take besides does not grow with the rows
    return PAIR_BYTES + CELL_BYTES * (size // stride) ** 2
