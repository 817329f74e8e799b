"""Weights of blocks from antidiagonals of cells, for Hopper: one warp group loads, two multiply.

A program weighs 128 cells of queries against 256 cells of keys at a time, a product over the S
tokens of a cell and the channels. The producer keeps a ring of slices filled by the tensor memory
accelerator, token t of every cell of keys with token S - 1 - t of every cell of queries. Each
consumer owns 64 cells of queries and keeps two products in flight.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # cells of queries of a consumer
M = gl.constexpr(128)
N = gl.constexpr(256)
DEPTH = gl.constexpr(64)  # channels of a slice
PARTS = (gl.constexpr(0), gl.constexpr(1))
PART_0, PART_1 = PARTS


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """Step to the ring's next place and, past its end, to the other phase."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), phase ^ gl.where(wrapped, 1, 0)


@gluon.jit
def _item(turn, items, heads, H, first, total_cells):
    """Return a turn's row and head, its tile of queries, and how many tiles of keys it reads.

    Items go from the longest to the shortest, and every other turn gives them out in the opposite
    order, so that programs end together.
    """
    own = gl.program_id(0)
    programs = gl.num_programs(0)
    item = turn * programs + gl.where(turn % 2 == 0, own, programs - 1 - own)
    tile = gl.maximum((total_cells + M - 1) // M - 1 - item // heads, 0)
    tiles = gl.where(item < items, (first + (tile + 1) * M + N - 1) // N, 0)
    program = item % heads
    return program, program // H, program % H, tile, tiles


@gluon.jit
def _produce(
    q_long, q_short, k_long, k_short, starts, q_ring, k_ring, full, free,
    first, total_cells, items, heads, H, T, T_q,
    GROUPS: gl.constexpr, S: gl.constexpr, SHIFT: gl.constexpr, SLICES: gl.constexpr,
    HAS_STARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring. Token u of a cell exists in one cell more where u is below the remainder."""
    bytes: gl.constexpr = (M + N) * DEPTH * 2
    slot = items * 0
    phase = items * 0
    turns = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    for turn in range(0, turns):
        _, b, h, tile, tiles = _item(turn, items, heads, H, first, total_cells)
        start = 0
        if HAS_STARTS:
            start = gl.load(starts + b).to(gl.int32)
        kv = h // GROUPS
        for number in range(0, tiles):
            for step in range(0, S * SLICES):
                t = step // SLICES
                channel = step % SLICES * DEPTH
                q_token = start + S - 1 - t - (T - T_q)
                k_token = start + t
                q_cell = first + tile * M + (q_token >> SHIFT)
                k_cell = number * N + (k_token >> SHIFT)
                q_token = q_token & (S - 1)
                k_token = k_token & (S - 1)
                bar = full.index(slot)
                mbarrier.wait(free.index(slot), phase ^ 1)
                mbarrier.expect(bar, bytes)
                q_tile = q_ring.index(slot)._reinterpret(
                    q_long.dtype, q_long.block_shape, q_long.layout
                )
                k_tile = k_ring.index(slot)._reinterpret(
                    k_long.dtype, k_long.block_shape, k_long.layout
                )
                q_at = [b, h, q_cell, q_token, channel]
                k_at = [b, kv, k_cell, k_token, channel]
                if q_token < T_q % S:
                    tma.async_copy_global_to_shared(q_long, q_at, bar, q_tile)
                else:
                    tma.async_copy_global_to_shared(q_short, q_at, bar, q_tile)
                if k_token < T % S:
                    tma.async_copy_global_to_shared(k_long, k_at, bar, k_tile)
                else:
                    tma.async_copy_global_to_shared(k_short, k_at, bar, k_tile)
                slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _consume(
    starts, scratch, out, q_ring, k_ring, full, free,
    first, total_cells, width, padded, items, heads, H, T, T_q, scale,
    PART: gl.constexpr, S: gl.constexpr, SLICES: gl.constexpr, CELLS: gl.constexpr,
    HAS_STARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Weigh the blocks that 64 cells of queries may read, one item after another.

    The first sweep over the keys keeps, in scratch memory of the program's own, the sum of
    2^(score - maximum so far) per cell of queries and block of keys, and those maxima per tile. The
    second puts all on the row's denominator and averages the cells of each query block.
    """
    BLOCKS: gl.constexpr = N // CELLS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    rows_of: gl.constexpr = gl.SliceLayout(1, mma)
    read: gl.constexpr = gl.BlockedLayout([CELLS, 1], [1, 32], [4, 1], [1, 0])
    wide: gl.constexpr = BLOCKS // 4 if BLOCKS < 32 else 8
    write: gl.constexpr = gl.BlockedLayout([1, 4], [32 // wide, wide], [4, 1], [1, 0])
    g = gl.arange(0, ROWS, gl.SliceLayout(1, write))
    j = gl.arange(0, BLOCKS, gl.SliceLayout(0, write))
    slot = items * 0
    phase = items * 0
    turns = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    sums_at = scratch + (gl.program_id(0) * 2 + PART).to(gl.int64) * ROWS * padded
    tops_at = scratch + gl.num_programs(0).to(gl.int64) * M * padded
    tops_at += (gl.program_id(0) * 2 + PART).to(gl.int64) * ROWS * (padded // BLOCKS)
    m = gl.arange(0, ROWS, rows_of)
    n = gl.arange(0, N, gl.SliceLayout(0, mma))
    begun = gl.zeros([ROWS, N], gl.float32, mma)
    for turn in range(0, turns):
        program, b, _, tile, tiles = _item(turn, items, heads, H, first, total_cells)
        row = first + tile * M + PART * ROWS
        top = gl.full([ROWS], -float("inf"), gl.float32, rows_of)
        total = gl.zeros([ROWS], gl.float32, rows_of)
        for number in range(0, tiles):
            q_tile = q_ring.index(slot).slice(PART * ROWS, ROWS)
            k_tile = k_ring.index(slot).permute((1, 0))
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(q_tile, k_tile, begun, use_acc=False, is_async=True)
            for _ in range(1, S * SLICES):
                old = slot
                slot, phase = _next(slot, phase, STAGES)
                q_tile = q_ring.index(slot).slice(PART * ROWS, ROWS)
                k_tile = k_ring.index(slot).permute((1, 0))
                mbarrier.wait(full.index(slot), phase)
                acc = warpgroup_mma(q_tile, k_tile, acc, is_async=True)
                acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
                mbarrier.arrive(free.index(old), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(slot), count=1)
            slot, phase = _next(slot, phase, STAGES)

            if number * N + N > row:
                seen = (number * N + n)[None, :] <= (row + m)[:, None]
                acc = gl.where(seen, acc, -float("inf"))
            raised = gl.maximum(top, gl.max(acc, 1) * scale)
            p = gl.exp2(acc * scale - raised[:, None])
            held = gl.sum(p.reshape([ROWS, BLOCKS, CELLS]), 2)
            added = gl.convert_layout(gl.sum(held, 1), rows_of)
            held = gl.convert_layout(held, write)
            gl.store(sums_at + g[:, None] * padded + number * BLOCKS + j[None, :], held)
            gl.store(tops_at + number * ROWS + m, raised)
            total = total * gl.exp2(top - raised) + added
            top = raised
        gl.thread_barrier()
        logs = gl.convert_layout(top + gl.log2(total), gl.SliceLayout(1, read))
        r = gl.arange(0, ROWS, gl.SliceLayout(1, read))
        c = gl.arange(0, BLOCKS, gl.SliceLayout(0, read))
        start = 0
        if HAS_STARTS:
            start = gl.load(starts + b).to(gl.int32)
        token = start + (row + r) * S  # the first of each cell
        real = (token + S > T - T_q) & (token + S > start) & (token < T)
        blocks = total_cells // CELLS
        block = (tile * M + PART * ROWS) // CELLS
        place = out + program.to(gl.int64) * blocks * width
        sweeps = gl.where(tiles > 0, (width + BLOCKS - 1) // BLOCKS, 0)
        for number in range(0, sweeps):
            known = real & (number < tiles)
            pointers = sums_at + r[:, None] * padded + number * BLOCKS + c[None, :]
            held = gl.load(pointers, mask=known[:, None] & (c >= 0)[None, :], other=0.0)
            raised = gl.load(tops_at + number * ROWS + r, mask=known, other=0.0)
            weights = held * gl.exp2(gl.where(known, raised - logs, 0.0))[:, None]
            mean = gl.sum(weights.reshape([ROWS // CELLS, CELLS, BLOCKS]), 1) / CELLS
            means: gl.constexpr = mean.type.layout
            own = block + gl.arange(0, ROWS // CELLS, gl.SliceLayout(1, means))
            seen = number * BLOCKS + gl.arange(0, BLOCKS, gl.SliceLayout(0, means))
            keep = (own < blocks)[:, None] & (seen < width)[None, :]
            gl.store(place + own.to(gl.int64)[:, None] * width + seen[None, :], mean, mask=keep)
        gl.thread_barrier()


@gluon.jit(do_not_specialize=["first", "total_cells", "width", "items", "heads", "H", "T", "T_q"])
def weigh(
    q_long, q_short, k_long, k_short, starts, scratch, out,
    first, total_cells, width, padded, items, heads, H, T, T_q, scale,
    GROUPS: gl.constexpr, S: gl.constexpr, SHIFT: gl.constexpr, CELLS: gl.constexpr,
    SLICES: gl.constexpr, HAS_STARTS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Weigh the blocks of keys for tiles of 128 cells of queries; ``scale`` makes scores base 2.

    The product and the sums are float32 in registers.
    """
    dtype: gl.constexpr = q_long.dtype
    q_flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, DEPTH], dtype)
    k_flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, DEPTH], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, M, DEPTH], q_flat)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, N, DEPTH], k_flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    # Constants stay constants only in tuples written where they are passed.
    gl.warp_specialize(
        [
            (_consume, (
                starts, scratch, out, q_ring, k_ring, full, free,
                first, total_cells, width, padded, items, heads, H, T, T_q, scale,
                PART_0, S, SLICES, CELLS, HAS_STARTS, STAGES,
            )),
            (_consume, (
                starts, scratch, out, q_ring, k_ring, full, free,
                first, total_cells, width, padded, items, heads, H, T, T_q, scale,
                PART_1, S, SLICES, CELLS, HAS_STARTS, STAGES,
            )),
            (_produce, (
                q_long, q_short, k_long, k_short, starts, q_ring, k_ring, full, free,
                first, total_cells, items, heads, H, T, T_q,
                GROUPS, S, SHIFT, SLICES, HAS_STARTS, STAGES,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
