"""A clustered linear layer for few rows of x: entries by byte permutation, products of bytes.

Threads are written out as in CUDA: a tensor holds one number per thread. A warp owns ``16 TILES``
rows of the weight and every WARPS-th step, which is 16 words of each plane and so 512 channels;
lane 4 g + t holds four words of rows g and g + 8 and needs no exchange before the last sum. x comes
as pairs of bytes in the order of these words, see ``streamed``.

Entries. A nibble is what PRMT takes as a selector: three bits of it choose one of eight bytes. Its
fourth bit asks for the sign of that byte instead, -1 or 0. Of sixteen entries one PRMT therefore
looks up the low eight and gives 0 or -1 where the code is in the high half, another PRMT the other
way round; both are multiplied, and their sum is made right beforehand: with bytes A of the low half
and B of the high half, A + (B < 0 ? -1 : 0) = B + (A < 0 ? -1 : 0) = entry - 1, so x is added once
more. That is 7 integer operations for 8 weights, where selecting among looked-up bytes takes 11.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOAD_WEIGHT = gl.constexpr("ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];")
LOAD = gl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
FENCE = gl.constexpr("mov.b32 $0, $1; bar.warp.sync 0xffffffff;")
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
def planes(bits):
    """Words of each j that a row has."""
    return bits


@gluon.constexpr_function
def table_words(bits):
    """Words of one row's table of byte entries."""
    return 2**bits // 4


@gluon.constexpr_function
def sum_at(tile, piece, column, pieces, columns, chains):
    """Where the four sums of a tile, a piece of the entries and a column tile begin."""
    return 4 * chains * ((tile * pieces + piece) * columns + column)


@gluon.constexpr_function
def lookup(bits, c):
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
def constraints(bits):
    """Operand kinds of ``lookup``."""
    results = 8 if bits == 4 else 4
    inputs = 2 * (2 if bits == 3 else 1) + 2 * 2 ** (bits - 2)
    return ",".join(["=&r"] * results + ["r"] * inputs)


