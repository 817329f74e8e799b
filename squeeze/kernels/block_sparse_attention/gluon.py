"""Block-sparse causal flash attention for Hopper: one warp group loads, one or two multiply.

A producer walks the list of key blocks, the diagonal first, and keeps a ring of tiles of keys and
values filled: whole blocks by the tensor memory accelerator, single columns by asynchronous copies
of gathered rows. Each consumer owns 64 rows of the block of queries. The product of the next tile's
keys and the product of this tile's values are in flight together, and the softmax of a tile runs
while the tensor cores multiply values, its own or those of the other consumer.

With ``KIND`` 1 or 2 whole blocks are eight-bit (``sage``); columns stay in the dtype of the query.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

EXACT = gl.constexpr(0)
FLOAT8 = gl.constexpr(1)
INT8 = gl.constexpr(2)
ROWS = gl.constexpr(64)
# An integer below 2**22 added to these bits is the float32 number MAGIC + that integer.
MAGIC_BITS = gl.constexpr(0x4B400000)
MAGIC = gl.constexpr(12582912.0)
# Eight-bit weights are 2**LIFT times as large, which keeps small ones normal in E4M3.
LIFT = gl.constexpr(8.0)
# Four neighbours in a register; the compiler's own conversion goes through single bytes.
TO_E4M3 = gl.constexpr(
    """{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
    }"""
)
# Sums of weights are never negative. The assembler moves a wait for the tensor cores up, past the
# arithmetic that should hide it, but not past a barrier whose name needs the sums.
PIN = """{
    .reg .pred negative;
    .reg .b32 name;
    .reg .f32 both;
    add.f32 both, $2, $3;
    setp.lt.f32 negative, both, 0f00000000;
    selp.b32 name, 15, NAME, negative;
    bar.sync name, 128;
    mov.f32 $0, $2;
    mov.f32 $1, $3;
    }"""
PINS = (gl.constexpr(PIN.replace("NAME", "13")), gl.constexpr(PIN.replace("NAME", "14")))
PIN_0, PIN_1 = PINS
PARTS = (gl.constexpr(0), gl.constexpr(1))
PART_0, PART_1 = PARTS
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """Step to the ring's next place and, past its end, to the other phase."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), phase ^ gl.where(wrapped, 1, 0)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    """Return the ring's place before one."""
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def _produce(
    k_desc, v_desc, keys, values, ids, column_ids, k_ring, v_ring, k_full, v_full, k_free, v_free,
    first, count, column_count, b, h, start, length, k_t, v_t,
    LISTED: gl.constexpr, COLUMNS: gl.constexpr, KIND: gl.constexpr, TILE: gl.constexpr,
    BLOCK_D: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings: listed blocks from the last to the first, then tiles of columns.

    ``b`` and ``h`` are coordinates of 16-bit tensors; of eight-bit ones, ``b`` is the first row of
    keys and ``h`` the first row of channels.
    """
    slot = first * 0
    phase = first * 0
    bytes: gl.constexpr = TILE * BLOCK_D * (2 if KIND == EXACT else 1)
    for i in range(0, count):
        place = first - i
        if LISTED:
            place = gl.load(ids + place)
        key = place * TILE
        k_tile = k_ring.index(slot)._reinterpret(k_desc.dtype, k_desc.block_shape, k_desc.layout)
        v_tile = v_ring.index(slot)._reinterpret(v_desc.dtype, v_desc.block_shape, v_desc.layout)
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), bytes)
        if KIND == EXACT:
            at = [b, h, start + key, 0]
            tma.async_copy_global_to_shared(k_desc, at, k_full.index(slot), k_tile)
        else:
            tma.async_copy_global_to_shared(k_desc, [b + key, 0], k_full.index(slot), k_tile)
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        mbarrier.expect(v_full.index(slot), bytes)
        if KIND == EXACT:
            at = [b, h, start + key, 0]
            tma.async_copy_global_to_shared(v_desc, at, v_full.index(slot), v_tile)
        else:
            tma.async_copy_global_to_shared(v_desc, [h, key], v_full.index(slot), v_tile)
        slot, phase = _next(slot, phase, STAGES)
    if COLUMNS:
        tiles = (column_count + TILE - 1) // TILE
        positions = _positions(column_ids, column_count, length, TILE, BLOCK_D)
        for t in range(0, tiles):
            mbarrier.wait(k_free.index(slot), phase ^ 1)
            _gather(keys, positions, k_ring.index(slot), k_t, BLOCK_D, D)
            # The next tile's list is on its way while this tile's rows are.
            column_ids += TILE
            column_count -= TILE
            following = _positions(column_ids, column_count, length, TILE, BLOCK_D)
            _land()
            mbarrier.arrive(k_full.index(slot), count=1)
            mbarrier.arrive(v_full.index(_before(slot, STAGES)), count=1, pred=t > 0)
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            _gather(values, positions, v_ring.index(slot), v_t, BLOCK_D, D)
            positions = following
            slot, phase = _next(slot, phase, STAGES)
        _land()
        mbarrier.arrive(v_full.index(_before(slot, STAGES)), count=1, pred=tiles > 0)


