"""Decode attention over product-quantized blocks: centroids from shared memory to tensor cores."""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Queries are scaled so that their largest channel lies between this power of two and the next.
QUERY_EXPONENT = gl.constexpr(5.0)
ENTRIES = gl.constexpr(256)
SPREAD = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")


def _key_gather() -> str:
    """Four words of codes to the sixteen centroids that a lane owns of a token, in PTX.

    $0 to $15 centroids, $16 to $19 codes, then eight copies each of: the selector of the lane's
    order, the low address bytes of its first four columns, the table's address. Tokens 4 to 7 read
    what tokens 0 to 3 read four loads later or earlier, so theirs change places: register ``j`` of
    a token holds column ``j ^ (token % 4)`` of eight.
    """
    text = [
        "{",
        ".reg .b32 s, o, w, x, a;",
        ".reg .b32 t0, t1, t2, t3, t4, t5, t6, t7;",
        ".reg .pred p;",
        "and.b32 a, $20, 4;",
        "setp.ne.u32 p, a, 0;",
        "xor.b32 s, $20, 0x4444;",
        "xor.b32 o, $28, 0x10101010;",
    ]
    for half in range(2):
        first, second = 16 + 2 * half, 17 + 2 * half
        text.append(f"prmt.b32 w, ${first}, ${second}, $20;")
        text.append(f"prmt.b32 x, ${first}, ${second}, s;")
        for v, (word, low) in enumerate((("w", "$28"), ("x", "o"))):
            for b, selector in enumerate(("0xCC04", "0xDD15", "0xEE26", "0xFF37")):
                text.append(f"prmt.b32 a, {word}, {low}, {selector};")
                text.append("add.u32 a, a, $36;")
                text.append(f"ld.shared.b32 t{4 * v + b}, [a+{128 * half}];")
        for v, b in itertools.product(range(2), range(4)):
            # Result tensor b, its register of half and v.
            own, other = f"t{4 * v + b}", f"t{4 * (1 - v) + b}"
            text.append(f"selp.b32 ${4 * b + 2 * half + v}, {other}, {own}, p;")
    return "\n".join([*text, "}"])


def _value_gather() -> str:
    """Two words of codes, of rows r and r + 8, to eight centroids, in PTX.

    $0 to $7 centroids, $8 and $9 codes, then four copies each of: selector, low address bytes,
    the table's address.
    """
    text = ["{", ".reg .b32 w, a;"]
    for high in range(2):
        text.append(f"prmt.b32 w, ${8 + high}, ${8 + high}, $10;")
        for i, selector in enumerate(("0xCC04", "0xDD15", "0xEE26", "0xFF37")):
            text.append(f"prmt.b32 a, w, $14, {selector};")
            text.append("add.u32 a, a, $18;")
            text.append(f"ld.shared.b32 ${2 * i + high}, [a+{65536 + 128 * high}];")
    return "\n".join([*text, "}"])


def _registers(outputs: int, inputs: int) -> str:
    """Constraints of an assembly whose outputs are written while inputs are still read."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


KEY_GATHER = gl.constexpr(_key_gather())
KEY_REGISTERS = gl.constexpr(_registers(16, 28))
VALUE_GATHER = gl.constexpr(_value_gather())
VALUE_REGISTERS = gl.constexpr(_registers(8, 14))


@gluon.constexpr_function
def warp_bases(warps, rank):
    """Bases of a layout whose first dimension is the warp."""
    return [[1 << i] + [0] * (rank - 1) for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def key_layout(warps):
    """Codes ``[W, 8, 32]`` as int16: a lane holds sixteen adjacent codes of one token."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4]]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 8, 32])


@gluon.constexpr_function
def value_layout(warps):
    """Codes ``[W, 8, 32]`` as int16: a lane holds words r and r + 8 of two tokens."""
    registers = [[0, 0, 1], [0, 0, 16], [0, 1, 0]]
    lanes = [[0, 2, 0], [0, 4, 0], [0, 0, 2], [0, 0, 4], [0, 0, 8]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 8, 32])


@gluon.constexpr_function
def weight_layout(warps):
    """Scores ``[W, 2, 4, 8]``: a copy for each component, heads, tokens."""
    registers = [[0, 0, 0, 1]]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 4), [], [warps, 2, 4, 8])


