"""Assembly of the clustered linear layer for few rows of x, in PTX for GPUs from sm_80.

Entries. A nibble is what PRMT takes as a selector: three bits of it choose one of eight bytes. Its
fourth bit asks for the sign of that byte instead, -1 or 0. Of sixteen entries one PRMT therefore
looks up the low eight and gives 0 or -1 where the code is in the high half, another PRMT the other
way round; both are multiplied, and their sum is made right beforehand: with bytes A of the low half
and B of the high half, A + (B < 0 ? -1 : 0) = B + (A < 0 ? -1 : 0) = entry - 1, so x is added once
more. That is 7 integer operations for 8 weights, where selecting among looked-up bytes takes 11 but
half as many products: the one for one or few rows of x, the other for more.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BASE = gl.constexpr("mov.b32 $0, global_smem;")
COPY = gl.constexpr("cp.async.cg.shared.global.L2::128B [$1], [$2], 16, $3; mov.b32 $0, 0;")
COMMIT = gl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
BARRIER = gl.constexpr("bar.sync 0; mov.b32 $0, $1;")
READ4 = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
READ2 = gl.constexpr("ld.shared.v2.b32 {$0, $1}, [$2];")
READ1 = gl.constexpr("ld.shared.b32 $0, [$1];")
WRITE4 = gl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.shared.v4.b32 [$1], {$2, $3, $4, $5}; "
    "mov.b32 $0, 0; }"
)
WRITE1 = gl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }"
)
MULTIPLY = gl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
# Turns four low and four high entries e into A and B: with f = e - 1 and signs a of A and b of B,
# a = e_low < 0 or (f_low < 0 and e_high >= 0), b = e_high < 0 or (f_high < 0 and not a).
BALANCE = gl.constexpr(
    """{
    .reg .b32 p, q, f, g, a, b;
    or.b32 p, $2, 0x80808080;
    sub.u32 p, p, 0x01010101;
    not.b32 q, $2;
    and.b32 q, q, 0x80808080;
    xor.b32 f, p, q;
    or.b32 p, $3, 0x80808080;
    sub.u32 p, p, 0x01010101;
    not.b32 q, $3;
    and.b32 q, q, 0x80808080;
    xor.b32 g, p, q;
    lop3.b32 a, f, $3, $2, 0xBA;
    lop3.b32 b, g, a, $3, 0xBA;
    prmt.b32 a, a, a, 0xBA98;
    prmt.b32 b, b, b, 0xBA98;
    lop3.b32 $0, b, $2, f, 0xCA;
    lop3.b32 $1, a, $3, g, 0xCA;
    }"""
)


@gluon.constexpr_function
def table_words(bits):
    """Words of one row's table of byte entries."""
    return 2**bits // 4


@gluon.constexpr_function
def wait(groups):
    """Assembly that waits until at most so many groups of copies are under way."""
    return f"cp.async.wait_group {groups}; mov.b32 $0, $1;"


@gluon.constexpr_function
def _unpack(half):
    """Assembly lines that bring the two numbers of word ``w`` into float32 registers a and b."""
    if half:
        return ["mov.b32 {g, h}, w;", "cvt.f32.f16 a, g;", "cvt.f32.f16 b, h;"]
    return ["shl.b32 a, w, 16;", "and.b32 b, w, 0xffff0000;"]


