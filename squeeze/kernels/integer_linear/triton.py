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

from squeeze.kernels.integer_linear import streamed
from squeeze.types import IntegerWeight

VECTOR_ROWS = 1  # every row of x costs one multiply-add per weight
TARGET_PROGRAMS = 264  # two per multiprocessor of a large GPU
DENSE_ROWS = 16  # from here on decoding once and a library product are faster
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLOW = tl.constexpr(INTERPRETED)
_WIDEN = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
_PICK = tl.constexpr(tuple(f"lop3.b32 $0, $1, {15 << 4 * n}, 0x4B000000, 0xEA;" for n in range(4)))


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
    if SCALED:
        power = tl.exp2(-tl.load(exponents + column, mask=mask, other=0).to(tl.float32))
    else:
        power = tl.full(column.shape, 1.0, tl.float32)
    return power


@triton.jit
def _widened(value):
    """Change to float32; bfloat16 two at a time."""
    if value.dtype == tl.bfloat16 and not SLOW:
        wide = tl.inline_asm_elementwise(
            _WIDEN, "=f,=f,r", [value], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def _in_place(word, n: tl.constexpr, MIDDLE: tl.constexpr):
    """16**n times (nibble n less MIDDLE) for n < 4, float32: no shift, no conversion."""
    if SLOW:
        number = ((word & (15 << (4 * n))) | 0x4B000000).to(tl.float32, bitcast=True)
    else:  # the compiler would take two instructions for and and or
        number = tl.inline_asm_elementwise(
            _PICK[n], "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1
        )
    return number - (8388608.0 + MIDDLE * 16.0**n)


@triton.jit
def _centred_in_place(low, high, shift: tl.constexpr, n: tl.constexpr, BITS: tl.constexpr):
    """16**n times the codes at one shift and nibble, less the middle of their range."""
    if BITS <= 4:
        entry = _in_place(low >> shift, n, 2 ** (BITS - 1))
    else:
        entry = _in_place(low >> shift, n, 0)
        entry += 16.0 * _in_place(high >> shift, n, 2 ** (BITS - 5))
    return entry


@triton.jit
def _vector_kernel(
    x, codes, scale, zero, exponents, bias, y, out_features, in_features, steps, x_stride,
    u: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """y[m, o] = sum_i x[m, i] W[o, i] + bias[o] for M <= 4 rows of x.

    One program computes BN outputs over the whole of ``in``: x and weights in float32, one
    accumulator tile [BN, BT] per row of x, reduced once at the end. Codes count from the middle of
    their range; what a zero point is off it is taken from the sum of x. WHOLE: no row or step
    of a tile is missing. EVEN: no column of a step is.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    UNROLL: tl.constexpr = 1 if ASYMMETRIC or SCALED or M > 1 or BITS != 4 else 4  # or spills
    row_mask = (tl.full((BN,), 1, tl.int1) if WHOLE else rows < out_features)[:, None]
    start = rows.to(tl.int64)[:, None] * (steps // u)
    sums = (tl.zeros((BN, BT), tl.float32),) * M
    for t0 in range(0, steps, BT):
        t = t0 + tl.arange(0, BT)
        there = tl.full((BT,), 1, tl.int1) if WHOLE else t < steps
        mask = row_mask & there[None, :]
        group = start + (t // u)[None, :]
        words = codes + group * (u * BITS) + (t % u)[None, :]
        first = (t // u) * (32 * u) + t % u
        parts = (tl.zeros((BN, BT), tl.float32),) * M  # in units of the scale
        inputs = (tl.zeros((BT,), tl.float32),) * M
        for c in tl.range(0, 4, loop_unroll_factor=UNROLL):
            low, high = _codes(words, u, c, mask, BITS)
            for i in tl.static_range(8):
                column = first + (4 * i + c) * u
                keep = there if EVEN else there & (column < in_features)
                entry = _centred_in_place(low, high, i // 4 * 16, i % 4, BITS)
                power = _power(exponents, column, keep, SCALED)
                new, total = (), ()
                for m in tl.static_range(M):
                    value = tl.load(x + m * x_stride + column, mask=keep, other=0.0)
                    value = _widened(value) * power
                    total = total + (inputs[m] + value,)  # noqa: RUF005
                    value *= 16.0 ** -(i % 4)
                    new = new + (parts[m] + entry * value[None, :],)  # noqa: RUF005
                parts, inputs = new, total
        factor = tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
        if ASYMMETRIC:
            off = tl.load(zero + group, mask=mask, other=0).to(tl.float32) - 2.0 ** (BITS - 1)
        scaled = ()
        for m in tl.static_range(M):
            part = parts[m]
            if ASYMMETRIC:
                part -= off * inputs[m][None, :]
            scaled = scaled + (sums[m] + part * factor,)  # noqa: RUF005
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
    codes, scale, zero, exponents, dense, size, groups, in_features,
    u: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, SCALED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dense[o, i] = W[o, i]: BLOCK of the ``size`` words that hold eight low nibbles each.

    Word q = c u + r of a group has the columns 4 n u + q: nibble by nibble, neighbours in words are
    neighbours in columns. EVEN: groups fill the rows.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    group, q = place // (4 * u), place % (4 * u)
    if BITS % 4 == 0:
        words = codes + group.to(tl.int64) * (u * BITS) + q
        low = tl.load(words, mask=mask, other=0)
        high = tl.load(words + (BITS - 4) * u, mask=mask, other=0)
    else:
        low, high = _codes(codes + group.to(tl.int64) * (u * BITS) + q % u, u, q // u, mask, BITS)
    factor = tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
    middle = tl.full((BLOCK,), 2 ** (BITS - 1), tl.float32)
    if ASYMMETRIC:
        middle = tl.load(zero + group, mask=mask, other=0).to(tl.float32)
    for n in tl.static_range(8):
        if EVEN:
            target = group.to(tl.int64) * (32 * u) + q + 4 * n * u
            keep = mask
        else:
            column = group % groups * (32 * u) + (4 * n * u + q)
            target = (group // groups).to(tl.int64) * in_features + column
            keep = mask & (column < in_features)
        entry = _centred(low, high, middle, n, BITS) * factor
        if SCALED:
            column = group % groups * (32 * u) + (4 * n * u + q)
            entry *= _power(exponents, column, keep, SCALED)
        tl.store(dense + target, entry.to(dense.dtype.element_ty), mask=keep)


def integer_linear(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` by the kernel that suits the number of rows of ``x``.

    Few rows that fit: ``streamed``. Otherwise one row: multiply-add in float32; up to 16: matrix
    product on tiles decoded in registers. Above: this layer's weight is decoded to a scratch in the
    dtype of ``x``, the library multiplies, and the scratch is freed.
    """
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    flat = flat if flat.stride(-1) == 1 or not flat.numel() else flat.contiguous()
    if len(flat) == 0:
        y = flat.new_empty(0, out_features)
    elif streamed.fits(flat, weight):
        y = streamed.integer_linear(flat, weight, bias)
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
    del meta["BT"]
    size = 4 * steps * out_features
    _dense_kernel[(triton.cdiv(size, 1024),)](
        weight.codes, weight.scale, weight.zero, weight.exponents, result,
        size, weight.scale.shape[1], in_features,
        **meta, EVEN=in_features % weight.group_size == 0, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return result


def _vector(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Launch the matrix-vector kernel."""
    out_features, in_features = weight.shape
    y = x.new_empty(len(x), out_features)
    steps, meta = _meta(weight)
    wide = len(x) == 1 and out_features >= 8192 and weight.bits <= 4
    bn = 32 if wide else 16 if len(x) <= 2 else 8  # more would spill
    whole = steps % meta["BT"] == 0 and out_features % bn == 0
    # More threads than steps: then x is loaded where it is needed and not through shared memory.
    _vector_kernel[(triton.cdiv(out_features, bn),)](
        x, weight.codes, weight.scale, weight.zero, weight.exponents, bias, y,
        out_features, in_features, steps, x.stride(0),
        M=len(x), **meta, BIASED=bias is not None, WHOLE=whole,
        EVEN=in_features % weight.group_size == 0, BN=bn, num_warps=8,
        maxnreg=None if meta["SCALED"] or len(x) > 2 else 128,
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