@gluon.constexpr_function
def four_layout(warps):
    """``[W, 2, 4, 4]``: as ``weight_layout`` for pairs of tokens."""
    lanes = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0]]
    return gl.DistributedLinearLayout([], lanes, warp_bases(warps, 4), [], [warps, 2, 4, 4])


@gluon.constexpr_function
def query_layout(warps):
    """Queries ``[W, 8, 128]``: a lane holds channels 16 l to 16 l + 15, and 64 further on."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 64]]
    lanes = [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 8, 128])


@gluon.constexpr_function
def row_layout(warps):
    """Queries or exact keys ``[W, 16, 128]``: a lane holds 32 adjacent channels of two rows."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 8, 0]]
    lanes = [[0, 0, 32], [0, 0, 64], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 16, 128])


@gluon.constexpr_function
def slot_layout(warps):
    """Exact values ``[W, 16, 128]``: a lane holds 16 adjacent channels of four slots."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 8, 0]]
    lanes = [[0, 2, 0], [0, 4, 0], [0, 0, 16], [0, 0, 32], [0, 0, 64]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 16, 128])


@gluon.constexpr_function
def lane_layout(warps):
    """``[W, 8, 4]``: lanes as the rows and column pairs of a product's tile."""
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([], lanes, warp_bases(warps, 3), [], [warps, 8, 4])


@gluon.jit
def _axis(DIM: gl.constexpr, SIZE: gl.constexpr, RANK: gl.constexpr, layout: gl.constexpr):
    """Index along one dimension of a tensor of three or four, the others of size 1."""
    if RANK == 3:
        if DIM == 0:
            index = gl.arange(0, SIZE, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
            result = index[:, None, None]
        elif DIM == 1:
            index = gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
            result = index[None, :, None]
        else:
            index = gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
            result = index[None, None, :]
    else:
        gl.static_assert(DIM > 0)
        if DIM == 1:
            inner: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, layout))
            result = gl.arange(0, SIZE, layout=gl.SliceLayout(0, inner))[None, :, None, None]
        elif DIM == 2:
            inner: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, layout))
            result = gl.arange(0, SIZE, layout=gl.SliceLayout(0, inner))[None, None, :, None]
        else:
            inner: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
            result = gl.arange(0, SIZE, layout=gl.SliceLayout(0, inner))[None, None, None, :]
    return result


