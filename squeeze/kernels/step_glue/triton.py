"""Triton kernels of a decode step's glue: few rows, so each is as long as its launch.

On GPUs that can, every launch begins while the one before it ends, and lets the next begin; what
that one wrote is read only after it has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _norm(
    x, residual, weight, total, normed, size, eps,
    ADDED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute weight * (s * rsqrt(mean(s^2) + eps)) with s = residual + x, one row a program."""
    column = tl.arange(0, BLOCK)
    keep = column < size
    start = tl.program_id(0).to(tl.int64) * size
    factor = tl.load(weight + column, mask=keep, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + start + column, mask=keep, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(residual + start + column, mask=keep, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + start + column, rounded, mask=keep)
        value = rounded.to(tl.float32)
    scaled = value * tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    product = scaled.to(normed.dtype.element_ty).to(tl.float32) * factor.to(tl.float32)
    tl.store(normed + start + column, product.to(normed.dtype.element_ty), mask=keep)


@triton.jit
def _normalised(first, second, norm, channel, keep, half, size, eps, DTYPE: tl.constexpr):
    """RMS norm of a head's two halves, rounded as in ``_norm``."""
    square = tl.sum(first * first, 0) + tl.sum(second * second, 0)
    factor = tl.rsqrt(square / size + eps)
    low = tl.load(norm + channel, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(norm + half + channel, mask=keep, other=0.0).to(tl.float32)
    first = ((first * factor).to(DTYPE).to(tl.float32) * low).to(DTYPE).to(tl.float32)
    second = ((second * factor).to(DTYPE).to(tl.float32) * high).to(DTYPE).to(tl.float32)
    return first, second


@triton.jit
def _rounded_product(a, b, DTYPE: tl.constexpr):
    return (a * b).to(DTYPE).to(tl.float32)


@triton.jit
def _rope(
    query, keys, values, cos, sin, exact_keys, exact_values, counts, query_norm, key_norm,
    rotated, steps, heads, kv_heads, slots, size, eps,
    query_strides, key_strides, value_strides, angle_strides, exact_key_strides,
    exact_value_strides,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one token: queries first, then keys, then values."""
    head = tl.program_id(0)
    row = (tl.program_id(1) // steps).to(tl.int64)
    token = tl.program_id(1) % steps
    half = size // 2
    channel = tl.arange(0, HALF)
    keep = channel < half
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    DTYPE: tl.constexpr = rotated.dtype.element_ty
    slot = (tl.load(counts + row) - steps + token).to(tl.int64)
    inside = keep & (slot >= 0) & (slot < slots)
    if head >= heads + kv_heads:
        own = head - heads - kv_heads
        source = values + row * value_strides[0] + token * value_strides[1] + own * value_strides[2]
        place = row * exact_value_strides[0] + own * exact_value_strides[1]
        target = exact_values + place + slot * exact_value_strides[2]
        tl.store(target + channel, tl.load(source + channel, mask=keep), mask=inside)
        source += half
        tl.store(target + half + channel, tl.load(source + channel, mask=keep), mask=inside)
    else:
        angle = row * angle_strides[0] + token * angle_strides[1] + channel
        cos_low = tl.load(cos + angle, mask=keep, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + angle + half, mask=keep, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + angle, mask=keep, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + angle + half, mask=keep, other=0.0).to(tl.float32)
        if head < heads:
            own = head
            source = query + row * query_strides[0] + token * query_strides[1]
            source += own * query_strides[2]
        else:
            own = head - heads
            source = keys + row * key_strides[0] + token * key_strides[1] + own * key_strides[2]
        first = tl.load(source + channel, mask=keep, other=0.0).to(tl.float32)
        second = tl.load(source + half + channel, mask=keep, other=0.0).to(tl.float32)
        if head < heads:
            if QUERY_NORM:
                first, second = _normalised(
                    first, second, query_norm, channel, keep, half, size, eps, DTYPE
                )
        else:
            if KEY_NORM:
                first, second = _normalised(
                    first, second, key_norm, channel, keep, half, size, eps, DTYPE
                )
        low = _rounded_product(first, cos_low, DTYPE) - _rounded_product(second, sin_low, DTYPE)
        high = _rounded_product(second, cos_high, DTYPE) + _rounded_product(first, sin_high, DTYPE)
        if head < heads:
            target = rotated + ((row * heads + own) * steps + token) * size
            tl.store(target + channel, low.to(DTYPE), mask=keep)
            tl.store(target + half + channel, high.to(DTYPE), mask=keep)
        else:
            place = row * exact_key_strides[0] + own * exact_key_strides[1]
            target = exact_keys + place + slot * exact_key_strides[2]
            tl.store(target + channel, low.to(DTYPE), mask=inside)
            tl.store(target + half + channel, high.to(DTYPE), mask=inside)


@triton.jit
def _silu(gate, up, y, size, gate_stride, up_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Compute round(gate / (1 + exp(-gate))) * up, BLOCK channels of one row."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = column < size
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(gate + row * gate_stride + column, mask=keep, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=keep, other=0.0).to(tl.float32)
    value = (value / (1.0 + tl.exp(-value))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * size + column, (value * factor).to(y.dtype.element_ty), mask=keep)


@triton.jit
def _heads(x, y, heads, steps, size, strides, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Copy ``[B, H, T, D]`` to ``[B, T, H D]``, BLOCK channels of one token."""
    row = (tl.program_id(1) // steps).to(tl.int64)
    token = tl.program_id(1) % steps
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = column < heads * size
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    source = x + row * strides[0] + token * strides[2]
    value = tl.load(source + column // size * strides[1] + column % size, mask=keep, other=0.0)
    target = y + (row * steps + token) * heads * size
    tl.store(target + column, value.to(y.dtype.element_ty), mask=keep)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch on checked tensors; the first result is ``x`` where nothing is added."""
    x = x.contiguous()
    size = x.shape[-1]
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if not x.numel():
        return total, normed
    block = triton.next_power_of_2(size)
    options = _overlap(x)
    _norm[(x.numel() // size,)](
        x, x if residual is None else residual.contiguous(), weight, total, normed, size, eps,
        ADDED=residual is not None, BLOCK=block, OVERLAP=bool(options),
        num_warps=min(16, max(1, block // 512)), **options,
    )  # fmt: skip
    return total, normed


def rope_append(
    query: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    exact_keys: Tensor, exact_values: Tensor, counts: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """Launch on checked tensors."""
    batch, steps, heads, size = query.shape
    kv_heads, slots = exact_keys.shape[1:3]
    rotated = query.new_empty(batch, heads, steps, size)
    options = _overlap(query)
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    angles = (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    _rope[(heads + 2 * kv_heads, batch * steps)](
        query, keys, values, cos, sin, exact_keys, exact_values, counts,
        query if query_norm is None else query_norm, keys if key_norm is None else key_norm,
        rotated, steps, heads, kv_heads, slots, size, eps,
        query.stride()[:3], keys.stride()[:3], values.stride()[:3], angles,
        exact_keys.stride()[:3], exact_values.stride()[:3],
        QUERY_NORM=query_norm is not None, KEY_NORM=key_norm is not None,
        HALF=triton.next_power_of_2(size // 2), OVERLAP=bool(options), num_warps=1, **options,
    )  # fmt: skip
    return rotated


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Launch on checked tensors."""
    size = gate.shape[-1]
    y = gate.new_empty(gate.shape)
    if not y.numel():
        return y
    rows = (gate.reshape(-1, size), up.reshape(-1, size))
    first, second = (x if x.stride(1) == 1 else x.contiguous() for x in rows)
    options = _overlap(gate)
    _silu[(triton.cdiv(size, 512), len(first))](
        first, second, y, size, first.stride(0), second.stride(0),
        BLOCK=512, OVERLAP=bool(options), num_warps=2, **options,
    )  # fmt: skip
    return y


def join_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch on a checked tensor."""
    batch, heads, steps, size = x.shape
    y = x.new_empty(batch, steps, heads * size, dtype=dtype)
    if not y.numel():
        return y
    x = x if x.stride(3) == 1 else x.contiguous()
    options = _overlap(x)
    _heads[(triton.cdiv(heads * size, 512), batch * steps)](
        x, y, heads, steps, size, x.stride()[:3],
        BLOCK=512, OVERLAP=bool(options), num_warps=2, **options,
    )  # fmt: skip
    return y


def _overlap(x: Tensor) -> dict[str, bool]:
    """Options of a launch that may begin before the one ahead of it has ended, where GPUs can."""
    found = x.device.type != "cpu" and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"launch_pdl": True} if found else {}
