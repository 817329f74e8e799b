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
from squeeze.kernels.lut_linear.gluon_inputs import prepare_rows, read4, split_x, write1
from squeeze.kernels.lut_linear.gluon_layout import (
    groups_of,
    order,
    places,
    plane_of,
    ring_bytes,
    wide_factors_at,
    wide_facts_at,
    wide_shared_bytes,
    wide_tables_at,
    wide_totals_at,
)
from squeeze.kernels.lut_linear.gluon_wide_assembly import (
    PUBLISH,
    describe,
    multiply_plane,
    plane_operands,
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
def multiply(
    x, indices, tables, scale, bias, y, x_count, x_stride, in_features, out_features,
    u: gl.constexpr, STEPS: gl.constexpr, X: gl.constexpr, OWN: gl.constexpr,
    ACROSS: gl.constexpr, EACH: gl.constexpr, WARPS: gl.constexpr, PIECES: gl.constexpr,
    SHARED: gl.constexpr, BITS: gl.constexpr, ALIGNED: gl.constexpr, FULL: gl.constexpr,
    SCALED: gl.constexpr, BIASED: gl.constexpr, WHOLE: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """y[slice, m, o] = scale[o] sum_i entry(o, i) x[m, i] over a slice, + bias[o] once.

    Programs ``(b, slice)``: tiles b, b + programs, ... (OWN of them, a multiple of the groups of
    warpgroups), STEPS steps from ``STEPS slice``. X >= x_count rows of x have room. Products of
    bytes accumulate in int32 over a step and, brought to the scale of x, in float32 over the steps.
    """
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    COLUMNS: gl.constexpr = 2 * X
    COLUMN_TILES: gl.constexpr = COLUMNS // 8
    COUNT: gl.constexpr = 2 * COLUMN_TILES
    SUMS: gl.constexpr = COLUMNS // 2 * PIECES
    GROUPS: gl.constexpr = WARPS // 4 // ACROSS
    TURNS: gl.constexpr = (STEPS + ACROSS - 1) // ACROSS
    WORDS: gl.constexpr = table_words(BITS)
    PLANES: gl.constexpr = places(BITS)
    PIECES_AT: gl.constexpr = ring_bytes(WARPS, 1, BITS)
    FACTORS_AT: gl.constexpr = wide_factors_at(WARPS, BITS, STEPS, COLUMNS)
    STEP_BYTES: gl.constexpr = (FACTORS_AT - PIECES_AT) // STEPS
    TABLES_AT: gl.constexpr = wide_tables_at(WARPS, BITS, STEPS, X, COLUMNS)
    FACTS_AT: gl.constexpr = wide_facts_at(WARPS, BITS, STEPS, X, COLUMNS, OWN, PIECES)
    TOTALS_AT: gl.constexpr = wide_totals_at(WARPS, BITS, STEPS, X, COLUMNS, OWN, PIECES)
    ALL: gl.constexpr = wide_shared_bytes(WARPS, BITS, STEPS, X, COLUMNS, OWN, PIECES, ACROSS)
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
    tiles = (out_features + 63) // 64
    slot = base + warp * (BITS * 1024) + lane * 16
    tile = first_tile + group * stride
    sources, size = row_sources(
        indices, tile * 4 + quarter, first_step + across, lane, out_features,
        (tile < tiles) & (across < STEPS), 1, BITS, u, WHOLE,
    )  # fmt: skip
    for at in gl.static_range(0, PLANES):
        copy_plane(slot, sources, size, plane_of(BITS, at), 1, BITS, u)
    prepare_rows(
        tables, scale, bias, base + TABLES_AT, base + FACTS_AT, thread, first_tile, stride,
        out_features, OWN, 4, WARPS, PIECES, SHARED, BITS, HALVES, SCALED, BIASED,
    )  # fmt: skip
    gdc_wait()
    split_x(
        x, base + PIECES_AT, base + FACTORS_AT, thread, first_step, x_count, x_stride, in_features,
        u, STEPS, X, WARPS, EACH, ALIGNED, FULL, COLUMNS,
    )  # fmt: skip
    say(PUBLISH, base)
    say(BARRIER, base)
    part_y = y + gl.program_id(1).to(gl.int64) * x_count * out_features
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
            step = turn * ACROSS + across
            same = turn + 1 < TURNS
            next_local = gl.where(same, local, local + GROUPS)
            next_step = gl.where(same, step + ACROSS, across)
            next_tile = first_tile + next_local * stride
            valid = (next_tile < tiles) & (next_local < OWN) & (next_step < STEPS)
            sources, size = row_sources(
                indices, next_tile * 4 + quarter, first_step + next_step, lane, out_features,
                valid, 1, BITS, u, WHOLE,
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
                say(wait(PLANES - 1), base)
                words = ()
                for r in gl.static_range(0, 2):
                    words = words + read4(slot + (plane_of(BITS, at) * 2 + r) * 512)
                copy_plane(slot, sources, size, plane_of(BITS, at), 1, BITS, u)
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