@gluon.jit
def _fill(tables, key_codebook, value_codebook, head, W: gl.constexpr):
    """Start copying a head's codebooks, ``[256, 64]`` words of two components each: two groups.

    Columns of keys change places: those of eight adjacent codes that lane ``k`` of four reads in
    half ``q`` stand at ``32 q + 8 k``, so that the lanes of a load never share a bank.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [2, 2, 4, 2], [W, 1, 1, 1], [3, 2, 1, 0])
    chunk: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout)))
    half: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    entry: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    c = gl.arange(0, 8, layout=chunk)[None, None, None, :]
    k = gl.arange(0, 4, layout=lane)[None, None, :, None]
    q = gl.arange(0, 2, layout=half)[None, :, None, None]
    e = gl.arange(0, 256, layout=entry)[:, None, None, None]
    keys = key_codebook.to(gl.pointer_type(gl.int32), bitcast=True) + head * (256 * 64)
    values = value_codebook.to(gl.pointer_type(gl.int32), bitcast=True) + head * (256 * 64)
    keys += e * 64 + k * 16 + q * 8 + c
    values += e * 64 + q * 32 + k * 8 + c
    async_copy.async_copy_global_to_shared(tables.index(0), keys)
    async_copy.commit_group()
    async_copy.async_copy_global_to_shared(tables.index(1), values)
    async_copy.commit_group()


@gluon.jit
def _load_query(
    query,
    strides,
    slab,
    kv_heads,
    groups,
    steps,
    splits,
    W: gl.constexpr,
    left: gl.constexpr,
):
    """Query rows as operands ``[W, 16, 64]``, one for each half: four orders of channels each.

    Row ``4 g + h`` belongs to tokens whose number modulo 4 is ``g``, and meets their centroids in
    the order in which their lanes hold them: component ``place % 2`` of column ``16 l + 8 q + (j ^
    g)``, where ``l`` is the lane of four, ``q`` the half and ``j`` the register. A lane loads its
    columns once, exchanges neighbours if its ``g`` is odd, and renames them for ``g // 2``.
    """
    layout: gl.constexpr = query_layout(W)
    row, channel = _axis(1, 8, 3, layout), _axis(2, 128, 3, layout)
    h = gl.program_id(2) * 4 + row % 4
    head = (slab % kv_heads) * groups + h // steps
    base = query + (slab // kv_heads) * strides[0]
    spread = 0 * _axis(0, W, 3, layout)
    places = head * strides[1] + (h % steps) * strides[2] + channel + spread
    tile = gl.load(base + places, mask=h < groups * steps, other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(tile), 2)
    finite = gl.where(largest > 0.0, largest, 1.0)
    exponent = gl.floor(gl.log2(finite)) - QUERY_EXPONENT
    tile = (tile * gl.exp2(-exponent)[:, :, None]).to(gl.float16)
    # [W, 8 rows, component, lane 4, half, j / 4, j / 2 % 2, j % 2]
    named: gl.constexpr = [W, 8, 2, 4, 2, 2, 2, 2]
    first, second = gl.split(gl.reshape(tile, named))
    odd, _ = gl.split(gl.reshape(row // 4 + 0 * channel + spread, named))
    pairs = gl.join(gl.where(odd == 1, second, first), gl.where(odd == 1, first, second))
    even, uneven = gl.split(gl.permute(pairs, (0, 1, 2, 3, 4, 7, 5, 6)))
    a, c = gl.split(even)
    b, d = gl.split(uneven)
    # Registers of their own, where the compiler would share and move them: it cannot see the zero.
    apart = gl.inline_asm_elementwise(
        "xor.b32 $0, $1, $2;",
        "=r,r,r,r",
        [_four(b, a, d, c), splits >> 30],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )
    orders = gl.join(_four(a, b, c, d), apart)
    # [W, g / 2, 8 rows, j / 4, j / 2 % 2, j % 2, lane, component, half]
    ordered = gl.permute(orders, (0, 8, 1, 7, 6, 5, 3, 2, 4))
    lower, upper = gl.split(gl.reshape(ordered, [W, 16, 64, 2]))
    lower = gl.convert_layout(lower, left, assert_trivial=True)
    upper = gl.convert_layout(upper, left, assert_trivial=True)
    return lower, upper, gl.max(gl.reshape(exponent, [W, 2, 4]), 1)


@gluon.jit
def _four(a, b, c, d):
    """Join four tensors: two dimensions of size 2, the low bit of their number first."""
    return gl.join(gl.join(a, b), gl.join(c, d))


@gluon.jit
def _lane_constants(layout: gl.constexpr, KEYS: gl.constexpr, W: gl.constexpr):
    """Selector and low address bytes of each lane, int32 ``[W, 8, 32]`` in the codes' layout.

    A lane reads its codes in an order of its own: code ``j`` of eight is the one at ``j ^ r`` of
    keys, code ``i`` of four the one at ``i ^ k`` of values, where ``r`` is the token or ``k`` the
    pair of tokens that the lane holds. So the lanes of a load read different columns.
    """
    token, unit = _axis(1, 8, 3, layout), _axis(2, 32, 3, layout)
    warp = 0 * _axis(0, W, 3, layout)
    if KEYS:
        order = token + 0 * unit + warp
        selector = 0x3210 ^ (order * 0x1111)
        first = 32 * (unit // 8) + warp + 0 * token
        low = (first * 0x01010101) ^ 0x0C080400 ^ (order * 0x04040404)
    else:
        order = token // 2 + 0 * unit + warp
        selector = 0x3210 ^ (order * 0x1111)
        first = 16 * (unit % 16 // 2) + warp + 0 * token
        low = (first * 0x01010101) ^ 0x0C080400 ^ (order * 0x04040404)
    return selector, low


@gluon.jit
def _key_operand(units, selector, low, base, W: gl.constexpr, right: gl.constexpr):
    """Look up the centroids of eight tokens as operands ``[W, 64, 8]``, one for each half."""
    a, b, c, d = gl.inline_asm_elementwise(
        KEY_GATHER,
        KEY_REGISTERS,
        [units, selector, low, base],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=False,
        pack=8,
    )
    # [W, 8 tokens, (lane 4, half 2, v 2, component 2), b / 2, b % 2]
    both = gl.join(gl.join(a, c), gl.join(b, d))
    named = gl.reshape(both, [W, 8, 4, 2, 2, 2, 4])
    ordered = gl.permute(named, (0, 4, 6, 2, 5, 1, 3))
    lower, upper = gl.split(gl.reshape(ordered, [W, 64, 8, 2]))
    lower = gl.convert_layout(lower, right, assert_trivial=True)
    return lower, gl.convert_layout(upper, right, assert_trivial=True)


@gluon.jit
def _value_operand(tile, W: gl.constexpr, left: gl.constexpr):
    """Name looked-up centroids ``[W, 8, 32]`` as an operand ``[W, 16, 16]``.

    Rows are words of codes; the reduced dimension is token (odd ones last) and component.
    """
    named = gl.reshape(tile, [W, 4, 2, 16, 2])
    ordered = gl.permute(named, (0, 3, 2, 1, 4))
    return gl.convert_layout(gl.reshape(ordered, [W, 16, 16]), left, assert_trivial=True)


@gluon.jit
def _weight_operand(weights, W: gl.constexpr, full: gl.constexpr, right: gl.constexpr):
    """Weights ``[W, 4, 8]`` as an operand ``[W, 16, 8]`` whose columns are component and head.

    The reduced dimension is token and component; masks leave a column its own component.
    """
    half = gl.expand_dims(weights.to(gl.float16).to(gl.int16, bitcast=True), 1)
    both = (half | gl.zeros([W, 2, 4, 8], gl.int16, layout=full)).to(gl.float16, bitcast=True)
    named = gl.reshape(gl.join(both, both), [W, 2, 4, 4, 2, 2])
    ordered = gl.permute(named, (0, 4, 3, 5, 1, 2))
    return gl.convert_layout(gl.reshape(ordered, [W, 16, 8]), right, assert_trivial=True)


@gluon.jit
def _scores(acc, diagonal, W: gl.constexpr, full: gl.constexpr):
    """Of a product ``[W, 16, 8]`` the rows of each token's own order: ``[W, 4, 8]``."""
    own = gl.where(diagonal, acc, 0.0)
    summed = gl.sum(gl.reshape(own, [W, 4, 4, 8]), 1)
    return gl.convert_layout(summed, gl.SliceLayout(1, full), assert_trivial=True)


