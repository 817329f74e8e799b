"""Decode attention over product-quantized blocks: centroids from shared memory to tensor cores."""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents

# Queries are scaled so that their largest channel lies between this power of two and the next.
QUERY_EXPONENT = gl.constexpr(5.0)
# Tokens that a warp reads between two updates of its maxima, and tokens of one product.
TOKENS = gl.constexpr(64)
GROUP = gl.constexpr(8)
ENTRIES = gl.constexpr(256)
SPREAD = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")


def _key_gather() -> str:
    """Four words of codes to the sixteen centroids that a lane owns of a token, in PTX.

    $0 to $15 centroids, $16 to $19 codes, then eight copies each of: the selector of the lane's
    order, the low address bytes of its first four columns, the table's address.
    """
    text = [
        "{",
        ".reg .b32 s, o, w, x, a;",
        "xor.b32 s, $20, 0x4444;",
        "xor.b32 o, $28, 0x10101010;",
    ]
    for half in range(2):
        first, second = 16 + 2 * half, 17 + 2 * half
        text.append(f"prmt.b32 w, ${first}, ${second}, $20;")
        text.append(f"prmt.b32 x, ${first}, ${second}, s;")
        for v, (word, low) in enumerate((("w", "$28"), ("x", "o"))):
            for b, selector in enumerate(("0xCC04", "0xDD15", "0xEE26", "0xFF37")):
                # Result tensor b, its register of half and v.
                text.append(f"prmt.b32 a, {word}, {low}, {selector};")
                text.append("add.u32 a, a, $36;")
                text.append(f"ld.shared.b32 ${4 * b + 2 * half + v}, [a+{128 * half}];")
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
    """Copy a head's codebooks into shared memory, ``[256, 64]`` words of two components each.

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
    tables.index(0).store(gl.load(keys + (e * 64 + k * 16 + q * 8 + c)))
    tables.index(1).store(gl.load(values + (e * 64 + q * 32 + k * 8 + c)))


@gluon.jit
def _load_query(query, strides, slab, kv_heads, groups, steps, W: gl.constexpr, left: gl.constexpr):
    """Query rows as an operand ``[W, 32, 128]``: eight orders of the channels, four rows each.

    Row ``4 g + h`` belongs to tokens whose number modulo 8 is ``g``, and meets their centroids in
    the order in which their lanes read them.
    """
    row = _axis(1, 32, 3, left)
    place = _axis(2, 128, 3, left)
    h, g = gl.program_id(2) * 4 + row % 4, row // 4
    lane, slot = (place // 2) % 4, place // 8
    channel = 16 * lane + (slot // 8) * 8 + ((slot % 8) ^ g) + 64 * (place % 2)
    head = (slab % kv_heads) * groups + h // steps
    base = query + (slab // kv_heads) * strides[0]
    places = head * strides[1] + (h % steps) * strides[2] + channel + 0 * _axis(0, W, 3, left)
    tile = gl.load(base + places, mask=h < groups * steps, other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(tile), 2)
    finite = gl.where(largest > 0.0, largest, 1.0)
    exponent = gl.floor(gl.log2(finite)) - QUERY_EXPONENT
    return (tile * gl.exp2(-exponent)[:, :, None]).to(gl.float16), exponent


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
    """Look up the centroids of eight tokens as an operand ``[W, 128, 8]``."""
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
    ordered = gl.permute(named, (0, 3, 4, 6, 2, 5, 1))
    return gl.convert_layout(gl.reshape(ordered, [W, 128, 8]), right, assert_trivial=True)


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

    A column takes the weight where the component of the reduced dimension is its own.
    """
    copies = gl.expand_dims(weights.to(gl.float16), 1)
    component = _axis(1, 2, 4, full)
    first = gl.where(component == 0, copies, 0.0)
    second = gl.where(component == 1, copies, 0.0)
    named = gl.reshape(gl.join(first, second), [W, 2, 4, 4, 2, 2])
    ordered = gl.permute(named, (0, 4, 3, 5, 1, 2))
    return gl.convert_layout(gl.reshape(ordered, [W, 16, 8]), right, assert_trivial=True)


