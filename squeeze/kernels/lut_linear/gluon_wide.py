"""A clustered linear layer for more rows of x than a few, multiplied by warpgroups.

As ``gluon``, but a tile has 64 rows of the weight, sixteen for each warp of a warpgroup, and what
was a warp there is a warpgroup: GROUPS groups of ACROSS share a program's tiles. x comes as bytes,
from the image that ``gluon_wide_inputs.make_image`` made of it. A word is looked up by addition,
two products for 7 operations of a lane, or by choice, one product for 11: a product takes its time
however few its columns are.

Programs of slices of the channels either write partial outputs, or are a cluster: then each adds up
its share of the outputs, which the others send to its shared memory.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.lut_linear.gluon import (
    copy_plane,
    fold,
    row_sources,
    row_table,
    say,
    store_tile,
)
from squeeze.kernels.lut_linear.gluon_assembly import BARRIER, BASE, table_words, wait
from squeeze.kernels.lut_linear.gluon_inputs import prepare_rows, read1, read2, read4, write1
from squeeze.kernels.lut_linear.gluon_layout import groups_of, order, places, plane_of
from squeeze.kernels.lut_linear.gluon_wide_assembly import (
    ARRIVE,
    AWAIT,
    PUBLISH,
    RANK,
    SEND,
    arrived,
    begin_barriers,
    bring,
    describe,
    multiply_plane,
    plane_operands,
    refill,
)
from squeeze.kernels.lut_linear.gluon_wide_layout import (
    barriers_at,
    facts_at,
    group_bytes,
    reused,
    ring_bytes,
    sent_at,
    sent_barrier_at,
    shared_bytes,
    step_bytes,
    tables_at,
    totals_at,
)


@gluon.constexpr_function
def threads(warps, cluster):
    """Layout of a number for each thread of a cluster."""
    programs = [[2**i] for i in range(cluster.bit_length() - 1)]
    return gl.BlockedLayout([1], [32], [warps], [0], programs)


@gluon.constexpr_function
def plain(cluster):
    """Layout of shared memory in which all programs of a cluster have parts of their own."""
    return gl.SwizzledSharedLayout(1, 1, 1, [0], [[2**i] for i in range(cluster.bit_length() - 1)])


@gluon.constexpr_function
def groups_at(bits, at):
    """The value groups used at one place of a step."""
    return tuple(order(bits)[at][1])


@gluon.constexpr_function
def first_at(bits):
    """The place of a step at which values are first used."""
    return 1 if bits == 3 else 0


@gluon.constexpr_function
def plane_behind(bits, at, depth):
    """The plane used so many places after one of a step."""
    return plane_of(bits, (at + depth) % places(bits))


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
def _say(asm: gl.constexpr, place, some):
    """Instructions that take an address and a number per thread."""
    gl.inline_asm_elementwise(
        asm, "=r,r,r", [place, some], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _fetch(
    image, place, thread, first_step, STEPS: gl.constexpr, BYTES: gl.constexpr, AT: gl.constexpr,
):  # fmt: skip
    """Have the slice's steps of the image brought, each with a barrier of those at AT."""
    source = image.to(gl.int64) + first_step.to(gl.int64) * BYTES + thread * 0
    gl.inline_asm_elementwise(
        bring(STEPS, BYTES, AT), "=r,r,l,r", [place, source, thread],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _refill(
    image, spare, barrier, step, across, thread, first_step, STEPS: gl.constexpr,
    HELD: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Have the step that takes the place of one that a warpgroup has read brought there."""
    source = image.to(gl.int64) + (first_step + step + HELD).to(gl.int64) * BYTES
    first = ((thread % 128 == 0) & (step + HELD < STEPS)).to(gl.int32)
    gl.inline_asm_elementwise(
        refill(BYTES), "=r,r,l,r,r,r", [spare, source, barrier, first, across + 1],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def multiply(
    image, indices, tables, scale, bias, y, x_count, out_features,
    u: gl.constexpr, STEPS: gl.constexpr, HELD: gl.constexpr, X: gl.constexpr, OWN: gl.constexpr,
    ACROSS: gl.constexpr, CLUSTER: gl.constexpr, WARPS: gl.constexpr, PIECES: gl.constexpr,
    SHARED: gl.constexpr, BITS: gl.constexpr, SCALED: gl.constexpr, BIASED: gl.constexpr,
    WHOLE: gl.constexpr, HALVES: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """y[slice, m, o] = scale[o] sum_i entry(o, i) x[m, i] over a slice, + bias[o] once.

    Programs ``(b, slice)``: tiles b, b + programs, ... (OWN of them, a multiple of the groups of
    warpgroups), STEPS steps from ``STEPS slice``. If CLUSTER is more than 1, the slices are the
    programs of a cluster and y has but one. X >= x_count rows of x have room. Products of bytes
    accumulate in int32 over a step and, brought to the scale of x, in float32 over the steps. A
    warp has DEPTH planes of its steps under way. The image of x is copied by the slice's steps, all
    at once, and these are waited for one by one. If there is room for only HELD of them, a multiple
    of ACROSS, there are no groups and one tile, and a warpgroup that has read a step has another
    copied there.
    """
    flat: gl.constexpr = threads(WARPS, CLUSTER)
    COLUMNS: gl.constexpr = 2 * X
    COLUMN_TILES: gl.constexpr = COLUMNS // 8
    COUNT: gl.constexpr = 2 * COLUMN_TILES
    SUMS: gl.constexpr = COLUMNS // 2 * PIECES
    GROUPS: gl.constexpr = WARPS // 4 // ACROSS
    TURNS: gl.constexpr = (STEPS + ACROSS - 1) // ACROSS
    WORDS: gl.constexpr = table_words(BITS)
    PLANES: gl.constexpr = places(BITS)
    NEAR: gl.constexpr = DEPTH // PLANES
    PIECES_AT: gl.constexpr = ring_bytes(WARPS, DEPTH)
    STEP_BYTES: gl.constexpr = step_bytes(COLUMNS)
    FACTORS_AT: gl.constexpr = PIECES_AT + 4 * group_bytes(COLUMNS)
    TABLES_AT: gl.constexpr = tables_at(WARPS, DEPTH, HELD, COLUMNS)
    FACTS_AT: gl.constexpr = facts_at(WARPS, BITS, DEPTH, HELD, COLUMNS, OWN, PIECES)
    TOTALS_AT: gl.constexpr = totals_at(
        WARPS, BITS, DEPTH, HELD, COLUMNS, OWN, PIECES, ACROSS, CLUSTER
    )
    SENT_AT: gl.constexpr = sent_at(WARPS, BITS, DEPTH, HELD, COLUMNS, OWN, PIECES, ACROSS, CLUSTER)
    ALL: gl.constexpr = shared_bytes(
        WARPS, BITS, DEPTH, HELD, COLUMNS, OWN, PIECES, ACROSS, CLUSTER
    )
    BARRIERS_AT: gl.constexpr = barriers_at(ALL)
    ARRIVALS_AT: gl.constexpr = sent_barrier_at(ALL)
    # Whether a warp has but one step: then all that it reads is on its way from the start.
    ONCE: gl.constexpr = OWN // GROUPS * TURNS == 1 and DEPTH == PLANES
    gdc_launch_dependents()
    # The only shared memory of the kernel, so it begins where the assembly takes it to begin.
    shared = gl.allocate_shared_memory(
        gl.int32, [BARRIERS_AT // 256 + 2, 64 * CLUSTER], plain(CLUSTER)
    )
    # Assembly alone would not have the compiler declare it.
    last = shared.index(BARRIERS_AT // 256 + 1)
    last.store(gl.zeros([64 * CLUSTER], gl.int32, layout=flat))
    thread = gl.arange(0, 32 * WARPS * CLUSTER, layout=flat) % (32 * WARPS)
    base = gl.inline_asm_elementwise(BASE, "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1)
    lane = thread % 32
    warp = thread // 32
    quarter = warp % 4
    group = warp // 4 // ACROSS
    across = warp // 4 % ACROSS
    stride = gl.num_programs(0)
    first_tile = gl.program_id(0)
    rank = gl.program_id(1)
    if CLUSTER > 1:
        rank = gl.inline_asm_elementwise(
            RANK, "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip
    first_step = rank * STEPS
    slot = base + warp * (DEPTH * 1024) + lane * 16
    for i in gl.static_range(0, DEPTH):
        if i % PLANES == 0:
            sources, size = _ahead(
                indices, thread * 0 + i // PLANES, first_step, first_tile, group, across, quarter,
                lane, out_features, OWN, GROUPS, TURNS, ACROSS, STEPS, BITS, u, WHOLE,
            )  # fmt: skip
        _copy(slot + i * 1024, sources, size, plane_of(BITS, i % PLANES), BITS, u)
    begun: gl.constexpr = begin_barriers(HELD, BARRIERS_AT, OWN * 256 * X if CLUSTER > 1 else 0)
    _say(begun, base, thread)
    say(BARRIER, base)
    if CLUSTER > 1:
        say(ARRIVE, base)
    prepare_rows(
        tables, scale, bias, base + TABLES_AT, base + FACTS_AT, thread, first_tile, stride,
        out_features, OWN, 4, WARPS, PIECES, SHARED, BITS, HALVES, SCALED, BIASED,
    )  # fmt: skip
    gdc_wait()
    _fetch(image, base + PIECES_AT, thread, first_step, HELD, STEP_BYTES, BARRIERS_AT)
    say(PUBLISH, base)
    say(BARRIER, base)
    part_y = y
    if CLUSTER == 1:
        part_y = y + rank.to(gl.int64) * x_count * out_features
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
            totals = totals + (gl.zeros([32 * WARPS * CLUSTER], gl.float32, layout=flat),)
        for turn in range(0, TURNS):
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
            time = thread * 0
            if HELD < STEPS:
                held = step % HELD
                time = (step // HELD + (step >= STEPS).to(gl.int32)) % 2
            _say(arrived(BARRIERS_AT), base + held * 8, time)
            operand = gl.inline_asm_elementwise(
                describe(COLUMNS), "=r,r", [base + PIECES_AT + held * STEP_BYTES],
                dtype=gl.int32, is_pure=True, pack=1,
            )  # fmt: skip
            sums = ()
            kept = ()
            for at in gl.static_range(0, PLANES):
                say(wait(DEPTH - 1 - (at if ONCE else 0)), base)
                words = ()
                for r in gl.static_range(0, 2):
                    words = words + read4(slot + spot + r * 512)
                if not ONCE:
                    spare = slot + spot
                    if (at + DEPTH) // PLANES == NEAR:
                        _copy(spare, near, near_size, plane_behind(BITS, at, DEPTH), BITS, u)
                    else:
                        _copy(spare, far, far_size, plane_behind(BITS, at, DEPTH), BITS, u)
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
            factors = base + FACTORS_AT + held * STEP_BYTES
            folded = fold(totals, sums, factors, x_rows, PIECES, 1, COLUMN_TILES, 1, HALVES)
            if HELD < STEPS:
                _refill(
                    image, base + PIECES_AT + held * STEP_BYTES, base + BARRIERS_AT + held * 8,
                    step, across, thread, first_step, STEPS, HELD, STEP_BYTES,
                )  # fmt: skip
            if STEPS % ACROSS == 0:
                totals = folded
            else:
                kept_totals = ()
                for i in gl.static_range(0, COUNT):
                    kept_totals = kept_totals + (gl.where(step < STEPS, folded[i], totals[i]),)
                totals = kept_totals
        if ACROSS * CLUSTER == 1:
            store_tile(
                part_y, totals, base + FACTS_AT, lane, local * 4 + quarter,
                (first_tile + local * stride) * 4 + quarter, x_count, out_features, 1, COLUMN_TILES,
            )  # fmt: skip
        else:
            if reused(WARPS, HELD, COLUMNS, OWN, ACROSS, CLUSTER):
                say(BARRIER, base)
            place = (local * ACROSS + across) * (4 * COUNT * 32) + quarter * (COUNT * 32) + lane
            for i in gl.static_range(0, COUNT):
                target = base + TOTALS_AT + place * 4 + 128 * i
                write1(target, totals[i].to(gl.int32, bitcast=True), thread | 1)
    if ACROSS * CLUSTER > 1:
        say(BARRIER, base)
        finish(
            part_y, base + TOTALS_AT, base + FACTS_AT, base + SENT_AT, base + ARRIVALS_AT,
            thread, rank, first_tile, stride, x_count, out_features, X, OWN, ACROSS, CLUSTER, WARPS,
        )  # fmt: skip
    shared._keep_alive()


@gluon.jit
def finish(
    y, totals, facts, sent, barrier, thread, rank, first_tile, stride, x_count, out_features,
    X: gl.constexpr, OWN: gl.constexpr, ACROSS: gl.constexpr, CLUSTER: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Add up the warpgroups' totals, and those of a cluster; scale, add the bias and store.

    A thread takes outputs in the order of the totals: tile, warp, value, lane.
    """
    SIZE: gl.constexpr = OWN * 64 * X
    TILE: gl.constexpr = 64 * X
    OWNED: gl.constexpr = SIZE // CLUSTER
    for turn in gl.static_range(0, SIZE // (32 * WARPS)):
        which = thread + turn * 32 * WARPS
        place = totals + (which // TILE * (ACROSS * TILE) + which % TILE) * 4
        total = read1(place)
        for k in gl.static_range(1, ACROSS):
            total += read1(place + k * (TILE * 4))
        if CLUSTER == 1:
            _store(
                y, total, which, which < SIZE, facts, rank, first_tile, stride, x_count,
                out_features, X,
            )  # fmt: skip
        else:
            if turn == 0:
                # Before this every program of the cluster must have begun.
                say(AWAIT, thread)
            gl.inline_asm_elementwise(
                SEND, "=r,r,r,r,r",
                [sent + (rank * OWNED + which % OWNED) * 4, barrier, total, which // OWNED],
                dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    if CLUSTER > 1:
        _say(arrived(0), barrier, thread * 0)
        for turn in gl.static_range(0, (OWNED + 32 * WARPS - 1) // (32 * WARPS)):
            own = gl.minimum(thread + turn * 32 * WARPS, OWNED - 1)
            total = read1(sent + own * 4)
            for k in gl.static_range(1, CLUSTER):
                total += read1(sent + (own + k * OWNED) * 4)
            _store(
                y, total, rank * OWNED + own, thread + turn * 32 * WARPS < OWNED, facts, 0,
                first_tile, stride, x_count, out_features, X,
            )  # fmt: skip


@gluon.jit
def _store(
    y, total, which, valid, facts, part, first_tile, stride, x_count, out_features,
    X: gl.constexpr,
):  # fmt: skip
    """Scale output ``which`` of a program, add the bias in the first part, store it if valid."""
    lane = which % 32
    value = which // 32 % (X // 2)
    quarter = which // (16 * X)
    local = quarter // 4
    inner = quarter % 4 * 16 + value // (X // 4) * 8 + lane // 4
    m = value % (X // 4) * 4 + lane % 4
    fact = read2(facts + (local * 64 + inner) * 8)
    row = (first_tile + local * stride) * 64 + inner
    total = total * fact[0] + gl.where(part == 0, fact[1], 0.0)
    keep = valid & (row < out_features) & (m < x_count)
    gl.store(y + m.to(gl.int64) * out_features + row, total.to(y.dtype.element_ty), mask=keep)
