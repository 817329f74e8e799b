"""Triton kernels of the integer linear layer: matrix-vector, matrix-matrix, and decode to dense.

Layout: a group of G columns has u = G / 32 positions. Position r of group g is one step t = g u + r
of a row, and its 32 values are the columns g G + i u + r: for c in 0..3 one word, or a mask and an
or of two, holds the codes of i = 4 n + c in its eight nibbles n (widths above 4: a second word
holds the high parts). All 32 belong to one group, so that scale and zero are read once per step.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.types import IntegerWeight

VECTOR_ROWS = 4  # up to here every row of x costs one multiply-add per weight
TARGET_PROGRAMS = 264  # two per multiprocessor of a large GPU
DENSE_ROWS = 256  # from here on decoding once and a library product are faster
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _plane(words, u, c, mask, WIDTH: tl.constexpr):
    """Nibbles n = the field of value 4 n + c in a plane of WIDTH bits; ``words`` [BN, BT]."""
    word = tl.load(words + (c % WIDTH) * u, mask=mask, other=0)
    if WIDTH < 4:
        word = (word >> ((c // WIDTH) * WIDTH)) & (0x11111111 * (2**WIDTH - 1))
    return word


@triton.jit
def _codes(words, u, c, mask, BITS: tl.constexpr):
    """Low nibbles and high nibbles of the codes of values 4 n + c."""
    high = tl.zeros(words.shape, tl.int32)
    if BITS == 2:
        low = _plane(words, u, c, mask, 2)
    elif BITS == 3:
        low = _plane(words, u, c, mask, 2) | (_plane(words + 2 * u, u, c, mask, 1) << 2)
    else:
        low = _plane(words, u, c, mask, 4)
    if BITS == 5:
        high = _plane(words + 4 * u, u, c, mask, 1)
    elif BITS == 6:
        high = _plane(words + 4 * u, u, c, mask, 2)
    elif BITS == 7:
        high = _plane(words + 4 * u, u, c, mask, 2)
        high = high | (_plane(words + 6 * u, u, c, mask, 1) << 2)
    elif BITS == 8:
        high = _plane(words + 4 * u, u, c, mask, 4)
    return low, high


@triton.jit
def _step(codes, scale, zero, rows, row_mask, t, steps, u: tl.constexpr, BITS: tl.constexpr,
          ASYMMETRIC: tl.constexpr):  # fmt: skip
    """Words, mask, scale and zero of steps ``t`` [BT] of ``rows`` [BN], each [BN, BT]."""
    mask = row_mask & (t < steps)[None, :]
    group = rows.to(tl.int64)[:, None] * (steps // u) + (t // u)[None, :]
    words = codes + group * (u * BITS) + (t % u)[None, :]
    factor = tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
    if ASYMMETRIC:
        middle = tl.load(zero + group, mask=mask, other=0).to(tl.float32)
    else:
        middle = tl.full(mask.shape, 2 ** (BITS - 1), tl.float32)
    return words, mask, factor, middle


@triton.jit
def _centred(low, high, middle, n: tl.constexpr, BITS: tl.constexpr):
    """Codes of nibble n less their zero, float32 [BN, BT]."""
    code = (low >> (4 * n)) & 15
    if BITS > 4:
        code = code | (((high >> (4 * n)) & 15) << 4)
    # 8388608 + code as the bits of a float: a conversion would cost four times the issue slots.
    number = (code | 0x4B000000).to(tl.float32, bitcast=True)
    return number - (middle + 8388608.0)


@triton.jit
def _power(exponents, column, mask, SCALED: tl.constexpr):
    """Factor 2**-exponent of columns [BT], float32; 1 where no column was scaled."""
    if not SCALED:
        return tl.full(column.shape, 1.0, tl.float32)
    return tl.exp2(-tl.load(exponents + column, mask=mask, other=0).to(tl.float32))


@triton.jit
def _vector_kernel(
    x, codes, scale, zero, exponents, bias, y, out_features, in_features, steps, x_stride,
    u: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """y[m, o] = sum_i x[m, i] W[o, i] + bias[o] for M <= 4 rows of x.

    One program computes BN outputs over the whole of ``in``: x and weights in float32, one
    accumulator tile [BN, BT] per row of x, reduced once at the end.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask = (rows < out_features)[:, None]
    sums = (tl.zeros((BN, BT), tl.float32),) * M
    for t0 in range(0, steps, BT):
        t = t0 + tl.arange(0, BT)
        words, mask, factor, middle = _step(
            codes, scale, zero, rows, row_mask, t, steps, u, BITS, ASYMMETRIC
        )
        first = (t // u) * (32 * u) + t % u
        parts = (tl.zeros((BN, BT), tl.float32),) * M  # in units of the scale
        for c in tl.static_range(4):
            low, high = _codes(words, u, c, mask, BITS)
            for n in tl.static_range(8):
                column = first + (4 * n + c) * u
                entry = _centred(low, high, middle, n, BITS)
                keep = (t < steps) & (column < in_features)
                power = _power(exponents, column, keep, SCALED)
                new = ()
                for m in tl.static_range(M):
                    value = tl.load(x + m * x_stride + column, mask=keep, other=0.0)
                    value = value.to(tl.float32) * power
                    new = new + (parts[m] + entry * value[None, :],)  # noqa: RUF005
                parts = new
        scaled = ()
        for m in tl.static_range(M):
            scaled = scaled + (sums[m] + parts[m] * factor,)  # noqa: RUF005
        sums = scaled
    keep = rows < out_features
    for m in tl.static_range(M):
        total = tl.sum(sums[m], axis=1)
        if BIASED:
            total += tl.load(bias + rows, mask=keep, other=0.0).to(tl.float32)
        tl.store(y + m * out_features + rows, total.to(y.dtype.element_ty), mask=keep)


@triton.jit
def _matrix_kernel(
    x, codes, scale, zero, exponents, bias, y, m_total, out_features, in_features, steps, x_stride,
    u: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, SCALED: tl.constexpr,
    BIASED: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Partial y[s, m, o] over a share of ``in``: weights on the rows of the product, x on columns.

    Per turn one word per (row, step) is decoded into eight tiles [BN, BT], each multiplied by the
    matching [BT, BM] of x; float32 accumulation in [BN, BM]. With SPLIT = 1 the result is final;
    otherwise the bias waits for the sum of the parts.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns_m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    row_mask = (rows < out_features)[:, None]
    m_mask = (columns_m < m_total)[None, :]
    x_start = x + columns_m.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BN, BM), tl.float32)
    for turn in range(0, tl.cdiv(4 * tl.cdiv(steps, BT), SPLIT)):
        step = turn * SPLIT + part  # past the end everything is masked
        c = step % 4
        t = (step // 4) * BT + tl.arange(0, BT)
        words, mask, factor, middle = _step(
            codes, scale, zero, rows, row_mask, t, steps, u, BITS, ASYMMETRIC
        )
        low, high = _codes(words, u, c, mask, BITS)
        first = (t // u) * (32 * u) + t % u
        for n in tl.static_range(8):
            column = first + (4 * n + c) * u
            entry = _centred(low, high, middle, n, BITS) * factor
            live = (t < steps) & (column < in_features)
            value = tl.load(x_start + column[:, None], mask=live[:, None] & m_mask, other=0.0)
            if SCALED:
                power = _power(exponents, column, live, SCALED)
                value = value.to(tl.float32) * power[:, None]
            total = tl.dot(entry.to(DOT), value.to(DOT), total, input_precision="ieee")
    keep = rows < out_features
    if SPLIT == 1 and BIASED:
        total += tl.load(bias + rows, mask=keep, other=0.0).to(tl.float32)[:, None]
    target = y + (part.to(tl.int64) * m_total + columns_m)[None, :] * out_features + rows[:, None]
    tl.store(target, total.to(y.dtype.element_ty), mask=keep[:, None] & m_mask)


@triton.jit
def _dense_kernel(
    codes, scale, zero, exponents, dense, out_features, in_features, steps,
    u: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, SCALED: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dense[o, i] = W[o, i], one program per BN rows and BT steps."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row_mask = (rows < out_features)[:, None]
    words, mask, factor, middle = _step(
        codes, scale, zero, rows, row_mask, t, steps, u, BITS, ASYMMETRIC
    )
    first = (t // u) * (32 * u) + t % u
    target = dense + rows.to(tl.int64)[:, None] * in_features
    for c in tl.static_range(4):
        low, high = _codes(words, u, c, mask, BITS)
        for n in tl.static_range(8):
            column = first + (4 * n + c) * u
            keep = (t < steps) & (column < in_features)
            entry = _centred(low, high, middle, n, BITS) * factor
            entry *= _power(exponents, column, keep, SCALED)[None, :]
            entry = entry.to(dense.dtype.element_ty)
            tl.store(target + column[None, :], entry, mask=row_mask & keep[None, :])


def integer_linear(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` by the kernel that suits the number of rows of ``x``.

    Up to 4: multiply-add in float32; up to 256: matrix product on tiles decoded in registers.
    Above: this layer's weight is decoded to a scratch in the dtype of ``x``, the library
    multiplies, and the scratch is freed.
    """
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    flat = flat if flat.stride(-1) == 1 or not flat.numel() else flat.contiguous()
    if len(flat) == 0:
        y = flat.new_empty(0, out_features)
    elif len(flat) <= VECTOR_ROWS:
        y = _vector(flat, weight, bias)
    elif len(flat) <= DENSE_ROWS:
        y = _matrix(flat, weight, bias)
    else:
        cast = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(flat, dense(weight, x.dtype), cast)
    return y.view(*x.shape[:-1], out_features)


def dense(weight: IntegerWeight, dtype: torch.dtype) -> Tensor:
    """Decode the whole weight to ``[out, in]`` in ``dtype``."""
    out_features, in_features = weight.shape
    result = weight.codes.new_empty(out_features, in_features, dtype=dtype)
    steps, meta = _meta(weight)
    bt = meta.pop("BT")
    _dense_kernel[(triton.cdiv(out_features, 16), triton.cdiv(steps, bt))](
        weight.codes, weight.scale, weight.zero, weight.exponents, result,
        out_features, in_features, steps, **meta, BN=16, BT=bt, num_warps=4,
    )  # fmt: skip
    return result


def _vector(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Launch the matrix-vector kernel."""
    out_features, in_features = weight.shape
    y = x.new_empty(len(x), out_features)
    steps, meta = _meta(weight)
    bn = 8  # 16 would take twice the registers to save a tenth of the instructions
    _vector_kernel[(triton.cdiv(out_features, bn),)](
        x, weight.codes, weight.scale, weight.zero, weight.exponents, bias, y,
        out_features, in_features, steps, x.stride(0),
        M=len(x), **meta, BIASED=bias is not None, BN=bn, num_warps=4,
    )  # fmt: skip
    return y


def _matrix(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Launch the matrix-matrix kernel; add up the parts when ``in`` was split."""
    out_features, in_features = weight.shape
    rows = len(x)
    bm = min(64, max(16, triton.next_power_of_2(rows)))
    bn = 64
    steps, meta = _meta(weight)
    bt = min(32, meta.pop("BT"))
    tiles = triton.cdiv(out_features, bn) * triton.cdiv(rows, bm)
    split = min(8, max(1, TARGET_PROGRAMS // tiles), triton.cdiv(steps, bt) * 4)
    whole = split == 1
    y = x.new_empty(split, rows, out_features, dtype=x.dtype if whole else torch.float32)
    _matrix_kernel[(triton.cdiv(out_features, bn), triton.cdiv(rows, bm), split)](
        x, weight.codes, weight.scale, weight.zero, weight.exponents, bias, y,
        rows, out_features, in_features, steps, x.stride(0),
        **meta, BIASED=bias is not None,
        DOT=_dot_dtype(x.dtype), BM=bm, BN=bn, BT=bt, SPLIT=split, num_warps=4, num_stages=2,
    )  # fmt: skip
    if whole:
        return y[0]
    total = y.sum(0)
    if bias is not None:
        total += bias.float()
    return total.to(x.dtype)


def _meta(weight: IntegerWeight) -> tuple[int, dict[str, int]]:
    """Steps of a row, and the compile-time facts of a weight with a tile width along steps."""
    u = weight.group_size // 32
    steps = weight.scale.shape[1] * u
    return steps, {
        "u": u,
        "BITS": weight.bits,
        "ASYMMETRIC": weight.zero is not None,
        "SCALED": weight.exponents is not None and not weight.folded,
        "BT": min(128, max(16, triton.next_power_of_2(steps))),
    }


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand type of the matrix product; the interpreter cannot multiply bfloat16."""
    if dtype == torch.float32 or INTERPRETED:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
