"""A clustered linear layer for more rows of x than a few, multiplied by warpgroups.

As ``gluon``, but a tile has 64 rows of the weight, sixteen for each warp of a warpgroup, and what
was a warp there is a warpgroup: GROUPS groups of ACROSS share a program's tiles.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.lut_linear.gluon import (
    copy_plane,
    finish,
    fold,
    row_sources,
    row_table,
    say,
    store_tile,
)
from squeeze.kernels.lut_linear.gluon_assembly import BARRIER, BASE, table_words, wait
from squeeze.kernels.lut_linear.gluon_inputs import prepare_rows, read4, write1
from squeeze.kernels.lut_linear.gluon_layout import groups_of, order, places, plane_of
from squeeze.kernels.lut_linear.gluon_wide_assembly import (
    PUBLISH,
    describe,
    multiply_plane,
    plane_operands,
)
from squeeze.kernels.lut_linear.gluon_wide_inputs import split_x
from squeeze.kernels.lut_linear.gluon_wide_layout import (
    factors_at,
    facts_at,
    group_bytes,
    reused,
    ring_bytes,
    shared_bytes,
    tables_at,
    totals_at,
)


@gluon.constexpr_function
def groups_at(bits, at):
    """The value groups used at one place of a step."""
    return tuple(order(bits)[at][1])


@gluon.constexpr_function
def first_at(bits):
    """The place of a step at which values are first used."""
    return 1 if bits == 3 else 0


@gluon.jit
def _ahead(
    indices, turn, first_step, first_tile, group, across, quarter, lane, out_features,
    OWN: gl.constexpr, GROUPS: gl.constexpr, TURNS: gl.constexpr, ACROSS: gl.constexpr,
    STEPS: gl.constexpr, BITS: gl.constexpr, u: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """``row_sources`` of a warpgroup's turn, counted over its tiles."""
    local = turn // TURNS * GROUPS + group
    step = turn % TURNS * ACROSS + across
    tile = first_tile + local * gl.num_programs(0)
    valid = (tile < (out_features + 63) // 64) & (local < OWN) & (step < STEPS)
    return row_sources(
        indices, tile * 4 + quarter, first_step + step, lane, out_features, valid, 1, BITS, u, WHOLE
    )


@gluon.jit
def _copy(place, sources, size, PLANE: gl.constexpr, BITS: gl.constexpr, u: gl.constexpr):
    """``copy_plane`` to a place of the ring."""
    copy_plane(place - PLANE * 1024, sources, size, PLANE, 1, BITS, u)


@gluon.jit
def multiply(
    x, indices, tables, scale, bias, y, x_count, x_stride, in_features, out_features,
    u: gl.constexpr, STEPS: gl.constexpr, X: gl.constexpr, OWN: gl.constexpr,
    ACROSS: gl.constexpr, EACH: gl.constexpr, WARPS: gl.constexpr, PIECES: gl.constexpr,
    SHARED: gl.constexpr, BITS: gl.constexpr, ALIGNED: gl.constexpr, FULL: gl.constexpr,
    SCALED: gl.constexpr, BIASED: gl.constexpr, WHOLE: gl.constexpr, HALVES: gl.constexpr,
    DEPTH: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """y[slice, m, o] = scale[o] sum_i entry(o, i) x[m, i] over a slice, + bias[o] once.

    Programs ``(b, slice)``: tiles b, b + programs, ... (OWN of them, a multiple of the groups of
    warpgroups), STEPS steps from ``STEPS slice``. X >= x_count rows of x have room. Products of
    bytes accumulate in int32 over a step and, brought to the scale of x, in float32 over the steps.
    A warp has DEPTH planes of its steps under way, at least those of one. x is turned to bytes in
    PARTS, 1 or 2, the second half way through the first tiles' steps: the copies go on meanwhile.
    """
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    COLUMNS: gl.constexpr = 2 * X
    COLUMN_TILES: gl.constexpr = COLUMNS // 8
    COUNT: gl.constexpr = 2 * COLUMN_TILES
    SUMS: gl.constexpr = COLUMNS // 2 * PIECES
    GROUPS: gl.constexpr = WARPS // 4 // ACROSS
    TURNS: gl.constexpr = (STEPS + ACROSS - 1) // ACROSS
    HALF: gl.constexpr = (TURNS + PARTS - 1) // PARTS
    HEAD: gl.constexpr = min(STEPS, HALF * ACROSS)
    WORDS: gl.constexpr = table_words(BITS)
    PLANES: gl.constexpr = places(BITS)
    NEAR: gl.constexpr = DEPTH // PLANES
    PIECES_AT: gl.constexpr = ring_bytes(WARPS, DEPTH)
    STEP_BYTES: gl.constexpr = 4 * group_bytes(COLUMNS)
    FACTORS_AT: gl.constexpr = factors_at(WARPS, DEPTH, STEPS, COLUMNS)
    TABLES_AT: gl.constexpr = tables_at(WARPS, DEPTH, STEPS, COLUMNS)
    FACTS_AT: gl.constexpr = facts_at(WARPS, BITS, DEPTH, STEPS, COLUMNS, OWN, PIECES)
    TOTALS_AT: gl.constexpr = totals_at(WARPS, BITS, DEPTH, STEPS, COLUMNS, OWN, PIECES, ACROSS)
    ALL: gl.constexpr = shared_bytes(WARPS, BITS, DEPTH, STEPS, COLUMNS, OWN, PIECES, ACROSS)
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
    quarter = warp % 4
    group = warp // 4 // ACROSS
    across = warp // 4 % ACROSS
    stride = gl.num_programs(0)
    first_tile = gl.program_id(0)
    first_step = gl.program_id(1) * STEPS
    slot = base + warp * (DEPTH * 1024) + lane * 16
    for i in gl.static_range(0, DEPTH):
        if i % PLANES == 0:
            sources, size = _ahead(
                indices, thread * 0 + i // PLANES, first_step, first_tile, group, across, quarter,
                lane, out_features, OWN, GROUPS, TURNS, ACROSS, STEPS, BITS, u, WHOLE,
            )  # fmt: skip
        _copy(slot + i * 1024, sources, size, plane_of(BITS, i % PLANES), BITS, u)
    prepare_rows(
        tables, scale, bias, base + TABLES_AT, base + FACTS_AT, thread, first_tile, stride,
        out_features, OWN, 4, WARPS, PIECES, SHARED, BITS, HALVES, SCALED, BIASED,
    )  # fmt: skip
    gdc_wait()
    split_x(
        x, base + PIECES_AT, base + FACTORS_AT, thread, first_step, x_count, x_stride, in_features,
        u, HEAD, X, WARPS, EACH, ALIGNED, FULL,
    )  # fmt: skip
    say(PUBLISH, base)
    say(BARRIER, base)
    part_y = y + gl.program_id(1).to(gl.int64) * x_count * out_features
    spot = thread * 0
    x_rows = ()
    for n in gl.static_range(0, COLUMN_TILES):
        x_rows = x_rows + (4 * n + lane % 4,)
    for turn_of_tile in range(0, OWN // GROUPS):
        local = turn_of_tile * GROUPS + group
        row_tables = ()
        for piece in gl.static_range(0, PIECES):
            for half in gl.static_range(0, 2):
                row = local * 64 + quarter * 16 + 8 * half + lane // 4
                place = base + TABLES_AT + (row * PIECES + piece) * (4 * WORDS)
                row_tables = row_tables + row_table(place, BITS)
        totals = ()
        for _ in gl.static_range(0, COUNT):
            totals = totals + (gl.zeros([32 * WARPS], gl.float32, layout=flat),)
        for turn in range(0, TURNS):
            if PARTS == 2:  # noqa: SIM102 - what does not hold for PARTS is not compiled
                if (turn_of_tile == 0) & (turn == HALF):
                    split_x(
                        x, base + PIECES_AT + HEAD * STEP_BYTES, base + FACTORS_AT + HEAD * (8 * X),
                        thread, first_step + HEAD, x_count, x_stride, in_features, u, STEPS - HEAD,
                        X, WARPS, EACH, ALIGNED, FULL,
                    )  # fmt: skip
                    say(PUBLISH, base)
                    say(BARRIER, base)
            step = turn * ACROSS + across
            now = turn_of_tile * TURNS + turn
            near, near_size = _ahead(
                indices, now + NEAR, first_step, first_tile, group, across, quarter, lane,
                out_features, OWN, GROUPS, TURNS, ACROSS, STEPS, BITS, u, WHOLE,
            )  # fmt: skip
            if DEPTH % PLANES == 0:
                far, far_size = near, near_size
            else:
                far, far_size = _ahead(
                    indices, now + NEAR + 1, first_step, first_tile, group, across, quarter, lane,
                    out_features, OWN, GROUPS, TURNS, ACROSS, STEPS, BITS, u, WHOLE,
                )  # fmt: skip
            # A step past the slice's end multiplies what lies there by zeros.
            held = gl.minimum(step, STEPS - 1)
            operand = gl.inline_asm_elementwise(
                describe(COLUMNS), "=r,r", [base + PIECES_AT + held * STEP_BYTES],
                dtype=gl.int32, is_pure=True, pack=1,
            )  # fmt: skip
            sums = ()
            kept = ()
            for at in gl.static_range(0, PLANES):
                say(wait(DEPTH - 1), base)
                words = ()
                for r in gl.static_range(0, 2):
                    words = words + read4(slot + spot + r * 512)
                if (at + DEPTH) // PLANES == NEAR:
                    _copy(
                        slot + spot, near, near_size, plane_of(BITS, (at + DEPTH) % PLANES), BITS, u
                    )  # fmt: skip
                else:
                    _copy(
                        slot + spot, far, far_size, plane_of(BITS, (at + DEPTH) % PLANES), BITS, u
                    )  # fmt: skip
                spot = gl.where(spot == (DEPTH - 1) * 1024, 0, spot + 1024)
                if groups_of(BITS, at) == 0:
                    kept = words
                else:
                    sums = gl.inline_asm_elementwise(
                        multiply_plane(
                            BITS, groups_at(BITS, at), PIECES, HALVES, COLUMNS, at == first_at(BITS)
                        ),
                        plane_operands(BITS, PIECES, COLUMNS, at == first_at(BITS)),
                        sums + words + kept + row_tables + (operand,),
                        dtype=(gl.int32,) * SUMS,
                        is_pure=False,
                        pack=1,
                    )
            factors = base + FACTORS_AT + held * (8 * X)
            folded = fold(totals, sums, factors, x_rows, PIECES, 1, COLUMN_TILES, 1, HALVES)
            if STEPS % ACROSS == 0:
                totals = folded
            else:
                kept_totals = ()
                for i in gl.static_range(0, COUNT):
                    kept_totals = kept_totals + (gl.where(step < STEPS, folded[i], totals[i]),)
                totals = kept_totals
        if ACROSS == 1:
            store_tile(
                part_y, totals, base + FACTS_AT, lane, local * 4 + quarter,
                (first_tile + local * stride) * 4 + quarter, x_count, out_features, 1, COLUMN_TILES,
            )  # fmt: skip
        else:
            if reused(WARPS, STEPS, COLUMNS, OWN, ACROSS):
                say(BARRIER, base)
            place = (local * ACROSS + across) * (4 * COUNT * 32) + quarter * (COUNT * 32) + lane
            for i in gl.static_range(0, COUNT):
                target = base + TOTALS_AT + place * 4 + 128 * i
                write1(target, totals[i].to(gl.int32, bitcast=True), thread | 1)
    if ACROSS > 1:
        say(BARRIER, base)
        finish(
            part_y, base + TOTALS_AT, base + FACTS_AT, thread, first_tile, stride, x_count,
            out_features, X, OWN, ACROSS, 4, COLUMN_TILES, WARPS,
        )  # fmt: skip
    shared._keep_alive()
