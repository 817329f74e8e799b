"""PTX of the product-quantization kernel: look-ups of centroids, and bulk copies to shared memory.

Shared memory holds both codebooks of a head as they are stored, ``[256, 64]`` words of two
components each, then for each warp the codes of a unit of keys and of one of values, then barriers.
"""

from __future__ import annotations

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Bytes from the beginning of shared memory.
CODES = gl.constexpr(131072)
BARRIERS = gl.constexpr(196608)  # of both codebooks, then of each warp's keys and values
PIECE = gl.constexpr(32768)  # of a codebook, copied by one thread
ADDRESS = gl.constexpr("mov.u32 $0, global_smem;")


def _key_gather() -> str:
    """Look up the sixteen centroids that a lane owns of a token.

    $0 to $15 centroids, then eight copies each of: the selector of the lane's order, the low
    address bytes of its first four columns, the table's address, the address of the codes. Tokens 4
    to 7 read what tokens 0 to 3 read four loads later or earlier, so theirs change places: register
    ``j`` of a token holds column ``j ^ (token % 4)`` of eight.
    """
    text = [
        "{",
        ".reg .b32 s, o, w, x, a, c0, c1, c2, c3;",
        ".reg .b32 t0, t1, t2, t3, t4, t5, t6, t7;",
        ".reg .pred p;",
        "ld.shared.v2.b32 {c0, c1}, [$40];",
        "ld.shared.v2.b32 {c2, c3}, [$40+32];",
        "and.b32 a, $16, 4;",
        "setp.ne.u32 p, a, 0;",
        "xor.b32 s, $16, 0x4444;",
        "xor.b32 o, $24, 0x10101010;",
    ]
    for half in range(2):
        first, second = f"c{2 * half}", f"c{2 * half + 1}"
        text.append(f"prmt.b32 w, {first}, {second}, $16;")
        text.append(f"prmt.b32 x, {first}, {second}, s;")
        for v, (word, low) in enumerate((("w", "$24"), ("x", "o"))):
            for b, selector in enumerate(("0xCC04", "0xDD15", "0xEE26", "0xFF37")):
                text.append(f"prmt.b32 a, {word}, {low}, {selector};")
                text.append("add.u32 a, a, $32;")
                text.append(f"ld.shared.b32 t{4 * v + b}, [a+{128 * half}];")
        for v, b in itertools.product(range(2), range(4)):
            # Result tensor b, its register of half and v.
            own, other = f"t{4 * v + b}", f"t{4 * (1 - v) + b}"
            text.append(f"selp.b32 ${4 * b + 2 * half + v}, {other}, {own}, p;")
    return "\n".join([*text, "}"])


def _value_gather() -> str:
    """Look up eight centroids: of one code word of two rows, r and r + 8.

    $0 to $7 centroids, then four copies each of: selector, low address bytes, the table's address,
    the address of the word that is read first, 32 bytes from the other.
    """
    text = [
        "{",
        ".reg .b32 w, a, s, x, y;",
        "ld.shared.b32 x, [$20];",
        "xor.b32 a, $20, 32;",
        "ld.shared.b32 y, [a];",
        "xor.b32 s, $8, 0x4444;",
    ]
    for high in range(2):
        text.append(f"prmt.b32 w, x, y, {('$8', 's')[high]};")
        for i, selector in enumerate(("0xCC04", "0xDD15", "0xEE26", "0xFF37")):
            text.append(f"prmt.b32 a, w, $12, {selector};")
            text.append("add.u32 a, a, $16;")
            text.append(f"ld.shared.b32 ${2 * i + high}, [a+{65536 + 128 * high}];")
    return "\n".join([*text, "}"])


def _registers(outputs: int, inputs: int) -> str:
    """Constraints of an assembly whose outputs are written while inputs are still read."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


KEY_GATHER = gl.constexpr(_key_gather())
KEY_REGISTERS = gl.constexpr(_registers(16, 32))
VALUE_GATHER = gl.constexpr(_value_gather())
VALUE_REGISTERS = gl.constexpr(_registers(8, 16))

# $1 thread, $2 target, $3 source, $4 barrier, $5 barrier of keys, which that of values follows.
FILL = gl.constexpr(
    "{ .reg .pred p; setp.eq.u32 p, $1, 0; "
    "@p mbarrier.init.shared::cta.b64 [$5], 1; @p mbarrier.init.shared::cta.b64 [$5+8], 1; "
    "@p fence.mbarrier_init.release.cluster; "
    "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$5], 65536; "
    "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$5+8], 65536; "
    "bar.warp.sync 0xffffffff; setp.lt.u32 p, $1, 4; "
    "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [$3], 32768, [$4]; "
    "mov.u32 $0, $1; }"
)
# $1 barriers of a warp, $2 whether this thread acts for its warp.
INITIALIZE = gl.constexpr(
    "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p mbarrier.init.shared::cta.b64 [$1], 1; "
    "@p mbarrier.init.shared::cta.b64 [$1+8], 1; @p fence.mbarrier_init.release.cluster; "
    "bar.warp.sync 0xffffffff; mov.u32 $0, $1; }"
)
# $1 target, $2 source, $3 barrier, $4 bytes, $5 whether this thread acts for its warp.
COPY = gl.constexpr(
    "{ .reg .pred p; bar.warp.sync 0xffffffff; setp.ne.u32 p, $5, 0; "
    "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], $4; "
    "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], $4, [$3]; "
    "mov.u32 $0, $1; }"
)
# $1 barrier, $2 parity of the phase that must have ended.
AWAIT = gl.constexpr(
    "{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; "
    "@!p bra.uni L; mov.u32 $0, $1; }"
)


@gluon.jit
def fill(origin, thread, key_codebook, value_codebook, head):
    """Start copying a head's codebooks: four threads copy a piece each."""
    keys, values = key_codebook.to(gl.int64), value_codebook.to(gl.int64)
    source = gl.where(thread < 2, keys, values) + head * 65536 + thread % 2 * PIECE
    barrier = origin + BARRIERS + thread // 2 * 8
    gl.inline_asm_elementwise(
        FILL,
        "=r,r,r,l,r,r",
        [thread, origin + thread * PIECE, source, barrier, origin + BARRIERS],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def initialize(barriers, chosen):
    """Make a warp's two barriers ready for its first copies."""
    gl.inline_asm_elementwise(
        INITIALIZE, "=r,r,r", [barriers, chosen], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def copy(target, source, barrier, size, chosen):
    """Start copying, once the warp has read what stood at the target."""
    gl.inline_asm_elementwise(
        COPY,
        "=r,r,l,r,r,r",
        [target, source, barrier, size, chosen],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def await_copy(barrier, parity):
    """Wait for a barrier's phase."""
    gl.inline_asm_elementwise(
        AWAIT, "=r,r,r", [barrier, parity], dtype=gl.int32, is_pure=False, pack=1
    )
