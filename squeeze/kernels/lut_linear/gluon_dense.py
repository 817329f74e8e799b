"""Decode a clustered weight to a dense one of 16-bit numbers, where a row has one codebook.

Entries times the row's scale are rounded first: a table has their low bytes in some words and their
high bytes in others, PRMT looks both up by the codes as they are packed, and four more interleave
them. Threads are written out as in CUDA; one has eight neighbouring words of every plane of a row.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from squeeze.kernels.lut_linear.gluon_assembly import table_words

LOAD = gl.constexpr("ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")


@gluon.constexpr_function
def table(bytes_of_entry, half):
    """Assembly: four entries ($2, and $3 of 16 bits each) times $4 to low and to high bytes."""
    kind = "f16x2" if half else "bf16x2"
    lines = [".reg .b32 x, y; .reg .f32 e0, e1, e2, e3; .reg .b16 g, h;"]
    if bytes_of_entry == 1:
        lines.append("xor.b32 x, $2, 0x80808080;")
        for i in range(4):
            # 8388608 + 128: the bits of a float whose low byte is u are the number 8388608 + u.
            lines.append(f"prmt.b32 y, x, 0x4B000000, {0x7540 + i};")
            lines.append(f"mov.b32 e{i}, y;")
            lines.append(f"sub.f32 e{i}, e{i}, 0f4B000080;")
    else:
        for i in range(2):
            lines.append(f"mov.b32 {{g, h}}, ${2 + i};")
            lines += [f"cvt.f32.f16 e{2 * i}, g;", f"cvt.f32.f16 e{2 * i + 1}, h;"]
    lines += [f"mul.f32 e{i}, e{i}, $4;" for i in range(4)]
    lines += [f"cvt.rn.{kind}.f32 x, e1, e0;", f"cvt.rn.{kind}.f32 y, e3, e2;"]
    lines += ["prmt.b32 $0, x, y, 0x6420;", "prmt.b32 $1, x, y, 0x7531;"]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def decode(bits, c, step):
    """Assembly: store the values of eight words of value group ``c``, ``step`` bytes apart.

    Operands: an unused result; eight words of plane ``c`` (4 bits) or of the two-bit plane and, for
    3 bits, of the one-bit plane; the low, then the high bytes of the table; where value 0 belongs;
    and whether to store.
    """
    each = table_words(bits)
    high = 1 + 8
    entry = high + (8 if bits == 3 else 0)
    place, keep = entry + 2 * each, entry + 2 * each + 1
    lines = [".reg .pred p;", f"setp.ne.b32 p, ${keep}, 0;", ".reg .b32 s, h, m, k, z, u, v, w, x;"]
    names = [f"b{w}_{i}" for w in range(8) for i in range(4)]
    lines += [f".reg .b32 {', '.join(names)};"]
    lines += [f".reg .b32 {', '.join(f'o{n}_{i}' for n in range(8) for i in range(4))};"]
    for word in range(8):
        if bits == 4:
            lines += [
                f"and.b32 s, ${1 + word}, 0x77777777;",
                f"shr.u32 m, ${1 + word}, 1;",
                "lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;",
                "shr.u32 k, m, 16;",
            ]
        else:
            lines += [f"shr.u32 z, ${1 + word}, {c // 2 * 2};", "and.b32 s, z, 0x33333333;"]
        if bits == 3:
            shift = f"shl.b32 z, ${high + word}, {2 - c};"
            lines.append(shift if c < 2 else f"shr.u32 z, ${high + word}, {c - 2};")
            lines.append("lop3.b32 s, z, 0x44444444, s, 0xEA;")
        lines.append("shr.u32 h, s, 16;")
        for upper in range(2):
            entries = [f"${entry + upper * each + i}" for i in range(each)]
            for part in range(2):
                target = f"b{word}_{2 * part + upper}"
                selector, choice = ("s", "m") if part == 0 else ("h", "k")
                if bits == 4:
                    lines += [
                        f"prmt.b32 u, {entries[0]}, {entries[1]}, {selector};",
                        f"prmt.b32 v, {entries[2]}, {entries[3]}, {selector};",
                        f"prmt.b32 {target}, u, v, {choice};",
                    ]
                else:
                    lines.append(f"prmt.b32 {target}, {entries[0]}, {entries[-1]}, {selector};")
    for word in range(0, 8, 2):
        for part in range(2):
            lines += [
                f"prmt.b32 u, b{word}_{2 * part}, b{word}_{2 * part + 1}, 0x5140;",
                f"prmt.b32 v, b{word}_{2 * part}, b{word}_{2 * part + 1}, 0x7362;",
                f"prmt.b32 w, b{word + 1}_{2 * part}, b{word + 1}_{2 * part + 1}, 0x5140;",
                f"prmt.b32 x, b{word + 1}_{2 * part}, b{word + 1}_{2 * part + 1}, 0x7362;",
                f"prmt.b32 o{4 * part}_{word // 2}, u, w, 0x5410;",
                f"prmt.b32 o{4 * part + 1}_{word // 2}, u, w, 0x7632;",
                f"prmt.b32 o{4 * part + 2}_{word // 2}, v, x, 0x5410;",
                f"prmt.b32 o{4 * part + 3}_{word // 2}, v, x, 0x7632;",
            ]
    for n in range(8):
        numbers = ", ".join(f"o{n}_{i}" for i in range(4))
        lines.append(f"@p st.global.v4.b32 [${place} + {(4 * n + c) * step}], {{{numbers}}};")
    lines.append("mov.b32 $0, 0;")
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def decode_operands(bits):
    """Operand kinds of ``decode``."""
    words = 16 if bits == 3 else 8
    return ",".join(["=r"] + ["r"] * (words + 2 * table_words(bits)) + ["l", "r"])


@gluon.jit
def _words(address):
    """Eight words of global memory."""
    result = ()
    for i in gl.static_range(0, 2):
        result = result + gl.inline_asm_elementwise(
            LOAD, "=r,=r,=r,=r,l", [address + 16 * i],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    return result


@gluon.jit
def _table(codebook, at, factor, BITS: gl.constexpr, HALF: gl.constexpr):
    """Low, then high bytes of a row's entries times ``factor``."""
    SIZE: gl.constexpr = 1 if codebook.dtype.element_ty == gl.int8 else 2
    lows = ()
    highs = ()
    source = codebook.to(gl.pointer_type(gl.int32)) + at * SIZE
    for i in gl.static_range(0, table_words(BITS)):
        first = gl.load(source + SIZE * i)
        second = gl.load(source + SIZE * i + (SIZE - 1))
        pair = gl.inline_asm_elementwise(
            table(SIZE, HALF), "=&r,=&r,r,r,f", [first, second, factor],
            dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        lows = lows + (pair[0],)
        highs = highs + (pair[1],)
    return lows + highs


@gluon.jit
def decode_rows(
    indices, codebook, scale, dense, out_features,
    u: gl.constexpr, ROWS: gl.constexpr, BITS: gl.constexpr, SCALED: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """dense[o, i] = scale[o] entry(o, i) for 32 u columns, eight words of each plane a thread."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    HALF: gl.constexpr = dense.dtype.element_ty == gl.float16
    which = gl.program_id(0) * (32 * WARPS) + gl.arange(0, 32 * WARPS, layout=flat)
    row = which // (u // 8)
    keep = row < out_features
    row = gl.minimum(row, out_features - 1)
    j = which % (u // 8) * 8
    source = indices.to(gl.int64) + (row.to(gl.int64) * (u * BITS) + j) * 4
    planes = ()
    for plane in gl.static_range(0, BITS):
        planes = planes + _words(source + 4 * plane * u)
    factor = gl.full_like(row, 1.0, dtype=gl.float32)
    if SCALED:
        factor = gl.load(scale + row).to(gl.float32)
    first = (row // ROWS).to(gl.int64) * table_words(BITS)
    entries = _table(codebook, first, factor, BITS, HALF)
    gdc_wait()  # for readers of what lies there
    target = dense.to(gl.int64) + (row.to(gl.int64) * (32 * u) + j) * 2
    for c in gl.static_range(0, 4):
        words = ()
        for i in gl.static_range(0, 8):
            words = words + (planes[8 * (c if BITS == 4 else c % 2) + i],)
        if BITS == 3:
            for i in gl.static_range(0, 8):
                words = words + (planes[16 + i],)
        gl.inline_asm_elementwise(
            decode(BITS, c, 2 * u), decode_operands(BITS),
            words + entries + (target, keep.to(gl.int32)),
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
