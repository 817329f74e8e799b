"""Hopper block-sparse attention: softmax of one tile of scores, in the registers it lies in."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from squeeze.kernels.block_sparse_attention.gluon_load import INT8

ROWS = gl.constexpr(64)  # of queries that a warp group owns
# An integer below 2**22 added to these bits is the float32 number MAGIC + that integer.
MAGIC_BITS = gl.constexpr(0x4B400000)
MAGIC = gl.constexpr(12582912.0)
# Eight-bit weights are 2**LIFT times as large, which keeps small ones normal in E4M3.
LIFT = gl.constexpr(8.0)
# Four neighbours in a register; the compiler's own conversion goes through single bytes.
TO_E4M3 = gl.constexpr(
    """{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
    }"""
)
# Sums of weights are never negative. The assembler moves a wait for the tensor cores up, past the
# arithmetic that should hide it, but not past a barrier whose name needs the sums.
PIN = """{
    .reg .pred negative;
    .reg .b32 name;
    .reg .f32 both;
    add.f32 both, $2, $3;
    setp.lt.f32 negative, both, 0f00000000;
    selp.b32 name, 15, NAME, negative;
    bar.sync name, 128;
    mov.f32 $0, $2;
    mov.f32 $1, $3;
    }"""
PINS = (gl.constexpr(PIN.replace("NAME", "13")), gl.constexpr(PIN.replace("NAME", "14")))
PIN_0, PIN_1 = PINS


@gluon.jit
def softmax(
    raw, top, factor, shift, visible, MASKED: gl.constexpr, KIND: gl.constexpr,
    SHIFTED: gl.constexpr, LIFTED: gl.constexpr,
):  # fmt: skip
    """Turn products into weights ``2 ** (factor * raw - shift - top')``, times ``2 ** LIFT``.

    Integers are read as MAGIC + themselves, the offset leaving with the maximum in one subtraction;
    the maximum that is kept is the one that was subtracted, rounding included.

    Returns:
        Weights, the new maximum, and what earlier sums are multiplied by.
    """
    x = raw.to(gl.float32, bitcast=True) if KIND == INT8 else raw
    if MASKED:
        x = gl.where(visible, x, -float("inf"))
    peak = gl.max(x, 1)
    if KIND == INT8:
        cut = gl.fma(factor, MAGIC, gl.maximum(top, (peak - MAGIC) * factor))
        raised = gl.fma(factor, -MAGIC, cut)
        shrink = gl.exp2(top - raised)
    else:
        peak = peak * factor
        if SHIFTED:
            peak = peak - shift
        raised = gl.maximum(top, peak)
        # A row that has seen no key yet keeps -inf; 0 stands in for it.
        base = gl.where(raised == -float("inf"), 0.0, raised) if MASKED else raised
        cut = base + shift if SHIFTED else base
        shrink = gl.exp2(top - base)
    if LIFTED:
        cut = cut - LIFT
    return gl.exp2(x * factor[:, None] - cut[:, None]), raised, shrink


@gluon.jit
def partial(weights, TILE: gl.constexpr):
    """Sum the weights that one thread holds of each row, so that no lane waits for another."""
    parts = weights.reshape([ROWS, TILE // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def scaled(sums, rows):
    """Multiply each row of ``sums`` by its number; nothing moves between threads."""
    layout: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    return sums * gl.convert_layout(rows, layout, assert_trivial=True)[:, None]


@gluon.jit
def pin(sums, PART: gl.constexpr):
    """Keep what follows behind the sums."""
    asm: gl.constexpr = PIN_0 if PART == 0 else PIN_1
    return gl.inline_asm_elementwise(
        asm, "=f,=f,f,f", [sums], dtype=gl.float32, is_pure=False, pack=2
    )


@gluon.jit
def operand_of(weights, dtype: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Make the weights the left operand of the second product, where they are.

    A thread holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of sixteen; eight-bit operands want four
    neighbours, so the reduced dimension is renumbered, as stored values are (``sage``).
    """
    if dtype.primitive_bitwidth == 8:
        parts = weights.reshape([ROWS, TILE // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4)
        ordered = gl.convert_layout(parts.reshape([ROWS, TILE]), LAYOUT, assert_trivial=True)
        operand = gl.inline_asm_elementwise(
            TO_E4M3, "=r,f,f,f,f", [ordered], dtype=gl.float8e4nv, is_pure=True, pack=4
        )
    else:
        operand = gl.convert_layout(weights.to(dtype), LAYOUT, assert_trivial=True)
    return operand
