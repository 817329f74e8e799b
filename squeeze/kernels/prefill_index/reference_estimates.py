"""What the kernels of a prefill index compute, in PyTorch: estimates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeeze.kernels.prefill_index.reference import later

# Chunks of a query up to which ``route_chunks`` finds one after another.
FEW = 8


def sampled_mass(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    scaling: float,
    softcap: float | None,
    rows: Sequence[range],
    size: int,
) -> tuple[Tensor, Tensor]:
    """Sum by key and by block diagonal; arguments and results are those of ``api.sampled_mass``."""
    pads = torch.zeros_like(query[:, 0, 0, 0], dtype=torch.int64) if starts is None else starts
    columns = diagonals = torch.zeros((), device=query.device)
    for part in rows:
        weights = sampled_weights(query, keys, pads, scaling, softcap, part)
        columns = columns + weights.sum(-2)  # [B, H, T]
        diagonals = diagonals + block_diagonals(weights, part, size)
    return columns, diagonals


def weigh_cells(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    stride: int,
    size: int,
    scaling: float,
    softcap: float | None,
    rows: range,
) -> Tensor:
    """Weigh blocks by antidiagonals; arguments and results are those of ``api.weigh_cells``."""
    T, T_q, cells = keys.shape[2], query.shape[2], size // stride
    pads = 0 if starts is None else starts[:, None]
    first = torch.arange(rows.start * cells, rows.stop * cells, device=query.device) * stride
    # A cell without a query has no weight.
    real = (first + stride > T - T_q - pads) & (first < T - pads)  # [cells] or [B, cells]
    real = real.expand(query.shape[0], -1)[:, None, :, None]
    block = (T - T_q) // size if starts is None else 0  # nothing stands before it
    q = aligned(query, starts, size, T, block)
    q = q[:, :, (rows.start - block) * size : (rows.stop - block) * size]
    q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
    k = aligned(keys, starts, size)[:, :, : rows.stop * size].unflatten(2, (-1, stride)).flatten(3)
    logits = scores(q, k, scaling / stride, softcap)
    weights = causal_softmax(logits, range(rows.start * cells, rows.stop * cells)) * real
    # [B, H, R * cells, C * cells] to [B, H, R, C]
    return weights.unflatten(-1, (-1, cells)).sum(-1).unflatten(2, (-1, cells)).mean(3)


def route_chunks(
    query: Tensor,
    means: Tensor,
    real: Tensor,
    number: float | Tensor,
    most: int,
    chunk_size: int,
    size: int,
    first: int,
) -> Tensor:
    """Count votes; arguments and results are those of ``api.route_chunks``."""
    most = min(most, means.shape[2])
    own = torch.arange(first, first + query.shape[2], device=query.device)[:, None] // chunk_size
    gates = scores(query, means, 1.0, None)  # [B, H, R * size, C]
    gates.masked_fill_(torch.arange(means.shape[2], device=own.device) >= own, -torch.inf)
    best = _few_best(gates, most) if 0 < most <= FEW else gates.topk(most).indices
    rank = torch.arange(most, device=own.device)
    # As many chunks are earlier as the own one's number.
    taken = ((rank < own) & (rank < number) & real[:, None, :, None]).expand(best.shape)
    taken = taken.unflatten(2, (-1, size)).flatten(3)
    votes = gates.new_zeros(*query.shape[:2], taken.shape[2], means.shape[2])
    # Sums of ones, so that their order does not matter.
    votes.scatter_add_(-1, best.unflatten(2, (-1, size)).flatten(3), taken.float())
    return votes / size


def _few_best(x: Tensor, number: int) -> Tensor:
    """Return where the ``number`` largest are; removes them from ``x``.

    One pass for each takes less time than ``topk``, which passes over the bits of all.
    """
    best = []
    for _ in range(number):
        best.append(x.argmax(-1, keepdim=True))
        x.scatter_(-1, best[-1], -torch.inf)
    return torch.cat(best, -1)


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


def scores(query: Tensor, keys: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Return attention scores, float32 ``[B, H, R, C]``; keys are shared, not repeated.

    ``query`` is ``[B, H, R, D]`` and ``keys`` ``[B, H_kv, C, D]``; head h reads h // (H / H_kv).
    """
    B, H, R, D = query.shape
    query = query.float() if scaling == 1.0 else query.float() * scaling
    grouped = query.reshape(B, keys.shape[1], -1, D)
    result = (grouped @ keys.float().mT).view(B, H, R, -1)
    return result if softcap is None else softcap * torch.tanh(result / softcap)


def causal_softmax(logits: Tensor, rows: range) -> Tensor:
    """Softmax over the blocks that a query block may read; 0 elsewhere and where none is.

    ``logits [B, H, R, C]`` belong to the query blocks ``rows`` and are masked in place; -inf leaves
    a block out.
    """
    return masked_softmax(logits, later(rows, logits.shape[-1], logits.device))


def masked_softmax(logits: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over what is not ``hidden``, bool ``[R, C]``; ``logits`` are masked in place."""
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_(0.0)


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
