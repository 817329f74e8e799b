"""Eight-bit keys and values for blocks of keys: the specification of what kernels multiply.

Keys lose their mean over the tokens, which no softmax sees, and take one scale per block. Values
take one scale per channel and are E4M3. Queries take one scale per token where they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeeze.kernels.block_sparse_attention.pyramid import aligned

Quantize = Literal["int8", "float8"]
LARGEST = {"int8": 127.0, "float8": 448.0}
E4M3 = torch.float8_e4m3fn
TINY = 1e-12
# Weights are 2**LIFT times as large when they are rounded to E4M3, which keeps small ones normal.
LIFT = 8
PADDED_TOKENS = 128


@dataclass(frozen=True)
class Small:
    """Keys and values as eight-bit codes; positions count from each row's first real token.

    Attributes:
        keys: int8 or E4M3 ``[B, H_kv, P, D']``, zero past the last token; P is T rounded up to 128
            and D' the head size rounded up to a power of two of at least 32.
        key_scales: float32 ``[B, H_kv, P / block]``.
        means: What the keys lost, float32 ``[B, H_kv, D']``.
        values: E4M3 ``[B, H_kv, D', P]``. Of sixteen tokens, place j holds token ``order()[j]``:
            eight-bit left operands of tensor cores want four neighbours of the reduced dimension in
            a register, and products leave tokens 2t, 2t + 1, 2t + 8 and 2t + 9 there.
        value_scales: float32 ``[B, H_kv, D']``.
    """

    keys: Tensor
    key_scales: Tensor
    means: Tensor
    values: Tensor
    value_scales: Tensor


def order(device: torch.device | None = None) -> Tensor:
    """Return which of sixteen tokens each place of the values holds, int64 ``[16]``."""
    place = torch.arange(16, device=device)
    return (place & 1) | ((place >> 2 & 3) << 1) | ((place >> 1 & 1) << 3)


def sizes(T: int, D: int) -> tuple[int, int]:
    """Return the padded tokens and channels of codes."""
    return -(-T // PADDED_TOKENS) * PADDED_TOKENS, max(32, 1 << (D - 1).bit_length())


def quantize(
    keys: Tensor, values: Tensor, starts: Tensor | None, block: int, to: Quantize
) -> Small:
    """Round keys and values to eight bits, in float32.

    Args:
        keys: After RoPE, ``[B, H_kv, T, D]``.
        values: ``[B, H_kv, T, D]``.
        starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
        block: Keys sharing a scale, 64 or 128: a block of the index.
        to: What keys become. Values become E4M3 in both cases.
    """
    (B, _, T, D), device = keys.shape, keys.device
    P, wide = sizes(T, D)
    lengths = torch.full((B,), T, device=device) if starts is None else T - starts
    real = (torch.arange(T, device=device) < lengths[:, None])[:, None, :, None]
    k, v = (aligned(x, starts).float().where(real, 0.0) for x in (keys, values))
    means = k.sum(2) / lengths[:, None, None]
    k = pad((k - means[:, :, None]).where(real, 0.0), (0, wide - D, 0, P - T))
    k = k.unflatten(2, (P // block, block))
    scales = k.abs().amax((-1, -2)).clamp(min=TINY) / LARGEST[to]
    k = (k / scales[..., None, None]).flatten(2, 3)
    v = pad(v, (0, wide - D, 0, P - T))
    value_scales = v.abs().amax(2).clamp(min=TINY) / LARGEST["float8"]
    v = (v / value_scales[:, :, None]).unflatten(2, (P // 16, 16))[:, :, :, order(device)]
    return Small(
        k.round().to(torch.int8) if to == "int8" else k.to(E4M3),
        scales,
        pad(means, (0, wide - D)),
        v.flatten(2, 3).mT.contiguous().to(E4M3),
        value_scales,
    )


def rounded(small: Small, T: int, D: int) -> tuple[Tensor, Tensor]:
    """Return the float32 keys (less their mean) and values that the codes stand for.

    Both are ``[B, H_kv, T, D]``.
    """
    block = small.keys.shape[2] // small.key_scales.shape[2]
    keys = small.keys.float() * small.key_scales.repeat_interleave(block, 2)[..., None]
    values = small.values.float() * small.value_scales[..., None]
    back = order(values.device).argsort()
    values = values.mT.unflatten(2, (-1, 16))[:, :, :, back].flatten(2, 3)
    return keys[:, :, :T, :D], values[:, :, :T, :D]


def rounded_queries(query: Tensor, to: Quantize) -> Tensor:
    """Round each token's query to eight bits and back, float32 ``[B, H, T_q, D]``."""
    wide = query.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=TINY) / LARGEST[to]
    codes = wide / scale
    return (codes.round() if to == "int8" else codes.to(E4M3).float()) * scale


def rounded_weights(weights: Tensor) -> Tensor:
    """Round weights of at most 1 to E4M3 times a power of two."""
    return (weights * 2**LIFT).to(E4M3).to(weights.dtype) / 2**LIFT
