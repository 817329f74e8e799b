"""The product of many rows with a clustered weight for Hopper, without the weight in memory.

A program computes ``y.T = W x.T``, 128 rows of the weight by 256 rows of x at a time. Each of two
warp groups has 64 rows of the weight, which it looks up from packed indices while its tensor cores
multiply what it looked up before: W is the operand in registers. A third group keeps a ring of
tiles of x filled through the tensor memory accelerator, across the ends of outputs.

Any order of channels will do as long as both operands share it. Word ``32 q + j`` of a row has in
nibble ``n`` the index of channel ``4 n u + 32 q + j``: of 32 words, two nibbles are a step, whose
operands are two tiles of 32 neighbouring channels. Entries times the row's scale are rounded first,
to what the dense weight has; a table has their low bytes in four words and their high bytes in
four others.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from squeeze.kernels.lut_linear.gluon_dense import table

BM = gl.constexpr(64)  # rows of the weight of a warp group
BN = gl.constexpr(256)  # rows of x
BK = gl.constexpr(32)  # channels of a tile of x, of which a step has two
WORDS = gl.constexpr(  # [BM, BK] words: pairs of neighbours a thread, two rows
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 16]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [64, 32],
    )
)  # fmt: skip
SPREAD = gl.constexpr(  # [BM, BK / 2, 2] numbers of the operand
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 4, 0], [0, 8, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [64, 16, 2],
    )
)  # fmt: skip
PAIRS = gl.constexpr(gl.SliceLayout(2, SPREAD))  # [BM, BK / 2]
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)


@gluon.constexpr_function
def look_up(part):
    """Assembly: the entries of nibbles 2 part and 2 part + 1 of two words, a pair each.

    Operands: two pairs of 16-bit numbers; the words; low, then high bytes of the table.
    """
    return "\n".join(
        [
            "{",
            ".reg .b32 s, m, u, v, low, high;",
            f"prmt.b32 s, $2, $3, {part | (part + 4) << 4};",
            "shr.u32 m, s, 1;",
            "and.b32 s, s, 0x7777;",
            "lop3.b32 m, m, 0x4444, 0x3210, 0xEA;",
            "prmt.b32 u, $4, $5, s;",
            "prmt.b32 v, $6, $7, s;",
            "prmt.b32 low, u, v, m;",
            "prmt.b32 u, $8, $9, s;",
            "prmt.b32 v, $10, $11, s;",
            "prmt.b32 high, u, v, m;",
            "prmt.b32 $0, low, high, 0x6240;",
            "prmt.b32 $1, low, high, 0x7351;",
            "}",
        ]
    )


@gluon.jit
def _codebook(codebook, scale, row, ROWS: gl.constexpr, SCALED: gl.constexpr):
    """Read the codebooks of rows ``[BM]`` as words, and their scale."""
    SIZE: gl.constexpr = 1 if codebook.dtype.element_ty == gl.int8 else 2
    source = codebook.to(gl.pointer_type(gl.int32)) + (row // ROWS).to(gl.int64) * (4 * SIZE)
    w0 = gl.load(source)
    w1 = gl.load(source + (SIZE - 1))
    w2 = gl.load(source + SIZE)
    w3 = gl.load(source + (2 * SIZE - 1))
    w4 = gl.load(source + 2 * SIZE)
    w5 = gl.load(source + (3 * SIZE - 1))
    w6 = gl.load(source + 3 * SIZE)
    w7 = gl.load(source + (4 * SIZE - 1))
    factor = gl.full_like(row, 1.0, dtype=gl.float32)
    if SCALED:
        factor = gl.load(scale + row).to(gl.float32)
    return w0, w1, w2, w3, w4, w5, w6, w7, factor


@gluon.jit
def _rounded(first, second, factor, SIZE: gl.constexpr, HALF: gl.constexpr):
    """Four entries times their factor as a word ``[BM, 1]`` of low bytes and one of high bytes."""
    low, high = gl.inline_asm_elementwise(
        table(SIZE, HALF), "=&r,=&r,r,r,f", [first, second, factor],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.expand_dims(low, 1), gl.expand_dims(high, 1)


@gluon.jit
def _table(book, SIZE: gl.constexpr, HALF: gl.constexpr):
    """Low bytes, then high bytes of the entries of each row."""
    w0, w1, w2, w3, w4, w5, w6, w7, factor = book
    l0, h0 = _rounded(w0, w1, factor, SIZE, HALF)
    l1, h1 = _rounded(w2, w3, factor, SIZE, HALF)
    l2, h2 = _rounded(w4, w5, factor, SIZE, HALF)
    l3, h3 = _rounded(w6, w7, factor, SIZE, HALF)
    return l0, l1, l2, l3, h0, h1, h2, h3


@gluon.jit
def _operand(pairs, dtype: gl.constexpr):
    """Hand pairs of 16-bit numbers ``[BM, BK / 2]`` to the tensor cores as they lie."""
    spread = gl.expand_dims(pairs, 2) + gl.zeros([BM, BK // 2, 2], gl.int32, SPREAD)
    numbers = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r", [spread], dtype=gl.int16, is_pure=True, pack=2
    )
    operand = numbers.reshape([BM, BK]).to(dtype, bitcast=True)
    return gl.convert_layout(operand, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)


@gluon.jit
def _pairs(words, entries, PART: gl.constexpr):
    """Look up two nibbles of each of 32 words: two tensors of pairs ``[BM, BK / 2]``."""
    even, odd = gl.split(words.reshape([BM, BK // 2, 2]))
    even = gl.convert_layout(even, PAIRS, assert_trivial=True)
    odd = gl.convert_layout(odd, PAIRS, assert_trivial=True)
    l0, l1, l2, l3, h0, h1, h2, h3 = entries
    return gl.inline_asm_elementwise(
        look_up(PART), "=&r,=&r,r,r,r,r,r,r,r,r,r,r", [even, odd, l0, l1, l2, l3, h0, h1, h2, h3],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """Step to the ring's next place and, past its end, to the other phase."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), phase ^ gl.where(wrapped, 1, 0)


