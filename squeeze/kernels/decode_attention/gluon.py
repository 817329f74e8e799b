"""Decode attention over packed blocks for tensor cores: asynchronous copies, operands in registers.

One warp is a program and owns the query rows of one KV head and a run of blocks, or of exact slots.
Codes reach shared memory by asynchronous copies, one block of keys and one of values ahead, and
tensor-core registers by ``ldmatrix``. Tokens (keys) or channels (values) are the sixteen rows of a
product and the query rows its eight columns, so little is padding.

Unpacking. Two neighbouring channels are one 16-bit unit; a register holds two units that neighbour
each other along the reduced dimension: channels of keys, tokens of values (a transposed load). A
mask over the register then leaves one code of each unit, which is a pair of that operand: even
channels come from the low bytes, odd ones from the high bytes. Put under the exponent of a power of
two ``OFFSET`` a code ``c`` reads as the float16 number ``OFFSET + c``, so nothing is converted; a
product with rows of ones gives the sum of the other operand, which removes the offset again.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Weights are ``2**LIFT`` times what the largest score asks for, which keeps small ones normal.
LIFT = gl.constexpr(4.0)
# Queries are scaled so that their largest channel lies between this power of two and the next.
QUERY_EXPONENT = gl.constexpr(5.0)

TWO_BITS = gl.constexpr(
    """{
    .reg .b32 a, b, c;
    shl.b32 a, $8, 4;
    shr.u32 b, $8, 4;
    shr.u32 c, $8, 8;
    lop3.b32 $0, a, 0x00300030, 0x54005400, 0xEA;
    lop3.b32 $1, a, 0x00C000C0, 0x4C004C00, 0xEA;
    lop3.b32 $2, a, 0x03000300, 0x44004400, 0xEA;
    lop3.b32 $3, $8, 0x00C000C0, 0x4C004C00, 0xEA;
    lop3.b32 $4, b, 0x00300030, 0x54005400, 0xEA;
    lop3.b32 $5, b, 0x00C000C0, 0x4C004C00, 0xEA;
    lop3.b32 $6, b, 0x03000300, 0x44004400, 0xEA;
    lop3.b32 $7, c, 0x00C000C0, 0x4C004C00, 0xEA;
    }"""
)
FOUR_BITS = gl.constexpr(
    """{
    .reg .b32 a, b, c;
    shl.b32 a, $4, 4;
    shr.u32 b, $4, 4;
    shr.u32 c, $4, 8;
    lop3.b32 $0, a, 0x00F000F0, 0x54005400, 0xEA;
    lop3.b32 $1, $4, 0x00F000F0, 0x54005400, 0xEA;
    lop3.b32 $2, b, 0x00F000F0, 0x54005400, 0xEA;
    lop3.b32 $3, c, 0x00F000F0, 0x54005400, 0xEA;
    }"""
)
EIGHT_BITS = gl.constexpr(
    """{
    .reg .b32 a, b;
    shl.b32 a, $2, 2;
    shr.u32 b, $2, 6;
    lop3.b32 $0, a, 0x03FC03FC, 0x5C005C00, 0xEA;
    lop3.b32 $1, b, 0x03FC03FC, 0x5C005C00, 0xEA;
    }"""
)
FLOAT8 = gl.constexpr(
    """{
    .reg .b32 a;
    .reg .b16 low, high;
    prmt.b32 a, $2, 0, 0x3120;
    mov.b32 {low, high}, a;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
    }"""
)
TRANSPOSE = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")


@gluon.constexpr_function
def field_offset(bits, field):
    """What a code reads as above its value; ``bits`` 0 stands for float8."""
    return {0: (0.0,), 2: (64.0, 16.0, 4.0, 16.0), 4: (64.0, 64.0), 8: (256.0,)}[bits][field]


@gluon.constexpr_function
def group_of(position, length, groups):
    """Which of a block's token groups a position belongs to."""
    return position * groups // length


@gluon.constexpr_function
def fields(bits):
    """Codes of one byte."""
    return 8 // bits if bits else 1