@gluon.jit
def _positions(ids, count, length, TILE: gl.constexpr, BLOCK_D: gl.constexpr):
    """Read which rows a tile gathers, for the threads that copy them; -1 where there is none."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    slots = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    # Positions past the row's end are hidden by causality; they must not leave the tensor, though.
    return gl.minimum(gl.load(ids + slots, mask=slots < count, other=-1), length - 1)


@gluon.jit
def _gather(source, positions, tile, stride, BLOCK_D: gl.constexpr, D: gl.constexpr):
    """Begin to copy listed rows into a tile, 16 bytes a thread; rows at -1 become zeros."""
    channels = gl.arange(0, BLOCK_D, gl.SliceLayout(0, positions.type.layout.parent))
    pointers = (source + channels)[None, :] + (positions * stride)[:, None]
    mask = (positions >= 0)[:, None] & (channels < D)[None, :]
    async_copy.async_copy_global_to_shared(tile, pointers, mask=mask)


@gluon.jit
def _land():
    """Wait for every copy, of all threads, and show what they wrote to the tensor cores."""
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _key_scale(key_scales, ids, place, LISTED: gl.constexpr):
    """Read the scale of one listed block, a tile before it is needed."""
    if LISTED:
        place = gl.load(ids + place)
    return gl.load(key_scales + place)


@gluon.jit
def _softmax(
    raw, top, factor, shift, visible, MASKED: gl.constexpr, KIND: gl.constexpr,
    SHIFTED: gl.constexpr, LIFTED: gl.constexpr,
):  # fmt: skip
    """Turn products into weights ``2 ** (factor * raw - shift - top')``, times ``2 ** LIFT``.

    Integers are read as MAGIC + themselves, the offset leaving with the maximum in one subtraction;
    the maximum that is kept is the one that was subtracted, rounding included.

    Returns:
        Weights, the new maximum, and what earlier sums are multiplied by.
    """
    x = raw.to(gl.float32, bitcast=True) if KIND == INT8 else raw
    if MASKED:
        x = gl.where(visible, x, -float("inf"))
    peak = gl.max(x, 1)
    if KIND == INT8:
        cut = gl.fma(factor, MAGIC, gl.maximum(top, (peak - MAGIC) * factor))
        raised = gl.fma(factor, -MAGIC, cut)
        shrink = gl.exp2(top - raised)
    else:
        peak = peak * factor
        if SHIFTED:
            peak = peak - shift
        raised = gl.maximum(top, peak)
        # A row that has seen no key yet keeps -inf; 0 stands in for it.
        base = gl.where(raised == -float("inf"), 0.0, raised) if MASKED else raised
        cut = base + shift if SHIFTED else base
        shrink = gl.exp2(top - base)
    if LIFTED:
        cut = cut - LIFT
    return gl.exp2(x * factor[:, None] - cut[:, None]), raised, shrink


@gluon.jit
def _partial(weights, TILE: gl.constexpr):
    """Sum the weights that one thread holds of each row, so that no lane waits for another."""
    parts = weights.reshape([ROWS, TILE // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def _scaled(sums, rows):
    """Multiply each row of ``sums`` by its number; nothing moves between threads."""
    layout: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    return sums * gl.convert_layout(rows, layout, assert_trivial=True)[:, None]


@gluon.jit
def _pin(sums, PART: gl.constexpr):
    """Keep what follows behind the sums."""
    asm: gl.constexpr = PIN_0 if PART == 0 else PIN_1
    return gl.inline_asm_elementwise(
        asm, "=f,=f,f,f", [sums], dtype=gl.float32, is_pure=False, pack=2
    )


@gluon.jit
def _operand(weights, dtype: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Make the weights the left operand of the second product, where they are.

    A thread holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of sixteen; eight-bit operands want four
    neighbours, so the reduced dimension is renumbered, as stored values are (``sage``).
    """
    if dtype.primitive_bitwidth == 8:
        parts = weights.reshape([ROWS, TILE // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4)
        ordered = gl.convert_layout(parts.reshape([ROWS, TILE]), LAYOUT, assert_trivial=True)
        operand = gl.inline_asm_elementwise(
            TO_E4M3, "=r,f,f,f,f", [ordered], dtype=gl.float8e4nv, is_pure=True, pack=4
        )
    else:
        operand = gl.convert_layout(weights.to(dtype), LAYOUT, assert_trivial=True)
    return operand


@gluon.jit
def _keys(k_ring, slot, dtype: gl.constexpr, TILE: gl.constexpr, BLOCK_D: gl.constexpr):
    """View a place of the ring as the right operand of the first product."""
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK_D], dtype)
    return k_ring.index(slot)._reinterpret(dtype, [TILE, BLOCK_D], flat).permute((1, 0))


@gluon.jit
def _values(v_ring, slot, dtype: gl.constexpr, TILE: gl.constexpr, BLOCK_D: gl.constexpr):
    """View a place of the ring as the right operand of the second product."""
    if dtype.primitive_bitwidth == 8:
        flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_D, TILE], dtype)
        tile = v_ring.index(slot)._reinterpret(dtype, [BLOCK_D, TILE], flat).permute((1, 0))
    else:
        flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK_D], dtype)
        tile = v_ring.index(slot)._reinterpret(dtype, [TILE, BLOCK_D], flat)
    return tile


