"""Which tokens matter: by the attention of a call's last queries, or by what kind they are.

The tokens that a format protects are by default those of which it would lose the most, which needs
neither. Attention says what the prompt's own end reads, and little of what a later question will.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Of a call, so many last queries are asked: they have seen the prompt, and the question in it.
QUERIES = 64


def attention_mass(
    query: Tensor,
    keys: Tensor,
    starts: Sequence[int],
    counts: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Share out the attention that a call's last 64 queries give to its exact tokens.

    Args:
        query: ``[B, H, T, D]``, the call's.
        keys: ``[B, H_kv, E, D]``, of exact tokens, the call's own the last of them.
        starts: Of each row, the slot of its first token.
        counts: Of each row, its tokens.
        scaling: Multiplies the dot products.
        softcap: Bound of the scores, or ``None``.

    Returns:
        float32 ``[B, H_kv, E]``, means over the queries and the heads that read a KV head.
    Cost: products of 64 queries with all keys, one row and KV head at a time, whose scores take
        ``256 * H / H_kv * E`` bytes.
    Differs: VidKV ranks vision tokens by the dot products of their embeddings with those of text.
    """
    slots = torch.arange(keys.shape[2], device=keys.device)
    found = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    asked = query[:, :, -QUERIES:].unflatten(1, (keys.shape[1], -1))
    ages = torch.arange(asked.shape[3] - 1, -1, -1, device=keys.device)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        hidden = (slots < start) | (slots >= start + count - ages[:, None])
        for head in range(keys.shape[1]):
            scores = asked[row, head].float() @ keys[row, head].float().mT * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            # A query that is padding sees nothing.
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
            found[row, head] = weights.mean((0, 1))
    return found


def text_tokens(
    types: Tensor,
    firsts: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    slots: int,
) -> Tensor:
    """Mark exact tokens that are text.

    Args:
        types: int ``[B, T]`` of the row's first tokens, padding included; 0 is text, as is
            whatever comes later.
        firsts: Of each row, the place in ``types`` of the token in slot ``starts``.
        starts: Of each row, a slot.
        counts: Of each row, tokens from that slot on.
        slots: E.

    Returns:
        float32 ``[B, 1, E]``: 1 for text.
    """
    found = torch.ones(len(types), 1, slots, device=types.device)
    for row, (first, start, count) in enumerate(zip(firsts, starts, counts, strict=True)):
        known = types[row, first : first + count]
        found[row, 0, start : start + len(known)] = (known == 0).float()
    return found


def joined(known: Tensor | None, types: Tensor | None, past: int, steps: int) -> Tensor | None:
    """Lay the types ``[B, steps]`` of a call behind those of ``past`` tokens.

    Types ``[B, past + steps]`` are those of all tokens already; missing ones are text.
    """
    if types is None:
        return None if known is None else known[:, :past]
    if types.shape[1] == past + steps:
        return types
    before = types[:, :0] if known is None else known[:, :past].to(types)
    return torch.cat([functional.pad(before, (0, past - before.shape[1])), types], dim=1)
