"""Triton kernels of the clustered linear layer: matrix-vector, matrix-matrix, and decode to dense.

Layout: with u = padded in / 32, the 32 values i u + j of one j lie in ``bits`` words. For c in 0..3
one word, or a mask and an or of two, holds the codes of i = 4 n + c in its eight nibbles n. A
nibble is what the PRMT instruction takes as a selector, so int8 codebooks of up to 16 entries live
in one to four registers and one to three PRMTs look up four weights. Anything else (float16
entries, more than 4 bits, codebooks that change along a row) gathers entries through the cache.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.lut_linear import few_rows, many_rows, whole_rows, wide_rows
from squeeze.types import ClusteredWeight

VECTOR_ROWS = 4  # up to here every row of x costs one multiply-add per weight
TARGET_PROGRAMS = 264  # two per multiprocessor of a large GPU
DENSE_ROWS = 256  # from here on decoding once and a library product are faster
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# 8388608 + 128: the bits of a float whose low byte is u are the number 8388608 + u.
_TO_FLOAT = "\n".join(
    f"prmt.b32 x, {'v' if n < 4 else 'w'}, 0x4B000000, {0x7540 + n % 4};\n"
    f"sub.f32 ${n}, x, 0f4B000080;"
    for n in range(8)
)
_LOOKUP = {
    1: "prmt.b32 v, $9, $9, s;\nprmt.b32 w, $9, $9, h;\n",
    2: "prmt.b32 v, $9, $10, s;\nprmt.b32 w, $9, $10, h;\n",
    4: "and.b32 q, s, 0x77777777;\nshr.u32 p, q, 16;\n"
    "and.b32 s, s, 0x88888888;\nshr.u32 s, s, 1;\nadd.u32 s, s, 0x32103210;\nshr.u32 h, s, 16;\n"
    "prmt.b32 v, $9, $10, q;\nprmt.b32 x, $11, $12, q;\nprmt.b32 v, v, x, s;\n"
    "prmt.b32 w, $9, $10, p;\nprmt.b32 x, $11, $12, p;\nprmt.b32 w, w, x, h;\n",
}
_ASM = {
    count: tl.constexpr(
        "{\n.reg .b32 s, h, v, w, x, q, p;\nmov.b32 s, $8;\nshr.u32 h, s, 16;\n"
        + lookup
        + _TO_FLOAT
        + "\n}"
    )
    for count, lookup in _LOOKUP.items()
}
_ASM1, _ASM2, _ASM4 = _ASM[1], _ASM[2], _ASM[4]


@triton.jit
def _plane(words, u, c, mask, WIDTH: tl.constexpr):
    """Nibbles n = the field of value 4 n + c in a plane of WIDTH bits; ``words`` [BN, BJ]."""
    word = tl.load(words + (c % WIDTH) * u, mask=mask, other=0)
    if WIDTH < 4:
        word = (word >> ((c // WIDTH) * WIDTH)) & (0x11111111 * (2**WIDTH - 1))
    return word


@triton.jit
def _codes(words, u, c, mask, BITS: tl.constexpr):
    """Low nibbles and high nibbles of the codes of values 4 n + c."""
    high = tl.zeros(words.shape, tl.int32)
    if BITS == 1:
        low = _plane(words, u, c, mask, 1)
    elif BITS == 2:
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
def _table(codebook, base, mask, BITS: tl.constexpr):
    """Load each row's int8 entries as words [BN, 1], offset by 128 to be unsigned."""
    flip: tl.constexpr = -2139062144  # 0x80 in every byte
    if BITS == 1:  # two entries a row: not aligned to words
        first = tl.load(codebook + base, mask=mask, other=0).to(tl.int32) & 255
        second = tl.load(codebook + base + 1, mask=mask, other=0).to(tl.int32) & 255
        t0 = (first | (second << 8)) ^ flip
    else:
        words = codebook.to(tl.pointer_type(tl.int32)) + base // 4
        t0 = tl.load(words, mask=mask, other=0) ^ flip
    t1, t2, t3 = t0, t0, t0
    if BITS >= 3:
        t1 = tl.load(words + 1, mask=mask, other=0) ^ flip
    if BITS >= 4:
        t2 = tl.load(words + 2, mask=mask, other=0) ^ flip
        t3 = tl.load(words + 3, mask=mask, other=0) ^ flip
    return t0, t1, t2, t3


