"""What prefill policies estimate with: rows in position order, block means, scores, weights.

N blocks of ``size`` tokens cover T tokens, counted from each row's first real token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

# Scores and weights of one pair of cells of ``antidiagonal_weights``, in bytes.
CELL_BYTES = 16


def row_lengths(query: Tensor, starts: Tensor | None) -> Tensor:
    """Return the real tokens of each row, int64 ``[B]``, of ``query [B, H, T, D]``."""
    B, _, T, _ = query.shape
    lengths = torch.full((B,), T, dtype=torch.int64, device=query.device)
    return lengths if starts is None else lengths - starts


def aligned(x: Tensor, starts: Tensor | None, size: int) -> Tensor:
    """Put each row's first real token first and fill up to whole blocks with zeros.

    Args:
        x: ``[B, H, T, D]``.
        starts: int64 ``[B]`` or ``None``.
        size: Tokens per block.
    Returns:
        ``[B, H, ceil(T / size) * size, D]``; ``x`` itself when there is nothing to move or fill.
    """
    T = x.shape[2]
    if starts is not None:
        tokens = torch.arange(T, device=x.device) + starts[:, None]  # [B, T]
        inside = (tokens < T)[:, None, :, None]
        tokens = tokens.clamp(max=T - 1)[:, None, :, None].expand_as(x)
        x = x.gather(2, tokens) * inside
    return pad(x, (0, 0, 0, -T % size)) if T % size else x


def block_means(x: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Average the real tokens of every block, float32 ``[B, H, N, D]``; 0 where there are none.

    ``x [B, H, N * size, D]`` is what ``aligned`` returns.
    """
    counts = block_counts(lengths, x.shape[2] // size, size)
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


def antidiagonal_weights(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    size: int,
    stride: int,
    scaling: float,
    softcap: float | None,
) -> Callable[[range], Tensor]:
    """Weigh blocks by antidiagonals of cells of ``stride`` tokens; see ``prefill/antidiagonal``.

    Returns:
        What ``list_blocks`` calls for the weights of query blocks; a full block's sum to 1.
    """
    cells, lengths = size // stride, row_lengths(query, starts)
    q = aligned(query, starts, size).unflatten(2, (-1, stride)).flip(3).flatten(3)
    k = aligned(keys, starts, size).unflatten(2, (-1, stride)).flatten(3)
    real = block_counts(lengths, q.shape[2], stride) > 0  # [B, N * cells]

    def weigh(rows: range) -> Tensor:
        first, end = rows.start * cells, rows.stop * cells
        logits = scores(q[:, :, first:end], k[:, :, :end], scaling / stride, softcap)
        weights = causal_softmax(logits, range(first, end)) * real[:, None, first:end, None]
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

    Rows and columns of padding are 0.
    """
    (B, H, T, D), H_kv = query.shape, keys.shape[1]
    sampled = query[:, :, rows.start : rows.stop : rows.step].float() * scaling
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
    B, H, R, T = weights.shape
    shift = T - 1 - rows[0]
    width = T + shift
    # Row r, read from rows[r] - rows[0] on, has each offset in the same column as every other row.
    skewed = pad(weights, (shift, 0)).as_strided(
        (B, H, R, T), (H * R * width, R * width, width + rows.step, 1)
    )
    offsets = pad(skewed.sum(2).flip(-1), (0, -T % size)).unflatten(-1, (-1, size))
    farther = torch.arange(size, device=weights.device) / size
    return offsets @ (1 - farther) + pad((offsets @ farther)[..., :-1], (1, 0))