@gluon.jit
def _unpack(units, BITS: gl.constexpr):
    """Split units ``[M, K]`` into float16 tiles: the even channels' fields, then the odd ones'."""
    if BITS == 2:
        result = gl.inline_asm_elementwise(
            TWO_BITS,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [units],
            dtype=(
                gl.float16,
                gl.float16,
                gl.float16,
                gl.float16,
                gl.float16,
                gl.float16,
                gl.float16,
                gl.float16,
            ),
            is_pure=True,
            pack=2,
        )
    elif BITS == 4:
        result = gl.inline_asm_elementwise(
            FOUR_BITS,
            "=&r,=&r,=&r,=&r,r",
            [units],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        result = gl.inline_asm_elementwise(
            FLOAT8 if BITS == 0 else EIGHT_BITS,
            "=&r,=&r,r",
            [units],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    return result


@gluon.jit
def _halves(words):
    """Split 32-bit words into the float16 numbers of their low and high halves."""
    low = (words & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    high = (words >> 16).to(gl.int16).to(gl.float16, bitcast=True)
    return low, high


@gluon.jit
def _as_operand(tile, N: gl.constexpr, layout: gl.constexpr):
    """Turn a product's float16 tile ``[16, N]`` into a second operand, in registers.

    Eight by eight transposes move the numbers; naming their dimensions the other way round then
    restores the tile's meaning.
    """
    moved = gl.inline_asm_elementwise(
        TRANSPOSE, "=r,r", [tile], dtype=tile.dtype, is_pure=True, pack=2
    )
    named = gl.permute(gl.reshape(moved, [2, 8, N // 8, 8]), (0, 3, 2, 1))
    return gl.convert_layout(gl.reshape(named, [16, N]), layout, assert_trivial=True)


@gluon.jit
def _copy_tile(target, address, ROWS: gl.constexpr, COLUMNS: gl.constexpr, PITCH: gl.constexpr):
    """Start copying ``ROWS`` rows of int16 columns, PITCH apart."""
    WIDE: gl.constexpr = COLUMNS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [1, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    places = row[:, None] * PITCH + column[None, :]
    async_copy.async_copy_global_to_shared(target, address + places)


@gluon.jit
def _pairs(line, COUNT: gl.constexpr):
    """See a line of float16 numbers as 32-bit words of two neighbours."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return line._reinterpret(gl.int32, [COUNT // 2], plain)


@gluon.jit
def _copy_line(target, address, COUNT: gl.constexpr):
    """Start copying COUNT adjacent float16 numbers."""
    EACH: gl.constexpr = COUNT // 64 if COUNT > 64 else 1
    layout: gl.constexpr = gl.BlockedLayout([EACH], [32], [1], [0])
    places = gl.arange(0, COUNT // 2, layout=layout)
    async_copy.async_copy_global_to_shared(_pairs(target, COUNT), address + places)


@gluon.jit
def _address(table, block, place, dtype: gl.constexpr):
    """Pointer to what lies ``place`` elements into a block."""
    base = gl.load(table + block).to(gl.pointer_type(dtype))
    return gl.multiple_of(base, 16) + place


@gluon.jit
def _copy_block(buffers, tables, piece, slab, META: gl.constexpr):
    """Start copying one piece of a block: codes, scales and zeros."""
    ROWS: gl.constexpr = META[2]
    PARTS: gl.constexpr = META[4]
    UNITS: gl.constexpr = META[6] // 2
    WIDTH: gl.constexpr = UNITS // PARTS
    WORDS: gl.constexpr = META[3] // 2
    PIECES: gl.constexpr = META[7]
    block = piece // PIECES
    place = slab * PIECES + piece % PIECES
    start = _address(tables[0], block, place * (ROWS * UNITS), gl.int16)
    for part in gl.static_range(0, PARTS):
        _copy_tile(buffers[0].index(part), start + part * WIDTH, ROWS, WIDTH, UNITS)
    if META[8]:
        place = slab
    _copy_line(buffers[1], _address(tables[1], block, place * WORDS, gl.int32), WORDS * 2)
    if META[5]:
        _copy_line(buffers[2], _address(tables[2], block, place * WORDS, gl.int32), WORDS * 2)


@gluon.jit
def _buffers(META: gl.constexpr):
    """Reserve shared memory for one piece: codes ``[PARTS, ROWS, units]``, scales, zeros."""
    WIDTH: gl.constexpr = META[6] // 2 // META[4]
    WIDE: gl.constexpr = WIDTH if WIDTH < 64 else 64
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // WIDE, WIDE // 8, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    codes = gl.allocate_shared_memory(gl.int16, [META[4], META[2], WIDTH], swizzled)
    scales = gl.allocate_shared_memory(gl.float16, [META[3]], plain)
    zeros = scales
    if META[5]:
        zeros = gl.allocate_shared_memory(gl.float16, [META[3]], plain)
    return codes, scales, zeros


@gluon.jit
def _rows(slab, kv_heads, groups, steps, N: gl.constexpr, layout: gl.constexpr):
    """Of the query rows: query head, step, row of the scratch, and whether it exists."""
    index = gl.program_id(2) * N + gl.arange(0, N, layout=layout)
    heads = (slab % kv_heads) * groups + index // steps
    return heads, index % steps, slab * (groups * steps) + index, index < groups * steps


@gluon.jit
def _load_query(
    query,
    strides,
    slab,
    kv_heads,
    groups,
    steps,
    D: gl.constexpr,
    N: gl.constexpr,
    layout: gl.constexpr,
):
    """Load the query rows as operands ``[D / 2, N]``: even and odd channels, model dtype."""
    dtype: gl.constexpr = query.dtype.element_ty
    heads, step, _, valid = _rows(slab, kv_heads, groups, steps, N, gl.SliceLayout(0, layout))
    offset = (slab // kv_heads) * strides[0] + heads * strides[1] + step * strides[2]
    unit = gl.arange(0, D // 2, layout=gl.SliceLayout(1, layout))
    places = offset[None, :] // 2 + unit[:, None]
    pairs = query.to(gl.pointer_type(gl.int32), bitcast=True)
    words = gl.load(pairs + places, mask=valid[None, :], other=0)
    even = (words & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    odd = (words >> 16).to(gl.int16).to(dtype, bitcast=True)
    return even, odd


@gluon.jit
def _normalize(even, odd):
    """Queries as float16 near ``2**QUERY_EXPONENT``, and the exponents taken from each row."""
    largest = gl.max(gl.maximum(gl.abs(even.to(gl.float32)), gl.abs(odd.to(gl.float32))), 0)
    finite = gl.where(largest > 0.0, largest, 1.0)
    exponent = gl.floor(gl.log2(finite)) - QUERY_EXPONENT
    factor = gl.exp2(-exponent)[None, :]
    first = (even.to(gl.float32) * factor).to(gl.float16)
    second = (odd.to(gl.float32) * factor).to(gl.float16)
    return first, second, exponent


@gluon.jit
def _soft_cap(scores, cap):
    """``cap * tanh(scores / cap)`` of base-2 scores and cap; stays finite for any score."""
    return cap - 2.0 * cap / (gl.exp2(scores * (2.0 * 1.4426950408889634 / cap)) + 1.0)


@gluon.jit
def _row_sums(even, odd, N: gl.constexpr, mma: gl.constexpr, left: gl.constexpr):
    """Sum the operands over all channels, once in every row of a tile ``[16, N]``."""
    K: gl.constexpr = even.shape[0]
    ones = gl.full([16, K], 1.0, gl.float16, layout=left)
    total = gl.zeros([16, N], gl.float32, layout=mma)
    return mma_v2(ones, odd, mma_v2(ones, even, total))


@gluon.jit
def _fold(
    even,
    odd,
    buffers,
    group,
    META: gl.constexpr,
    N: gl.constexpr,
    mma: gl.constexpr,
    left: gl.constexpr,
    right: gl.constexpr,
):
    """Fold one token group's channel scales into the query.

    Returns:
        Even and odd operands ``[D / 2, N]``; what a score starts from but for the codes' offset,
        and the sum of the operands, both ``[16, N]`` with equal rows.
    """
    U: gl.constexpr = META[6] // 2
    pairs = _pairs(buffers[1], META[3]).slice(group * U, U)
    first, second = _halves(pairs.load(gl.SliceLayout(1, right)))
    low, high = even * first[:, None], odd * second[:, None]
    total = _row_sums(low, high, N, mma, left)
    base = gl.zeros([16, N], gl.float32, layout=mma)
    if META[5]:
        pairs = _pairs(buffers[2], META[3]).slice(group * U, U)
        first, second = _halves(pairs.load(gl.SliceLayout(0, left)))
        ones = gl.full([16, U], 1.0, gl.float16, layout=left)
        base = mma_v2(ones * second[None, :], odd, mma_v2(ones * first[None, :], even, base))
    return low, high, base, total


@gluon.jit
def _scores(
    even,
    odd,
    sums,
    buffers,
    META: gl.constexpr,
    N: gl.constexpr,
    mma: gl.constexpr,
    left: gl.constexpr,
    right: gl.constexpr,
):
    """Dot products of the query with a block of keys, as tiles ``[16, N]`` and what they lack.

    Returns:
        Tiles in the order of their tokens. And addends with equal rows, number
        ``i * groups + group`` for field i of the bytes and the token group; keeping them apart
        lets the products begin at once.
    """
    BITS: gl.constexpr = META[0]
    ROWS: gl.constexpr = META[2]
    COUNT: gl.constexpr = fields(BITS)
    HALF: gl.constexpr = 0.0 if META[5] or BITS == 0 else 2.0 ** (BITS - 1)
    GROUPS: gl.constexpr = META[3] // META[6] if META[1] else 1
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    zero = gl.zeros([16, N], gl.float32, layout=mma)
    queries = ()
    if META[1]:
        for group in gl.static_range(0, GROUPS):
            queries = queries + (_fold(even, odd, buffers, group, META, N, mma, left, right),)
    else:
        queries = ((even, odd, zero, sums),)
    addends = ()
    for i in gl.static_range(0, COUNT):
        for group in gl.static_range(0, GROUPS):
            side = queries[group]
            addends = addends + (side[2] - side[3] * (field_offset(BITS, i) + HALF),)
    tiles = ()
    for r in gl.static_range(0, ROWS // 16):
        codes = _unpack(buffers[0].index(0).slice(16 * r, 16).load(left), BITS)
        for i in gl.static_range(0, COUNT):
            side = queries[group_of(i * ROWS + 16 * r, ROWS * COUNT, GROUPS)]
            tile = mma_v2(codes[COUNT + i], side[1], mma_v2(codes[i], side[0], zero))
            if not META[1]:
                scale = buffers[1].slice(i * ROWS + 16 * r, 16).load(rows).to(gl.float32)
                tile = (tile + addends[i] if BITS else tile) * scale[:, None]
                if META[5]:
                    zeros = buffers[2].slice(i * ROWS + 16 * r, 16).load(rows).to(gl.float32)
                    tile += zeros[:, None] * sums
            tiles = tiles + (tile,)
    if not META[1]:
        # Scales differ from token to token, so nothing is left to add.
        addends = ()
        for _ in gl.static_range(0, COUNT):
            addends = addends + (zero,)
    ordered = ()
    for i in gl.static_range(0, COUNT):
        for r in gl.static_range(0, ROWS // 16):
            ordered = ordered + (tiles[r * COUNT + i],)
    return ordered, addends


@gluon.jit
def _highest(
    tiles, addends, COUNT: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, mma: gl.constexpr
):
    """Largest dot product of each column, ``[N]``; addends are added to maxima."""
    STRIPS: gl.constexpr = len(tiles) // COUNT
    result = gl.full([16, N], float("-inf"), gl.float32, layout=mma)
    for i in gl.static_range(0, COUNT):
        for group in gl.static_range(0, GROUPS):
            largest = gl.full([16, N], float("-inf"), gl.float32, layout=mma)
            for r in gl.static_range(0, STRIPS):
                if group_of(i * STRIPS + r, STRIPS * COUNT, GROUPS) == group:
                    largest = gl.maximum(largest, tiles[i * STRIPS + r])
            result = gl.maximum(result, largest + addends[i * GROUPS + group])
    return gl.max(result, 0)


@gluon.jit
def _cap(
    tiles,
    addends,
    factor,
    added,
    softcap,
    META: gl.constexpr,
    N: gl.constexpr,
    mma: gl.constexpr,
):
    """Finish the scores of all tiles and bound them; nothing is left to add."""
    COUNT: gl.constexpr = fields(META[0])
    GROUPS: gl.constexpr = len(addends) // COUNT
    TILES: gl.constexpr = len(tiles)
    capped = ()
    for k in gl.static_range(0, TILES):
        addend = addends[k * COUNT // TILES * GROUPS + group_of(k, TILES, GROUPS)]
        scores = (tiles[k] + addend) * factor[None, :] + added[None, :]
        capped = capped + (_soft_cap(scores, softcap),)
    zeros = ()
    for _ in gl.static_range(0, COUNT * GROUPS):
        zeros = zeros + (gl.zeros([16, N], gl.float32, layout=mma),)
    return capped, zeros


@gluon.jit
def _weigh(weights, buffers, part, where, META: gl.constexpr, mma: gl.constexpr):
    """Fold the scales of one part's tokens into their weights; also the weighted zeros."""
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    PARTS: gl.constexpr = META[4]
    if PARTS == 2:
        scale = _halves(_pairs(buffers[1], META[3]).slice(where, 16).load(rows))[part]
    else:
        scale = buffers[1].slice(where, 16).load(rows)
    folded = weights.to(gl.float16) * scale[:, None]
    zeros = weights
    if META[5]:
        if PARTS == 2:
            pairs = _halves(_pairs(buffers[2], META[3]).slice(where, 16).load(rows))
            zero = pairs[part].to(gl.float32)
        else:
            zero = buffers[2].slice(where, 16).load(rows).to(gl.float32)
        zeros = weights * zero[:, None]
    return folded, zeros


@gluon.jit
def _weights(
    tiles,
    slope,
    bases,
    decay,
    total,
    zeros,
    buffers,
    KEY_FIELDS: gl.constexpr,
    META: gl.constexpr,
    N: gl.constexpr,
    mma: gl.constexpr,
    left: gl.constexpr,
    right: gl.constexpr,
):
    """Turn scores into operands for the values.

    Returns:
        Operands of tile k and part p at ``k * PARTS + p``; per part what the codes' offsets add,
        ``[16, N]`` with equal rows, and the weighted zeros; the sum of the weights, by row.
    """
    BITS: gl.constexpr = META[0]
    PARTS: gl.constexpr = META[4]
    HALF: gl.constexpr = 0.0 if META[5] or BITS == 0 else 2.0 ** (BITS - 1)
    TILES: gl.constexpr = len(tiles)
    GROUPS: gl.constexpr = len(bases) // KEY_FIELDS
    total = total * decay[None, :]
    offsets = ()
    added = ()
    for part in gl.static_range(0, PARTS):
        offsets = offsets + (gl.zeros([16, N], gl.float32, layout=mma),)
        added = added + (zeros[part] * decay[None, :],)
    operands = ()
    for k in gl.static_range(0, TILES):
        base = bases[k * KEY_FIELDS // TILES * GROUPS + group_of(k, TILES, GROUPS)]
        tile = gl.exp2(tiles[k] * slope[None, :] + base)
        total += tile
        minus = gl.full(
            [16, 16],
            -(field_offset(BITS, k * fields(BITS) // TILES) + HALF),
            gl.float16,
            layout=left,
        )
        moved = ()
        sums = ()
        for part in gl.static_range(0, PARTS):
            folded, weighted = _weigh(tile, buffers, part, 16 * k, META, mma)
            operand = _as_operand(folded, N, right)
            operands = operands + (operand,)
            if BITS:
                moved = moved + (mma_v2(minus, operand, offsets[part]),)
            else:
                moved = moved + (offsets[part],)
            sums = sums + (added[part] + weighted if META[5] else added[part],)
        offsets = moved
        added = sums
    return operands, offsets, added, total


@gluon.jit
def _accumulate(
    outputs,
    operands,
    offsets,
    decay,
    buffers,
    META: gl.constexpr,
    left: gl.constexpr,
):
    """Add a block of values: outputs are per part the even and odd channels ``[units, N]``."""
    BITS: gl.constexpr = META[0]
    ROWS: gl.constexpr = META[2]
    COUNT: gl.constexpr = fields(BITS)
    PARTS: gl.constexpr = META[4]
    STRIPS: gl.constexpr = ROWS // 16
    result = ()
    for part in gl.static_range(0, PARTS):
        even = outputs[2 * part] * decay[None, :]
        odd = outputs[2 * part + 1] * decay[None, :]
        for r in gl.static_range(0, STRIPS):
            units = buffers[0].index(part).slice(16 * r, 16).permute([1, 0]).load(left)
            codes = _unpack(units, BITS)
            for i in gl.static_range(0, COUNT):
                operand = operands[(i * STRIPS + r) * PARTS + part]
                even = mma_v2(codes[i], operand, even)
                odd = mma_v2(codes[COUNT + i], operand, odd)
        # Every row of the offsets is the same.
        lacking = gl.max(offsets[part], 0)[None, :]
        result = result + (even + lacking, odd + lacking)
    return result


@gluon.jit
def _packed(
    query,
    shift,
    key_tables,
    value_tables,
    block_counts,
    partial,
    strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    slab,
    split,
    splits,
    column,
    columns,
    key_buffers,
    value_buffers,
    D: gl.constexpr,
    N: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    OVERLAP: gl.constexpr,
    KEYS: gl.constexpr,
    VALUES: gl.constexpr,
    mma: gl.constexpr,
    left: gl.constexpr,
    right: gl.constexpr,
):
    """Walk this split's share of the row's packed blocks; returns the largest score and the sum."""
    head: gl.constexpr = gl.SliceLayout(0, mma)
    PARTS: gl.constexpr = VALUES[4]
    U: gl.constexpr = D // 2 // PARTS
    count = gl.load(block_counts + slab // kv_heads) * KEYS[7]
    first = split * count // splits
    last = (split + 1) * count // splits
    if first < last:
        _copy_block(key_buffers, key_tables, first, slab, KEYS)
    async_copy.commit_group()
    if first < last:
        _copy_block(value_buffers, value_tables, first, slab, VALUES)
    async_copy.commit_group()
    even, odd = _load_query(query, strides, slab, kv_heads, groups, steps, KEYS[6], N, right)
    even, odd, exponent = _normalize(even, odd)
    factor = scaling * gl.exp2(gl.convert_layout(exponent, head))
    sums = _row_sums(even, odd, N, mma, left)
    _, _, row, valid = _rows(slab, kv_heads, groups, steps, N, head)
    added = gl.zeros([N], gl.float32, layout=head)
    if HAS_SHIFT:
        added = gl.load(shift + row, mask=valid, other=0.0) * scaling
    maximum = gl.full([N], float("-inf"), gl.float32, layout=head)
    total = gl.zeros([16, N], gl.float32, layout=mma)
    outputs = ()
    zeros = ()
    for _ in gl.static_range(0, PARTS):
        nothing = gl.zeros([U, N], gl.float32, layout=mma)
        outputs = outputs + (nothing, nothing)
        zeros = zeros + (total,)
    for block in range(first, last):
        async_copy.wait_group(1)
        tiles, addends = _scores(even, odd, sums, key_buffers, KEYS, N, mma, left, right)
        if block + 1 < last:
            _copy_block(key_buffers, key_tables, block + 1, slab, KEYS)
        async_copy.commit_group()
        if HAS_SOFTCAP:
            tiles, addends = _cap(tiles, addends, factor, added, softcap, KEYS, N, mma)
        COUNT: gl.constexpr = fields(KEYS[0])
        GROUPS: gl.constexpr = len(addends) // COUNT
        largest = _highest(tiles, addends, COUNT, GROUPS, N, mma)
        slope, constant = factor, added
        if HAS_SOFTCAP:
            slope = gl.full([N], 1.0, gl.float32, layout=head)
            constant = gl.zeros([N], gl.float32, layout=head)
        largest = gl.maximum(maximum, largest * slope + (constant - LIFT))
        decay = gl.exp2(maximum - largest)
        maximum = largest
        bases = ()
        for i in gl.static_range(0, COUNT * GROUPS):
            bases = bases + (addends[i] * slope[None, :] + (constant - maximum)[None, :],)
        async_copy.wait_group(1)
        operands, offsets, zeros, total = _weights(
            tiles,
            slope,
            bases,
            decay,
            total,
            zeros,
            value_buffers,
            COUNT,
            VALUES,
            N,
            mma,
            left,
            right,
        )
        outputs = _accumulate(outputs, operands, offsets, decay, value_buffers, VALUES, left)
        if block + 1 < last:
            _copy_block(value_buffers, value_tables, block + 1, slab, VALUES)
        async_copy.commit_group()
    if OVERLAP:
        gdc_launch_dependents()
    unit = gl.arange(0, U, layout=gl.SliceLayout(1, mma))
    places = (row * columns + column)[None, :] * D + 2 * unit[:, None]
    for part in gl.static_range(0, PARTS):
        base = gl.zeros([N], gl.float32, layout=head)
        if VALUES[5]:
            base = gl.sum(zeros[part], 0)
        for odd_one in gl.static_range(0, 2):
            output = outputs[2 * part + odd_one] + base[None, :]
            target = partial + places + (2 * U * part + odd_one)
            gl.store(target, output, mask=valid[None, :])
    return maximum, gl.sum(total, 0)


@gluon.jit
def _copy_exact(target, base, stride, start, count, TOKENS: gl.constexpr, D: gl.constexpr):
    """Start copying TOKENS exact slots; those past the count become zero."""
    WIDE: gl.constexpr = D // 8 if D < 256 else 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [1, 1], [1, 0])
    slot = start + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    places = slot[:, None].to(gl.int64) * stride + channel[None, :]
    mask = (slot < count)[:, None] & (channel < D)[None, :]
    async_copy.async_copy_global_to_shared(target, base + places, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _exact(
    query,
    exact_keys,
    exact_values,
    exact_counts,
    partial,
    strides,
    key_strides,
    value_strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    slab,
    split,
    columns,
    key_buffer,
    value_buffer,
    D: gl.constexpr,
    N: gl.constexpr,
    SLOTS: gl.constexpr,
    TOKENS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    mma: gl.constexpr,
    left: gl.constexpr,
    right: gl.constexpr,
):
    """Attend to SLOTS exact slots, causal among the current tokens."""
    dtype: gl.constexpr = query.dtype.element_ty
    head: gl.constexpr = gl.SliceLayout(0, mma)
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    keys = key_buffer._reinterpret(dtype, [TOKENS, D], swizzled)
    values = value_buffer._reinterpret(dtype, [TOKENS, D], swizzled)
    batch = slab // kv_heads
    count = gl.load(exact_counts + batch)
    key_base = exact_keys + batch * key_strides[0] + (slab % kv_heads) * key_strides[1]
    value_base = exact_values + batch * value_strides[0] + (slab % kv_heads) * value_strides[1]
    heads, step, _, valid = _rows(slab, kv_heads, groups, steps, N, gl.SliceLayout(0, right))
    offset = batch * strides[0] + heads * strides[1] + step * strides[2]
    channel = gl.arange(0, D, layout=gl.SliceLayout(1, right))
    queries = gl.load(query + offset[None, :] + channel[:, None], mask=valid[None, :], other=0.0)
    _, step, row, valid = _rows(slab, kv_heads, groups, steps, N, head)
    limit = count - (steps - 1 - step)
    maximum = gl.full([N], float("-inf"), gl.float32, layout=head)
    total = gl.zeros([16, N], gl.float32, layout=mma)
    output = gl.zeros([D, N], gl.float32, layout=mma)
    for start in range(split * SLOTS, gl.minimum(split * SLOTS + SLOTS, count), TOKENS):
        gl.thread_barrier()
        _copy_exact(keys, key_base, key_strides[2], start, count, TOKENS, D)
        _copy_exact(values, value_base, value_strides[2], start, count, TOKENS, D)
        async_copy.wait_group(0)
        for r in gl.static_range(0, TOKENS // 16):
            tile = gl.zeros([16, N], gl.float32, layout=mma)
            tile = mma_v2(keys.slice(16 * r, 16).load(left), queries, tile) * scaling
            if HAS_SOFTCAP:
                tile = _soft_cap(tile, softcap)
            slot = start + 16 * r + gl.arange(0, 16, layout=gl.SliceLayout(1, mma))
            tile = gl.where(slot[:, None] < limit[None, :], tile, float("-inf"))
            largest = gl.maximum(maximum, gl.max(tile, 0))
            finite = gl.where(largest == float("-inf"), 0.0, largest)
            decay = gl.exp2(maximum - finite)
            maximum = largest
            weights = gl.exp2(tile - finite[None, :])
            total = total * decay[None, :] + weights
            operand = _as_operand(weights.to(dtype), N, right)
            loaded = values.slice(16 * r, 16).permute([1, 0]).load(left)
            output = mma_v2(loaded, operand, output * decay[None, :])
    channel = gl.arange(0, D, layout=gl.SliceLayout(1, mma))
    places = (row * columns + split)[None, :] * D + channel[:, None]
    gl.store(partial + places, output, mask=valid[None, :])
    return maximum, gl.sum(total, 0)


@gluon.jit(do_not_specialize=["splits"])
def attend(
    query,
    packed_query,
    shift,
    key_tables,
    value_tables,
    block_counts,
    exact_keys,
    exact_values,
    exact_counts,
    partial,
    maxima,
    totals,
    query_strides,
    packed_query_strides,
    key_strides,
    value_strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    exact_splits,
    splits,
    D: gl.constexpr,
    N: gl.constexpr,
    SLOTS: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    OVERLAP: gl.constexpr,
    KEYS: gl.constexpr,
    VALUES: gl.constexpr,
):
    """Online softmax over one split: ``o = sum 2**(s - m) v``, ``l = sum 2**(s - m)``, ``m``.

    The first ``exact_splits`` programs of a KV head share the exact slots, the other ``splits``
    its packed blocks. KEYS and VALUES are what ``streamed.describe`` returns.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    head: gl.constexpr = gl.SliceLayout(0, mma)
    KEY_BYTES: gl.constexpr = KEYS[2] * KEYS[6]
    VALUE_BYTES: gl.constexpr = VALUES[2] * VALUES[6]
    BYTES: gl.constexpr = KEY_BYTES if KEY_BYTES < VALUE_BYTES else VALUE_BYTES
    TOKENS: gl.constexpr = BYTES // (2 * D)
    split = gl.program_id(0)
    slab = gl.program_id(1).to(gl.int64)
    columns = exact_splits + splits
    if OVERLAP:
        # Launched while the kernel before it ran, which may have written the query.
        gdc_wait()
    key_buffers = _buffers(KEYS)
    value_buffers = _buffers(VALUES)
    _, _, row, valid = _rows(slab, kv_heads, groups, steps, N, head)
    if split < exact_splits:
        maximum, total = _exact(
            query,
            exact_keys,
            exact_values,
            exact_counts,
            partial,
            query_strides,
            key_strides,
            value_strides,
            scaling,
            softcap,
            kv_heads,
            groups,
            steps,
            slab,
            split,
            columns,
            key_buffers[0],
            value_buffers[0],
            D,
            N,
            SLOTS,
            TOKENS,
            HAS_SOFTCAP,
            mma,
            left,
            right,
        )
        gl.store(maxima + row * columns + split, maximum, mask=valid)
        gl.store(totals + row * columns + split, total, mask=valid)
    else:
        maximum, total = _packed(
            packed_query,
            shift,
            key_tables,
            value_tables,
            block_counts,
            partial,
            packed_query_strides,
            scaling,
            softcap,
            kv_heads,
            groups,
            steps,
            slab,
            split - exact_splits,
            splits,
            split,
            columns,
            key_buffers,
            value_buffers,
            D,
            N,
            HAS_SHIFT,
            HAS_SOFTCAP,
            OVERLAP,
            KEYS,
            VALUES,
            mma,
            left,
            right,
        )
        gl.store(maxima + row * columns + split, maximum, mask=valid)
        gl.store(totals + row * columns + split, total, mask=valid)
