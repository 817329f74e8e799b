"""Low-bit estimates of all scores, for Hopper: one warp group loads, two multiply.

A program multiplies 256 queries with 128 keys at a time, all channels at once. The producer keeps
the queries of this item and of the next, and a ring of keys, filled by the tensor memory
accelerator. Each consumer owns 128 queries: while one reduces its scores, the other multiplies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from squeeze.kernels.prefill_index.gluon import _next

ROWS = gl.constexpr(128)  # queries of a consumer
M = gl.constexpr(256)
N = gl.constexpr(128)
PEERS = gl.constexpr(16)  # queries of a product that one warp holds, if of one block
LOG2_E = gl.constexpr(1.4426950408889634)
PARTS = (gl.constexpr(0), gl.constexpr(1))
PART_0, PART_1 = PARTS


@gluon.jit
def _item(turn, items, heads, number, begin, width, SIZE: gl.constexpr, STRIDE: gl.constexpr):
    """Return a turn's row and head, its tile of queries, and how many tiles of keys it reads.

    Items go from the longest to the shortest, and every other turn gives them out in the opposite
    order, so that programs end together.
    """
    own = gl.program_id(0)
    programs = gl.num_programs(0)
    item = turn * programs + gl.where(turn % 2 == 0, own, programs - 1 - own)
    tile = gl.maximum((number * (SIZE // STRIDE) + M - 1) // M - 1 - item // heads, 0)
    last = gl.minimum(begin + (tile + 1) * (M * STRIDE), width * SIZE)
    return item % heads, tile, gl.where(item < items, (last + N - 1) // N, 0)


@gluon.jit
def _produce(
    codes, key_codes, q_ring, k_ring, q_full, q_free, k_full, k_free,
    start, number, begin, width, items, heads,
    GROUPS: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring of keys, and the two places of queries."""
    slot = items * 0
    phase = items * 0
    turns = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    for turn in range(0, turns):
        program, tile, tiles = _item(turn, items, heads, number, begin, width, SIZE, STRIDE)
        place = turn % 2
        mbarrier.wait(q_free.index(place), (turn // 2 & 1) ^ 1)
        mbarrier.expect(q_full.index(place), codes.block_type.nbytes)
        q_tile = q_ring.index(place)._reinterpret(codes.dtype, codes.block_shape, codes.layout)
        q_at = [program, start + tile * M, 0]
        tma.async_copy_global_to_shared(codes, q_at, q_full.index(place), q_tile)
        for step in range(0, tiles):
            mbarrier.wait(k_free.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), key_codes.block_type.nbytes)
            k_tile = k_ring.index(slot)._reinterpret(
                key_codes.dtype, key_codes.block_shape, key_codes.layout
            )
            k_at = [program // GROUPS, step * N, 0]
            tma.async_copy_global_to_shared(key_codes, k_at, k_full.index(slot), k_tile)
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _bounded(x, SOFTCAP: gl.constexpr):
    """Return ``SOFTCAP * tanh(x / SOFTCAP)``, or x where there is no bound."""
    if SOFTCAP > 0:
        decay = gl.exp2(gl.abs(x) * (-2.0 * LOG2_E / SOFTCAP))
        magnitude = (1.0 - decay) / (1.0 + decay) * SOFTCAP
        x = gl.where(x < 0, -magnitude, magnitude)
    return x


@gluon.jit
def _consume(
    scales, totals, key_scales, added, scratch, out, q_ring, k_ring, q_full, q_free, k_full,
    k_free, start, number, begin, width, padded, items, heads, queries, tokens,
    PART: gl.constexpr, GROUPS: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Reduce the scores of 128 queries to a number per block of keys, one item after another.

    The first sweep over the keys keeps, in scratch memory of the program's own, the largest
    relative score of every 16 queries, or those of one block. The second joins them.
    """
    BLOCKS: gl.constexpr = N // SIZE
    EACH: gl.constexpr = SIZE // STRIDE
    UNIT: gl.constexpr = EACH if EACH < PEERS else PEERS
    UNITS: gl.constexpr = ROWS // UNIT
    EIGHT: gl.constexpr = q_ring.dtype.is_int()
    kind: gl.constexpr = gl.int32 if EIGHT else gl.float32
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    rows_of: gl.constexpr = gl.SliceLayout(1, mma)
    read: gl.constexpr = gl.BlockedLayout([UNITS, 1], [1, 32], [1, 4], [1, 0])
    slot = items * 0
    phase = items * 0
    turns = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    scratch += (gl.program_id(0) * 2 + PART).to(gl.int64) * UNITS * padded
    m = gl.arange(0, ROWS, rows_of)
    n = gl.arange(0, N, gl.SliceLayout(0, mma))
    begun = gl.zeros([ROWS, N], kind, mma)
    for turn in range(0, turns):
        program, tile, tiles = _item(turn, items, heads, number, begin, width, SIZE, STRIDE)
        place = turn % 2
        row = tile * M + PART * ROWS
        there = row + m < number * EACH
        at = program.to(gl.int64) * queries + start + row + m
        factor = gl.load(scales + at, mask=there, other=0.0)
        total = gl.load(totals + at, mask=there, other=float("inf"))
        k_scales = key_scales + (program // GROUPS).to(gl.int64) * tokens
        k_added = added + program.to(gl.int64) * tokens
        mbarrier.wait(q_full.index(place), turn // 2 & 1)
        q_tile = q_ring.index(place).slice(PART * ROWS, ROWS)
        for step in range(0, tiles):
            k_tile = k_ring.index(slot).permute((1, 0))
            mbarrier.wait(k_full.index(slot), phase)
            acc = warpgroup_mma(q_tile, k_tile, begun, use_acc=False, is_async=True)
            k_scale = gl.load(k_scales + step * N + n)
            more = gl.load(k_added + step * N + n)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(k_free.index(slot), count=1)
            slot, phase = _next(slot, phase, STAGES)
            x = acc.to(gl.float32) * k_scale[None, :]
            x = x * factor[:, None] + more[None, :]
            # What a thread holds comes first, so that few numbers move between lanes.
            parts = gl.max(gl.max(x.reshape([ROWS, BLOCKS, SIZE // 8, 4, 2]), 4), 2)
            totals_of: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, parts.type.layout))
            shift = gl.convert_layout(total, totals_of, assert_trivial=True)
            parts = _bounded(parts, SOFTCAP) - shift[:, None][:, :, None]
            held = gl.max(gl.max(parts.reshape([UNITS, UNIT, BLOCKS, 4]), 1), 2)
            kept: gl.constexpr = held.type.layout
            unit = gl.arange(0, UNITS, gl.SliceLayout(1, kept))
            j = gl.arange(0, BLOCKS, gl.SliceLayout(0, kept))
            gl.store(scratch + unit[:, None] * padded + step * BLOCKS + j[None, :], held)
        mbarrier.arrive(q_free.index(place), count=1)
        gl.thread_barrier()
        unit = gl.arange(0, UNITS, gl.SliceLayout(1, read))
        c = gl.arange(0, N, gl.SliceLayout(0, read))
        pointer = out + program.to(gl.int64) * number * width
        for step in range(0, (tiles * BLOCKS + N - 1) // N):
            column = step * N + c
            known = (unit >= 0)[:, None] & (column < tiles * BLOCKS)[None, :]
            held = gl.load(
                scratch + unit[:, None] * padded + column[None, :], mask=known, other=0.0
            )
            best = gl.max(held.reshape([ROWS // EACH, EACH // UNIT, N]), 1)
            final: gl.constexpr = best.type.layout
            block = row // EACH + gl.arange(0, ROWS // EACH, gl.SliceLayout(1, final))
            own = step * N + gl.arange(0, N, gl.SliceLayout(0, final))
            keep = (block < number)[:, None] & (own < gl.minimum(width, tiles * BLOCKS))[None, :]
            gl.store(pointer + block.to(gl.int64)[:, None] * width + own[None, :], best, mask=keep)
        gl.thread_barrier()


@gluon.jit(
    do_not_specialize=["start", "number", "begin", "width", "padded", "items", "heads", "queries"]
)
def weigh_elements(
    codes, key_codes, scales, totals, key_scales, added, scratch, out,
    start, number, begin, width, padded, items, heads, queries, tokens,
    GROUPS: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr, WIDE: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Find the largest relative score of every pair of blocks, for tiles of 256 queries.

    Sums of products are int32 or, of eight-bit floats, float32; both are exact.
    """
    dtype: gl.constexpr = codes.dtype
    q_flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, WIDE], dtype)
    k_flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, WIDE], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [2, M, WIDE], q_flat)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, N, WIDE], k_flat)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
    # Constants stay constants only in tuples written where they are passed.
    gl.warp_specialize(
        [
            (_consume, (
                scales, totals, key_scales, added, scratch, out, q_ring, k_ring, q_full, q_free,
                k_full, k_free, start, number, begin, width, padded, items, heads, queries, tokens,
                PART_0, GROUPS, SIZE, STRIDE, SOFTCAP, STAGES,
            )),
            (_consume, (
                scales, totals, key_scales, added, scratch, out, q_ring, k_ring, q_full, q_free,
                k_full, k_free, start, number, begin, width, padded, items, heads, queries, tokens,
                PART_1, GROUPS, SIZE, STRIDE, SOFTCAP, STAGES,
            )),
            (_produce, (
                codes, key_codes, q_ring, k_ring, q_full, q_free, k_full, k_free,
                start, number, begin, width, items, heads, GROUPS, SIZE, STRIDE, STAGES,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
