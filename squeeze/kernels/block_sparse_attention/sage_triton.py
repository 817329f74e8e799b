"""Round keys and values to eight bits in two passes; ``sage.quantize`` is what this computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.block_sparse_attention.sage import (
    E4M3,
    LARGEST,
    TINY,
    Quantize,
    Small,
    sizes,
)

CHUNK = 512
ROWS = 64


@triton.jit
def to_e4m3(x, INTERPRETED: tl.constexpr):
    """Round float32 to E4M3, ties to even; the interpreter's own cast loses the carry."""
    if INTERPRETED:
        exponent = tl.abs(x).to(tl.int32, bitcast=True) >> 23
        step = ((tl.maximum(exponent, 121) - 3) << 23).to(tl.float32, bitcast=True)
        x = ((x / step + 12582912.0) - 12582912.0) * step
    return x.to(tl.float8e4nv)


@triton.jit
def _statistics(
    keys, values, starts, sums, peaks,
    k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, T, chunks,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Sum the keys of one chunk of tokens and find the largest magnitude of each value channel."""
    pair = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b, h = pair // H, pair % H
    start = tl.load(starts + b) if HAS_STARTS else b * 0
    channel = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    peak = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, CHUNK, ROWS):
        token = start + chunk * CHUNK + first + tl.arange(0, ROWS)
        mask = (token < T)[:, None] & (channel < D)[None, :]
        k = tl.load(
            keys + b * k_b + h * k_h + token[:, None] * k_t + channel[None, :] * k_d,
            mask=mask, other=0.0,
        )  # fmt: skip
        v = tl.load(
            values + b * v_b + h * v_h + token[:, None] * v_t + channel[None, :] * v_d,
            mask=mask, other=0.0,
        )  # fmt: skip
        total += tl.sum(k.to(tl.float32), 0)
        peak = tl.maximum(peak, tl.max(tl.abs(v.to(tl.float32)), 0))
    target = (pair * chunks + chunk) * BLOCK_D + channel
    tl.store(sums + target, total)
    tl.store(peaks + target, peak)


@triton.jit
def _codes(
    keys, values, starts, means, value_scales, key_codes, key_scales, value_codes,
    k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, T, P,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    INT8: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, HAS_STARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Round one block of keys, and its values transposed and reordered (``sage.Small``)."""
    pair = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b, h = pair // H, pair % H
    start = tl.load(starts + b) if HAS_STARTS else b * 0
    channel = tl.arange(0, BLOCK_D)
    inside = channel < D
    place = tl.arange(0, BLOCK)
    token = start + block * BLOCK + place
    mask = (token < T)[:, None] & inside[None, :]
    k = tl.load(
        keys + b * k_b + h * k_h + token[:, None] * k_t + channel[None, :] * k_d,
        mask=mask, other=0.0,
    )  # fmt: skip
    mean = tl.load(means + pair * BLOCK_D + channel)
    k = tl.where(mask, k.to(tl.float32) - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), TINY) / LARGEST
    k = k / scale
    # Adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even.
    whole = (k + 12582912.0) - 12582912.0
    codes = whole.to(tl.int8) if INT8 else to_e4m3(k, INTERPRETED)
    row = block * BLOCK + place
    tl.store(key_codes + (pair * P + row)[:, None] * BLOCK_D + channel[None, :], codes)
    tl.store(key_scales + pair * (P // BLOCK) + block, scale)
    sixteenth = (place & 1) | ((place >> 2 & 3) << 1) | ((place >> 1 & 1) << 3)
    token = start + block * BLOCK + (place & -16) + sixteenth
    mask = (token < T)[:, None] & inside[None, :]
    v = tl.load(
        values + b * v_b + h * v_h + token[:, None] * v_t + channel[None, :] * v_d,
        mask=mask, other=0.0,
    )  # fmt: skip
    divisor = tl.load(value_scales + pair * BLOCK_D + channel)
    v = to_e4m3(tl.trans(v.to(tl.float32) / divisor[None, :]), INTERPRETED)  # [BLOCK_D, BLOCK]
    tl.store(value_codes + (pair * BLOCK_D + channel)[:, None] * P + row[None, :], v)


def quantize(
    keys: Tensor, values: Tensor, starts: Tensor | None, block: int, to: Quantize
) -> Small:
    """Launch both passes; arguments and results are those of ``sage.quantize``.

    Cost: reads keys and values twice, writes half of them once. Nothing waits for the device.
    """
    B, H, T, D = keys.shape
    P, wide = sizes(T, D)
    device, chunks = keys.device, triton.cdiv(T, CHUNK)
    sums, peaks = torch.empty(2, B, H, chunks, wide, device=device).unbind()
    _statistics[(B * H, chunks)](
        keys, values, starts, sums, peaks, *keys.stride(), *values.stride(), T, chunks,
        H=H, D=D, BLOCK_D=wide, CHUNK=CHUNK, ROWS=ROWS, HAS_STARTS=starts is not None,
    )  # fmt: skip
    lengths = T if starts is None else (T - starts)[:, None, None]
    means = sums.sum(2) / lengths
    value_scales = peaks.amax(2).clamp(min=TINY) / LARGEST["float8"]
    codes = torch.int8 if to == "int8" else E4M3
    small = Small(
        torch.empty(B, H, P, wide, dtype=codes, device=device),
        torch.empty(B, H, P // block, device=device),
        means,
        torch.empty(B, H, wide, P, dtype=E4M3, device=device),
        value_scales,
    )
    _codes[(B * H, P // block)](
        keys, values, starts, means, value_scales, small.keys, small.key_scales, small.values,
        *keys.stride(), *values.stride(), T, P,
        H=H, D=D, BLOCK_D=wide, BLOCK=block, INT8=to == "int8", LARGEST=LARGEST[to], TINY=TINY,
        HAS_STARTS=starts is not None, INTERPRETED=triton.knobs.runtime.interpret, num_warps=8,
    )  # fmt: skip
    return small
