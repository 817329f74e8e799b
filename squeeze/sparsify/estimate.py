"""What prefill policies estimate with: rows in position order, block means, scores, weights.

N blocks of ``size`` tokens cover T tokens, counted from each row's first real token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from squeeze.kernels.prefill_index.api import weigh_cells
from squeeze.kernels.prefill_index.reference import later as later
from squeeze.kernels.prefill_index.reference_estimates import FEW as FEW
from squeeze.kernels.prefill_index.reference_estimates import aligned as aligned
from squeeze.kernels.prefill_index.reference_estimates import block_diagonals as block_diagonals
from squeeze.kernels.prefill_index.reference_estimates import causal_softmax as causal_softmax
from squeeze.kernels.prefill_index.reference_estimates import masked_softmax as masked_softmax
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
        before: Of the keys before the first query, padding included, T - T_q.
    """

    size: int
    blocks: int
    first: int
    starts: Tensor | None
    lengths: Tensor
    begins: Tensor
    tokens: int
    before: int

    @classmethod
    def of(cls, query: Tensor, keys: Tensor, starts: Tensor | None, size: int) -> Span:
        """Describe a call whose queries ``[B, H, T_q, D]`` are the last of ``T`` tokens."""
        T, before, blocks = keys.shape[2], keys.shape[2] - query.shape[2], -(-keys.shape[2] // size)
        if starts is not None:
            begins = (before - starts).clamp(min=0)
            return cls(size, blocks, 0, starts, T - starts, begins, T, before)
        lengths, begins = (_repeated(n, query.shape[0], query.device) for n in (T, before))
        return cls(size, blocks, before // size, None, lengths, begins, T, before)

    def queries(self, query: Tensor) -> Tensor:
        """Return ``aligned`` queries from block ``first`` on, zeros where there are none."""
        return aligned(query, self.starts, self.size, self.tokens, self.first)

    def query_counts(self, size: int) -> Tensor:
        """Return the queries in every ``size`` tokens from block ``first`` on, int64 ``[B, n]``."""
        each, rows, device = self.size // size, self.lengths.shape[0], self.lengths.device
        first, end = self.first * each, self.blocks * each
        if self.starts is None:
            return _alike(self.tokens, self.before, rows, first, end, size, device)
        earlier = block_counts(self.begins, end, size)
        return (block_counts(self.lengths, end, size) - earlier)[:, first:].clamp(min=0)

    def key_counts(self, size: int) -> Tensor:
        """Return the keys in every ``size`` tokens, int64 ``[B, n]``."""
        end, rows = self.blocks * self.size // size, self.lengths.shape[0]
        if self.starts is None:
            return _alike(self.tokens, 0, rows, 0, end, size, self.lengths.device)
        return block_counts(self.lengths, end, size)

    def query_means(self, query: Tensor) -> Tensor:
        """Average the queries of every block from ``first`` on, float32 ``[B, H, n, D]``."""
        return _means(self.queries(query), self.query_counts(self.size), self.size)

    def key_means(self, keys: Tensor) -> Tensor:
        """Average the keys of every block, float32 ``[B, H_kv, N, D]``."""
        return _means(aligned(keys, self.starts, self.size), self.key_counts(self.size), self.size)

    def part(self, x: Tensor, rows: range) -> Tensor:
        """Take query blocks ``rows`` out of what ``queries`` or ``query_means`` returned."""
        each = x.shape[2] // (self.blocks - self.first)
        return x[:, :, (rows.start - self.first) * each : (rows.stop - self.first) * each]


# What rows without padding have in common is made once: every layer of a prompt asks for it.
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _repeated(number: int, rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), number, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _alike(
    tokens: int, before: int, rows: int, first: int, end: int, size: int, device: torch.device
) -> Tensor:
    """Return ``Span.query_counts`` of rows without padding, or ``key_counts`` where before is 0."""
    lengths, begins = (_repeated(n, rows, device) for n in (tokens, before))
    counts = block_counts(lengths, end, size) - block_counts(begins, end, size)
    return counts[:, first:].clamp(min=0)


def row_lengths(keys: Tensor, starts: Tensor | None) -> Tensor:
    """Return the real tokens of each row, int64 ``[B]``, of ``keys [B, H, T, D]``."""
    lengths = _repeated(keys.shape[2], keys.shape[0], keys.device)
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
    firsts = torch.arange(0, blocks * size, size, device=lengths.device)
    return (lengths[:, None] - firsts).clamp(0, size)


def pooled_weights(
    query: Tensor,
    keys: Tensor,
    span: Span,
    scaling: float,
    softcap: float | None,
    left_out: Tensor | None = None,
    means: Tensor | None = None,
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
        means: ``span.key_means(keys)``, where it is at hand.
    Returns:
        What ``list_blocks`` calls for the weights of query blocks.
    """
    q, k = span.query_means(query) * scaling, span.key_means(keys) if means is None else means
    hidden = later(range(span.blocks), span.blocks, query.device)
    bonus = (span.key_counts(span.size) / span.size).log()[:, None, None]  # [B, 1, 1, N]
    # Without padding no block but the last is cut.
    cut = slice(span.blocks - 1 if span.starts is None else 0, span.blocks)

    def weigh(rows: range) -> Tensor:
        logits = scores(span.part(q, rows), k[:, :, : rows.stop], 1.0, softcap)
        if rows.stop > cut.start:
            logits[..., cut].add_(bonus[..., cut.start : rows.stop])
        if left_out is not None:
            logits.masked_fill_(left_out[..., : rows.stop], -torch.inf)
        return masked_softmax(logits, hidden[rows.start : rows.stop, : rows.stop])

    return weigh


def pooled_bytes(implementation: Implementation) -> int:
    """Return the scratch memory of ``pooled_weights`` and a selection per pair of blocks."""
    # Three float32 numbers at a time, of scores, their bound and their softmax; what the kernels
    # take besides does not grow with the rows.
    return 12 if implementation is Implementation.TRITON else PAIR_BYTES


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
