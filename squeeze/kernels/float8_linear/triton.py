"""Triton kernels around the float8 product: tokens rounded to E4M3, weights decoded to E4M3.

Layout: with W = padded in / 8, word w of a decoded row holds the weights of channels n W + w in its
eight bytes n. That is the order in which the nibbles of packed words lie (``squeeze.kernels.bits``
and ``lut_linear``), so a word of eight codes becomes eight bytes side by side by six PRMTs. Tokens
are written in the same order, and a sum over channels does not mind.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from squeeze.types import ClusteredWeight

ROWS = 128  # of x, from which decoding the weight for a float8 product pays
CAPABILITY = (8, 9)  # of GPUs with float8 tensor cores
DECODED_ROWS = 16  # of a program
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_TWO = "shr.u32 q, $1, 16;\nprmt.b32 v, $2, $2, $1;\nprmt.b32 w, $2, $2, q;\n"
_LOOKUP = {
    2: _TWO,
    3: _TWO.replace("$2, $2", "$2, $3"),
    4: "and.b32 q, $1, 0x77777777;\nshr.u32 p, q, 16;\n"
    "and.b32 s, $1, 0x88888888;\nshr.u32 s, s, 1;\nadd.u32 s, s, 0x32103210;\nshr.u32 h, s, 16;\n"
    "prmt.b32 v, $2, $3, q;\nprmt.b32 x, $4, $5, q;\nprmt.b32 v, v, x, s;\n"
    "prmt.b32 w, $2, $3, p;\nprmt.b32 x, $4, $5, p;\nprmt.b32 w, w, x, h;\n",
}
_ASM = {
    bits: tl.constexpr("{\n.reg .b32 s, h, v, w, x, q, p;\n" + lookup + "mov.b64 $0, {v, w};\n}")
    for bits, lookup in _LOOKUP.items()
}
_ASM2, _ASM3, _ASM4 = _ASM[2], _ASM[3], _ASM[4]
_CAST = tl.constexpr(
    "{\n.reg .b16 a, b, c, d;\n.reg .b32 v, w;\n"
    + "".join(
        f"cvt.rn.satfinite.e4m3x2.f32 {name}, ${2 * i + 2}, ${2 * i + 1};\n"
        for i, name in enumerate("abcd")
    )
    + "mov.b32 v, {a, b};\nmov.b32 w, {c, d};\nmov.b64 $0, {v, w};\n}"
)


@triton.jit
def _exponents(largest):
    """Exponent fields of a token's scale and of its inverse from the bits of its largest value.

    448 is 1.75 * 2**8: the scale's exponent is 8 less, and one more past a significand of 1.75.
    """
    field = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    field = tl.maximum(field, 1)
    scale = (field << 23).to(tl.float32, bitcast=True)
    scale = tl.where(largest >= 0x7F800000, float("nan"), scale)
    return scale, ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(value):
    """Round float32 of at most 448 to the nearest E4M3 value, ties to even, in any hardware."""
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = (value + 24576.0) - 24576.0  # multiples of 2**-9
    return tl.where(tl.abs(value) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def _byte(value):
    """The bits of float32 of at most 448 rounded to E4M3, as int64."""
    size = _rounded(tl.abs(value))
    bits = size.to(tl.int32, bitcast=True)
    eighths = (size + 24576.0).to(tl.int32, bitcast=True) & 15  # of the least normal number
    code = tl.where(size < 0.015625, eighths, (bits >> 20) - 960)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.int64)


@triton.jit
def _cast(values, INTERPRETED: tl.constexpr):
    """Eight float32 tensors to one int64 of their E4M3 bytes, the first lowest."""
    if INTERPRETED:
        word = _byte(values[0])
        for n in tl.static_range(1, 8):
            word |= _byte(values[n]) << (8 * n)
        return word
    return tl.inline_asm_elementwise(
        _CAST, "=l,f,f,f,f,f,f,f,f", values, dtype=tl.int64, is_pure=True, pack=1
    )


@triton.jit
def _nibbles(words, u, c, mask, BITS: tl.constexpr):
    """Codes of channels 4 n + c in nibbles n; ``words`` point at j of the row's first plane."""
    if BITS == 4:
        return tl.load(words + c * u, mask=mask, other=0)
    pairs = tl.load(words + (c % 2) * u, mask=mask, other=0)
    low = (pairs >> ((c // 2) * 2)) & 0x33333333
    if BITS == 2:
        return low
    ones = tl.load(words + 2 * u, mask=mask, other=0)
    return low | (((ones >> c) & 0x11111111) << 2)


@triton.jit
def _table(codebook, first, BITS: tl.constexpr):
    """Load the entries of each row as up to four words [BN, 1]."""
    words = codebook.to(tl.pointer_type(tl.int32)) + first // 4
    t0 = tl.load(words)
    t1, t2, t3 = t0, t0, t0
    if BITS >= 3:
        t1 = tl.load(words + 1)
    if BITS == 4:
        t2, t3 = tl.load(words + 2), tl.load(words + 3)
    return t0, t1, t2, t3


@triton.jit
def _look_up(nibbles, t0, t1, t2, t3, BITS: tl.constexpr):
    """Entries of eight codes as the bytes of an int64."""
    if BITS == 2:
        asm: tl.constexpr = _ASM2
    elif BITS == 3:
        asm: tl.constexpr = _ASM3
    else:
        asm: tl.constexpr = _ASM4
    return tl.inline_asm_elementwise(
        asm, "=l,r,r,r,r,r", [nibbles, t0, t1, t2, t3], dtype=tl.int64, is_pure=True, pack=1
    )


@triton.jit
def _gather(codebook, first, nibbles):
    """The same by loads, for the interpreter; ``first`` [BN, 1] entry of each row."""
    word = tl.zeros(nibbles.shape, tl.int64)
    for n in tl.static_range(8):
        entry = tl.load(codebook + first + ((nibbles >> (4 * n)) & 15))
        word |= entry.to(tl.int64) << (8 * n)
    return word


@triton.jit
def _words(token, w, in_features, W: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round a token: its words ``w`` of eight E4M3 bytes, int64 [WIDTH], and its scale."""
    values = ()
    largest = tl.zeros((WIDTH,), tl.int32)
    for n in tl.static_range(8):
        channel = n * W + w
        keep = (w < W) & (channel < in_features)
        value = tl.load(token + channel, mask=keep, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        values = values + (value,)  # noqa: RUF005
    scale, inverse = _exponents(tl.max(largest, 0))
    scaled = ()
    for n in tl.static_range(8):
        scaled = scaled + (values[n] * inverse,)  # noqa: RUF005
    return _cast(scaled, INTERPRETED), scale


@triton.jit
def _order_kernel(
    x, codes, scale, in_features, x_stride,
    W: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Round one token and write it in the order of ``gluon``, sixteen words at a time."""
    if OVERLAP:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    w = tl.max_contiguous(tl.arange(0, WIDTH), 2)
    word, factor = _words(x + token * x_stride, w, in_features, W, WIDTH, INTERPRETED)
    halves = tl.join((word & 0xFFFFFFFF).to(tl.int32), (word >> 32).to(tl.int32))
    halves = halves.reshape([WIDTH // 16, 4, 4, 2])  # thread of a quad, instruction, half
    halves = halves.permute([0, 2, 3, 1]).reshape([2 * WIDTH])
    place = tl.arange(0, 2 * WIDTH)
    tl.store(codes + token * (2 * W) + place, halves, mask=place < 2 * W)
    tl.store(scale + token, factor)


@triton.jit
def _prepare_kernel(
    x, indices, codebook, scale, x_codes, x_scale, w_codes, w_scale,
    decoders, out_features, in_features, x_stride,
    u: tl.constexpr, SHARED: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Decode [BN, 4 BJ] words of the weight, or past the last of these round one token.

    Both are bound by memory, so they share the launch. A token's values stay in registers between
    their maximum and the cast.
    """
    W: tl.constexpr = 4 * u
    program = tl.program_id(0)
    if program < decoders:
        blocks: tl.constexpr = (u + BJ - 1) // BJ
        row = (program // blocks) * BN + tl.arange(0, BN)
        real = row < out_features
        row = tl.minimum(row, out_features - 1).to(tl.int64)
        j = tl.max_contiguous((program % blocks) * BJ + tl.arange(0, BJ), 2)
        mask = real[:, None] & (j < u)[None, :]
        first = (row // SHARED)[:, None] * 2**BITS
        words = indices + row[:, None] * (u * BITS) + j[None, :]
        target = w_codes + row[:, None] * W + j[None, :]
        if not INTERPRETED:
            t0, t1, t2, t3 = _table(codebook, first, BITS)
        nibbles = ()  # all loads before the first store, which might write where they read
        for c in tl.static_range(4):
            nibbles = nibbles + (_nibbles(words, u, c, mask, BITS),)  # noqa: RUF005
        for c in tl.static_range(4):
            if INTERPRETED:
                entries = _gather(codebook, first, nibbles[c])
            else:
                entries = _look_up(nibbles[c], t0, t1, t2, t3, BITS)
            tl.store(target + c * u, entries, mask=mask)
        if program % blocks == 0:
            tl.store(w_scale + row, tl.load(scale + row).to(tl.float32), mask=real)
    else:
        token = (program - decoders).to(tl.int64)
        w = tl.max_contiguous(tl.arange(0, WIDTH), 2)
        word, factor = _words(x + token * x_stride, w, in_features, W, WIDTH, INTERPRETED)
        tl.store(x_codes + token * W + w, word, mask=w < W)
        tl.store(x_scale + token, factor)


@triton.jit
def _round_kernel(x, y, size, x_stride, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    """y[m, i] = what E4M3 under a token's own scale makes of x[m, i]; a program per token."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    value = tl.load(x + token * x_stride + place, mask=place < size, other=0.0).to(tl.float32)
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    scale, inverse = _exponents(largest)
    value = _rounded(value * inverse) * scale
    value = tl.where(value > LIMIT, LIMIT, tl.where(value < -LIMIT, -LIMIT, value))
    tl.store(y + token * size + place, value.to(y.dtype.element_ty), mask=place < size)


def fits(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the float8 product takes this weight and ``[..., in]``, and is the one to choose."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.numel() >= ROWS * x.shape[-1]
        and weight.bits in _ASM
        and weight.codebook.shape[1] == 1
        and weight.outlier_values is None
        and weight.shape[0] % 16 == 0
        and torch.cuda.get_device_capability(x.device) >= CAPABILITY
    )


def float8_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``round(x) @ W.T + bias`` for ``x`` that ``fits``, by the library's float8 product.

    Accumulated in float32; scales and bias are applied there too, and the result rounded once.
    """
    out_features, in_features = weight.shape
    x_codes, x_scale, w_codes, w_scale = prepare(x.reshape(-1, in_features), weight)
    y = torch._scaled_mm(
        x_codes, w_codes.t(), scale_a=x_scale, scale_b=w_scale,
        bias=None if bias is None else bias.to(x.dtype), out_dtype=x.dtype,
        use_fast_accum=False,
    )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)


def prepare(x: Tensor, weight: ClusteredWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round tokens and decode the weight, in one launch.

    Args:
        x: ``[rows, in]``.
        weight: 2 to 4 bits, codebooks along whole rows.
    Returns:
        E4M3 ``[rows, padded in]`` and its scales float32 ``[rows, 1]``; E4M3 ``[out, padded in]``
        and its scales ``[1, out]``; channels in the order of this module.
    """
    x = x if x.stride(-1) == 1 or not x.numel() else x.contiguous()
    out_features, in_features = weight.shape
    u = weight.indices.shape[1] // weight.bits
    x_codes = x.new_empty(len(x), 32 * u, dtype=torch.float8_e4m3fn)
    w_codes = x.new_empty(out_features, 32 * u, dtype=torch.float8_e4m3fn)
    x_scale = x.new_empty(len(x), 1, dtype=torch.float32)
    w_scale = x.new_empty(1, out_features, dtype=torch.float32)
    block = min(64, max(16, u & -u))
    decoders = triton.cdiv(out_features, DECODED_ROWS) * triton.cdiv(u, block)
    width = triton.next_power_of_2(4 * u)
    _prepare_kernel[(decoders + len(x),)](
        x, weight.indices, weight.codebook, weight.scale,
        x_codes.view(torch.int64), x_scale, w_codes.view(torch.int64), w_scale,
        decoders, out_features, in_features, x.stride(0),
        u=u, SHARED=weight.rows, BITS=weight.bits, BN=DECODED_ROWS, BJ=block, WIDTH=width,
        INTERPRETED=INTERPRETED, num_warps=8 if width <= 2048 else 16,
    )  # fmt: skip
    return x_codes, x_scale, w_codes, w_scale


def ordered_tokens(x: Tensor, u: int) -> tuple[Tensor, Tensor]:
    """Round tokens and write them as ``gluon.multiply`` reads them.

    Args:
        x: ``[rows, in]``.
        u: Padded in / 32, a multiple of 4.
    Returns:
        E4M3 ``[rows, 32 u]``, channels in the order of ``gluon``, and scales float32 ``[rows, 1]``.
    """
    x = x if x.stride(-1) == 1 or not x.numel() else x.contiguous()
    codes = x.new_empty(len(x), 32 * u, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(len(x), 1, dtype=torch.float32)
    width = triton.next_power_of_2(4 * u)
    _order_kernel[(len(x),)](
        x, codes.view(torch.int32), scale, x.shape[1], x.stride(0), W=4 * u, WIDTH=width,
        OVERLAP=not INTERPRETED, INTERPRETED=INTERPRETED, num_warps=8 if width <= 2048 else 16,
    )  # fmt: skip
    return codes, scale


def rounded_inputs(x: Tensor) -> Tensor:
    """What ``reference.rounded_inputs`` computes, ``[..., in]``."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 or not flat.numel() else flat.contiguous()
    y = x.new_empty(flat.shape)
    if len(flat):
        width = triton.next_power_of_2(flat.shape[1])
        _round_kernel[(len(flat),)](
            flat, y, flat.shape[1], flat.stride(0), LIMIT=torch.finfo(x.dtype).max, WIDTH=width,
            num_warps=min(16, max(1, width // 1024)),
        )  # fmt: skip
    return y.view(x.shape)