@gluon.jit
def _columns_seen(
    column_ids, count, last_column, row, TILE: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Count, for each of 64 rows from ``row``, the columns of a tile that it sees: they ascend."""
    rows: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    seen = gl.zeros([ROWS], gl.int32, rows) + count
    if last_column > row:
        slots = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT))
        at = gl.load(column_ids + slots, mask=slots < count, other=MAGIC_BITS)
        mine = row + gl.arange(0, ROWS, rows)
        seen = gl.sum((at[None, :] <= mine[:, None]).to(gl.int32), 1)
    return seen


@gluon.jit
def _step(
    operand, k_ring, v_ring, k_full, v_full, k_free, v_free, slot, phase, old_slot, old_phase,
    left, acc, total, top, shrink, begun, stretch, shift, visible,
    PART: gl.constexpr, MASKED: gl.constexpr, KIND: gl.constexpr, SHIFTED: gl.constexpr,
    LIFTED: gl.constexpr, OVERLAP: gl.constexpr, TILE: gl.constexpr, BLOCK_D: gl.constexpr,
    k_type: gl.constexpr, v_type: gl.constexpr,
):  # fmt: skip
    """Multiply the values of the tile before and the keys of this one; take in its scores."""
    o_mma: gl.constexpr = acc.type.layout
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2 if KIND == EXACT else 4)
    k_tile = _keys(k_ring, slot, k_type, TILE, BLOCK_D)
    v_tile = _values(v_ring, old_slot, v_type, TILE, BLOCK_D)
    if OVERLAP:
        mbarrier.wait(k_full.index(slot), phase)
        scoring = warpgroup_mma(operand, k_tile, begun, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(old_slot), old_phase)
        adding = warpgroup_mma(left, v_tile, acc, is_async=True)
        raw = warpgroup_mma_wait(1, deps=[scoring])
        mbarrier.arrive(k_free.index(slot), count=1)
        weights, top, shrink = _softmax(
            raw, top, stretch, shift, visible, MASKED, KIND, SHIFTED, LIFTED
        )
        total = _scaled(total, shrink) + _partial(weights, TILE)
        left = _operand(weights, v_type, TILE, p_layout)
        total = _pin(total, PART)
        acc, total = warpgroup_mma_wait(0, deps=[adding, total])
        mbarrier.arrive(v_free.index(old_slot), count=1)
        acc = _scaled(acc, shrink)
    else:
        narrow = left
        if KIND != EXACT:
            narrow = _operand(left, v_type, TILE, p_layout)
        mbarrier.wait(v_full.index(old_slot), old_phase)
        if KIND == EXACT:
            adding = warpgroup_mma(narrow, v_tile, acc, is_async=True)
        else:
            none = gl.zeros([ROWS, BLOCK_D], gl.float32, o_mma)
            adding = warpgroup_mma(narrow, v_tile, none, use_acc=False, is_async=True)
        mbarrier.wait(k_full.index(slot), phase)
        scoring = warpgroup_mma(operand, k_tile, begun, use_acc=KIND == INT8, is_async=True)
        product = warpgroup_mma_wait(1, deps=[adding])
        mbarrier.arrive(v_free.index(old_slot), count=1)
        acc = product if KIND == EXACT else _scaled(acc, shrink) + product
        raw = warpgroup_mma_wait(0, deps=[scoring])
        mbarrier.arrive(k_free.index(slot), count=1)
        weights, top, shrink = _softmax(
            raw, top, stretch, shift, visible, MASKED, KIND, SHIFTED, LIFTED
        )
        total = _scaled(total, shrink) + _partial(weights, TILE)
        left = weights
        if KIND == EXACT:
            left = _operand(weights, v_type, TILE, p_layout)
            acc = _scaled(acc, shrink)
    return left, acc, total, top, shrink


@gluon.jit
def _walk(
    operand, k_ring, v_ring, k_full, v_full, k_free, v_free, slot, phase, acc, total, top,
    ids, column_ids, key_scales, factor, shift, row, first, count, column_count,
    PART: gl.constexpr, LISTED: gl.constexpr, COLUMNS: gl.constexpr, KIND: gl.constexpr,
    SHIFTED: gl.constexpr, LIFTED: gl.constexpr, FRESH: gl.constexpr, OVERLAP: gl.constexpr,
    TILE: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    k_type: gl.constexpr, v_type: gl.constexpr,
):  # fmt: skip
    """Take in ``count`` blocks, the diagonal first, and then tiles of columns.

    The first tile is masked, and the last ones of columns: one that is not full, and one with
    columns that only some of the rows see.
    """
    depth: gl.constexpr = 16 if KIND == EXACT else 32
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, depth])
    o_mma: gl.constexpr = acc.type.layout
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2 if KIND == EXACT else 4)
    rows_of: gl.constexpr = gl.SliceLayout(1, s_mma)
    if KIND == INT8:
        begun = gl.full([ROWS, TILE], MAGIC_BITS, gl.int32, s_mma)
    else:
        begun = gl.zeros([ROWS, TILE], gl.float32, s_mma)
    place = gl.arange(0, TILE, gl.SliceLayout(0, s_mma))
    tiles = count
    clear = count
    if COLUMNS:
        tiles = count + (column_count + TILE - 1) // TILE
        last_column = gl.load(column_ids + column_count - 1, mask=column_count > 0, other=0)
        # Fewer than a tile of columns can lie past the first row, where rows see some of them.
        clear = count + gl.maximum(column_count // TILE - (last_column > row).to(gl.int32), 0)
    last = first - count + 1
    if tiles > 0:
        key = first * TILE
        if LISTED:
            key = gl.load(ids + first, mask=count > 0, other=0) * TILE
        stretch = factor
        if KIND != EXACT:
            stretch = factor * gl.load(key_scales + key // TILE)
            upcoming = _key_scale(key_scales, ids, gl.maximum(first - 1, last), LISTED)
        seen = row + gl.arange(0, ROWS, rows_of) - key + 1
        if COLUMNS:  # noqa: SIM102 (one is known while compiling)
            if count == 0:
                few = gl.minimum(column_count, TILE)
                seen = _columns_seen(column_ids, few, last_column, row, TILE, s_mma)
        mbarrier.wait(k_full.index(slot), phase)
        k_tile = _keys(k_ring, slot, k_type, TILE, BLOCK_D)
        raw = warpgroup_mma(operand, k_tile, begun, use_acc=KIND == INT8)
        mbarrier.arrive(k_free.index(slot), count=1)
        visible = place[None, :] < seen[:, None]
        weights, top, shrink = _softmax(
            raw, top, stretch, shift, visible, True, KIND, SHIFTED, LIFTED
        )
        if FRESH:
            total = _partial(weights, TILE)
        else:
            total = _scaled(total, shrink) + _partial(weights, TILE)
            acc = _scaled(acc, shrink)
        # Eight-bit weights would cross the loop as single bytes, so they cross it as float32.
        left = _operand(weights, v_type, TILE, p_layout) if KIND == EXACT else weights
        for i in range(1, clear):
            old_slot = slot
            old_phase = phase
            slot, phase = _next(slot, phase, STAGES)
            if KIND != EXACT:
                stretch = factor * upcoming
                upcoming = _key_scale(key_scales, ids, gl.maximum(first - i - 1, last), LISTED)
            left, acc, total, top, shrink = _step(
                operand, k_ring, v_ring, k_full, v_full, k_free, v_free, slot, phase, old_slot,
                old_phase, left, acc, total, top, shrink, begun, stretch, shift, place,
                PART, False, KIND, SHIFTED, LIFTED, OVERLAP, TILE, BLOCK_D, k_type, v_type,
            )  # fmt: skip
        v_tile = _values(v_ring, slot, v_type, TILE, BLOCK_D)
        if KIND != EXACT:
            left = _operand(left, v_type, TILE, p_layout)
        mbarrier.wait(v_full.index(slot), phase)
        if KIND == EXACT:
            acc = warpgroup_mma(left, v_tile, acc)
        else:
            none = gl.zeros([ROWS, BLOCK_D], gl.float32, o_mma)
            product = warpgroup_mma(left, v_tile, none, use_acc=False)
            acc = _scaled(acc, shrink) + product
        mbarrier.arrive(v_free.index(slot), count=1)
        slot, phase = _next(slot, phase, STAGES)
    if COLUMNS:
        for i in range(gl.maximum(clear, 1), tiles):
            begin = (i - count) * TILE
            few = gl.minimum(column_count - begin, TILE)
            seen = _columns_seen(column_ids + begin, few, last_column, row, TILE, s_mma)
            mbarrier.wait(k_full.index(slot), phase)
            k_tile = _keys(k_ring, slot, k_type, TILE, BLOCK_D)
            raw = warpgroup_mma(operand, k_tile, begun, use_acc=False)
            mbarrier.arrive(k_free.index(slot), count=1)
            visible = place[None, :] < seen[:, None]
            weights, top, shrink = _softmax(
                raw, top, factor, shift, visible, True, KIND, SHIFTED, LIFTED
            )
            total = _scaled(total, shrink) + _partial(weights, TILE)
            left = _operand(weights, v_type, TILE, p_layout)
            acc = _scaled(acc, shrink)
            mbarrier.wait(v_full.index(slot), phase)
            acc = warpgroup_mma(left, _values(v_ring, slot, v_type, TILE, BLOCK_D), acc)
            mbarrier.arrive(v_free.index(slot), count=1)
            slot, phase = _next(slot, phase, STAGES)
    return slot, phase, acc, total, top


@gluon.jit
def _consume(
    k_desc, v_desc, query, out, lse, ids, column_ids, key_scales, value_scales, key_means,
    k_ring, v_ring, k_full, v_full, k_free, v_free, q_tile, q_small,
    first, count, column_count, row, start, length, before, T, scale, q_t, q_d,
    PART: gl.constexpr, LISTED: gl.constexpr, COLUMNS: gl.constexpr, KIND: gl.constexpr,
    TILE: gl.constexpr, BLOCK_D: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """Attend 64 rows. ``query``, ``out`` and ``lse`` point at the head's first query."""
    exact: gl.constexpr = q_tile.dtype
    depth: gl.constexpr = 16 if KIND == EXACT else 32
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, depth])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, depth])
    load: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows_of: gl.constexpr = gl.SliceLayout(1, s_mma)

    # Positions past a row's end stand for its padding, so that every output row is written.
    position = row + gl.arange(0, ROWS, gl.SliceLayout(1, load))
    token = gl.where(position < length, start + position, position - length) - before
    read = gl.arange(0, BLOCK_D, gl.SliceLayout(0, load))
    writable = (position < T) & (token >= 0)
    pointers = query + token.to(gl.int64)[:, None] * q_t + read[None, :] * q_d
    q = gl.load(pointers, mask=writable[:, None] & (read < D)[None, :], other=0.0)
    factor = gl.full([ROWS], scale, gl.float32, rows_of)
    shift = gl.zeros([ROWS], gl.float32, rows_of)
    if KIND != EXACT:
        wide = q.to(gl.float32)
        mean = gl.load(key_means + read)
        shift = gl.convert_layout(gl.sum(wide * mean[None, :], 1) * scale, rows_of)
        bound: gl.constexpr = 127.0 if KIND == INT8 else 448.0
        step = gl.maximum(gl.max(gl.abs(wide), 1), 1e-12) / bound
        wide = wide / step[:, None]
        if KIND == INT8:
            # Adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even.
            q_small.store(((wide + MAGIC) - MAGIC).to(gl.int8))
        else:
            q_small.store(wide.to(gl.float8e4nv))
        factor = gl.convert_layout(step * scale, rows_of)
    if KIND == EXACT or COLUMNS:
        q_tile.store(q)
    fence_async_shared()
    gl.thread_barrier()

    top = gl.full([ROWS], -float("inf"), gl.float32, rows_of)
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_mma)
    total = _partial(gl.zeros([ROWS, TILE], gl.float32, s_mma), TILE)
    slot = first * 0
    phase = first * 0
    slot, phase, acc, total, top = _walk(
        q_tile if KIND == EXACT else q_small, k_ring, v_ring, k_full, v_full, k_free, v_free, slot,
        phase, acc, total, top, ids, column_ids, key_scales, factor, shift, row, first, count,
        column_count,
        PART, LISTED, COLUMNS and KIND == EXACT, KIND, False, KIND != EXACT, True, OVERLAP, TILE,
        BLOCK_D, STAGES, k_desc.dtype, v_desc.dtype,
    )  # fmt: skip
    # The same registers, named for products of 16-bit operands.
    s_exact: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_exact: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    exact_rows: gl.constexpr = gl.SliceLayout(1, s_exact)
    out_rows: gl.constexpr = gl.SliceLayout(1, o_exact)
    acc = gl.convert_layout(acc, o_exact, assert_trivial=True)
    top = gl.convert_layout(top, exact_rows, assert_trivial=True)
    shift = gl.convert_layout(shift, exact_rows, assert_trivial=True)
    channel = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_exact))
    if KIND != EXACT:
        acc = acc * gl.load(value_scales + channel)[None, :]
    if COLUMNS and KIND != EXACT:
        plain = gl.full([ROWS], scale, gl.float32, exact_rows)
        slot, phase, acc, total, top = _walk(
            q_tile, k_ring, v_ring, k_full, v_full, k_free, v_free, slot, phase, acc, total, top,
            ids, column_ids, key_scales, plain, shift, row, 0, 0, column_count,
            PART, LISTED, True, EXACT, True, True, False, True, TILE, BLOCK_D, STAGES, exact, exact,
        )  # fmt: skip

    sums = gl.convert_layout(gl.sum(total, 1), out_rows)
    tops = gl.convert_layout(top, out_rows)
    position = row + gl.arange(0, ROWS, out_rows)
    token = gl.where(position < length, start + position, position - length) - before
    writable = (position < T) & (token >= 0)
    real = (position < length) & (sums > 0.0)
    sums = gl.where(real, sums, 1.0)
    logs = tops + gl.log2(sums)
    if KIND != EXACT:
        logs = logs + gl.convert_layout(shift, out_rows) - LIFT
    logs = gl.where(real, logs / LOG2_E, -float("inf"))
    gl.store(lse + token, logs, mask=writable)
    acc = gl.where(real[:, None], acc / sums[:, None], 0.0).to(exact)
    pointers = out + token.to(gl.int64)[:, None] * D + channel[None, :]
    gl.store(pointers, acc, mask=writable[:, None] & (channel < D)[None, :])