@gluon.jit
def _load4(address, WEIGHT: gl.constexpr):
    """Four words from an address per thread."""
    return gl.inline_asm_elementwise(
        LOAD_WEIGHT if WEIGHT else LOAD,
        "=r,=r,=r,=r,l",
        [address],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _load_step(rows, step, lane, u: gl.constexpr, BITS: gl.constexpr):
    """Words q of plane p of the r-th row at ``(r * BITS + p) * 4 + q``; past the end others' words.

    What lies past the end meets zeros of x.
    """
    place = gl.minimum(16 * step + 4 * (lane % 4), u - 4).to(gl.int64) * 4
    words = ()
    for r in gl.static_range(0, len(rows)):
        start = rows[r] + place
        for p in gl.static_range(0, BITS):
            words = words + _load4(start + 4 * p * u, True)
    # Without this fence the compiler moves the loads to where their results are used.
    gl.inline_asm_elementwise(FENCE, "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
    return words


@gluon.jit
def _look_up(words, table, C: gl.constexpr, Q: gl.constexpr, BITS: gl.constexpr):
    """First operands of word Q of value group C: four registers, or twice four for 4 bits."""
    if BITS == 4:
        picked = (words[4 * C + Q], words[4 * (BITS + C) + Q])
    elif BITS == 3:
        picked = (
            words[4 * (C % 2) + Q],
            words[8 + Q],
            words[4 * (BITS + C % 2) + Q],
            words[4 * (BITS + 2) + Q],
        )
    else:
        picked = (words[4 * (C % 2) + Q], words[4 * (BITS + C % 2) + Q])
    for i in gl.static_range(0, len(table)):
        picked = picked + (table[i],)
    if BITS == 4:
        result = gl.inline_asm_elementwise(
            lookup(BITS, C),
            constraints(BITS),
            picked,
            dtype=(
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
            ),
            is_pure=True,
            pack=1,
        )
    else:
        result = gl.inline_asm_elementwise(
            lookup(BITS, C),
            constraints(BITS),
            picked,
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    return result


@gluon.jit
def _multiply(left, FIRST: gl.constexpr, right, SECOND: gl.constexpr, sums, THIRD: gl.constexpr):
    """One m16n8k32 product of bytes on registers FIRST.. of left, SECOND.. of right, added up."""
    return gl.inline_asm_elementwise(
        MULTIPLY,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [
            left[FIRST],
            left[FIRST + 1],
            left[FIRST + 2],
            left[FIRST + 3],
            right[SECOND],
            right[SECOND + 1],
            sums[THIRD],
            sums[THIRD + 1],
            sums[THIRD + 2],
            sums[THIRD + 3],
        ],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _slice(values, START: gl.constexpr, COUNT: gl.constexpr):
    """Values START to START + COUNT of a tuple."""
    part = ()
    for i in gl.static_range(0, COUNT):
        part = part + (values[START + i],)
    return part


@gluon.jit
def _table(tables, row, PIECE: gl.constexpr, PIECES: gl.constexpr, BITS: gl.constexpr):
    """Words of one table: of an int8 codebook, or of a row's two prepared tables."""
    COUNT: gl.constexpr = table_words(BITS)
    address = tables.to(gl.pointer_type(gl.int32)) + row * (PIECES * COUNT) + PIECE * COUNT
    words = ()
    for i in gl.static_range(0, COUNT):
        words = words + (gl.load(address + i),)
    if BITS == 4:
        first = _balance(words[0], words[2])
        second = _balance(words[1], words[3])
        words = (first[0], second[0], first[1], second[1])
    return words


@gluon.jit
def _balance(low, high):
    """Four low and four high entries to bytes A and B, see the module."""
    return gl.inline_asm_elementwise(
        BALANCE, "=&r,=&r,r,r", [low, high], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _accumulate(
    sums,
    words,
    tables,
    pieces,
    column_stride,
    columns,
    PIECES: gl.constexpr,
    TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    CHAINS: gl.constexpr,
    BITS: gl.constexpr,
):
    """Add one step's products of bytes to ``sums``.

    Four sums of tile, piece of the entries, column tile and chain lie at
    ``4 (((tile PIECES + piece) COLUMN_TILES + column) CHAINS + chain)``.
    """
    HALVES: gl.constexpr = 2 if BITS == 4 else 1
    OWN: gl.constexpr = 8 * BITS
    COUNT: gl.constexpr = 2 * table_words(BITS)
    for c in gl.static_range(0, 4):
        for pair in gl.static_range(0, 2):
            right = ()
            for n in gl.static_range(0, COLUMN_TILES):
                place = (2 * c + pair) * column_stride + columns[n]
                right = right + _load4(pieces + place.to(gl.int64), False)
            for odd in gl.static_range(0, 2):
                new = ()
                for tile in gl.static_range(0, TILES):
                    codes = _slice(words, OWN * tile, OWN)
                    for piece in gl.static_range(0, PIECES):
                        table = _slice(tables, COUNT * (tile * PIECES + piece), COUNT)
                        left = _look_up(codes, table, c, 2 * pair + odd, BITS)
                        for n in gl.static_range(0, COLUMN_TILES):
                            own = _slice(
                                sums,
                                sum_at(tile, piece, n, PIECES, COLUMN_TILES, CHAINS),
                                4 * CHAINS,
                            )
                            low = _multiply(left, 0, right, 4 * n + 2 * odd, own, 0)
                            if HALVES == 2 and CHAINS == 2:
                                high = _multiply(left, 4, right, 4 * n + 2 * odd, own, 4)
                                new = new + low + high
                            elif HALVES == 2:
                                new = new + _multiply(left, 4, right, 4 * n + 2 * odd, low, 0)
                            else:
                                new = new + low
                sums = new
    return sums


@gluon.jit
def _fold(
    totals,
    sums,
    factors,
    x_rows,
    PIECES: gl.constexpr,
    TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    CHAINS: gl.constexpr,
    BITS: gl.constexpr,
):
    """Bring a step's sums to x's scale and add them to the totals of tile, half and column tile."""
    OFFSET: gl.constexpr = (255.0 if PIECES == 2 else 1.0) if BITS == 4 else 0.0
    scales = ()
    added = ()
    for n in gl.static_range(0, COLUMN_TILES):
        address = factors + 2 * x_rows[n]
        scales = scales + (gl.load(address),)
        if BITS == 4:
            added = added + (gl.load(address + 1) * OFFSET,)
    new = ()
    for tile in gl.static_range(0, TILES):
        for half in gl.static_range(0, 2):
            for n in gl.static_range(0, COLUMN_TILES):
                value = scales[n]
                for piece in gl.static_range(0, PIECES):
                    own = _slice(
                        sums, sum_at(tile, piece, n, PIECES, COLUMN_TILES, CHAINS), 4 * CHAINS
                    )
                    high = own[2 * half]
                    low = own[2 * half + 1]
                    if CHAINS == 2:
                        high += own[2 * half + 4]
                        low += own[2 * half + 5]
                    part = high.to(gl.float32) * 256.0 + low.to(gl.float32)
                    value = part if piece == 0 else value * 254.0 + part
                total = totals[(tile * 2 + half) * COLUMN_TILES + n] + value * scales[n]
                new = new + (total + added[n] if BITS == 4 else total,)
    return new


@gluon.jit
def multiply(
    pieces,
    factors,
    indices,
    tables,
    scale,
    bias,
    y,
    x_count,
    out_features,
    u: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    AHEAD: gl.constexpr,
    PIECES: gl.constexpr,
    SHARED: gl.constexpr,
    BITS: gl.constexpr,
    SCALED: gl.constexpr,
    BIASED: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """y[m, o] = scale[o] sum_i entry(o, i) x[m, i] + bias[o] for ``16 TILES`` rows of the weight.

    ``pieces`` int8 ``[steps, 8, 2 x_count, 4, 16]`` and ``factors`` float32 ``[steps, x_count, 2]``
    are described in ``streamed``; ``SHARED`` rows have one table. Products of bytes accumulate in
    int32 over a step and, brought to the scale of x, in float32 over the steps; the warps' totals
    meet in shared memory. With AHEAD the words of a step are in registers while those of the step
    before are used; the first are asked for before the kernel that writes ``pieces`` has ended.
    Programs of one weight and other rows of x are neighbours, so that they share it in the cache.
    """
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    CHAINS: gl.constexpr = 2 if BITS == 4 and TILES * COLUMN_TILES * PIECES == 1 else 1
    SUMS: gl.constexpr = 4 * CHAINS * TILES * COLUMN_TILES * PIECES
    COUNT: gl.constexpr = 2 * TILES * COLUMN_TILES
    if OVERLAP:
        gdc_launch_dependents()
    thread = gl.arange(0, 32 * WARPS, layout=flat)
    lane = thread % 32
    warp = thread // 32
    first = gl.program_id(1) * (16 * TILES)
    first_x = gl.program_id(0) * (4 * COLUMN_TILES)
    rows = ()
    row_tables = ()
    for r in gl.static_range(0, 2 * TILES):
        row = gl.minimum(first + 8 * r + lane // 4, out_features - 1).to(gl.int64)
        rows = rows + (indices.to(gl.int64) + row * (4 * u * BITS),)
    words = _load_step(rows, warp, lane, u, BITS)
    if OVERLAP:
        gdc_wait()
    for tile in gl.static_range(0, TILES):
        for piece in gl.static_range(0, PIECES):
            for half in gl.static_range(0, 2):
                at = first + 16 * tile + 8 * half + lane // 4
                row = gl.minimum(at, out_features - 1).to(gl.int64)
                row_tables = row_tables + _table(tables, row // SHARED, piece, PIECES, BITS)
    columns = ()
    x_rows = ()
    for n in gl.static_range(0, COLUMN_TILES):
        column = gl.minimum(2 * first_x + 8 * n + lane // 4, 2 * x_count - 1)
        columns = columns + (column * 64 + lane % 4 * 16,)
        x_rows = x_rows + (gl.minimum(first_x + 4 * n + lane % 4, x_count - 1),)
    totals = ()
    for _ in gl.static_range(0, COUNT):
        totals = totals + (gl.zeros([32 * WARPS], gl.float32, layout=flat),)
    for turn in gl.static_range(0, STEPS):
        step = turn * WARPS + warp
        if AHEAD and turn + 1 < STEPS:
            following = _load_step(rows, step + WARPS, lane, u, BITS)
        sums = ()
        for _ in gl.static_range(0, SUMS):
            sums = sums + (gl.zeros([32 * WARPS], gl.int32, layout=flat),)
        place = pieces.to(gl.int64) + step.to(gl.int64) * (1024 * x_count)
        sums = _accumulate(
            sums, words, row_tables, place, 128 * x_count, columns,
            PIECES, TILES, COLUMN_TILES, CHAINS, BITS,
        )  # fmt: skip
        totals = _fold(
            totals, sums, factors + 2 * step * x_count, x_rows,
            PIECES, TILES, COLUMN_TILES, CHAINS, BITS,
        )  # fmt: skip
        if AHEAD and turn + 1 < STEPS:
            words = following
        elif turn + 1 < STEPS:
            words = _load_step(rows, step + WARPS, lane, u, BITS)
    _finish(
        totals, scale, bias, y, x_count, out_features, first, first_x,
        WARPS, COLUMN_TILES, COUNT, SCALED, BIASED,
    )  # fmt: skip


@gluon.jit
def _finish(
    totals,
    scale,
    bias,
    y,
    x_count,
    out_features,
    first,
    first_x,
    WARPS: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    COUNT: gl.constexpr,
    SCALED: gl.constexpr,
    BIASED: gl.constexpr,
):
    """Add up the warps' totals, scale, add the bias and store."""
    wide: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    spread: gl.constexpr = gl.BlockedLayout([1, WARPS, 1], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    kept: gl.constexpr = gl.SliceLayout(1, spread)
    whole: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [WARPS, 1], [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    shared = gl.allocate_shared_memory(gl.float32, [COUNT * WARPS, 32], plain)
    for i in gl.static_range(0, COUNT):
        tile = gl.convert_layout(gl.reshape(totals[i], [WARPS, 32]), wide, assert_trivial=True)
        shared.slice(i * WARPS, WARPS).store(tile)
    parts = gl.reshape(shared.load(whole), [COUNT, WARPS, 32])
    total = gl.sum(gl.convert_layout(parts, spread, assert_trivial=True), 1)
    which = gl.arange(0, COUNT, layout=gl.SliceLayout(1, kept))[:, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, kept))[None, :]
    row = first + which // COLUMN_TILES * 8 + lane // 4
    m = first_x + which % COLUMN_TILES * 4 + lane % 4
    keep = (row < out_features) & (m < x_count)
    if SCALED:
        total *= gl.load(scale + row, mask=keep, other=0.0).to(gl.float32)
    if BIASED:
        total += gl.load(bias + row, mask=keep, other=0.0).to(gl.float32)
    place = m.to(gl.int64) * out_features + row
    gl.store(y + place, total.to(y.dtype.element_ty), mask=keep)
