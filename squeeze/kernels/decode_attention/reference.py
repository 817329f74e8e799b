"""Specification of decode attention: an online softmax in torch over decoded super-blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from squeeze.types import PackedBlocks

# Tokens decoded at a time: bounds the dense copy, and is enough to keep the products busy.
SUPER_BLOCK_TOKENS = 1024


class State(NamedTuple):
    """Online softmax of rows R: maximum and sum ``[B, H_kv, R]``, output ``[B, H_kv, R, D]``."""

    maximum: Tensor
    total: Tensor
    output: Tensor


def decode_attention(
    query: Tensor,
    packed_query: Tensor,
    shift: Tensor | None,
    keys: PackedBlocks | None,
    values: PackedBlocks | None,
    block_counts: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    exact_counts: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    max_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the packed blocks and the exact slots; arguments as in ``api.decode_attention``.

    ``s = softcap(scaling * (q . k + shift))`` over the packed tokens and
    ``s = softcap(scaling * q . k)`` over the exact slots share one softmax. The arithmetic is
    float32, or float64 for float64 queries.

    Returns:
        The packed and the exact contribution, each ``[B, H, T_q, D]`` and already weighted by the
        common softmax (their sum is the output), and its log-sum-exp ``[B, H, T_q]``.
    Cost: at most 1024 tokens of one layer are dense at a time.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = _rows(query.to(dtype), exact_keys.shape[1])
    exact = _empty(rows)
    if exact_keys.shape[2]:
        hidden = ~_visible_slots(query, exact_keys, exact_counts)
        unused = _unused_slots(exact_values, exact_counts)
        clean = exact_values.to(dtype).masked_fill(unused, 0.0)
        scores = _scores(rows, exact_keys.to(dtype), None, scaling, softcap)
        exact = _update(exact, scores.masked_fill(hidden, -torch.inf), clean)
    packed = _empty(rows)
    if keys is not None and values is not None:
        rows = _rows(packed_query.to(dtype), exact_keys.shape[1])
        shift = None if shift is None else _rows(shift.to(dtype).unsqueeze(-1), rows.shape[1])
        for tile_keys, tile_values, empty in _tiles(keys, values, block_counts, max_blocks):
            scores = _scores(rows, tile_keys.to(dtype), shift, scaling, softcap)
            scores = scores.masked_fill(empty, -torch.inf)
            clean = tile_values.to(dtype).masked_fill(empty.mT, 0.0)
            packed = _update(packed, scores, clean)
    return _merge(packed, exact, query.shape)


def _rows(query: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, T_q, X]`` to ``[B, H_kv, R, X]``: the rows of a KV head, R = G * T_q."""
    return query.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _visible_slots(query: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
    """Which exact slots a row sees, bool ``[B, 1, R, E]``: the causal triangle at the end."""
    groups, steps = query.shape[1] // keys.shape[1], query.shape[2]
    ahead = torch.arange(steps - 1, -1, -1, device=keys.device).repeat(groups)
    limits = counts.view(-1, 1, 1, 1) - ahead.view(1, 1, -1, 1)
    return torch.arange(keys.shape[2], device=keys.device) < limits


def _unused_slots(values: Tensor, counts: Tensor) -> Tensor:
    """Slots past a row's end, bool ``[B, 1, E, 1]``: their memory may hold anything."""
    slots = torch.arange(values.shape[2], device=values.device)
    return (slots >= counts.view(-1, 1)).view(-1, 1, values.shape[2], 1)


def _scores(
    rows: Tensor, keys: Tensor, shift: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Scores ``[B, H_kv, R, T]`` of rows ``[B, H_kv, R, D]`` and keys ``[B, H_kv, T, D]``."""
    scores = rows @ keys.mT
    if shift is not None:
        scores = scores + shift
    scores = scores * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _tiles(
    keys: PackedBlocks, values: PackedBlocks, counts: Tensor, max_blocks: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield decoded keys and values ``[B, H_kv, T, D]`` and the empty slots ``[B, 1, 1, T]``.

    Tiles are cut by block number alone, so that the result does not depend on the segments.
    """
    step = max(1, SUPER_BLOCK_TOKENS // keys.length)
    for start in range(0, max_blocks, step):
        stop = min(start + step, max_blocks)
        blocks = torch.arange(start, stop, device=counts.device)
        empty = (blocks >= counts.view(-1, 1)).repeat_interleave(keys.length, dim=1)
        yield _decode(keys, start, stop), _decode(values, start, stop), empty[:, None, None, :]


def _decode(blocks: PackedBlocks, start: int, stop: int) -> Tensor:
    """Decode blocks ``start`` to ``stop``, which segments may share, into ``[B, H_kv, T, D]``."""
    parts, first = [], 0
    for segment in blocks.segments:
        size = next(iter(segment.values())).shape[0]
        span = slice(max(start - first, 0), max(min(stop - first, size), 0))
        if span.start < span.stop:
            parts.append({name: component[span] for name, component in segment.items()})
        first += size
    merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    dense = blocks.format.decode(merged, blocks.parameters)  # [N, B, H_kv, L, D]
    return dense.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _empty(rows: Tensor) -> State:
    """Nothing seen yet."""
    zero = rows.new_zeros(rows.shape[:-1])
    return State(torch.full_like(zero, -torch.inf), zero, torch.zeros_like(rows))


def _update(state: State, scores: Tensor, values: Tensor) -> State:
    """Add a tile of scores ``[B, H_kv, R, T]`` and values ``[B, H_kv, T, D]``."""
    maximum = torch.maximum(state.maximum, scores.amax(-1))
    # A row that has seen nothing keeps a maximum of -inf; subtracting it would make NaN.
    finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weights = torch.exp(scores - finite.unsqueeze(-1))
    decay = torch.exp(state.maximum - finite)
    output = state.output * decay.unsqueeze(-1) + weights @ values
    return State(maximum, state.total * decay + weights.sum(-1), output)


def _merge(packed: State, exact: State, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise both parts by their common sum and restore ``[B, H, T_q]``."""
    maximum = torch.maximum(packed.maximum, exact.maximum)
    finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weights = [torch.exp(part.maximum - finite) for part in (packed, exact)]
    total = packed.total * weights[0] + exact.total * weights[1]
    lse = (finite + torch.log(total)).reshape(shape[:-1])
    divisor = total.masked_fill(total == 0, 1.0)
    parts = [
        (part.output * (weight / divisor).unsqueeze(-1)).reshape(shape)
        for part, weight in zip((packed, exact), weights, strict=True)
    ]
    return parts[0], parts[1], lse
