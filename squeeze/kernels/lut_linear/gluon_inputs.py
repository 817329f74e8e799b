"""What a program of ``gluon`` writes to shared memory before it multiplies: x, tables, row facts.

x is taken in blocks of 512 channels, each block of a row with a scale of its own: a number is
``scale * (256 high + low)`` with both bytes signed, 15 bits and a sign below the block's largest.
Rounding that, relative to the block's root mean square, is at most a quarter of what rounding a
weight to bfloat16 is. Float16 entries become ``scale * (254 high + low)`` by rows of the weight.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from squeeze.kernels.lut_linear.gluon_assembly import (
    BALANCE,
    READ1,
    READ2,
    READ4,
    WRITE1,
    WRITE4,
    largest,
    split,
    table_words,
)

SMALLEST = gl.constexpr(2.0**-100)  # a block whose largest number is below this counts as zeros


@gluon.jit
def read4(address):
    """Four words of shared memory."""
    return gl.inline_asm_elementwise(
        READ4, "=r,=r,=r,=r,r", [address],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def read2(address):
    """Two float32 of shared memory."""
    return gl.inline_asm_elementwise(
        READ2, "=r,=r,r", [address], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )


@gluon.jit
def read1(place):
    """One float32 of shared memory."""
    return gl.inline_asm_elementwise(
        READ1, "=r,r", [place], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def write1(address, value, keep):
    """One word to shared memory."""
    gl.inline_asm_elementwise(
        WRITE1, "=r,r,r,r", [address, value, keep], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def write4(address, a, b, c, d, keep):
    """Four words to shared memory."""
    gl.inline_asm_elementwise(
        WRITE4, "=r,r,r,r,r,r,r", [address, a, b, c, d, keep],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def part(values, START: gl.constexpr, COUNT: gl.constexpr):
    """Values START to START + COUNT of a tuple."""
    taken = ()
    for i in gl.static_range(0, COUNT):
        taken = taken + (values[START + i],)
    return taken


@gluon.jit
def split_x(
    x, base, factors, thread, first_step, x_count, x_stride, in_features, u: gl.constexpr,
    STEPS: gl.constexpr, X: gl.constexpr, WARPS: gl.constexpr, EACH: gl.constexpr,
    ALIGNED: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """Write the slice's x as bytes and factors to shared memory; a warp takes 512 numbers."""
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    lane = thread % 32
    c = lane // 8
    for turn in range(0, (STEPS * X + WARPS * EACH - 1) // (WARPS * EACH)):
        loaded = ()
        for k in gl.static_range(0, EACH):
            which = (turn * EACH + k) * WARPS + thread // 32
            m = which % X
            j = 16 * (first_step + which // X) + 2 * (lane % 8)
            inside = (j < u) & (m < x_count) & (which < STEPS * X)
            start = m.to(gl.int64) * x_stride + (c * u + j)
            for b in gl.static_range(0, 8):
                keep = inside
                if not FULL:
                    keep = inside & ((4 * b + c) * u + j < in_features)
                if ALIGNED:
                    at = x.to(gl.pointer_type(gl.int32)) + (start // 2) + 2 * b * u
                    word = gl.load(at, mask=keep, other=0)
                else:
                    at = x.to(gl.pointer_type(gl.int16)) + start + 4 * b * u
                    low = gl.load(at, mask=keep, other=0).to(gl.int32)
                    last = keep & ((4 * b + c) * u + j + 1 < in_features)
                    high = gl.load(at + 1, mask=last, other=0).to(gl.int32)
                    word = (low & 65535) | (high << 16)
                loaded = loaded + (word,)
        for k in gl.static_range(0, EACH):
            which = (turn * EACH + k) * WARPS + thread // 32
            words = part(loaded, 8 * k, 8)
            peak = gl.inline_asm_elementwise(
                largest(HALF), "=r,r,r,r,r,r,r,r,r", words,
                dtype=gl.int32, is_pure=False, pack=1,
            ).to(gl.float32, bitcast=True)  # fmt: skip
            some = peak > SMALLEST
            inverse = gl.where(some, 32512.0 / gl.where(some, peak, 1.0), 0.0)
            # A number that is not finite makes the scale, and every output, not a number.
            scale = peak * (1.0 / 32512.0) + peak * 0.0
            out = gl.inline_asm_elementwise(
                split(HALF), "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                words + (inverse,),
                dtype=(
                    gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
                    gl.int32, gl.int32, gl.int32, gl.int32,
                ),
                is_pure=False, pack=1,
            )  # fmt: skip
            keep = (which < STEPS * X).to(gl.int32)
            place = which // X * 8 + c * 2 + lane % 2
            place = base + (place * (2 * X) + which % X * 2) * 64 + lane // 2 % 4 * 16
            write4(place, out[0], out[1], out[2], out[3], keep)
            write4(place + 64, out[4], out[5], out[6], out[7], keep)
            at = factors + which * 8
            total = scale * out[8].to(gl.float32)
            write1(at, scale.to(gl.int32, bitcast=True), keep)
            write1(at + 4, total.to(gl.int32, bitcast=True), keep)


@gluon.jit
def prepare_rows(
    tables, scale, bias, table_base, fact_base, thread, first_tile, stride, out_features,
    OWN: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, PIECES: gl.constexpr,
    SHARED: gl.constexpr, BITS: gl.constexpr, HALVES: gl.constexpr, SCALED: gl.constexpr,
    BIASED: gl.constexpr,
):  # fmt: skip
    """Write tables, scale and bias of the program's rows to shared memory, a row per thread."""
    COUNT: gl.constexpr = table_words(BITS)
    ROWS: gl.constexpr = OWN * TILES * 16
    for turn in gl.static_range(0, (ROWS + 32 * WARPS - 1) // (32 * WARPS)):
        which = thread + turn * 32 * WARPS
        tile = first_tile + which // (16 * TILES) * stride
        row = gl.minimum(tile * (16 * TILES) + which % (16 * TILES), out_features - 1)
        keep = (which < ROWS).to(gl.int32)
        factor = gl.full_like(row, 1.0, dtype=gl.float32)
        added = gl.full_like(row, 0.0, dtype=gl.float32)
        if SCALED:
            factor = gl.load(scale + row).to(gl.float32)
        if BIASED:
            added = gl.load(bias + row).to(gl.float32)
        at = (row // SHARED).to(gl.int64) * COUNT
        if PIECES == 1:
            words = ()
            for i in gl.static_range(0, COUNT):
                words = words + (gl.load(tables.to(gl.pointer_type(gl.int32)) + at + i),)
        else:
            words, own = _entries(tables, at * 4, BITS)
            factor *= own
        for piece in gl.static_range(0, PIECES):
            table = part(words, piece * COUNT, COUNT)
            if HALVES == 2:
                first = _balance(table[0], table[2])
                second = _balance(table[1], table[3])
                table = (first[0], second[0], first[1], second[1])
            place = table_base + (which * PIECES + piece) * (4 * COUNT)
            for i in gl.static_range(0, COUNT):
                write1(place + 4 * i, table[i], keep)
        write1(fact_base + 8 * which, factor.to(gl.int32, bitcast=True), keep)
        write1(fact_base + 8 * which + 4, added.to(gl.int32, bitcast=True), keep)


@gluon.jit
def _balance(low, high):
    """Four low and four high entries to bytes A and B, see ``gluon_assembly``."""
    return gl.inline_asm_elementwise(
        BALANCE, "=&r,=&r,r,r", [low, high], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _entries(codebook, at, BITS: gl.constexpr):
    """A row's float16 entries as words of high bytes, then of low ones, and their scale."""
    CODES: gl.constexpr = 2**BITS
    entries = ()
    for i in gl.static_range(0, CODES):
        entries = entries + (gl.load(codebook + at + i).to(gl.float32),)
    peak = gl.abs(entries[0])
    poison = entries[0] * 0.0
    for i in gl.static_range(1, CODES):
        peak = gl.maximum(peak, gl.abs(entries[i]))
        poison += entries[i] * 0.0
    inverse = 32258.0 / gl.where(peak > 0.0, peak, 1.0)
    highs = ()
    lows = ()
    for i in gl.static_range(0, CODES // 4):
        high_word = gl.full_like(peak, 0, dtype=gl.int32)
        low_word = high_word
        for k in gl.static_range(0, 4):
            whole = entries[4 * i + k] * inverse + 12582912.0
            whole = whole.to(gl.int32, bitcast=True) - 0x4B400000
            high = (whole + (127 + 254 * 128)) // 254 - 128
            high_word |= (high & 255) << (8 * k)
            low_word |= ((whole - high * 254) & 255) << (8 * k)
        highs = highs + (high_word,)
        lows = lows + (low_word,)
    return highs + lows, peak * (1.0 / 32258.0) + poison