@gluon.jit
def _decay_tile(decay, W: gl.constexpr, four: gl.constexpr, lanes: gl.constexpr, mma: gl.constexpr):
    """Spread a factor per head ``[W, 4]`` over the output's tiles ``[W, 16, 8]``."""
    named: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, four))
    wide = gl.expand_dims(gl.convert_layout(decay, named, assert_trivial=True), 1)
    wide = gl.expand_dims(wide, 3) + gl.zeros([W, 2, 4, 4], gl.float32, layout=four)
    wide = gl.convert_layout(gl.reshape(wide, [W, 8, 4]), lanes, assert_trivial=True)
    source = (_axis(2, 4, 3, lanes) % 2) * 8 + 0 * _axis(1, 8, 3, lanes) + 0 * _axis(0, W, 3, lanes)
    even = gl.inline_asm_elementwise(
        SPREAD, "=f,f,r", [wide, source], dtype=gl.float32, is_pure=True, pack=1
    )
    odd = gl.inline_asm_elementwise(
        SPREAD, "=f,f,r", [wide, source + 4], dtype=gl.float32, is_pure=True, pack=1
    )
    columns = gl.reshape(gl.join(even, odd), [W, 8, 8])
    both = gl.permute(gl.join(columns, columns), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(both, [W, 16, 8]), mma, assert_trivial=True)


@gluon.jit
def _by_lane(tile, W: gl.constexpr):
    """Name the channels of ``[W, 16, 128]`` so that each lane of a product has what it loaded."""
    named = gl.permute(gl.reshape(tile, [W, 16, 4, 16, 2]), (0, 1, 3, 2, 4))
    return gl.reshape(named, [W, 16, 128])


@gluon.jit
def _load_slots(base, stride, start, count, W: gl.constexpr, layout: gl.constexpr):
    """Load 16 exact slots a warp, ``[W, 16, 128]``; those past the count are zero."""
    slot = start + 16 * _axis(0, W, 3, layout) + _axis(1, 16, 3, layout)
    places = slot.to(gl.int64) * stride + _axis(2, 128, 3, layout)
    return gl.load(base + places, mask=slot < count, other=0.0)