@gluon.jit
def _scores(acc, diagonal, W: gl.constexpr, full: gl.constexpr):
    """Of a product ``[W, 32, 8]`` the rows of each token's own order: ``[W, 4, 8]``."""
    own = gl.where(diagonal, acc, 0.0)
    summed = gl.sum(gl.reshape(own, [W, 8, 4, 8]), 1)
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
def _point(table, unit, last, slab, PER_BLOCK: gl.constexpr):
    """Point at the codes of each warp's 64 tokens, ``[W, 1, 1]``; past the end at the last ones."""
    SIZE: gl.constexpr = PER_BLOCK * 64 * 32
    unit = gl.maximum(gl.minimum(unit, last - 1), 0)
    where = gl.load(table + unit // PER_BLOCK).to(gl.pointer_type(gl.int16))
    where = gl.multiple_of(where, [16, 16, 16])
    return where + (slab * SIZE + (unit % PER_BLOCK) * (64 * 32))


@gluon.jit
def _load_codes(where, layout: gl.constexpr):
    """Load the codes of each warp's 64 tokens as eight tiles ``[W, 8, 32]`` of int16."""
    places = where + (_axis(1, 8, 3, layout) * 32 + _axis(2, 32, 3, layout))
    tiles = ()
    for group in gl.static_range(0, 8):
        tiles = tiles + (gl.load(places + group * 256),)
    return tiles


@gluon.jit(do_not_specialize=["splits"])
def attend(
    query,
    shift,
    key_table,
    value_table,
    key_codebook,
    value_codebook,
    block_counts,
    partial,
    maxima,
    totals,
    strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    splits,
    columns,
    W: gl.constexpr,
    PER_BLOCK: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Online softmax over one split: ``o = sum 2**(s - m) v``, ``l = sum 2**(s - m)``, ``m``.

    A program owns four query rows of one KV head and a run of 64-token units, which its warps walk
    in turn; each warp leaves a result of its own. Shared memory holds the two codebooks and nothing
    else, so they stand at its beginning.
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
    operand, exponent = _load_query(query, strides, slab, kv_heads, groups, steps, W, left)
    exponent = gl.max(gl.reshape(exponent, [W, 8, 4]), 1)
    factor = scaling * gl.exp2(gl.convert_layout(exponent, heads_as, assert_trivial=True))
    base = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [split], dtype=gl.int32, is_pure=True, pack=1
    )
    key_selector, key_low = _lane_constants(keys_as, True, W)
    value_selector, value_low = _lane_constants(values_as, False, W)
    pair = _axis(1, 16, 3, right) // 2 % 4 + 0 * _axis(2, 8, 3, right) + 0 * _axis(0, W, 3, right)
    masks = ()
    for i in gl.static_range(0, 4):
        masks = masks + (gl.where(pair == i, -1, 0),)
    row = _axis(1, 32, 3, mma)
    diagonal = row // 4 == _axis(2, 8, 3, mma)
    head = gl.program_id(2) * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, heads_as))
    valid = head < groups * steps
    scratch_row = slab * (groups * steps) + head
    added = gl.zeros([W, 4], gl.float32, layout=heads_as)
    if HAS_SHIFT:
        added += (gl.load(shift + scratch_row, mask=valid, other=0.0) * scaling)[None, :]
    units = gl.load(block_counts + slab // kv_heads) * PER_BLOCK
    first = split * units // splits
    last = (split + 1) * units // splits
    warp_keys = _axis(0, W, 3, keys_as)
    warp_values = _axis(0, W, 3, values_as)
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, scores_as)))[:, None, None]
    maximum = gl.full([W, 4], float("-inf"), gl.float32, layout=heads_as)
    total = gl.zeros([W, 4, 8], gl.float32, layout=scores_as)
    nothing = gl.zeros([W, 16, 8], gl.float32, layout=mma)
    outputs = (nothing, nothing, nothing, nothing)
    gl.thread_barrier()
    slab_wide = slab.to(gl.int64)
    key_place = _point(key_table, first + warp_keys, last, slab_wide, PER_BLOCK)
    value_place = _point(value_table, first + warp_values, last, slab_wide, PER_BLOCK)
    codes = _load_codes(key_place, keys_as)
    for start in range(first, last, W):
        value_codes = _load_codes(value_place, values_as)
        key_place = _point(key_table, start + W + warp_keys, last, slab_wide, PER_BLOCK)
        value_place = _point(value_table, start + W + warp_values, last, slab_wide, PER_BLOCK)
        there = start + warp < last
        tiles = ()
        largest = gl.full([W, 4, 8], float("-inf"), gl.float32, layout=scores_as)
        for group in gl.static_range(0, 8):
            keys = _key_operand(codes[group], key_selector, key_low, base, W, right)
            acc = gl.zeros([W, 32, 8], gl.float32, layout=mma)
            acc = mma_v2(operand, keys, acc)
            tile = _scores(acc, diagonal, W, full) * factor[:, :, None] + added[:, :, None]
            if HAS_SOFTCAP:
                tile = softcap - 2.0 * softcap / (
                    gl.exp2(tile * (2.0 * 1.4426950408889634 / softcap)) + 1.0
                )
            tile = gl.where(there, tile, float("-inf"))
            largest = gl.maximum(largest, tile)
            tiles = tiles + (tile,)
        codes = _load_codes(key_place, keys_as)
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
        for group in gl.static_range(0, 8):
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
    if OVERLAP:
        gdc_launch_dependents()
    column = 1 + split * W
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