@gluon.jit(do_not_specialize=["block_capacity", "column_capacity", "T", "T_q", "padded", "blocks"])
def attend(
    k_desc, v_desc, query, keys, values, out, lse, starts,
    block_offsets, block_ids, column_offsets, column_ids, key_scales, value_scales, key_means,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, v_b, v_h, v_t,
    block_capacity, column_capacity, T, T_q, padded, blocks, scale,
    H: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr,
    HAS_STARTS: gl.constexpr, LISTED: gl.constexpr, COLUMNS: gl.constexpr, KIND: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attend one block of 64 * CONSUMERS queries of one head, the longest rows first.

    Scores are in base 2. The accumulator, row sums and row maxima are float32 in registers; weights
    enter the second product in the dtype of the values. An eight-bit product of one tile is added
    to the accumulator in float32, because tensor cores keep fewer bits.
    """
    exact: gl.constexpr = query.dtype.element_ty
    tile: gl.constexpr = ROWS * CONSUMERS
    program = gl.program_id(0)
    place = gl.program_id(1)
    if LISTED:
        # Scattered reads stay in the cache: programs that run together share keys and values.
        turn = place * gl.num_programs(0) + program
        each = gl.num_programs(1) * GROUPS
        program = turn // each * GROUPS + turn % GROUPS
        place = turn % each // GROUPS
    b = (program // H).to(gl.int64)
    h = (program % H).to(gl.int64)
    kv = h // GROUPS
    block = blocks - 1 - place
    start = 0
    if HAS_STARTS:
        start = gl.load(starts + b).to(gl.int32)
    length = T - start
    row = block * tile
    before = T - T_q
    idle = (row >= length) | (start + row + tile <= before)

    lists = program.to(gl.int64) * (blocks + 1) + block
    ids = block_ids
    first = block
    count = block + 1
    if LISTED:
        begin = gl.load(block_offsets + lists)
        end = gl.load(block_offsets + lists + 1)
        ids = block_ids + program.to(gl.int64) * block_capacity
        first = end - 1
        count = end - begin
    count = gl.where(idle, 0, count)
    column_count = block * 0
    columns = column_ids
    if COLUMNS:
        begin = gl.load(column_offsets + lists)
        column_count = gl.where(idle, 0, gl.load(column_offsets + lists + 1) - begin)
        columns = column_ids + program.to(gl.int64) * column_capacity + begin
    H_KV: gl.constexpr = H // GROUPS
    if KIND == EXACT:
        batch = b.to(gl.int32)
        head = kv.to(gl.int32)
    else:
        pair = (b * H_KV + kv).to(gl.int32)
        batch = pair * padded
        head = pair * BLOCK_D
        key_scales += pair * (padded // tile)
        value_scales += pair * BLOCK_D
        key_means += pair * BLOCK_D
    if COLUMNS:
        keys += b * k_b + kv * k_h + start.to(gl.int64) * k_t
        values += b * v_b + kv * v_h + start.to(gl.int64) * v_t
    query += b * q_b + h * q_h
    out += program.to(gl.int64) * T_q * D
    lse += program.to(gl.int64) * T_q

    ring: gl.constexpr = exact if KIND == EXACT or COLUMNS else k_desc.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([tile, BLOCK_D], ring)
    q_flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], exact)
    k_ring = gl.allocate_shared_memory(ring, [STAGES, tile, BLOCK_D], flat)
    v_ring = gl.allocate_shared_memory(ring, [STAGES, tile, BLOCK_D], flat)
    count_bars: gl.constexpr = [STAGES, 1]
    k_full = gl.allocate_shared_memory(gl.int64, count_bars, mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, count_bars, mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, count_bars, mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, count_bars, mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    q_tile = gl.allocate_shared_memory(exact, [CONSUMERS, ROWS, BLOCK_D], q_flat)
    q_small = q_tile
    if KIND != EXACT:
        s_flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], k_desc.dtype)
        q_small = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, ROWS, BLOCK_D], s_flat)
    # Constants stay constants only in tuples written where they are passed.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    k_desc, v_desc, query, out, lse, ids, columns, key_scales, value_scales,
                    key_means, k_ring, v_ring, k_full, v_full, k_free, v_free, q_tile.index(0),
                    q_small.index(0), first, count, column_count, row, start,
                    length, before, T, scale, q_t, q_d, PART_0, LISTED, COLUMNS, KIND, tile,
                    BLOCK_D, D, STAGES, OVERLAP,
                )),
                (_consume, (
                    k_desc, v_desc, query, out, lse, ids, columns, key_scales, value_scales,
                    key_means, k_ring, v_ring, k_full, v_full, k_free, v_free, q_tile.index(1),
                    q_small.index(1), first, count, column_count, row + ROWS, start,
                    length, before, T, scale, q_t, q_d, PART_1, LISTED, COLUMNS, KIND, tile,
                    BLOCK_D, D, STAGES, OVERLAP,
                )),
                (_produce, (
                    k_desc, v_desc, keys, values, ids, columns, k_ring, v_ring, k_full, v_full,
                    k_free, v_free, first, count, column_count, batch, head, start, length, k_t,
                    v_t, LISTED, COLUMNS, KIND, tile, BLOCK_D, D, STAGES,
                )),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    k_desc, v_desc, query, out, lse, ids, columns, key_scales, value_scales,
                    key_means, k_ring, v_ring, k_full, v_full, k_free, v_free, q_tile.index(0),
                    q_small.index(0), first, count, column_count, row, start,
                    length, before, T, scale, q_t, q_d, PART_0, LISTED, COLUMNS, KIND, tile,
                    BLOCK_D, D, STAGES, OVERLAP,
                )),
                (_produce, (
                    k_desc, v_desc, keys, values, ids, columns, k_ring, v_ring, k_full, v_full,
                    k_free, v_free, first, count, column_count, batch, head, start, length, k_t,
                    v_t, LISTED, COLUMNS, KIND, tile, BLOCK_D, D, STAGES,
                )),
            ],
            [4],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
