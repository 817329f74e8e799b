"""The integer linear layer for up to 16 rows of x, as a stream of codes into tensor cores.

Threads are written out as in CUDA: a tensor holds one number per thread. A program owns tiles of 16
rows of the weight and one slice of the columns, in chunks of 128: 16 words q of a row (of 8 bits:
16 of low nibbles and 16 of high ones), word q holding at nibble n the column ``4 n u + q`` of its
group. A warp takes every WARPS-th chunk of each tile. A lane streams the words that it will use
through a place of its own in shared memory, and the copies begin before the kernel that writes x
has ended.

A nibble or-ed into the last bits of a large number's mantissa is that number plus the code: two
codes of a word become two operands by one instruction. What was added, and the zero points, are
taken off again by the sum of x, which a product with ones gives.

Shared memory, in bytes: the ring ``[warp, item, plane, half of the tile, lane, 16]``; x as second
operands ``[chunk, word % 4, row, word // 4, 16]``, four words of nibbles n (low half) and n + 4; 16
zeros; (scale, scale times what a code counts too much) ``[row, group]``, 8 bytes after each row
unused; the warps' totals ``[tile, warp, row, row of x]``.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
BATCH = gl.constexpr(4)  # numbers that a thread reads at once before the stream


@gluon.constexpr_function
def wait(groups):
    """Assembly that waits until at most so many groups of copies are under way."""
    return f"cp.async.wait_group {groups}; mov.b32 $0, $1;"


@gluon.constexpr_function
def product(half, registers):
    """Assembly: add to four sums the m16n8k16 product of four registers and two."""
    kind = "f16" if half else "bf16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{%s, %s, %s, %s}, {%s, %s, %s, %s}, {%s, %s}, {%s, %s, %s, %s};" % registers
    )


@gluon.constexpr_function
def multiply_words(half):
    """Assembly: a word of codes of both halves of a tile ($4, $5) times x ($6 to $9)."""
    magic = "0x64006400" if half else "0x43004300"
    lines = [".reg .b32 a, b, c, d, g, h;", ".reg .f32 s0, s1, s2, s3;"]
    lines += ["mov.b32 g, $4;", "mov.b32 h, $5;"]
    between = ("s0", "s1", "s2", "s3")
    for pair in range(2):
        if pair:
            lines += ["shr.u32 g, g, 4;", "shr.u32 h, h, 4;"]
        lines.append(f"lop3.b32 a, g, 0x000F000F, {magic}, 0xEA;")
        lines.append(f"lop3.b32 b, h, 0x000F000F, {magic}, 0xEA;")
        lines += ["shr.u32 g, g, 4;", "shr.u32 h, h, 4;"]
        lines.append(f"lop3.b32 c, g, 0x000F000F, {magic}, 0xEA;")
        lines.append(f"lop3.b32 d, h, 0x000F000F, {magic}, 0xEA;")
        source = between if pair else ("$10", "$11", "$12", "$13")
        target = ("$0", "$1", "$2", "$3") if pair else between
        right = (f"${6 + 2 * pair}", f"${7 + 2 * pair}")
        lines.append(product(half, target + ("a", "b", "c", "d") + right + source))
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def add_inputs(half):
    """Assembly: add up x ($4 to $7) by its rows."""
    one = "0x3C003C00" if half else "0x3F803F80"
    between = ("s0", "s1", "s2", "s3")
    lines = [".reg .b32 a;", ".reg .f32 s0, s1, s2, s3;", f"mov.b32 a, {one};"]
    lines.append(product(half, (*between, *"aaaa", "$4", "$5", "$8", "$9", "$10", "$11")))
    lines.append(product(half, ("$0", "$1", "$2", "$3", *"aaaa", "$6", "$7", *between)))
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def inputs_at(warps, depth, planes):
    """Where x begins, behind the ring."""
    return warps * depth * planes * 1024


@gluon.constexpr_function
def facts_at(warps, depth, planes, chunks, x_rows):
    """Where the scales begin, behind x and 16 zeros."""
    return inputs_at(warps, depth, planes) + chunks * x_rows * 256 + 16


@gluon.constexpr_function
def groups_of(chunks, u):
    """Groups of a slice at most."""
    return 2 * chunks if u == 2 else -(-chunks * 4 // u) + (chunks * 4 % u != 0)


@gluon.constexpr_function
def totals_at(warps, depth, planes, chunks, x_rows, own, u):
    """Where the totals begin."""
    start = facts_at(warps, depth, planes, chunks, x_rows)
    return start + own * 16 * (8 * groups_of(chunks, u) + 8)


@gluon.constexpr_function
def shared_bytes(warps, depth, planes, chunks, x_rows, own, u):
    """Bytes of shared memory."""
    return totals_at(warps, depth, planes, chunks, x_rows, own, u) + own * warps * 64 * x_rows


@gluon.jit
def _say(asm: gl.constexpr, some):
    """One instruction without operands; ``some`` is any number per thread."""
    gl.inline_asm_elementwise(asm, "=r,r", [some], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _read4(address):
    """Four words of shared memory."""
    return gl.inline_asm_elementwise(
        READ4, "=r,=r,=r,=r,r", [address],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _read2(address):
    """Two float32 of shared memory."""
    return gl.inline_asm_elementwise(
        READ2, "=f,=f,r", [address], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )


@gluon.jit
def _read1(address):
    """One float32 of shared memory."""
    return gl.inline_asm_elementwise(
        READ1, "=f,r", [address], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _write4(address, words, keep):
    """Four words to shared memory."""
    gl.inline_asm_elementwise(
        WRITE4, "=r,r,r,r,r,r,r", [address, words[0], words[1], words[2], words[3], keep],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _write1(address, value, keep):
    """One float32 to shared memory."""
    gl.inline_asm_elementwise(
        WRITE1, "=r,r,f,r", [address, value, keep], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _start(
    slot, codes, item, warp, lane, first_tile, first_chunk, chunks, out_features, row_words,
    TURNS: gl.constexpr, OWN: gl.constexpr, CHUNKS: gl.constexpr, WARPS: gl.constexpr,
    PLANES: gl.constexpr, u: gl.constexpr,
):  # fmt: skip
    """Start copying an item's words, and close the group."""
    chunk = item % TURNS * WARPS + warp
    tile = item // TURNS
    row = (first_tile + tile) * 16 + lane // 4
    inside = (tile < OWN) & (chunk < CHUNKS) & (first_chunk + chunk < chunks)
    q = gl.where(inside, first_chunk + chunk, 0) * 16 + lane % 4 * 4
    word = q // (4 * u) * (4 * PLANES * u) + q % (4 * u)
    for half in gl.static_range(0, 2):
        there = inside & (row + 8 * half < out_features)
        place = gl.where(there, row + 8 * half, 0).to(gl.int64) * row_words + word
        size = gl.where(there, 16, 0)
        for plane in gl.static_range(0, PLANES):
            gl.inline_asm_elementwise(
                COPY, "=r,r,l,r",
                [
                    slot + (2 * plane + half) * 512,
                    codes.to(gl.int64) + (place + 4 * plane * u) * 4,
                    size,
                ],
                dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    _say(COMMIT, slot)


@gluon.jit
def _prepare_rows(
    scale, zero, fact_base, thread, first_row, first_group, groups, out_features,
    ROWS: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr, BITS: gl.constexpr,
    ASYMMETRIC: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Write the scales of the program's rows to shared memory."""
    MAGIC: gl.constexpr = (1024.0 if HALF else 128.0) * (17.0 if BITS == 8 else 1.0)
    for start in range(0, ROWS * GROUPS, 32 * WARPS * BATCH):
        for i in gl.static_range(0, BATCH):
            which = start + i * (32 * WARPS) + thread
            group = which % GROUPS
            row = first_row + which // GROUPS
            keep = (which < ROWS * GROUPS) & (row < out_features) & (first_group + group < groups)
            place = row.to(gl.int64) * groups + first_group + group
            factor = gl.load(scale + place, mask=keep, other=0.0).to(gl.float32)
            if ASYMMETRIC:
                middle = gl.load(zero + place, mask=keep, other=0).to(gl.float32) + MAGIC
            else:
                middle = gl.full_like(factor, MAGIC + 2.0 ** (BITS - 1))
            at = fact_base + which // GROUPS * (8 * GROUPS + 8) + group * 8
            write = (which < ROWS * GROUPS).to(gl.int32)
            _write1(at, factor, write)
            _write1(at + 4, factor * middle, write)


@gluon.jit
def _prepare_inputs(
    x, exponents, base, thread, first_chunk, x_count, x_stride, in_features,
    CHUNKS: gl.constexpr, X: gl.constexpr, WARPS: gl.constexpr, SCALED: gl.constexpr,
    u: gl.constexpr,
):  # fmt: skip
    """Write the slice of x to shared memory as second operands, then 16 zeros."""
    WORDS: gl.constexpr = 16 * CHUNKS
    for start in range(0, WORDS * X, 32 * WARPS):
        which = start + thread
        m = which // WORDS
        own = which % WORDS
        q = first_chunk * 16 + own
        column = q // (4 * u) * (32 * u) + q % (4 * u)
        numbers = ()
        for n in gl.static_range(0, 8):
            place = column + 4 * n * u
            keep = (place < in_features) & (m < x_count)
            number = gl.load(x + m.to(gl.int64) * x_stride + place, mask=keep, other=0.0)
            if SCALED:
                power = gl.exp2(-gl.load(exponents + place, mask=keep, other=0).to(gl.float32))
                number = (number.to(gl.float32) * power).to(x.dtype.element_ty)
            numbers = numbers + (number.to(gl.int16, bitcast=True).to(gl.int32),)
        words = ()
        for n in gl.static_range(0, 4):
            words = words + ((numbers[n] & 65535) | (numbers[n + 4] << 16),)
        place = ((own // 16 * 4 + own % 4) * X + m) * 4 + own % 16 // 4
        _write4(base + place * 16, words, (which < WORDS * X).to(gl.int32))
    none = thread * 0
    _write4(base + CHUNKS * X * 256 + none, (none, none, none, none), (thread == 0).to(gl.int32))


@gluon.jit
def _zeros(COUNT: gl.constexpr, WARPS: gl.constexpr):
    """COUNT float32 zeros."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    result = ()
    for _ in gl.static_range(0, COUNT):
        result = result + (gl.zeros([32 * WARPS], gl.float32, layout=flat),)
    return result


@gluon.jit
def _products(
    words, right_at, X: gl.constexpr, PLANES: gl.constexpr, WARPS: gl.constexpr, HALF: gl.constexpr
):
    """Sums of a chunk: four of codes times x for each plane, then four of x."""
    sums = _zeros(4 * PLANES + 4, WARPS)
    for j in gl.static_range(0, 4):
        right = _read4(right_at[j])
        new = ()
        for plane in gl.static_range(0, PLANES):
            new = new + gl.inline_asm_elementwise(
                multiply_words(HALF), "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                [
                    words[8 * plane + j], words[8 * plane + 4 + j],
                    right[0], right[1], right[2], right[3],
                    sums[4 * plane], sums[4 * plane + 1], sums[4 * plane + 2], sums[4 * plane + 3],
                ],
                dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
            )  # fmt: skip
        sums = new + gl.inline_asm_elementwise(
            add_inputs(HALF), "=f,=f,=f,=f,r,r,r,r,f,f,f,f",
            [
                right[0], right[1], right[2], right[3],
                sums[4 * PLANES], sums[4 * PLANES + 1], sums[4 * PLANES + 2], sums[4 * PLANES + 3],
            ],
            dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return sums


@gluon.jit
def _fold(totals, sums, facts, FIRST: gl.constexpr, PLANES: gl.constexpr):
    """Scale a chunk's sums and add them to the four totals from FIRST on."""
    new = ()
    for i in gl.static_range(0, 4):
        code = sums[i]
        if PLANES == 2:
            code += 16.0 * sums[4 + i]
        factor = facts[i // 2 * 2]
        taken = facts[i // 2 * 2 + 1]
        new = new + (totals[FIRST + i] + (code * factor - sums[4 * PLANES + i] * taken),)
    return new


@gluon.jit
def multiply(
    x, codes, scale, zero, exponents, bias, y, x_count, x_stride, in_features, out_features, groups,
    u: gl.constexpr, BITS: gl.constexpr, X: gl.constexpr, OWN: gl.constexpr, CHUNKS: gl.constexpr,
    DEPTH: gl.constexpr, WARPS: gl.constexpr, ASYMMETRIC: gl.constexpr, SCALED: gl.constexpr,
    BIASED: gl.constexpr,
):  # fmt: skip
    """y[slice, m, o] = sum_i W[o, i] x[m, i] over a slice of CHUNKS chunks, + bias[o] if given.

    Program ``(b, slice)``: tiles ``b OWN`` and on. X >= x_count rows of x have room. Sums in
    float32.
    """
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    PLANES: gl.constexpr = BITS // 4
    SUBS: gl.constexpr = 2 if u == 2 else 1
    TILES: gl.constexpr = (X + 7) // 8
    TURNS: gl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    GROUPS: gl.constexpr = groups_of(CHUNKS, u)
    ALL: gl.constexpr = shared_bytes(WARPS, DEPTH, PLANES, CHUNKS, X, OWN, u)
    gdc_launch_dependents()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # The only shared memory of the kernel, so it begins where the assembly takes it to begin.
    shared = gl.allocate_shared_memory(gl.int32, [(ALL + 255) // 256 + 1, 64], plain)
    # Assembly alone would not have the compiler declare it.
    shared.index((ALL + 255) // 256).store(gl.zeros([64], gl.int32, layout=flat))
    thread = gl.arange(0, 32 * WARPS, layout=flat)
    base = gl.inline_asm_elementwise(BASE, "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1)
    lane = thread % 32
    warp = thread // 32
    first_tile = gl.program_id(0) * OWN
    first_chunk = gl.program_id(1) * CHUNKS
    first_group = first_chunk * 16 // (4 * u)
    chunks = (in_features + 127) // 128
    row_words = in_features // 8 * PLANES
    slot = base + warp * (DEPTH * PLANES * 1024) + lane * 16
    for d in gl.static_range(0, DEPTH):
        _start(
            slot + d * (PLANES * 1024), codes, d, warp, lane, first_tile, first_chunk, chunks,
            out_features, row_words, TURNS, OWN, CHUNKS, WARPS, PLANES, u,
        )  # fmt: skip
    inputs = base + inputs_at(WARPS, DEPTH, PLANES)
    none = inputs + CHUNKS * X * 256
    fact_base = base + facts_at(WARPS, DEPTH, PLANES, CHUNKS, X)
    total_base = base + totals_at(WARPS, DEPTH, PLANES, CHUNKS, X, OWN, u)
    _prepare_rows(
        scale, zero, fact_base, thread, first_tile * 16, first_group, groups, out_features,
        OWN * 16, GROUPS, WARPS, BITS, ASYMMETRIC, HALF,
    )  # fmt: skip
    gdc_wait()
    _prepare_inputs(
        x, exponents, inputs, thread, first_chunk, x_count, x_stride, in_features,
        CHUNKS, X, WARPS, SCALED, u,
    )  # fmt: skip
    _say(BARRIER, base)
    totals = _zeros(4 * TILES, WARPS)
    for first in range(0, OWN * TURNS, DEPTH):
        for d in gl.static_range(0, DEPTH):
            item = first + d
            _say(wait(DEPTH - 1), base)
            words = ()
            for part in gl.static_range(0, 2 * PLANES):
                words = words + _read4(slot + (d * 2 * PLANES + part) * 512)
            _start(
                slot + d * (PLANES * 1024), codes, item + DEPTH, warp, lane, first_tile,
                first_chunk, chunks, out_features, row_words, TURNS, OWN, CHUNKS, WARPS, PLANES, u,
            )  # fmt: skip
            turn = item % TURNS
            local = item // TURNS
            chunk = turn * WARPS + warp
            inside = (chunk < CHUNKS) & (first_chunk + chunk < chunks) & (local < OWN)
            chunk = gl.minimum(chunk, CHUNKS - 1)
            row = gl.minimum(local, OWN - 1) * 16 + lane // 4
            for sub in gl.static_range(0, SUBS):
                if SUBS == 2:
                    group = 2 * chunk + sub
                else:
                    group = (first_chunk + chunk) * 16 // (4 * u) - first_group
                at = fact_base + row * (8 * GROUPS + 8) + group * 8
                facts = _read2(at) + _read2(at + 8 * (8 * GROUPS + 8))
                kept = ()
                for i in gl.static_range(0, 4):
                    kept = kept + (gl.where(inside, facts[i], 0.0),)
                new = ()
                for tile in gl.static_range(0, TILES):
                    m = gl.minimum(8 * tile + lane // 4, X - 1)
                    right_at = ()
                    for j in gl.static_range(0, 4):
                        place = inputs + (((chunk * 4 + j) * X + m) * 4 + lane % 4) * 16
                        if SUBS == 2:
                            place = gl.where(lane % 4 // 2 == sub, place, none)
                        right_at = right_at + (place,)
                    sums = _products(words, right_at, X, PLANES, WARPS, HALF)
                    new = new + _fold(totals, sums, kept, 4 * tile, PLANES)
                totals = new
            last = (turn == TURNS - 1) & (local < OWN)
            new = ()
            for i in gl.static_range(0, 4 * TILES):
                m = i // 4 * 8 + lane % 4 * 2 + i % 2
                row = lane // 4 + i % 4 // 2 * 8
                place = total_base + (((local * WARPS + warp) * 16 + row) * X + m) * 4
                _write1(place, totals[i], (last & (m < X)).to(gl.int32))
                new = new + (gl.where(last, 0.0, totals[i]),)
            totals = new
    _say(wait(0), base)
    _say(BARRIER, base)
    _finish(
        y + gl.program_id(1).to(gl.int64) * x_count * out_features, bias, total_base, thread,
        first_tile * 16, x_count, out_features, X, OWN, WARPS, BIASED,
    )  # fmt: skip
    shared._keep_alive()


@gluon.jit
def _finish(
    y, bias, totals, thread, first_row, x_count, out_features,
    X: gl.constexpr, OWN: gl.constexpr, WARPS: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """Add up the warps' totals and store; a thread takes one output."""
    SIZE: gl.constexpr = OWN * 16 * X
    for start in range(0, SIZE, 32 * WARPS):
        which = start + thread
        m = which // (OWN * 16)
        inner = gl.where(which < SIZE, which % (OWN * 16), 0)
        place = totals + ((inner // 16 * WARPS * 16 + inner % 16) * X + gl.minimum(m, X - 1)) * 4
        total = gl.full_like(thread, 0.0, dtype=gl.float32)
        for warp in gl.static_range(0, WARPS):
            total += _read1(place + warp * (64 * X))
        row = first_row + inner
        keep = (which < SIZE) & (row < out_features) & (m < x_count)
        if BIASED:
            total += gl.load(bias + row, mask=keep, other=0.0).to(gl.float32)
        gl.store(y + m.to(gl.int64) * out_features + row, total.to(y.dtype.element_ty), mask=keep)
