"""The glue of a decode step in torch: the specification, rounding where transformers does."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square in float32, round, and multiply by the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, and normalise the rounded sum."""
    total = residual + x
    return total, rms_norm(total, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[B, H, T, D]`` in pairs of channels ``d`` and ``d + D / 2``, rounding products."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def rope_append(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    counts: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise, rotate, and store keys and values in the last ``T`` of each row's slots."""
    if query_norm is not None:
        query = rms_norm(query, query_norm, eps)
    if key_norm is not None:
        keys = rms_norm(keys, key_norm, eps)
    query, keys = (rotate(x.transpose(1, 2), cos, sin) for x in (query, keys))
    steps = keys.shape[2]
    slots = counts.long().view(-1, 1) - steps + torch.arange(steps, device=counts.device)
    index = slots[:, None, :, None].expand_as(keys)
    exact_keys.scatter_(2, index, keys)
    exact_values.scatter_(2, index, values.transpose(1, 2))
    return query.contiguous()


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply the rounded ``silu(gate)`` by ``up``."""
    return torch.nn.functional.silu(gate) * up


def join_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``[B, H, T, D]`` and lay the heads of each token side by side."""
    return x.to(dtype).transpose(1, 2).flatten(2)