@gluon.jit
def _exact(
    query,
    exact_keys,
    exact_values,
    exact_counts,
    partial,
    maxima,
    totals,
    strides,
    key_strides,
    value_strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    slab,
    columns,
    W: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    mma: gl.constexpr,
):
    """Attend to the exact slots, causal among the current tokens, into the first W columns.

    A warp takes 16 slots at a time, straight from memory to operands: rows of a product are query
    rows, of which there are four, and channels stand in the order in which lanes load them.
    """
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    wide: gl.constexpr = row_layout(W)
    deep: gl.constexpr = slot_layout(W)
    rows_as: gl.constexpr = gl.SliceLayout(2, mma)
    batch, kv_head = slab // kv_heads, slab % kv_heads
    count = gl.load(exact_counts + batch)
    row = _axis(1, 16, 3, wide)
    index = gl.program_id(2) * 4 + row
    head = kv_head * groups + index // steps
    places = head * strides[1] + (index % steps) * strides[2] + _axis(2, 128, 3, wide)
    there = (row < 4) & (index < groups * steps)
    spread = 0 * _axis(0, W, 3, wide)
    tile = gl.load(query + batch * strides[0] + places + spread, mask=there, other=0.0)
    queries = gl.convert_layout(_by_lane(tile, W), left, assert_trivial=True)
    key_base = exact_keys + batch * key_strides[0] + kv_head * key_strides[1]
    value_base = exact_values + batch * value_strides[0] + kv_head * value_strides[1]
    row = _axis(1, 16, 3, mma)
    index = gl.program_id(2) * 4 + row
    limit = count - (steps - 1 - index % steps)
    maximum = gl.full([W, 16], float("-inf"), gl.float32, layout=rows_as)
    total = gl.zeros([W, 16], gl.float32, layout=rows_as)
    output = gl.zeros([W, 16, 128], gl.float32, layout=mma)
    for start in range(0, count, 16 * W):
        keys = _by_lane(_load_slots(key_base, key_strides[2], start, count, W, wide), W)
        keys = gl.convert_layout(gl.permute(keys, (0, 2, 1)), right, assert_trivial=True)
        values = _load_slots(value_base, value_strides[2], start, count, W, deep)
        values = gl.permute(gl.reshape(values, [W, 16, 8, 16]), (0, 1, 3, 2))
        values = gl.convert_layout(gl.reshape(values, [W, 16, 128]), right, assert_trivial=True)
        scores = mma_v2(queries, keys, gl.zeros([W, 16, 16], gl.float32, layout=mma)) * scaling
        if HAS_SOFTCAP:
            scores = _soft_cap(scores, softcap)
        slot = start + 16 * _axis(0, W, 3, mma) + _axis(2, 16, 3, mma)
        scores = gl.where(slot < limit, scores, float("-inf"))
        largest = gl.maximum(maximum, gl.max(scores, 2))
        finite = gl.where(largest == float("-inf"), 0.0, largest)
        decay = gl.exp2(maximum - finite)
        maximum = largest
        weights = gl.exp2(scores - finite[:, :, None])
        total = total * decay + gl.sum(weights, 2)
        operand = gl.convert_layout(weights.to(query.dtype.element_ty), left, assert_trivial=True)
        output = mma_v2(operand, values, output * decay[:, :, None])
    rows = slab * (groups * steps) + index
    there = (row < 4) & (index < groups * steps)
    place = _axis(2, 128, 3, mma)
    target = partial + (rows.to(gl.int64) * columns + _axis(0, W, 3, mma)) * 128
    gl.store(target + (place % 8 * 16 + place // 8), output, mask=there)
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, rows_as))[None, :]
    index = gl.program_id(2) * 4 + row
    there = (row < 4) & (index < groups * steps)
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, rows_as))[:, None]
    places = (slab * (groups * steps) + index) * columns + warp
    gl.store(maxima + places, maximum, mask=there)
    gl.store(totals + places, total, mask=there)


@gluon.jit
def _soft_cap(scores, cap):
    """``cap * tanh(scores / cap)`` of base-2 scores and cap; stays finite for any score."""
    return cap - 2.0 * cap / (gl.exp2(scores * (2.0 * 1.4426950408889634 / cap)) + 1.0)


