"""Assembly of products by warpgroups of the clustered linear layer, in PTX for sm_90a.

A warpgroup multiplies 64 rows of the weight, sixteen of each of its warps in registers, by the
bytes of x in shared memory: they are read once for four warps and by no instruction of theirs.
While one word's products run, the next word's entries are looked up. Entries as in
``gluon_assembly``; both pieces of float16 entries take one set of selectors.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from squeeze.kernels.lut_linear.gluon_assembly import table_words
from squeeze.kernels.lut_linear.gluon_wide_layout import (
    SENT,
    column_bytes,
    group_bytes,
    word_bytes,
)

# What a barrier is prepared for, a fence of its own publishes.
ARRIVE = gl.constexpr("barrier.cluster.arrive.relaxed.aligned; mov.b32 $0, $1;")
AWAIT = gl.constexpr("barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;")
RANK = gl.constexpr("mov.b32 $0, %cluster_ctarank;")
SEND = gl.constexpr(
    "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, $1, $4; mapa.shared::cluster.u32 b, $2, $4; "
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], $3, [b]; "
    "mov.b32 $0, 0; }"
)
# The tensor cores read shared memory by another way than stores take.
PUBLISH = gl.constexpr("fence.proxy.async.shared::cta; mov.b32 $0, $1;")


@gluon.constexpr_function
def describe(columns):
    """Assembly: the low half of the descriptor of an operand at an address in shared memory.

    Addresses in a program of a cluster have its rank above their 18 bits, where the descriptor has
    the distance of halves. The first lane's goes to all lanes: only so does the compiler know that
    they have the same.
    """
    between = column_bytes(columns) // 16 << 16
    lines = ["bfe.u32 a, $1, 4, 14;", f"or.b32 a, a, {between};"]
    lines.append("shfl.sync.idx.b32 $0, a, 0, 31, 0xffffffff;")
    return "{ .reg .b32 a; " + " ".join(lines) + " }"


@gluon.constexpr_function
def begin_barriers(steps, at, sent):
    """Assembly: thread $2 = 0 prepares the barriers of the steps, at ``at`` behind $1.

    And, if they are not 0, the one of so many bytes that a cluster sends.
    """
    lines = [".reg .pred p;", ".reg .b32 a;", "setp.eq.u32 p, $2, 0;"]
    for i in range(steps):
        lines += [f"add.u32 a, $1, {at + 8 * i};", "@p mbarrier.init.shared::cta.b64 [a], 1;"]
    if sent:
        lines += [f"add.u32 a, $1, {at + SENT};", "@p mbarrier.init.shared::cta.b64 [a], 1;"]
    lines.append("@p fence.mbarrier_init.release.cluster;")
    if sent:
        lines.append(f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [a], {sent};")
    return "{ " + " ".join(lines) + " mov.b32 $0, 0; }"


@gluon.constexpr_function
def bring(steps, size, at):
    """Assembly: thread $3 = 0 has steps of ``size`` bytes copied from $2 to $1, with barriers.

    The barriers lie ``at`` behind the beginning of shared memory.
    """
    lines = [".reg .pred p;", ".reg .b32 a, b;", ".reg .b64 s;", "setp.eq.u32 p, $3, 0;"]
    lines += ["mov.b64 s, $2;", "mov.b32 a, $1;", "mov.b32 b, global_smem;", f"add.u32 b, b, {at};"]
    for _ in range(steps):
        lines += [
            f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], {size};",
            "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            f"[a], [s], {size}, [b];",
            f"add.u32 a, a, {size};",
            f"add.s64 s, s, {size};",
            "add.u32 b, b, 8;",
        ]
    return "{ " + " ".join(lines) + " mov.b32 $0, 0; }"


@gluon.constexpr_function
def arrived(at):
    """Assembly: wait for the barrier ``at`` behind $1 and what came an even or odd ($2) time."""
    lines = [".reg .pred p;", ".reg .b32 a;", f"add.u32 a, $1, {at};"]
    lines += ["AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2;"]
    lines += ["@p bra DONE;", "bra AGAIN;", "DONE: mov.b32 $0, $2;"]
    return "{ " + " ".join(lines) + " }"


@gluon.constexpr_function
def refill(size):
    """Assembly: when a warpgroup no longer reads a step, have another of ``size`` bytes copied.

    From $2 to $1, by the thread for which $4 is not 0; $3 is the step's barrier, and $5 one of all
    threads of the warpgroup.
    """
    lines = [".reg .pred p;", "bar.sync $5, 128;", "setp.ne.b32 p, $4, 0;"]
    lines += [
        "@p fence.proxy.async.shared::cta;",
        f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], {size};",
        "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$1], [$2], {size}, [$3];",
    ]
    return "{ " + " ".join(lines) + " mov.b32 $0, 0; }"


@gluon.constexpr_function
def _selectors(bits, c, halves, row, word, high):
    """Assembly lines: selectors of PRMT from a word of row g or g + 8, in registers of the row."""
    s, h, m, k, z = (f"{name}{row}" for name in "shmkz")
    if bits == 4 and halves == 1:
        return [
            f"and.b32 {s}, {word}, 0x77777777;",
            f"shr.u32 {m}, {word}, 1;",
            f"lop3.b32 {m}, {m}, 0x44444444, 0x32103210, 0xEA;",
            f"shr.u32 {h}, {s}, 16;",
            f"shr.u32 {k}, {m}, 16;",
        ]
    if bits == 4:
        lines = [f"mov.b32 {s}, {word};"]
    else:
        lines = [f"shr.u32 {z}, {word}, {c // 2 * 2};", f"and.b32 {s}, {z}, 0x33333333;"]
    if bits == 3:
        shift = f"shl.b32 {z}, {high}, {2 - c};" if c < 2 else f"shr.u32 {z}, {high}, {c - 2};"
        lines += [shift, f"lop3.b32 {s}, {z}, 0x44444444, {s}, 0xEA;"]
    lines.append(f"shr.u32 {h}, {s}, 16;")
    if halves == 2:
        lines += [f"xor.b32 {m}, {s}, 0x88888888;", f"shr.u32 {k}, {m}, 16;"]
    return lines


@gluon.constexpr_function
def _entries(bits, halves, row, table, names):
    """Assembly lines: bytes of a row's eight values; ``names`` are four registers per half."""
    s, h, m, k = (f"{name}{row}" for name in "shmk")
    lines = []
    if bits == 4 and halves == 1:
        for i in range(2):
            low, choice = ((s, m), (h, k))[i]
            lines += [
                f"prmt.b32 u, {table[0]}, {table[1]}, {low};",
                f"prmt.b32 v, {table[2]}, {table[3]}, {low};",
                f"prmt.b32 {names[row + 2 * i]}, u, v, {choice};",
            ]
        return lines
    for half in range(halves):
        pair = table * 2 if bits == 2 else table[2 * half : 2 * half + 2]
        for i in range(2):
            selector = ((s, h), (m, k))[half][i]
            target = names[4 * half + row + 2 * i]
            lines.append(f"prmt.b32 {target}, {pair[0]}, {pair[1]}, {selector};")
    return lines


