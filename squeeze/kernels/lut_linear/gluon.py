"""A clustered linear layer for few rows of x, by programs that stay on their multiprocessor.

Threads are written out as in CUDA: a tensor holds one number per thread. A program owns tiles of
``16 TILES`` rows of the weight and one slice of the channels, in steps of 16 words of each plane,
512 channels. Its warps are GROUPS groups of ACROSS: a group takes every GROUPS-th of its tiles, a
warp of it every ACROSS-th step. Each lane streams the words that it will use through a place of its
own in shared memory: the copy of the next step's plane starts as soon as this step's is in
registers, and the first copies before the kernel that writes x has ended.

x and float16 entries become bytes as in ``gluon_inputs``, entries are looked up as in
``gluon_assembly``.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.lut_linear.gluon_assembly import (
    BARRIER,
    BASE,
    COMMIT,
    COPY,
    MULTIPLY,
    lookup,
    operands,
    table_words,
    wait,
)
from squeeze.kernels.lut_linear.gluon_inputs import (
    part,
    prepare_rows,
    read1,
    read2,
    read4,
    split_x,
    write1,
)
from squeeze.kernels.lut_linear.gluon_layout import (
    facts_at,
    group_of,
    groups_of,
    places,
    plane_of,
    ring_bytes,
    shared_bytes,
    sum_at,
    tables_at,
    totals_at,
)


@gluon.jit
def say(asm: gl.constexpr, some):
    """One instruction without operands; ``some`` is any number per thread."""
    gl.inline_asm_elementwise(asm, "=r,r", [some], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_plane(
    slot, sources, size, PLANE: gl.constexpr, TILES: gl.constexpr, BITS: gl.constexpr,
    u: gl.constexpr,
):  # fmt: skip
    """Start copying one plane's words of every row, and close the group."""
    for r in gl.static_range(0, 2 * TILES):
        if len(sources) == 1:
            source = sources[0] + 32 * r * u * BITS + 4 * PLANE * u
        else:
            source = sources[r] + 4 * PLANE * u
        gl.inline_asm_elementwise(
            COPY, "=r,r,l,r", [slot + (PLANE * 2 * TILES + r) * 512, source, size],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    say(COMMIT, slot)


@gluon.jit
def row_sources(
    indices, tile, step, lane, out_features, valid, TILES: gl.constexpr, BITS: gl.constexpr,
    u: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Addresses of this lane's words of plane 0 by rows, and the bytes a copy takes: 16 or 0.

    Where the tiles are whole the first row's address is enough.
    """
    word = 16 * step + 4 * (lane % 4)
    size = gl.where(valid & (word < u), 16, 0)
    word = gl.minimum(word, u - 4)
    sources = ()
    for r in gl.static_range(0, 1 if WHOLE else 2 * TILES):
        row = tile * (16 * TILES) + 8 * r + lane // 4
        if not WHOLE:
            row = gl.minimum(row, out_features - 1)
        place = row.to(gl.int64) * (u * BITS) + word
        sources = sources + (indices.to(gl.int64) + place * 4,)
    return sources, size


@gluon.jit
def _look_up(
    kept, words, table, TILE: gl.constexpr, C: gl.constexpr, Q: gl.constexpr, BITS: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """First operands of word Q of value group C: HALVES times four registers."""
    first: gl.constexpr = 8 * TILE + Q
    if BITS == 3:
        picked = (words[first], kept[first], words[first + 4], kept[first + 4])
    else:
        picked = (words[first], words[first + 4])
    picked = picked + table
    if HALVES == 2:
        result = gl.inline_asm_elementwise(
            lookup(BITS, C, HALVES),
            operands(BITS, HALVES),
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
            lookup(BITS, C, HALVES),
            operands(BITS, HALVES),
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
def _accumulate(
    sums, kept, words, tables, pieces, columns, X: gl.constexpr, C: gl.constexpr,
    PIECES: gl.constexpr, TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, CHAINS: gl.constexpr,
    BITS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Add one value group's products of bytes to ``sums``.

    Four sums of tile, piece of the entries, column tile and chain lie at
    ``4 (((tile PIECES + piece) COLUMN_TILES + column) CHAINS + chain)``.
    """
    COUNT: gl.constexpr = 2 * table_words(BITS)
    for pair in gl.static_range(0, 2):
        right = ()
        for n in gl.static_range(0, COLUMN_TILES):
            right = right + read4(pieces + columns[n] + (2 * C + pair) * (128 * X))
        for odd in gl.static_range(0, 2):
            new = ()
            for tile in gl.static_range(0, TILES):
                for piece in gl.static_range(0, PIECES):
                    table = part(tables, COUNT * (tile * PIECES + piece), COUNT)
                    left = _look_up(kept, words, table, tile, C, 2 * pair + odd, BITS, HALVES)
                    for n in gl.static_range(0, COLUMN_TILES):
                        own = part(
                            sums, sum_at(tile, piece, n, PIECES, COLUMN_TILES, CHAINS), 4 * CHAINS
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
def fold(
    totals, sums, factors, x_rows, PIECES: gl.constexpr, TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr, CHAINS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Bring a step's sums to x's scale and add them to the totals of tile, half and column tile."""
    OFFSET: gl.constexpr = 255.0 if PIECES == 2 else 1.0
    scales = ()
    added = ()
    for n in gl.static_range(0, COLUMN_TILES):
        pair = read2(factors + 8 * x_rows[n])
        scales = scales + (pair[0],)
        added = added + (pair[1] * OFFSET,)
    new = ()
    for tile in gl.static_range(0, TILES):
        for half in gl.static_range(0, 2):
            for n in gl.static_range(0, COLUMN_TILES):
                value = scales[n]
                for piece in gl.static_range(0, PIECES):
                    own = part(
                        sums, sum_at(tile, piece, n, PIECES, COLUMN_TILES, CHAINS), 4 * CHAINS
                    )
                    high = own[2 * half]
                    low = own[2 * half + 1]
                    if CHAINS == 2:
                        high += own[2 * half + 4]
                        low += own[2 * half + 5]
                    value_part = high.to(gl.float32) * 256.0 + low.to(gl.float32)
                    value = value_part if piece == 0 else value * 254.0 + value_part
                total = totals[(tile * 2 + half) * COLUMN_TILES + n] + value * scales[n]
                new = new + (total + added[n] if HALVES == 2 else total,)
    return new


@gluon.jit
def row_table(place, BITS: gl.constexpr):
    """The words of one row's table from shared memory."""
    if BITS == 4:
        words = read4(place)
    elif BITS == 3:
        pair = read2(place)
        words = (pair[0].to(gl.int32, bitcast=True), pair[1].to(gl.int32, bitcast=True))
    else:
        words = (read1(place).to(gl.int32, bitcast=True),)
    return words


@gluon.jit
def multiply(
    x, indices, tables, scale, bias, y, x_count, x_stride, in_features, out_features,
    u: gl.constexpr, STEPS: gl.constexpr, X: gl.constexpr, OWN: gl.constexpr,
    ACROSS: gl.constexpr, TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, EACH: gl.constexpr,
    WARPS: gl.constexpr, PIECES: gl.constexpr, SHARED: gl.constexpr, BITS: gl.constexpr,
    ALIGNED: gl.constexpr, FULL: gl.constexpr, SCALED: gl.constexpr, BIASED: gl.constexpr,
    WHOLE: gl.constexpr, HALVES: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """y[slice, m, o] = scale[o] sum_i entry(o, i) x[m, i] over a slice, + bias[o] once.

    Programs ``(b, slice)``: tiles b, b + programs, ... (OWN of them, a multiple of the groups of
    warps), STEPS steps from ``STEPS slice``. X >= x_count rows of x have room. Products of bytes
    accumulate in int32 over a step and, brought to the scale of x, in float32 over the steps.
    The next kernel starts at once or, if LATE, when x has been read.
    """
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    CHAINS: gl.constexpr = 2 if HALVES == 2 and TILES * COLUMN_TILES * PIECES == 1 else 1
    SUMS: gl.constexpr = 4 * CHAINS * TILES * COLUMN_TILES * PIECES
    COUNT: gl.constexpr = 2 * TILES * COLUMN_TILES
    GROUPS: gl.constexpr = WARPS // ACROSS
    TURNS: gl.constexpr = (STEPS + ACROSS - 1) // ACROSS
    WORDS: gl.constexpr = table_words(BITS)
    PLANES: gl.constexpr = places(BITS)
    PIECES_AT: gl.constexpr = ring_bytes(WARPS, TILES, BITS)
    FACTORS_AT: gl.constexpr = PIECES_AT + STEPS * X * 1024
    TABLES_AT: gl.constexpr = tables_at(WARPS, TILES, BITS, STEPS, X)
    FACTS_AT: gl.constexpr = facts_at(WARPS, TILES, BITS, STEPS, X, OWN, PIECES)
    TOTALS_AT: gl.constexpr = totals_at(WARPS, TILES, BITS, STEPS, X, OWN, PIECES)
    ALL: gl.constexpr = shared_bytes(
        WARPS, TILES, BITS, STEPS, X, OWN, PIECES, ACROSS, COLUMN_TILES
    )
    # Whether a warp has but one step: then all that it reads is on its way from the start.
    ONCE: gl.constexpr = OWN // GROUPS * TURNS == 1
    if not LATE:
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
    group = warp // ACROSS
    across = warp % ACROSS
    stride = gl.num_programs(0)
    first_tile = gl.program_id(0)
    first_step = gl.program_id(1) * STEPS
    tiles = (out_features + (16 * TILES - 1)) // (16 * TILES)
    slot = base + warp * (TILES * BITS * 1024) + lane * 16
    tile = first_tile + group * stride
    sources, size = row_sources(
        indices, tile, first_step + across, lane, out_features,
        (tile < tiles) & (across < STEPS), TILES, BITS, u, WHOLE,
    )  # fmt: skip
    for at in gl.static_range(0, PLANES):
        copy_plane(slot, sources, size, plane_of(BITS, at), TILES, BITS, u)
    prepare_rows(
        tables, scale, bias, base + TABLES_AT, base + FACTS_AT, thread, first_tile, stride,
        out_features, OWN, TILES, WARPS, PIECES, SHARED, BITS, HALVES, SCALED,
        BIASED,
    )  # fmt: skip
    gdc_wait()
    split_x(
        x, base + PIECES_AT, base + FACTORS_AT, thread, first_step, x_count, x_stride, in_features,
        u, STEPS, X, WARPS, EACH, ALIGNED, FULL,
    )  # fmt: skip
    if LATE:
        gdc_launch_dependents()
    say(BARRIER, base)
    part_y = y + gl.program_id(1).to(gl.int64) * x_count * out_features
    columns = ()
    x_rows = ()
    for n in gl.static_range(0, COLUMN_TILES):
        columns = columns + (gl.minimum(8 * n + lane // 4, 2 * X - 1) * 64 + lane % 4 * 16,)
        x_rows = x_rows + (gl.minimum(4 * n + lane % 4, X - 1),)
    for turn_of_tile in range(0, OWN // GROUPS):
        local = turn_of_tile * GROUPS + group
        row_tables = ()
        for t in gl.static_range(0, TILES):
            for piece in gl.static_range(0, PIECES):
                for half in gl.static_range(0, 2):
                    row = (local * TILES + t) * 16 + 8 * half + lane // 4
                    place = base + TABLES_AT + (row * PIECES + piece) * (4 * WORDS)
                    row_tables = row_tables + row_table(place, BITS)
        totals = ()
        for _ in gl.static_range(0, COUNT):
            totals = totals + (gl.zeros([32 * WARPS], gl.float32, layout=flat),)
        for turn in range(0, TURNS):
            step = turn * ACROSS + across
            same = turn + 1 < TURNS
            next_local = gl.where(same, local, local + GROUPS)
            next_step = gl.where(same, step + ACROSS, across)
            next_tile = first_tile + next_local * stride
            valid = (next_tile < tiles) & (next_local < OWN) & (next_step < STEPS)
            sources, size = row_sources(
                indices, next_tile, first_step + next_step, lane, out_features, valid,
                TILES, BITS, u, WHOLE,
            )  # fmt: skip
            # A step past the slice's end multiplies what lies there by zeros.
            held = gl.minimum(step, STEPS - 1)
            pieces = base + PIECES_AT + held * (1024 * X)
            factors = base + FACTORS_AT + held * (8 * X)
            sums = ()
            for _ in gl.static_range(0, SUMS):
                sums = sums + (gl.zeros([32 * WARPS], gl.int32, layout=flat),)
            kept = ()
            for at in gl.static_range(0, PLANES):
                say(wait(PLANES - 1 - (at if ONCE else 0)), base)
                words = ()
                for r in gl.static_range(0, 2 * TILES):
                    words = words + read4(slot + (plane_of(BITS, at) * 2 * TILES + r) * 512)
                if not ONCE:
                    copy_plane(slot, sources, size, plane_of(BITS, at), TILES, BITS, u)
                if groups_of(BITS, at) == 0:
                    kept = words
                for i in gl.static_range(0, groups_of(BITS, at)):
                    sums = _accumulate(
                        sums, kept, words, row_tables, pieces, columns, X, group_of(BITS, at, i),
                        PIECES, TILES, COLUMN_TILES, CHAINS, BITS, HALVES,
                    )  # fmt: skip
            folded = fold(
                totals, sums, factors, x_rows, PIECES, TILES, COLUMN_TILES, CHAINS, HALVES
            )
            if STEPS % ACROSS == 0:
                totals = folded
            else:
                kept_totals = ()
                for i in gl.static_range(0, COUNT):
                    kept_totals = kept_totals + (gl.where(step < STEPS, folded[i], totals[i]),)
                totals = kept_totals
        if ACROSS == 1:
            store_tile(
                part_y, totals, base + FACTS_AT, lane, local, first_tile + local * stride, x_count,
                out_features, TILES, COLUMN_TILES,
            )  # fmt: skip
        else:
            place = base + TOTALS_AT + ((local * ACROSS + across) * (COUNT * 32) + lane) * 4
            for i in gl.static_range(0, COUNT):
                write1(place + 128 * i, totals[i].to(gl.int32, bitcast=True), thread | 1)
    if ACROSS > 1:
        say(BARRIER, base)
        finish(
            part_y, base + TOTALS_AT, base + FACTS_AT, thread, first_tile, stride, x_count,
            out_features, X, OWN, ACROSS, TILES, COLUMN_TILES, WARPS,
        )  # fmt: skip
    shared._keep_alive()


@gluon.jit
def store_tile(
    y, totals, facts, lane, local, tile, x_count, out_features, TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
):  # fmt: skip
    """Scale one tile's totals, add the bias and store, where a warp has all of its tile's steps."""
    for half in gl.static_range(0, 2 * TILES):
        inner = 8 * half + lane // 4
        fact = read2(facts + (local * (16 * TILES) + inner) * 8)
        row = tile * (16 * TILES) + inner
        added = gl.where(gl.program_id(1) == 0, fact[1], 0.0)
        for n in gl.static_range(0, COLUMN_TILES):
            m = 4 * n + lane % 4
            value = totals[half * COLUMN_TILES + n] * fact[0] + added
            keep = (row < out_features) & (m < x_count)
            place = y + m.to(gl.int64) * out_features + row
            gl.store(place, value.to(y.dtype.element_ty), mask=keep)


@gluon.jit
def finish(
    y, totals, facts, thread, first_tile, stride, x_count, out_features, X: gl.constexpr,
    OWN: gl.constexpr, ACROSS: gl.constexpr, TILES: gl.constexpr, COLUMN_TILES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Add up the warps' totals, scale, add the bias and store; a thread takes one output."""
    ROWS: gl.constexpr = 16 * TILES
    COUNT: gl.constexpr = 2 * TILES * COLUMN_TILES
    SIZE: gl.constexpr = OWN * ROWS * X
    for turn in gl.static_range(0, (SIZE + 32 * WARPS - 1) // (32 * WARPS)):
        which = gl.minimum(thread + turn * 32 * WARPS, SIZE - 1)
        inner = which % ROWS
        local = which // ROWS % OWN
        m = which // (ROWS * OWN)
        value = inner // 8 * COLUMN_TILES + m // 4
        place = totals + local * (ACROSS * COUNT * 128) + value * 128
        place += (inner % 8 * 4 + m % 4) * 4
        total = gl.full_like(place, 0.0, dtype=gl.float32)
        for k in gl.static_range(0, ACROSS):
            total += read1(place + k * (COUNT * 128))
        fact = read2(facts + (local * ROWS + inner) * 8)
        total = total * fact[0]
        row = (first_tile + local * stride) * ROWS + inner
        total += gl.where(gl.program_id(1) == 0, fact[1], 0.0)
        keep = (row < out_features) & (m < x_count) & (thread + turn * 32 * WARPS < SIZE)
        gl.store(y + m.to(gl.int64) * out_features + row, total.to(y.dtype.element_ty), mask=keep)