@triton.jit
def _entries(low, t0, t1, t2, t3, BITS: tl.constexpr):
    """Look up eight codes per element: a tuple of eight float32 [BN, BJ]."""
    if BITS <= 2:
        asm: tl.constexpr = _ASM1
    elif BITS == 3:
        asm: tl.constexpr = _ASM2
    else:
        asm: tl.constexpr = _ASM4
    return tl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r",
        [low, t0, t1, t2, t3],
        dtype=(
            tl.float32, tl.float32, tl.float32, tl.float32,
            tl.float32, tl.float32, tl.float32, tl.float32,
        ),
        is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _gather(codebook, base, low, high, column, mask, n: tl.constexpr, BLOCKS: tl.constexpr,
            COLUMNS: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Load the entries of values 4 n + c through the cache, float32 [BN, BJ]."""
    code = (low >> (4 * n)) & 15
    if BITS > 4:
        code = code | (((high >> (4 * n)) & 15) << 4)
    if BLOCKS > 1:
        code += (tl.minimum(column // COLUMNS, BLOCKS - 1) * 2**BITS)[None, :]
    return tl.load(codebook + base + code, mask=mask, other=0).to(tl.float32)


@triton.jit
def _vector_kernel(
    x, indices, codebook, scale, bias, y, out_features, in_features, x_stride,
    u: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    BITS: tl.constexpr, REGISTERS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """y[m, o] = scale[o] sum_i x[m, i] entry(o, i) + bias[o] for M <= 4 rows of x.

    One program computes BN outputs over the whole of ``in``: x and entries in float32, one
    accumulator tile [BN, BJ] per row of x, reduced once at the end.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask = (rows < out_features)[:, None]
    base = ((rows // ROWS).to(tl.int64) * (BLOCKS * 2**BITS))[:, None]
    if REGISTERS:
        t0, t1, t2, t3 = _table(codebook, base, row_mask, BITS)
    sums = (tl.zeros((BN, BJ), tl.float32),) * M
    start = rows.to(tl.int64)[:, None] * (u * BITS)
    for j0 in range(0, u, BJ):
        j = j0 + tl.arange(0, BJ)
        mask = row_mask & (j < u)[None, :]
        words = indices + start + j[None, :]
        for c in tl.static_range(4):
            low, high = _codes(words, u, c, mask, BITS)
            if REGISTERS:
                entries = _entries(low, t0, t1, t2, t3, BITS)
            for n in tl.static_range(8):
                column = (4 * n + c) * u + j
                if REGISTERS:
                    entry = entries[n]
                else:
                    entry = _gather(
                        codebook, base, low, high, column, mask, n, BLOCKS, COLUMNS, BITS
                    )
                keep = (j < u) & (column < in_features)
                new = ()
                for m in tl.static_range(M):
                    value = tl.load(x + m * x_stride + column, mask=keep, other=0.0)
                    new = new + (sums[m] + entry * value.to(tl.float32)[None, :],)  # noqa: RUF005
                sums = new
    keep = rows < out_features
    for m in tl.static_range(M):
        total = tl.sum(sums[m], axis=1)
        if SCALED:
            total *= tl.load(scale + rows, mask=keep, other=0.0).to(tl.float32)
        if BIASED:
            total += tl.load(bias + rows, mask=keep, other=0.0).to(tl.float32)
        tl.store(y + m * out_features + rows, total.to(y.dtype.element_ty), mask=keep)


@triton.jit
def _matrix_kernel(
    x, indices, codebook, scale, bias, y, m_total, out_features, in_features, x_stride,
    u: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    REGISTERS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Partial y[s, m, o] over a share of ``in``: weights on the rows of the product, x on columns.

    Per step one word per (row, j) is decoded into eight tiles [BN, BJ], each multiplied by the
    matching [BJ, BM] of x; float32 accumulation in [BN, BM]. With SPLIT = 1 the result is final;
    otherwise scale and bias wait for the sum of the parts.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns_m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    row_mask = (rows < out_features)[:, None]
    m_mask = (columns_m < m_total)[None, :]
    base = ((rows // ROWS).to(tl.int64) * (BLOCKS * 2**BITS))[:, None]
    if REGISTERS:
        t0, t1, t2, t3 = _table(codebook, base, row_mask, BITS)
    start = rows.to(tl.int64)[:, None] * (u * BITS)
    x_start = x + columns_m.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BN, BM), tl.float32)
    for turn in range(0, tl.cdiv(4 * tl.cdiv(u, BJ), SPLIT)):
        step = turn * SPLIT + part  # past the end everything is masked
        c = step % 4
        j = (step // 4) * BJ + tl.arange(0, BJ)
        mask = row_mask & (j < u)[None, :]
        low, high = _codes(indices + start + j[None, :], u, c, mask, BITS)
        if REGISTERS:
            entries = _entries(low, t0, t1, t2, t3, BITS)
        for n in tl.static_range(8):
            column = (4 * n + c) * u + j
            if REGISTERS:
                entry = entries[n]
            else:
                entry = _gather(codebook, base, low, high, column, mask, n, BLOCKS, COLUMNS, BITS)
            keep = ((j < u) & (column < in_features))[:, None] & m_mask
            value = tl.load(x_start + column[:, None], mask=keep, other=0.0)
            total = tl.dot(entry.to(DOT), value.to(DOT), total, input_precision="ieee")
    keep = rows < out_features
    if SPLIT == 1:
        if SCALED:
            total *= tl.load(scale + rows, mask=keep, other=0.0).to(tl.float32)[:, None]
        if BIASED:
            total += tl.load(bias + rows, mask=keep, other=0.0).to(tl.float32)[:, None]
    target = y + (part.to(tl.int64) * m_total + columns_m)[None, :] * out_features + rows[:, None]
    tl.store(target, total.to(y.dtype.element_ty), mask=keep[:, None] & m_mask)


@triton.jit
def _dense_kernel(
    indices, codebook, scale, dense, out_features, in_features,
    u: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    REGISTERS: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """dense[o, i] = scale[o] entry(o, i), one program per [BN, BJ] words of each plane."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    row_mask = (rows < out_features)[:, None]
    mask = row_mask & (j < u)[None, :]
    base = ((rows // ROWS).to(tl.int64) * (BLOCKS * 2**BITS))[:, None]
    if REGISTERS:
        t0, t1, t2, t3 = _table(codebook, base, row_mask, BITS)
    words = indices + rows.to(tl.int64)[:, None] * (u * BITS) + j[None, :]
    factor = tl.full((BN, 1), 1.0, tl.float32)
    if SCALED:
        factor = tl.load(scale + rows[:, None], mask=row_mask, other=0.0).to(tl.float32)
    target = dense + rows.to(tl.int64)[:, None] * in_features
    for c in tl.static_range(4):
        low, high = _codes(words, u, c, mask, BITS)
        if REGISTERS:
            entries = _entries(low, t0, t1, t2, t3, BITS)
        for n in tl.static_range(8):
            column = (4 * n + c) * u + j
            if REGISTERS:
                entry = entries[n]
            else:
                entry = _gather(codebook, base, low, high, column, mask, n, BLOCKS, COLUMNS, BITS)
            entry = (entry * factor).to(dense.dtype.element_ty)
            tl.store(target + column[None, :], entry, mask=mask & (column < in_features)[None, :])


def lut_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` by the kernel that suits the number of rows of ``x``.

    Few rows that fit: ``few_rows``, some more: ``wide_rows``, many: ``many_rows``. Otherwise up to
    4: multiply-add in float32; up to 256: matrix product on tiles decoded in registers. Above: this
    layer's weight is decoded to a scratch in the dtype of ``x``, the library multiplies, and the
    scratch is freed.
    """
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    flat = flat if flat.stride(-1) == 1 or not flat.numel() else flat.contiguous()
    if len(flat) == 0:
        y = flat.new_empty(0, out_features)
    elif wide_rows.fits(flat, weight):
        y = wide_rows.lut_linear(flat, weight, bias)
    elif few_rows.fits(flat, weight):
        y = few_rows.lut_linear(flat, weight, bias)
    elif many_rows.fits(flat, weight):
        y = many_rows.lut_linear(flat, weight, bias)
    elif len(flat) <= VECTOR_ROWS:
        y = _vector(flat, weight, bias)
    elif len(flat) <= DENSE_ROWS:
        y = _matrix(flat, weight, bias)
    else:
        cast = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(flat, dense(weight, x.dtype), cast)
    return y.view(*x.shape[:-1], out_features)


def dense(weight: ClusteredWeight, dtype: torch.dtype) -> Tensor:
    """Decode the whole weight to ``[out, in]`` in ``dtype``.

    Where ``whole_rows.fits``, its contract on who wrote the weight holds.
    """
    out_features, in_features = weight.shape
    result = weight.indices.new_empty(out_features, in_features, dtype=dtype)
    if whole_rows.fits(result, weight):
        whole_rows.decode(weight, result)
        return result
    meta = _meta(weight)
    u, bj = meta.pop("u"), meta.pop("BJ")
    grid = (triton.cdiv(out_features, 16), triton.cdiv(u, bj))
    _dense_kernel[grid](
        weight.indices, weight.codebook, weight.scale, result, out_features, in_features,
        u=u, **meta, SCALED=weight.scale is not None, BN=16, BJ=bj, num_warps=4,
    )  # fmt: skip
    return result


def _vector(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Launch the matrix-vector kernel."""
    out_features, in_features = weight.shape
    y = x.new_empty(len(x), out_features)
    meta = _meta(weight)
    u, bj = meta.pop("u"), meta.pop("BJ")
    bn = 16 if out_features >= 8192 and len(x) == 1 else 8  # more would spill
    _vector_kernel[(triton.cdiv(out_features, bn),)](
        x, weight.indices, weight.codebook, weight.scale, bias, y,
        out_features, in_features, x.stride(0),
        u=u, M=len(x), **meta, SCALED=weight.scale is not None, BIASED=bias is not None,
        BN=bn, BJ=bj, num_warps=4,
    )  # fmt: skip
    return y


def _matrix(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Launch the matrix-matrix kernel; add up the parts when ``in`` was split."""
    out_features, in_features = weight.shape
    rows = len(x)
    bm = min(64, max(16, triton.next_power_of_2(rows)))
    bn = 64
    meta = _meta(weight)
    u = meta.pop("u")
    bj = min(32, meta.pop("BJ"))  # eight decoded tiles of 64 x 32 fill half the registers
    tiles = triton.cdiv(out_features, bn) * triton.cdiv(rows, bm)
    split = min(8, max(1, TARGET_PROGRAMS // tiles), triton.cdiv(u, bj) * 4)
    whole = split == 1
    y = x.new_empty(split, rows, out_features, dtype=x.dtype if whole else torch.float32)
    _matrix_kernel[(triton.cdiv(out_features, bn), triton.cdiv(rows, bm), split)](
        x, weight.indices, weight.codebook, weight.scale, bias, y,
        rows, out_features, in_features, x.stride(0),
        u=u, **meta, SCALED=weight.scale is not None, BIASED=bias is not None,
        DOT=_dot_dtype(x.dtype), BM=bm, BN=bn, BJ=bj, SPLIT=split, num_warps=4, num_stages=2,
    )  # fmt: skip
    if whole:
        return y[0]
    total = y.sum(0)
    if weight.scale is not None:
        total *= weight.scale.float()
    if bias is not None:
        total += bias.float()
    return total.to(x.dtype)


def _meta(weight: ClusteredWeight) -> dict[str, int]:
    """Compile-time facts of a weight, its u, and a tile width along j."""
    u = weight.indices.shape[1] // weight.bits
    blocks = weight.codebook.shape[1]
    packed = weight.codebook.dtype == torch.int8 and weight.bits <= 4 and blocks == 1
    return {
        "ROWS": weight.rows,
        "COLUMNS": weight.columns,
        "BLOCKS": blocks,
        "BITS": weight.bits,
        "REGISTERS": packed and not INTERPRETED,
        "u": u,
        "BJ": min(128, max(16, triton.next_power_of_2(u))),
    }


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand type of the matrix product; the interpreter cannot multiply bfloat16."""
    if dtype == torch.float32 or INTERPRETED:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
