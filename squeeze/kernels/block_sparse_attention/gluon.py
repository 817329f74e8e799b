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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from squeeze.kernels.block_sparse_attention.gluon_load import EXACT, INT8, produce
from squeeze.kernels.block_sparse_attention.gluon_scores import LIFT, MAGIC, ROWS, partial
from squeeze.kernels.block_sparse_attention.gluon_walk import walk

PARTS = (gl.constexpr(0), gl.constexpr(1))
PART_0, PART_1 = PARTS
LOG2_E = gl.constexpr(1.4426950408889634)


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
    total = partial(gl.zeros([ROWS, TILE], gl.float32, s_mma), TILE)
    slot = first * 0
    phase = first * 0
    slot, phase, acc, total, top = walk(
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
        slot, phase, acc, total, top = walk(
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
                (produce, (
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
                (produce, (
                    k_desc, v_desc, keys, values, ids, columns, k_ring, v_ring, k_full, v_full,
                    k_free, v_free, first, count, column_count, batch, head, start, length, k_t,
                    v_t, LISTED, COLUMNS, KIND, tile, BLOCK_D, D, STAGES,
                )),
            ],
            [4],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