@gluon.jit
def _point(table, unit, last, slab, TOKENS: gl.constexpr, PER_BLOCK: gl.constexpr):
    """Point at the codes of each warp's unit, ``[W, 1, 1]``; past the end at the last one."""
    SIZE: gl.constexpr = PER_BLOCK * TOKENS * 32
    unit = gl.maximum(gl.minimum(unit, last - 1), 0)
    where = gl.load(table + unit // PER_BLOCK).to(gl.pointer_type(gl.int16))
    where = gl.multiple_of(where, [16, 16, 16])
    return where + (slab * SIZE + (unit % PER_BLOCK) * (TOKENS * 32))


@gluon.jit
def _load_codes(where, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Load the codes of each warp's unit as tiles ``[W, 8 tokens, 32]`` of int16."""
    places = where + (_axis(1, 8, 3, layout) * 32 + _axis(2, 32, 3, layout))
    tiles = ()
    for group in gl.static_range(0, TOKENS // 8):
        tiles = tiles + (gl.load(places + group * 256),)
    return tiles


@gluon.jit(do_not_specialize=["splits"])
def attend(
    query,
    packed_query,
    shift,
    key_table,
    value_table,
    key_codebook,
    value_codebook,
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
    splits,
    columns,
    W: gl.constexpr,
    TOKENS: gl.constexpr,
    PER_BLOCK: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Online softmax over one split: ``o = sum 2**(s - m) v``, ``l = sum 2**(s - m)``, ``m``.

    A program owns four query rows of one KV head and a run of units of TOKENS, which its warps walk
    in turn; each warp leaves a result of its own. While the codebooks are on their way, the first
    program of a row attends to the exact slots. Shared memory holds the two codebooks and nothing
    else, so they stand at its beginning.

    With OVERLAP a launch may begin before the kernel ahead of it has ended: the codebooks are
    parameters, written long before, and all else is read and written after a wait.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    full: gl.constexpr = weight_layout(W)
    four: gl.constexpr = four_layout(W)
    lanes: gl.constexpr = lane_layout(W)
    keys_as: gl.constexpr = key_layout(W)
    values_as: gl.constexpr = value_layout(W)
    scores_as: gl.constexpr = gl.SliceLayout(1, full)
    heads_as: gl.constexpr = gl.SliceLayout(2, scores_as)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    tables = gl.allocate_shared_memory(gl.int32, [2, ENTRIES, 2, 4, 8], plain)
    split = gl.program_id(0)
    slab = gl.program_id(1)
    _fill(tables, key_codebook, value_codebook, slab % kv_heads, W)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    units = gl.load(block_counts + slab // kv_heads) * PER_BLOCK
    first = split * units // splits
    last = (split + 1) * units // splits
    warp_keys = _axis(0, W, 3, keys_as)
    warp_values = _axis(0, W, 3, values_as)
    slab_wide = slab.to(gl.int64)
    key_place = _point(key_table, first + warp_keys, last, slab_wide, TOKENS, PER_BLOCK)
    value_place = _point(value_table, first + warp_values, last, slab_wide, TOKENS, PER_BLOCK)
    codes = _load_codes(key_place, TOKENS, keys_as)
    if split == 0:
        _exact(
            query,
            exact_keys,
            exact_values,
            exact_counts,
            partial,
            maxima,
            totals,
            query_strides,
            key_strides,
            value_strides,
            scaling,
            softcap,
            kv_heads,
            groups,
            steps,
            slab_wide,
            columns,
            W,
            HAS_SOFTCAP,
            mma,
        )
    lower, upper, exponent = _load_query(
        packed_query, packed_query_strides, slab, kv_heads, groups, steps, splits, W, left
    )
    factor = scaling * gl.exp2(gl.convert_layout(exponent, heads_as, assert_trivial=True))
    base = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [split], dtype=gl.int32, is_pure=True, pack=1
    )
    key_selector, key_low = _lane_constants(keys_as, True, W)
    value_selector, value_low = _lane_constants(values_as, False, W)
    pair = _axis(1, 16, 3, right) // 2 % 4 + 0 * _axis(0, W, 3, right)
    component = gl.where(_axis(2, 8, 3, right) // 4 == 0, 0xFFFF, -0x10000)
    masks = ()
    for i in gl.static_range(0, 4):
        masks = masks + (gl.where(pair == i, component, 0),)
    diagonal = _axis(1, 16, 3, mma) // 4 == _axis(2, 8, 3, mma) % 4
    head = gl.program_id(2) * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, heads_as))
    valid = head < groups * steps
    scratch_row = slab * (groups * steps) + head
    added = gl.zeros([W, 4], gl.float32, layout=heads_as)
    if HAS_SHIFT:
        added += (gl.load(shift + scratch_row, mask=valid, other=0.0) * scaling)[None, :]
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, scores_as)))[:, None, None]
    maximum = gl.full([W, 4], float("-inf"), gl.float32, layout=heads_as)
    total = gl.zeros([W, 4, 8], gl.float32, layout=scores_as)
    nothing = gl.zeros([W, 16, 8], gl.float32, layout=mma)
    outputs = (nothing, nothing, nothing, nothing)
    async_copy.wait_group(1)
    gl.thread_barrier()
    for start in range(first, last, W):
        value_codes = _load_codes(value_place, TOKENS, values_as)
        key_unit, value_unit = start + W + warp_keys, start + W + warp_values
        key_place = _point(key_table, key_unit, last, slab_wide, TOKENS, PER_BLOCK)
        value_place = _point(value_table, value_unit, last, slab_wide, TOKENS, PER_BLOCK)
        there = start + warp < last
        tiles = ()
        largest = gl.full([W, 4, 8], float("-inf"), gl.float32, layout=scores_as)
        for group in gl.static_range(0, TOKENS // 8):
            first_keys, second_keys = _key_operand(
                codes[group], key_selector, key_low, base, W, right
            )
            zero = gl.zeros([W, 16, 8], gl.float32, layout=mma)
            acc = mma_v2(lower, first_keys, zero) + mma_v2(upper, second_keys, zero)
            tile = _scores(acc, diagonal, W, full) * factor[:, :, None] + added[:, :, None]
            if HAS_SOFTCAP:
                tile = _soft_cap(tile, softcap)
            tile = gl.where(there, tile, float("-inf"))
            largest = gl.maximum(largest, tile)
            tiles = tiles + (tile,)
        codes = _load_codes(key_place, TOKENS, keys_as)
        if start == first:
            async_copy.wait_group(0)
            gl.thread_barrier()
        new = gl.maximum(maximum, gl.max(largest, 2))
        finite = gl.where(new == float("-inf"), 0.0, new)
        decay = gl.exp2(maximum - finite)
        maximum = new
        total = total * decay[:, :, None]
        spread = _decay_tile(decay, W, four, lanes, mma)
        outputs = (
            outputs[0] * spread,
            outputs[1] * spread,
            outputs[2] * spread,
            outputs[3] * spread,
        )
        for group in gl.static_range(0, TOKENS // 8):
            weights = gl.exp2(tiles[group] - finite[:, :, None])
            total += weights
            dense = _weight_operand(weights, W, full, right)
            masked = ()
            for i in gl.static_range(0, 4):
                masked = masked + (
                    gl.inline_asm_elementwise(
                        "and.b32 $0, $1, $2;",
                        "=r,r,r,r",
                        [dense, masks[i]],
                        dtype=gl.float16,
                        is_pure=True,
                        pack=2,
                    ),
                )
            values = gl.inline_asm_elementwise(
                VALUE_GATHER,
                VALUE_REGISTERS,
                [value_codes[group], value_selector, value_low, base],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
                is_pure=False,
                pack=4,
            )
            for i in gl.static_range(0, 4):
                centroids = _value_operand(values[i], W, left)
                result = ()
                for slot in gl.static_range(0, 4):
                    result = result + (mma_v2(centroids, masked[i ^ slot], outputs[slot]),)
                outputs = result
    async_copy.wait_group(0)
    column = (1 + split) * W
    warp_out = _axis(0, W, 3, mma)
    word, place = _axis(1, 16, 3, mma), _axis(2, 8, 3, mma)
    index = gl.program_id(2) * 4 + place % 4
    rows = slab * (groups * steps) + index
    target = partial + (rows.to(gl.int64) * columns + column + warp_out) * 128
    for slot in gl.static_range(0, 4):
        channel = word * 4 + slot + place // 4 * 64
        gl.store(target + channel, outputs[slot], mask=index < groups * steps)
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, heads_as))[:, None]
    places = (scratch_row * columns)[None, :] + column + warp
    gl.store(maxima + places, maximum, mask=valid[None, :])
    gl.store(totals + places, gl.sum(total, 2), mask=valid[None, :])
