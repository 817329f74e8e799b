"""Hopper block-sparse attention: the warp group that keeps the ring of keys and values filled."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# What whole blocks are multiplied in, as ``hopper.KINDS`` numbers it; between them float8.
EXACT = gl.constexpr(0)
INT8 = gl.constexpr(2)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """Step to the ring's next place and, past its end, to the other phase."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), phase ^ gl.where(wrapped, 1, 0)


@gluon.jit
def before(slot, STAGES: gl.constexpr):
    """Return the ring's place before one."""
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def produce(
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
        slot, phase = advance(slot, phase, STAGES)
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
            mbarrier.arrive(v_full.index(before(slot, STAGES)), count=1, pred=t > 0)
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            _gather(values, positions, v_ring.index(slot), v_t, BLOCK_D, D)
            positions = following
            slot, phase = advance(slot, phase, STAGES)
        _land()
        mbarrier.arrive(v_full.index(before(slot, STAGES)), count=1, pred=tiles > 0)


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