@gluon.constexpr_function
def multiply_plane(bits, groups, pieces, halves, columns, first):
    """Assembly: a plane's words times x, added to 32-bit sums, or put in their place if ``first``.

    Operands: ``columns / 2`` sums for each piece of the entries; these before, unless ``first``;
    four words of row g and four of row g + 8, for 3 bits also those of the one-bit plane; the
    tables by pieces of row g, then of row g + 8; and the low half of the descriptor of x at value
    group 0 and word 0.
    """
    size = columns // 2
    count = size * pieces
    word = count if first else 2 * count
    high = word + 8
    table = high + (8 if bits == 3 else 0)
    each = table_words(bits)
    place = table + 2 * pieces * each
    lines = [".reg .pred p, q;", ".reg .b64 d;", ".reg .b32 t, u, v;"]
    lines += [f".reg .b32 {', '.join(f'{n}{row}' for n in 'shmkz' for row in range(2))};"]
    lines += ["mov.b32 t, 0;", "setp.eq.b32 p, t, 0;", "setp.ne.b32 q, t, 0;"]
    turn = 0
    for c in groups:
        for w in range(4):
            names = [f"a{turn}_{i}" for i in range(4 * halves * pieces)]
            lines.append(f".reg .b32 {', '.join(names)};")
            for row in range(2):
                words = (f"${word + 4 * row + w}", f"${high + 4 * row + w}")
                lines += _selectors(bits, c, halves, row, *words)
                for piece in range(pieces):
                    at = table + (2 * piece + row) * each
                    own = [f"${at + i}" for i in range(each)]
                    mine = names[4 * halves * piece : 4 * halves * (piece + 1)]
                    lines += _entries(bits, halves, row, own, mine)
            step = c * group_bytes(columns) + w * word_bytes(columns)
            lines += [f"add.u32 t, ${place}, {step // 16};", "mov.b64 d, {t, 8};"]
            lines.append("wgmma.fence.sync.aligned;")
            for piece in range(pieces):
                sums = ", ".join(f"${size * piece + i}" for i in range(size))
                for half in range(halves):
                    start = 4 * (halves * piece + half)
                    left = ", ".join(names[start : start + 4])
                    add = "q" if first and turn == 0 and half == 0 else "p"
                    lines.append(
                        f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 "
                        f"{{{sums}}}, {{{left}}}, d, {add};"
                    )
            lines.append("wgmma.commit_group.sync.aligned;")
            turn += 1
    lines.append("wgmma.wait_group.sync.aligned 0;")
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def plane_operands(bits, pieces, columns, first):
    """Operand kinds of ``multiply_plane``."""
    count = columns // 2 * pieces
    inputs = (16 if bits == 3 else 8) + 2 * pieces * table_words(bits) + 1
    before = [] if first else [str(i) for i in range(count)]
    return ",".join(["=&r"] * count + before + ["r"] * inputs)