@gluon.constexpr_function
def largest(half):
    """Assembly: the largest magnitude of a warp's eight words each, as the bits of a float32.

    Magnitudes of 16 bits are in the order of their bits.
    """
    lines = [".reg .b32 m, w;", ".reg .b16 g;", "and.b32 m, $1, 0x7fff7fff;"]
    for i in range(2, 9):
        lines += [f"and.b32 w, ${i}, 0x7fff7fff;", "max.u16x2 m, m, w;"]
    lines += ["and.b32 w, m, 0xffff;", "shr.u32 m, m, 16;", "max.u32 m, m, w;"]
    lines.append("redux.sync.max.u32 m, m, 0xffffffff;")
    lines += ["cvt.u16.u32 g, m;", "cvt.f32.f16 $0, g;"] if half else ["shl.b32 $0, m, 16;"]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def split(half):
    """Assembly: eight words of x times $17 to four words of high bytes, four of low, and the sum.

    12583040 is 1.5 2^23 + 128: the low half of the sum's bits is the whole number plus 128.
    """
    lines = [".reg .b32 w, a, b, s, z;", ".reg .b16 g, h;"]
    lines += [".reg .b32 " + ", ".join(f"v{i}" for i in range(16)) + ";"]
    for i in range(8):
        lines.append(f"mov.b32 w, ${9 + i};")
        lines += _unpack(half)
        lines.append(f"fma.rn.f32 v{i}, a, $17, 0f4B400080;")
        lines.append(f"fma.rn.f32 v{8 + i}, b, $17, 0f4B400080;")
    lines += ["mov.b32 s, 0;", "mov.b32 z, 0;"]
    for i in range(4):
        v = [f"v{4 * i + n}" for n in range(4)]
        lines.append(f"prmt.b32 a, {v[0]}, {v[1]}, 0x5140;")
        lines.append(f"prmt.b32 b, {v[2]}, {v[3]}, 0x5140;")
        lines.append(f"prmt.b32 ${i}, a, b, 0x7632;")
        lines.append("prmt.b32 w, a, b, 0x5410;")
        lines.append(f"xor.b32 ${4 + i}, w, 0x80808080;")
        lines.append(f"dp4a.s32.s32 s, ${i}, 0x01010101, s;")
        lines.append(f"dp4a.s32.s32 z, ${4 + i}, 0x01010101, z;")
    lines += ["mad.lo.s32 s, s, 256, z;", "redux.sync.add.s32 $8, s, 0xffffffff;"]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _add(bits, c):
    """Assembly: words of rows g and g + 8 to the operand's four registers, per half of the entries.

    Operands: results; the words of plane ``c`` (4 bits), or of the two-bit plane and, for 3 bits,
    of the one-bit plane, for row g, then for row g + 8; the table of row g, then of row g + 8.
    """
    results, half = (8, 2) if bits == 4 else (4, 1)
    words = 2 if bits == 3 else 1
    table = results + 2 * words
    lines = [".reg .b32 s, h, z;"]
    for row in range(2):
        word = f"${results + words * row}"
        entries = [f"${table + row * 2 ** (bits - 2) + i}" for i in range(2 ** (bits - 2))]
        if bits == 4:
            lines.append(f"mov.b32 s, {word};")
        else:
            lines.append(f"shr.u32 z, {word}, {c // 2 * 2};")
            lines.append("and.b32 s, z, 0x33333333;")
        if bits == 3:
            high = f"${results + words * row + 1}"
            shift = f"shl.b32 z, {high}, {2 - c};" if c < 2 else f"shr.u32 z, {high}, {c - 2};"
            lines += [shift, "lop3.b32 s, z, 0x44444444, s, 0xEA;"]
        for side in range(half):
            pair = entries[2 * side : 2 * side + 2] if bits > 2 else entries * 2
            if side:
                lines.append("xor.b32 s, s, 0x88888888;")
            lines.append("shr.u32 h, s, 16;")
            lines.append(f"prmt.b32 ${4 * side + row}, {pair[0]}, {pair[1]}, s;")
            lines.append(f"prmt.b32 ${4 * side + row + 2}, {pair[0]}, {pair[1]}, h;")
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _choose():
    """Assembly as ``_add``'s for 4 bits, but a look-up in each half and a choice between them."""
    lines = [".reg .b32 q, h, m, a, b;"]
    for row in range(2):
        word, entries = f"${4 + row}", [f"${6 + 4 * row + i}" for i in range(4)]
        lines += [
            f"and.b32 q, {word}, 0x77777777;",
            f"shr.u32 m, {word}, 1;",
            "lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;",
            "shr.u32 h, q, 16;",
            f"prmt.b32 a, {entries[0]}, {entries[1]}, q;",
            f"prmt.b32 b, {entries[2]}, {entries[3]}, q;",
            f"prmt.b32 ${row}, a, b, m;",
            "shr.u32 m, m, 16;",
            f"prmt.b32 a, {entries[0]}, {entries[1]}, h;",
            f"prmt.b32 b, {entries[2]}, {entries[3]}, h;",
            f"prmt.b32 ${row + 2}, a, b, m;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def lookup(bits, c, halves):
    """Assembly of a look-up: by addition of two halves of the entries, or of one result."""
    return _choose() if bits == 4 and halves == 1 else _add(bits, c)


@gluon.constexpr_function
def operands(bits, halves):
    """Operand kinds of ``lookup``."""
    inputs = 2 * (2 if bits == 3 else 1) + 2 * table_words(bits)
    return ",".join(["=&r"] * (4 * halves) + ["r"] * inputs)
