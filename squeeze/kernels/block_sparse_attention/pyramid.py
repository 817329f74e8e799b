"""Averages of 2, 4 and 8 consecutive tokens, in runs as ``BlockIndex.pooled_ids`` numbers them."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = (1, 2, 3)
RUN = 8


def counts(T: int) -> list[int]:
    """Return how many averages each level has: whole runs only."""
    return [T // (RUN << h) * RUN for h in LEVELS]


def aligned(x: Tensor, starts: Tensor | None) -> Tensor:
    """Move each row's first real token to the front; the last token fills the end."""
    if starts is None:
        return x
    T = x.shape[2]
    tokens = (torch.arange(T, device=x.device) + starts[:, None]).clamp(max=T - 1)  # [B, T]
    return x.gather(2, tokens[:, None, :, None].expand_as(x))


def averages(x: Tensor) -> Tensor:
    """Average aligned keys or values, level after level.

    Args:
        x: ``[B, H_kv, T, D]``.
    Returns:
        ``[B, H_kv, sum(counts(T)), D]`` in the dtype of ``x``; sums are float32 (float64 for
        float64).
    """
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    levels = [
        x[:, :, : count << h].unflatten(2, (count, 1 << h)).mean(3, dtype=precise).to(x.dtype)
        for h, count in zip(LEVELS, counts(x.shape[2]), strict=True)
    ]
    return torch.cat(levels, 2)
