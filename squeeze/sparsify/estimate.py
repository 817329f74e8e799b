"""What prefill policies estimate with: rows in position order, block means, scores, weights.

N blocks of ``size`` tokens cover T tokens, counted from each row's first real token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Scores and weights of one pair of cells of ``antidiagonal_weights``, in bytes.
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


def aligned(
    x: Tensor, starts: Tensor | None, size: int, tokens: int | None = None, first: int = 0
) -> Tensor:
    """Put each row's first real token first and fill up to whole blocks with zeros.

    Args:
        x: ``[B, H, T_x, D]``, the last T_x of all tokens.
        starts: int64 ``[B]`` or ``None``.
        size: Tokens per block.
        tokens: Of all, T; T_x if not given.
        first: Block to begin with; x has nothing before it.
    Returns:
        ``[B, H, (ceil(T / size) - first) * size, D]``; ``x`` itself when there is nothing to move
        or fill.
    """
    T_x = x.shape[2]
    T = T_x if tokens is None else tokens
    begin, end = first * size, -(-T // size) * size
    if starts is not None:
        places = torch.arange(begin, end, device=x.device) + starts[:, None] - (T - T_x)
        inside = ((places >= 0) & (places < T_x))[:, None, :, None]
        places = places.clamp(0, T_x - 1)[:, None, :, None]
        return x.gather(2, places.expand(*x.shape[:2], -1, x.shape[3])) * inside
    fill = (T - T_x - begin, end - T)
    return pad(x, (0, 0, *fill)) if any(fill) else x


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


def scores(query: Tensor, keys: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Return attention scores, float32 ``[B, H, R, C]``; keys are shared, not repeated.

    ``query`` is ``[B, H, R, D]`` and ``keys`` ``[B, H_kv, C, D]``; head h reads h // (H / H_kv).
    """
    B, H, R, D = query.shape
    grouped = (query.float() * scaling).reshape(B, keys.shape[1], -1, D)
    result = (grouped @ keys.float().mT).view(B, H, R, -1)
    return result if softcap is None else softcap * torch.tanh(result / softcap)


def causal_softmax(logits: Tensor, rows: range) -> Tensor:
    """Softmax over the blocks that a query block may read; 0 elsewhere and where none is.

    ``logits [B, H, R, C]`` belong to the query blocks ``rows``; -inf leaves a block out.
    """
    hidden = later(rows, logits.shape[-1], logits.device)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)


def later(rows: range, blocks: int, device: torch.device) -> Tensor:
    """Mark the blocks after each query block's own, bool ``[R, C]``."""
    own = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return torch.arange(blocks, device=device) > own


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
        logits = logits + bonus[..., : rows.stop]
        if left_out is not None:
            logits = logits.masked_fill(left_out[..., : rows.stop], -torch.inf)
        return causal_softmax(logits, rows)

    return weigh


def antidiagonal_weights(
    query: Tensor,
    keys: Tensor,
    span: Span,
    stride: int,
    scaling: float,
    softcap: float | None,
) -> Callable[[range], Tensor]:
    """Weigh blocks by antidiagonals of cells of ``stride`` tokens; see ``prefill/antidiagonal``.

    Returns:
        What ``list_blocks`` calls for the weights of query blocks; a full block's sum to 1.
    """
    cells = span.size // stride
    q = span.queries(query).unflatten(2, (-1, stride)).flip(3).flatten(3)
    k = aligned(keys, span.starts, span.size).unflatten(2, (-1, stride)).flatten(3)
    real = (span.query_counts(stride) > 0)[:, None, :, None]  # [B, 1, cells of queries, 1]

    def weigh(rows: range) -> Tensor:
        end = rows.stop * cells
        logits = scores(span.part(q, rows), k[:, :, :end], scaling / stride, softcap)
        weights = causal_softmax(logits, range(rows.start * cells, end)) * span.part(real, rows)
        # [B, H, R * cells, C * cells] to [B, H, R, C]
        return weights.unflatten(-1, (-1, cells)).sum(-1).unflatten(2, (-1, cells)).mean(3)

    return weigh


def sampled_weights(
    query: Tensor,
    keys: Tensor,
    starts: Tensor,
    scaling: float,
    softcap: float | None,
    rows: range,
) -> Tensor:
    """Return the attention of the queries of tokens ``rows``, float32 ``[B, H, R, T]``.

    ``query [B, H, T_q, D]`` are the last of the T tokens of ``keys``. Rows and columns of padding
    are 0.
    """
    (B, H, T_q, D), (H_kv, T) = query.shape, keys.shape[1:3]
    sampled = query[:, :, rows.start - T + T_q : rows.stop - T + T_q : rows.step].float() * scaling
    scores = sampled.reshape(B, H_kv, -1, D) @ keys.float().mT  # [B, H_kv, G * R, T]
    scores = scores.view(B, H, -1, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    tokens = torch.arange(T, device=query.device)
    own = tokens[rows.start : rows.stop : rows.step, None]
    hidden = (tokens > own) | (tokens < starts[:, None, None])
    hidden = hidden[:, None]  # [B, 1, R, T]
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    return weights.masked_fill_(hidden, 0.0)


def block_diagonals(weights: Tensor, rows: range, size: int) -> Tensor:
    """Return the mass that each block diagonal would compute, ``[B, H, ceil(T / size)]``.

    ``weights [B, H, R, T]`` belong to the tokens ``rows``. Offset o lies in the block diagonals at
    o // size and the next one, in proportion to its overlap with them.
    """
    offsets = offset_mass(weights, rows)
    offsets = pad(offsets, (0, -offsets.shape[-1] % size)).unflatten(-1, (-1, size))
    farther = torch.arange(size, device=weights.device) / size
    return offsets @ (1 - farther) + pad((offsets @ farther)[..., :-1], (1, 0))


def offset_mass(weights: Tensor, rows: range) -> Tensor:
    """Sum ``weights [B, H, R, T]`` of the tokens ``rows`` by distance to the key, ``[B, H, T]``."""
    B, H, R, T = weights.shape
    shift = T - 1 - rows[0]
    width = T + shift
    # Row r, read from rows[r] - rows[0] on, has each offset in the same column as every other row.
    skewed = pad(weights, (shift, 0)).as_strided(
        (B, H, R, T), (H * R * width, R * width, width + rows.step, 1)
    )
    return skewed.sum(2).flip(-1)
