"""The image of x as bytes for ``gluon_wide``; numbers and scales as in ``gluon_inputs``.

A warp takes 512 channels of two rows of x: a lane reads four neighbouring channels of each
of the eight that belong to one word, so that what it makes of them are whole words of an operand.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.lut_linear.gluon_inputs import SMALLEST
from squeeze.kernels.lut_linear.gluon_wide_layout import group_bytes, piece_at, step_bytes


@gluon.constexpr_function
def largest(half):
    """Assembly: the largest magnitude of sixteen words each of a half of a warp, in float32.

    Magnitudes of 16 bits are in the order of their bits. Operand 17 is the lane's half, 0 or 1.
    """
    lines = [".reg .b32 m, w, a, b;", ".reg .b16 g;", ".reg .pred p;"]
    lines.append("and.b32 m, $1, 0x7fff7fff;")
    for i in range(2, 17):
        lines += [f"and.b32 w, ${i}, 0x7fff7fff;", "max.u16x2 m, m, w;"]
    lines += ["and.b32 w, m, 0xffff;", "shr.u32 m, m, 16;", "max.u32 m, m, w;"]
    lines += _of_halves("max.u32")
    if half:
        return _body([*lines, "cvt.u16.u32 g, m;", "cvt.f32.f16 $0, g;"])
    return _body([*lines, "shl.b32 $0, m, 16;"])


@gluon.constexpr_function
def _of_halves(operation):
    """Assembly lines: register m of a half of a warp reduced; the lane's half is operand 17."""
    return [
        "setp.ne.b32 p, $17, 0;",
        "selp.b32 a, 0, m, p;",
        "selp.b32 b, m, 0, p;",
        f"redux.sync.{operation} a, a, 0xffffffff;",
        f"redux.sync.{operation} b, b, 0xffffffff;",
        "selp.b32 m, b, a, p;",
    ]


@gluon.constexpr_function
def _body(lines):
    """Assembly of lines with registers of their own."""
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def split(half, summed):
    """Assembly: sixteen words of x times $34 to sixteen words of bytes and the sum, $16.

    Words 2 n and 2 n + 1 hold four channels of value n. Results by channel, half of the values,
    high or low byte; the sum is 0 unless ``summed``. $33 is the lane's half of its
    warp. 12583040 is 1.5 2^23 + 128: the low half of a sum's bits is the whole number plus 128.
    """
    lines = [".reg .b32 f, v0, v1, v2, v3, s, z, m, a, b;", ".reg .b16 g, h;", ".reg .pred p;"]
    lines += ["mov.b32 s, 0;", "mov.b32 z, 0;"]
    for q in range(4):
        for side in range(2):
            for b in range(4):
                word = f"${17 + 2 * (4 * side + b) + q // 2}"
                if half:
                    lines += [f"mov.b32 {{g, h}}, {word};", f"cvt.f32.f16 f, {'gh'[q % 2]};"]
                elif q % 2:
                    lines.append(f"and.b32 f, {word}, 0xffff0000;")
                else:
                    lines.append(f"shl.b32 f, {word}, 16;")
                lines.append(f"fma.rn.f32 v{b}, f, $34, 0f4B400080;")
            high = 4 * q + 2 * side
            lines += [
                "prmt.b32 a, v0, v1, 0x5140;",
                "prmt.b32 b, v2, v3, 0x5140;",
                f"prmt.b32 ${high}, a, b, 0x7632;",
                "prmt.b32 f, a, b, 0x5410;",
                f"xor.b32 ${high + 1}, f, 0x80808080;",
            ]
            if summed:
                lines.append(f"dp4a.s32.s32 s, ${high}, 0x01010101, s;")
                lines.append(f"dp4a.s32.s32 z, ${high + 1}, 0x01010101, z;")
    lines += ["mad.lo.s32 m, s, 256, z;"]
    lines += [line.replace("$17", "$33") for line in _of_halves("add.s32")]
    return _body([*lines, "mov.b32 $16, m;"])


@gluon.constexpr_function
def operands(results, inputs):
    """Operand kinds of assembly that writes results before it has read all inputs."""
    return ",".join(["=&r"] * results + ["r"] * inputs)