@gluon.jit
def _produce(
    x_desc, tiles, full, free, x_tiles, count, u: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Fill the ring: of each output, for 32 words after 32 words, four steps of two tiles."""
    gdc_wait()  # for x; a weight was there before
    slot = count * 0
    phase = count * 0
    for tile in range(gl.program_id(0), count, gl.num_programs(0)):
        token = (tile % x_tiles) * BN
        for q in range(0, u // 8):
            for part in gl.static_range(4):
                bar = full.index(slot)
                mbarrier.wait(free.index(slot), phase ^ 1)
                mbarrier.expect(bar, 2 * BN * BK * 2)
                at = q * BK + 8 * part * u
                tma.async_copy_global_to_shared(x_desc, [token, at], bar, tiles.index(2 * slot))
                at += 4 * u
                tma.async_copy_global_to_shared(x_desc, [token, at], bar, tiles.index(2 * slot + 1))
                slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _rows(tile, x_tiles, out_features, WHICH: gl.constexpr, layout: gl.constexpr):
    """Rows ``[BM]`` of the weight of a warp group; past the last, the last."""
    row = (tile // x_tiles) * (2 * BM) + WHICH * BM + gl.arange(0, BM, layout)
    return gl.minimum(row, out_features - 1)


@gluon.jit
def _consume(
    y_desc, tiles, full, free, staging, indices, codebook, scale, bias, x_tiles, count,
    out_features, WHICH: gl.constexpr, u: gl.constexpr, ROWS: gl.constexpr, SCALED: gl.constexpr,
    BIASED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply 64 rows of the weight of each output tile with the tiles of x of the ring."""
    dtype: gl.constexpr = y_desc.dtype
    HALF: gl.constexpr = dtype == gl.float16
    SIZE: gl.constexpr = 1 if codebook.dtype.element_ty == gl.int8 else 2
    rows_of: gl.constexpr = gl.SliceLayout(1, WORDS)
    place = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, WORDS)), 0)
    slot = count * 0
    phase = count * 0
    tile = gl.program_id(0)
    row = _rows(tile, x_tiles, out_features, WHICH, rows_of)
    words = indices + gl.expand_dims(row.to(gl.int64) * (4 * u), 1) + place
    coming = gl.load(words)
    row = _rows(tile, x_tiles, out_features, WHICH, gl.SliceLayout(1, PAIRS))
    book = _codebook(codebook, scale, row, ROWS, SCALED)
    for tile in range(gl.program_id(0), count, gl.num_programs(0)):
        entries = _table(book, SIZE, HALF)
        sums = gl.zeros([BM, BN], gl.float32, SUMS)
        pairs_0, pairs_1 = _pairs(coming, entries, FIRST)
        mbarrier.wait(full.index(slot), phase)
        for q in range(0, u // 8):
            now = coming
            coming = gl.load(words + gl.minimum(q + 1, u // 8 - 1) * BK)
            used = slot
            old_0 = pairs_0
            old_1 = pairs_1
            for part in gl.static_range(4):
                operand_0 = _operand(pairs_0, dtype)
                operand_1 = _operand(pairs_1, dtype)
                if part > 0:
                    mbarrier.wait(full.index(slot), phase)
                right = tiles.index(2 * slot).permute([1, 0])
                begun = warpgroup_mma(operand_0, right, sums, is_async=True)
                right = tiles.index(2 * slot + 1).permute([1, 0])
                begun = warpgroup_mma(operand_1, right, begun, is_async=True)
                if part > 0:
                    sums, old_0, old_1 = warpgroup_mma_wait(2, deps=[begun, old_0, old_1])
                    mbarrier.arrive(free.index(used), count=1)
                else:
                    sums = begun
                used = slot
                old_0 = pairs_0
                old_1 = pairs_1
                slot, phase = _next(slot, phase, STAGES)
                if part < 3:
                    pairs_0, pairs_1 = _pairs(now, entries, part + 1)
                else:
                    pairs_0, pairs_1 = _pairs(coming, entries, FIRST)
            mbarrier.wait(full.index(slot), phase, pred=q + 1 < u // 8)
            sums, old_0, old_1 = warpgroup_mma_wait(0, deps=[sums, old_0, old_1])
            mbarrier.arrive(free.index(used), count=1)
        upcoming = gl.minimum(tile + gl.num_programs(0), count - 1)
        row = _rows(upcoming, x_tiles, out_features, WHICH, rows_of)
        words = indices + gl.expand_dims(row.to(gl.int64) * (4 * u), 1) + place
        coming = gl.load(words)
        row = _rows(upcoming, x_tiles, out_features, WHICH, gl.SliceLayout(1, PAIRS))
        book = _codebook(codebook, scale, row, ROWS, SCALED)
        if BIASED:
            output = _rows(tile, x_tiles, out_features, WHICH, gl.SliceLayout(1, SUMS))
            sums += gl.expand_dims(gl.load(bias + output).to(gl.float32), 1)
        tma.store_wait(0)
        gl.thread_barrier()
        staging.permute([1, 0]).store(sums.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        at = [(tile % x_tiles) * BN, (tile // x_tiles) * (2 * BM) + WHICH * BM]
        tma.async_copy_shared_to_global(y_desc, at, staging)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "out_features"])
def multiply(
    x_desc, y_desc, indices, codebook, scale, bias, rows, out_features,
    u: gl.constexpr, ROWS: gl.constexpr, SCALED: gl.constexpr, BIASED: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """y[m, o] = sum_i x[m, i] round(scale[o] entry(o, i)) + bias[o] for ``x`` ``[rows, 32 u]``.

    Sums are float32, ``u`` a multiple of 32. Rows of x run fastest over outputs, so that programs
    at work share weights.
    """
    dtype: gl.constexpr = x_desc.dtype
    x_tiles = gl.cdiv(rows, BN)
    count = x_tiles * gl.cdiv(out_features, 2 * BM)
    tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, BN, BK], x_desc.layout)
    staging = gl.allocate_shared_memory(dtype, [2, BN, BM], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                y_desc, tiles, full, free, staging.index(0), indices, codebook, scale, bias,
                x_tiles, count, out_features, FIRST, u, ROWS, SCALED, BIASED, STAGES,
            )),
            (_consume, (
                y_desc, tiles, full, free, staging.index(1), indices, codebook, scale, bias,
                x_tiles, count, out_features, SECOND, u, ROWS, SCALED, BIASED, STAGES,
            )),
            (_produce, (x_desc, tiles, full, free, x_tiles, count, u, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
