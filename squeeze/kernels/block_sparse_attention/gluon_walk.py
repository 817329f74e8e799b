"""Hopper block-sparse attention: a warp group of queries meets the tiles of the ring in turn."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from squeeze.kernels.block_sparse_attention.gluon_load import EXACT, INT8, advance
from squeeze.kernels.block_sparse_attention.gluon_scores import (
    MAGIC_BITS,
    ROWS,
    operand_of,
    partial,
    pin,
    scaled,
    softmax,
)


@gluon.jit
def _key_scale(key_scales, ids, place, LISTED: gl.constexpr):
    """Read the scale of one listed block, a tile before it is needed."""
    if LISTED:
        place = gl.load(ids + place)
    return gl.load(key_scales + place)


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
        weights, top, shrink = softmax(
            raw, top, stretch, shift, visible, MASKED, KIND, SHIFTED, LIFTED
        )
        total = scaled(total, shrink) + partial(weights, TILE)
        left = operand_of(weights, v_type, TILE, p_layout)
        total = pin(total, PART)
        acc, total = warpgroup_mma_wait(0, deps=[adding, total])
        mbarrier.arrive(v_free.index(old_slot), count=1)
        acc = scaled(acc, shrink)
    else:
        narrow = left
        if KIND != EXACT:
            narrow = operand_of(left, v_type, TILE, p_layout)
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
        acc = product if KIND == EXACT else scaled(acc, shrink) + product
        raw = warpgroup_mma_wait(0, deps=[scoring])
        mbarrier.arrive(k_free.index(slot), count=1)
        weights, top, shrink = softmax(
            raw, top, stretch, shift, visible, MASKED, KIND, SHIFTED, LIFTED
        )
        total = scaled(total, shrink) + partial(weights, TILE)
        left = weights
        if KIND == EXACT:
            left = operand_of(weights, v_type, TILE, p_layout)
            acc = scaled(acc, shrink)
    return left, acc, total, top, shrink


@gluon.jit
def walk(
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
        weights, top, shrink = softmax(
            raw, top, stretch, shift, visible, True, KIND, SHIFTED, LIFTED
        )
        if FRESH:
            total = partial(weights, TILE)
        else:
            total = scaled(total, shrink) + partial(weights, TILE)
            acc = scaled(acc, shrink)
        # Eight-bit weights would cross the loop as single bytes, so they cross it as float32.
        left = operand_of(weights, v_type, TILE, p_layout) if KIND == EXACT else weights
        for i in range(1, clear):
            old_slot = slot
            old_phase = phase
            slot, phase = advance(slot, phase, STAGES)
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
            left = operand_of(left, v_type, TILE, p_layout)
        mbarrier.wait(v_full.index(slot), phase)
        if KIND == EXACT:
            acc = warpgroup_mma(left, v_tile, acc)
        else:
            none = gl.zeros([ROWS, BLOCK_D], gl.float32, o_mma)
            product = warpgroup_mma(left, v_tile, none, use_acc=False)
            acc = scaled(acc, shrink) + product
        mbarrier.arrive(v_free.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)
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
            weights, top, shrink = softmax(
                raw, top, factor, shift, visible, True, KIND, SHIFTED, LIFTED
            )
            total = scaled(total, shrink) + partial(weights, TILE)
            left = operand_of(weights, v_type, TILE, p_layout)
            acc = scaled(acc, shrink)
            mbarrier.wait(v_full.index(slot), phase)
            acc = warpgroup_mma(left, _values(v_ring, slot, v_type, TILE, BLOCK_D), acc)
            mbarrier.arrive(v_free.index(slot), count=1)
            slot, phase = advance(slot, phase, STAGES)
    return slot, phase, acc, total, top
