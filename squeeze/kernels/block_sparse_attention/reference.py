"""The specification of block-sparse causal attention: one block of queries at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeeze.kernels.block_sparse_attention.pyramid import LEVELS, RUN, aligned, averages, counts
from squeeze.kernels.block_sparse_attention.sage import (
    Quantize,
    quantize,
    rounded,
    rounded_queries,
    rounded_weights,
)
from squeeze.types import BlockIndex

DENSE_ROWS = 64
DENSE_BLOCK = 128  # keys that share a scale where every key is read


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: BlockIndex | None,
    starts: Tensor | None,
    scaling: float,
    softcap: float | None,
    to: Quantize | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``api.block_sparse_attention`` documents, in float32 (float64 for float64).

    Rows are first shifted so that token 0 of each is its first real one, queries standing where
    their tokens do. A block of queries then gathers its listed keys, heads padded to the longest
    list, and takes one softmax over them.

    Averages, in the dtype of the keys, are appended to them and never hidden by causality.

    With ``to``, whole blocks read in order are eight-bit: scores come from rounded queries and keys
    without their mean, weights are rounded below the row's largest, and the softmax denominator
    sums them before that. Gathered keys (columns, averages, reordered ones) stay exact. Kernels
    round weights below the largest score met so far.

    Cost: two copies of the longest list's keys and values, one block's scores, float32 copies of
    the inputs.
    """
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    T = keys.shape[2]
    before = T - query.shape[2]  # tokens that are keys alone
    q, k, v = (aligned(x, starts) for x in (pad(query, (0, 0, before, 0)), keys, values))
    (B, H, _, D), H_kv = q.shape, k.shape[1]
    size = DENSE_ROWS if index is None else index.block_size
    skipped = before if starts is None else max(0, before - int(starts.max()))
    longest = None if index is None else _longest(index)
    since = torch.arange(T + 1, device=q.device)  # the first row that sees a key; T is never seen
    bonus = None  # ln of the tokens behind each key
    if index is not None and index.pooled_ids is not None:
        k, v = (torch.cat((x, averages(x)), 2) for x in (k, v))
        sizes = torch.tensor([1 << h for h in LEVELS], device=q.device)
        tokens = sizes.repeat_interleave(torch.tensor(counts(T), device=q.device))
        since = torch.cat((since[:T], torch.zeros_like(tokens), since[T:]))
        bonus = pad(tokens.to(precise), (T, 1), value=1.0).log()
    small = None
    if to is not None:
        block = size if index is not None else DENSE_BLOCK
        codes = quantize(keys, values, starts, block, to)
        k_small, v_small = (x.to(precise) for x in rounded(codes, T, D))
        missing = codes.means[:, :, None, :D].to(precise)
        tail = k.shape[2] - T
        k_small, v_small = (pad(x, (0, 0, 0, tail)) for x in (k_small, v_small))
        small = (rounded_queries(q, to).to(precise) * scaling, k_small, v_small, missing)
    q, k, v = q.to(precise) * scaling, k.to(precise), v.to(precise)
    out, lse = torch.zeros_like(q), q.new_zeros(B, H, T)
    for i in range(skipped // size, -(-T // size)):
        first, end = i * size, min((i + 1) * size, T)
        if index is None or longest is None:
            seen = torch.arange(end, device=q.device)[None, None]
            take = partial(_first, count=end)
            whole = torch.ones_like(seen, dtype=torch.bool)
        else:
            seen, whole = _listed(index, i, longest[i], T, k.shape[2])  # [B, H, L]
            take = partial(_gather, seen=seen, groups=H // H_kv)
        k_i, v_i = take(k), take(v)  # [B, H or H_kv, L, D]
        scores = _products(q[:, :, first:end], k_i.mT)
        if small is not None:
            q_small, k_small, v_small, means = small
            offset = _products(q[:, :, first:end], means.mT)
            rough = _products(q_small[:, :, first:end], take(k_small).mT)
            scores = torch.where(whole[:, :, None], rough, scores - offset)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows = torch.arange(first, end, device=q.device)
        if bonus is not None:
            scores += bonus[seen][:, :, None]
        scores.masked_fill_(since[seen][:, :, None] > rows[:, None], -torch.inf)
        weights, total, lse[:, :, first:end] = _softmax(scores)
        if small is None:
            block_out = _products(weights, v_i)
        else:
            rough = rounded_weights(weights) * whole[:, :, None]
            block_out = _products(rough, take(v_small))
            block_out += _products(weights * ~whole[:, :, None], v_i)
            lse[:, :, first:end] += offset.squeeze(-1)
        out[:, :, first:end] = block_out / total.masked_fill(total == 0, 1.0)
    out, lse = _restore(out, lse, starts)
    return out[:, :, before:].to(query.dtype), lse[:, :, before:]


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights below the largest, their sum and logsumexp; 0, 0, -inf for a row of -inf."""
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights, total, (top + total.log()).squeeze(-1)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Multiply ``[B, H, rows, K]`` by ``[B, H or H_kv, K, N]`` without repeating the second."""
    B, H, rows = x.shape[:3]
    return (x.reshape(B, y.shape[1], -1, x.shape[3]) @ y).view(B, H, rows, y.shape[3])


def _first(x: Tensor, count: int) -> Tensor:
    return x[:, :, :count]


def _longest(index: BlockIndex) -> list[tuple[int, ...]]:
    """Return, per query block, the most blocks (at least 1), columns and runs of any head."""
    blocks = index.block_offsets.diff().amax((0, 1)).clamp(min=1).tolist()
    single = [
        [0] * len(blocks) if offsets is None else offsets.diff().amax((0, 1)).tolist()
        for offsets in (index.column_offsets, index.pooled_offsets)
    ]
    return list(zip(blocks, *single, strict=True))


def _listed(
    index: BlockIndex, i: int, longest: tuple[int, ...], T: int, E: int
) -> tuple[Tensor, Tensor]:
    """Return which of E keys query block i reads, ``[B, H, L]``: positions, then T + averages.

    E, one past the last, pads and is never read. Beside them: whether each is in a whole block that
    is read in order.
    """
    size, device = index.block_size, index.block_ids.device
    blocks = _slice(index.block_offsets, index.block_ids, i, longest[0], -(-T // size))
    seen = (blocks[..., None] * size + torch.arange(size, device=device)).flatten(-2)
    whole = torch.ones_like(seen, dtype=torch.bool)
    if index.permutation is not None and index.permutation.shape[-1]:
        own = i * size // index.segment_size * index.segment_size
        slots = seen.clamp(max=index.permutation.shape[-1] - 1)
        whole = seen >= own
        seen = torch.where(seen < own, index.permutation.gather(-1, slots).long(), seen)
    parts = [seen.masked_fill(seen >= T, E)]
    if index.column_offsets is not None and index.column_ids is not None:
        parts.append(_slice(index.column_offsets, index.column_ids, i, longest[1], E))
    if index.pooled_offsets is not None and index.pooled_ids is not None:
        runs = _slice(index.pooled_offsets, index.pooled_ids, i, longest[2], (E - T) // RUN)
        pooled = runs[..., None] * RUN + torch.arange(RUN, device=device)
        parts.append(T + pooled.flatten(-2).clamp(max=E - T))
    listed = torch.cat(parts, dim=-1)
    return listed, pad(whole, (0, listed.shape[-1] - whole.shape[-1]))


def _slice(offsets: Tensor, ids: Tensor, i: int, count: int, padding: int) -> Tensor:
    """Return the ids of query block i, int64 ``[B, H, count]``, padded."""
    slots = offsets[..., i, None] + torch.arange(count, device=ids.device)
    inside = slots < offsets[..., i + 1, None]
    listed = ids.gather(-1, slots.clamp(max=ids.shape[-1] - 1).long())
    return listed.long().masked_fill(~inside, padding)


def _gather(x: Tensor, seen: Tensor, groups: int) -> Tensor:
    """Take positions ``[B, H, L]`` of ``x [B, H_kv, T, D]`` per query head, ``[B, H, L, D]``."""
    B, H, L = seen.shape
    heads = torch.arange(B * H, device=x.device).view(B, H, 1) // groups
    rows = heads * x.shape[2] + seen.clamp(max=x.shape[2] - 1)
    return x.flatten(0, 2).index_select(0, rows.flatten()).view(B, H, L, -1)


def _restore(out: Tensor, lse: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Undo ``aligned``; padding gives 0 and -inf."""
    if starts is None:
        return out, lse
    positions = torch.arange(out.shape[2], device=out.device) - starts[:, None]  # [B, T]
    padding = (positions < 0)[:, None]
    tokens = positions.clamp(min=0)[:, None].expand_as(lse)
    out = out.gather(2, tokens[..., None].expand_as(out)).masked_fill(padding[..., None], 0.0)
    return out, lse.gather(2, tokens).masked_fill(padding, -torch.inf)