@gluon.jit
def _read_x(
    x, which, lane, x_count, x_stride, in_features, u: gl.constexpr, STEPS: gl.constexpr,
    X: gl.constexpr, ALIGNED: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """Sixteen words of x, four channels of each of eight values; zeros outside."""
    pair = which % (X // 2)
    m = pair // 2 * 4 + pair % 2 + lane // 16 * 2
    j = 16 * (which // (X // 2)) + 4 * (lane % 4)
    channel = lane // 4 % 4 * u + j
    inside = (j < u) & (m < x_count) & (which < STEPS * (X // 2))
    start = m.to(gl.int64) * x_stride + channel
    words = ()
    for n in gl.static_range(0, 8):
        if ALIGNED:
            keep = inside
            if not FULL:
                keep = inside & (channel + 4 * n * u < in_features)
            at = x.to(gl.pointer_type(gl.int64)) + (start >> 2) + n * u
            both = gl.load(at, mask=keep, other=0)
            words = words + (both.to(gl.int32), (both >> 32).to(gl.int32))
        else:
            for k in gl.static_range(0, 2):
                at = x.to(gl.pointer_type(gl.int16)) + start + (4 * n * u + 2 * k)
                left = in_features - (channel + 4 * n * u + 2 * k)
                low = gl.load(at, mask=inside & (left > 0), other=0).to(gl.int32)
                high = gl.load(at + 1, mask=inside & (left > 1), other=0).to(gl.int32)
                words = words + ((low & 65535) | (high << 16),)
    return words


@gluon.jit
def _turn(words, side, HALF: gl.constexpr, HALVES: gl.constexpr):
    """Sixteen words of bytes, the scale, and the scale times the sum of integers."""
    peak = gl.inline_asm_elementwise(
        largest(HALF), operands(1, 17), words + (side,), dtype=gl.float32, is_pure=False, pack=1
    )
    some = peak > SMALLEST
    inverse = gl.where(some, 32512.0 / gl.where(some, peak, 1.0), 0.0)
    # A number that is not finite makes the scale, and every output, not a number.
    scale = peak * (1.0 / 32512.0) + peak * 0.0
    out = gl.inline_asm_elementwise(
        split(HALF, HALVES == 2), operands(17, 18), words + (side, inverse),
        dtype=(gl.int32,) * 17, is_pure=False, pack=1,
    )  # fmt: skip
    return out, scale.to(gl.int32, bitcast=True), scale * out[16].to(gl.float32)


@gluon.jit
def _row(which, side, X: gl.constexpr):
    """The row of x of a lane: a warp's are two apart."""
    pair = which % (X // 2)
    return pair // 2 * 4 + pair % 2 + side * 2


@gluon.jit
def make_image(
    x, image, x_count, x_stride, in_features, u: gl.constexpr, STEPS: gl.constexpr,
    X: gl.constexpr, HALVES: gl.constexpr, ALIGNED: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """Write x as bytes and factors by steps, X rows, a multiple of four; X / 2 programs a step.

    Sums are made where HALVES, the ways of looking up an entry, are 2: by addition.
    """
    gdc_launch_dependents()
    gdc_wait()
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    STEP: gl.constexpr = step_bytes(2 * X) // 4
    lane = gl.arange(0, 32, layout=flat)
    side = lane // 16
    which = gl.program_id(0) + lane * 0
    words = _read_x(x, which, lane, x_count, x_stride, in_features, u, STEPS, X, ALIGNED, FULL)
    out, scale, total = _turn(words, side, HALF, HALVES)
    m = _row(which, side, X)
    step = which // (X // 2)
    place = step * STEP + lane // 4 % 4 * (group_bytes(2 * X) // 4) + lane % 4 + m * 8
    for i in gl.static_range(0, 16):
        gl.store(image + place + piece_at(i, 2 * X) // 4, out[i])
    at = step * STEP + group_bytes(2 * X) + m * 2
    gl.store(image + at, scale)
    gl.store(image + at + 1, total.to(gl.int32, bitcast=True))
