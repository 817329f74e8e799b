"""The float8 product of packed weights for Hopper: entries are looked up while tensor cores work.

A program of two warp groups computes the outputs of 128 rows of the weight for 256 tokens as
``y.T = W x.T``: W is the operand in registers, so it never exists in memory. A thread holds the
words of two rows and their two codebooks; six PRMTs turn a word of eight codes into the eight bytes
that it owes to one instruction. Tiles of x come by the tensor memory accelerator. The product of
one step of 128 channels runs while the next step's entries are looked up.

Any order of channels will do as long as both operands share it. Word ``16 b + 4 t + s`` of a row
is that of thread t of a quad, step b and instruction s, whose channels ``4 t + i`` and
``16 + 4 t + i`` are its low and high four codes: ``triton.ordered_tokens`` writes x so.
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

BM = gl.constexpr(128)  # rows of the weight
BN = gl.constexpr(256)  # tokens
BK = gl.constexpr(128)  # channels of a step
WORDS = gl.constexpr(16)  # of a row in a step
_LOOK_UP = gl.constexpr(
    "{\n.reg .b32 q, p, s, h, v, w, x;\nand.b32 q, $2, 0x77777777;\nshr.u32 p, q, 16;\n"
    "and.b32 s, $2, 0x88888888;\nshr.u32 s, s, 1;\nadd.u32 s, s, 0x32103210;\nshr.u32 h, s, 16;\n"
    "prmt.b32 v, $3, $4, q;\nprmt.b32 x, $5, $6, q;\nprmt.b32 v, v, x, s;\n"
    "prmt.b32 w, $3, $4, p;\nprmt.b32 x, $5, $6, p;\nprmt.b32 $1, w, x, h;\nmov.b32 $0, v;\n}"
)
_BYTES = gl.constexpr("mov.b32 $0, $1;")
PIECES = gl.constexpr(  # [BM, WORDS] words: four neighbours a thread, two rows
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]], [], [128, 16],
    )
)  # fmt: skip
SPREAD = gl.constexpr(  # [BM, BK / 4, 4] bytes of the operand
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [8, 0, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0], [64, 0, 0]], [], [128, 32, 4],
    )
)  # fmt: skip
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 256, 32]))
OUTPUT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))


@gluon.jit
def _table(codebook, row):
    """The codebooks of rows ``[BM]`` as four words ``[BM, 1]``."""
    book = codebook.to(gl.pointer_type(gl.int32)) + row * 4
    t0 = gl.load(book)
    t1 = gl.load(book + 1)
    t2 = gl.load(book + 2)
    t3 = gl.load(book + 3)
    return (
        gl.expand_dims(t0, 1), gl.expand_dims(t1, 1), gl.expand_dims(t2, 1), gl.expand_dims(t3, 1)
    )  # fmt: skip


@gluon.jit
def _operand(nibbles, table):
    """Look a step's entries up: E4M3 ``[BM, BK]`` as the tensor cores read it from registers.

    Returns:
        That, and its registers as integers, which a wait for the tensor cores can name.
    """
    t0, t1, t2, t3 = table
    low, high = gl.inline_asm_elementwise(
        _LOOK_UP, "=&r,=&r,r,r,r,r,r", [nibbles, t0, t1, t2, t3], dtype=(gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    both = gl.join(low, high).reshape([BM, 4, 4, 2]).permute([0, 2, 3, 1])  # row, s, half, t
    quads = gl.convert_layout(both.reshape([BM, BK // 4]), gl.SliceLayout(2, SPREAD), True)
    spread = gl.expand_dims(quads, 2) + gl.zeros([BM, BK // 4, 4], gl.int32, SPREAD)
    octets = gl.inline_asm_elementwise(
        _BYTES, "=r,r,r,r,r", [spread], dtype=gl.int8, is_pure=True, pack=4
    )
    operand = octets.reshape([BM, BK]).to(gl.float8e4nv, bitcast=True)
    layout: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    return gl.convert_layout(operand, layout, True), quads


@gluon.jit
def _fetch(x, tile, tiles, bars, step, STEPS: gl.constexpr, STAGES: gl.constexpr):
    """Ask for the tile of x of a step, if there is one."""
    bar = bars.index(step % STAGES)
    inside = step < STEPS
    mbarrier.expect(bar, BN * BK, pred=inside)
    tma.async_copy_global_to_shared(
        x, [tile * BN, step * BK], bar, tiles.index(step % STAGES), pred=inside
    )


@gluon.jit
def _begin(operand, tiles, bars, step, sums, STAGES: gl.constexpr):
    """Start a step's product when its tile of x is there."""
    mbarrier.wait(bars.index(step % STAGES), (step // STAGES) & 1)
    right = tiles.index(step % STAGES).permute([1, 0])
    return warpgroup_mma(operand, right, sums, is_async=True)


@gluon.jit
def multiply(
    x, indices, codebook, scale, x_scale, bias, y, rows, out_features,
    u: gl.constexpr, BIASED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """y[m, o] = x_scale[m] scale[o] sum_i x[m, i] entry(o, i) + bias[o].

    ``x`` describes E4M3 ``[rows, 32 u]`` and is zero past that, for an odd last step. Sums are the
    tensor cores' own over the whole of ``in``: each instruction aligns 32 products and the sum to
    the largest of them and cuts off what is below its leading 14 bits.
    Tokens run fastest over programs, so that those at work share weights.
    """
    LAST: gl.constexpr = u // 4 - 1
    STEPS: gl.constexpr = LAST + 1 + (LAST + 1) % 2
    token_tiles = gl.cdiv(rows, BN)
    tile = gl.program_id(0) % token_tiles
    first = (gl.program_id(0) // token_tiles) * BM
    tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, BK], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    fence_async_shared()
    row = first + gl.arange(0, BM, gl.SliceLayout(1, PIECES))
    row = gl.minimum(row, out_features - 1).to(gl.int64)
    place = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, PIECES)), 0)
    words = indices + gl.expand_dims(row * (u * 4), 1) + place
    table = _table(codebook, row)
    nibbles = gl.load(words)
    coming = gl.load(words + min(1, LAST) * WORDS)
    gdc_wait()  # for x; weights were there before
    for stage in gl.static_range(STAGES - 1):
        _fetch(x, tile, tiles, bars, stage, STEPS, STAGES)
    sums = gl.zeros([BM, BN], gl.float32, SUMS)
    odd = gl.zeros([BM, BK // 4], gl.int32, gl.SliceLayout(2, SPREAD))
    for step in range(0, STEPS, 2):
        # Two operands in turn: one is looked up while the tensor cores read the other.
        operand, even = _operand(nibbles, table)
        nibbles = gl.load(words + gl.minimum(step + 2, LAST) * WORDS)
        begun = _begin(operand, tiles, bars, step, sums, STAGES)
        sums, odd = warpgroup_mma_wait(1, deps=[begun, odd])
        gl.thread_barrier()
        _fetch(x, tile, tiles, bars, step - 1 + STAGES, STEPS, STAGES)
        operand, odd = _operand(coming, table)
        coming = gl.load(words + gl.minimum(step + 3, LAST) * WORDS)
        begun = _begin(operand, tiles, bars, step + 1, sums, STAGES)
        sums, even = warpgroup_mma_wait(1, deps=[begun, even])
        gl.thread_barrier()
        _fetch(x, tile, tiles, bars, step + STAGES, STEPS, STAGES)
    total, odd = warpgroup_mma_wait(0, deps=[sums, odd])
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(stage))
    output = first + gl.arange(0, BM, gl.SliceLayout(1, SUMS))
    token = tile * BN + gl.arange(0, BN, gl.SliceLayout(0, SUMS))
    output = gl.minimum(output, out_features - 1)
    factor = gl.load(scale + output).to(gl.float32)
    sizes = gl.load(x_scale + token, mask=token < rows, other=0.0)
    total = total * gl.expand_dims(factor, 1) * gl.expand_dims(sizes, 0)
    if BIASED:
        total += gl.expand_dims(gl.load(bias + output).to(gl.float32), 1)
    result = gl.convert_layout(total.to(y.dtype.element_ty).permute([1, 0]), OUTPUT)
    token = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, OUTPUT))
    output = first + gl.arange(0, BM, gl.SliceLayout(0, OUTPUT))
    target = gl.expand_dims(token.to(gl.int64) * out_features, 1) + gl.expand_dims(output, 0)
    keep = gl.expand_dims(token < rows, 1) & gl.expand_dims(output < out_features, 0)
    gl.store(y + target, result, mask=keep)
