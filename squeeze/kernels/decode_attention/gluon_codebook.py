"""Decode attention over product-quantized blocks: centroids from shared memory to tensor cores."""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.decode_attention.gluon_codebook_assembly import (
    ADDRESS,
    BARRIERS,
    CODES,
    KEY_GATHER,
    KEY_REGISTERS,
    VALUE_GATHER,
    VALUE_REGISTERS,
    await_copy,
    copy,
    fill,
    initialize,
)
from squeeze.kernels.decode_attention.gluon_codebook_exact import attend_exact, soft_cap

# Queries are scaled so that their largest channel lies between this power of two and the next.
QUERY_EXPONENT = gl.constexpr(5.0)
SPREAD = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")


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
    """Queries ``[W, 8, 128]``: a lane holds channels 8 l to 8 l + 7, and 32, 64, 96 further on."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 32], [0, 0, 64]]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 8, 128])


@gluon.constexpr_function
def lane_layout(warps):
    """``[W, 8, 4]``: lanes as the rows and column pairs of a product's tile."""
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([], lanes, warp_bases(warps, 3), [], [warps, 8, 4])


@gluon.constexpr_function
def axis_layout(layout, dim, rank):
    """Layout of one dimension, the others taken away."""
    for other in reversed(range(rank)):
        layout = layout if other == dim else gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _axis(DIM: gl.constexpr, SIZE: gl.constexpr, RANK: gl.constexpr, layout: gl.constexpr):
    """Index along one dimension of a tensor, the others of size 1."""
    index = gl.arange(0, SIZE, layout=axis_layout(layout, DIM, RANK))
    for other in gl.static_range(RANK):
        if other != DIM:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def _load_query(query, strides, slab, tile, kv_heads, groups, steps, W: gl.constexpr):
    """Load a program's four query rows, twice over: ``[W, 8, 128]``."""
    layout: gl.constexpr = query_layout(W)
    h = tile * 4 + _axis(1, 8, 3, layout) % 4
    head = (slab % kv_heads) * groups + h // steps
    base = query + (slab // kv_heads) * strides[0]
    spread = 0 * _axis(0, W, 3, layout)
    channel = _axis(2, 128, 3, layout)
    places = head * strides[1] + (h % steps) * strides[2] + channel + spread
    return gl.load(base + places, mask=h < groups * steps, other=0.0)


@gluon.jit
def _query_operand(tile, splits, W: gl.constexpr, left: gl.constexpr):
    """Query rows as operands ``[W, 16, 64]``, one for each half: four orders of channels each.

    Row ``4 g + h`` belongs to tokens whose number modulo 4 is ``g``, and meets their centroids in
    the order in which their lanes hold them: component ``place % 2`` of column ``32 q + 8 l + (j ^
    g)``, where ``l`` is the lane of four, ``q`` the half and ``j`` the register. A lane has its
    columns once, exchanges neighbours if its ``g`` is odd, and renames them for ``g // 2``.
    """
    layout: gl.constexpr = query_layout(W)
    tile = tile.to(gl.float32)
    largest = gl.max(gl.abs(tile), 2)
    finite = gl.where(largest > 0.0, largest, 1.0)
    exponent = gl.floor(gl.log2(finite)) - QUERY_EXPONENT
    tile = (tile * gl.exp2(-exponent)[:, :, None]).to(gl.float16)
    # [W, 8 rows, component, half, lane 4, j / 4, j / 2 % 2, j % 2]
    named: gl.constexpr = [W, 8, 2, 2, 4, 2, 2, 2]
    first, second = gl.split(gl.reshape(tile, named))
    row = _axis(1, 8, 3, layout) + 0 * _axis(2, 128, 3, layout) + 0 * _axis(0, W, 3, layout)
    odd, _ = gl.split(gl.reshape(row // 4, named))
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
    ordered = gl.permute(orders, (0, 8, 1, 7, 6, 5, 4, 2, 3))
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
    pair of tokens that the lane holds. So the lanes of a load read different columns. For ``k`` of
    2 and 3 the two words of values are read in the other order.
    """
    token, unit = _axis(1, 8, 3, layout), _axis(2, 32, 3, layout)
    warp = 0 * _axis(0, W, 3, layout)
    if KEYS:
        order = token + 0 * unit + warp
        selector = 0x3210 ^ (order * 0x1111)
        first = 32 * (unit // 8) + warp + 0 * token
    else:
        order = token // 2 + 0 * unit + warp
        selector = (0x3210 ^ (order * 0x1111)) + (order // 2) * 0x4444
        first = 16 * (unit % 16 // 2) + warp + 0 * token
    low = (first * 0x01010101) ^ 0x0C080400 ^ (order * 0x04040404)
    return selector, low


@gluon.jit
def _code_places(
    base, layout: gl.constexpr, KEYS: gl.constexpr, W: gl.constexpr, TOKENS: gl.constexpr
):
    """Address of each lane's first codes of eight tokens, ``[W, 8, 32]`` in the codes' layout.

    Tokens 2 and 3, and 6 and 7, change places: then the words of values of a load differ in bank.
    """
    token, unit = _axis(1, 8, 3, layout), _axis(2, 32, 3, layout)
    own = base + CODES + _axis(0, W, 3, layout) * (TOKENS * 128)
    own += (token ^ (token // 2 % 2)) * 64
    if KEYS:
        places = own + unit // 8 * 8
    else:
        places = own + TOKENS * 64 + 4 * (unit % 16 // 2) + 32 * (token // 4)
    return places


@gluon.jit
def _key_operand(places, selector, low, base, W: gl.constexpr, right: gl.constexpr):
    """Look up the centroids of eight tokens as operands ``[W, 64, 8]``, one for each half."""
    a, b, c, d = gl.inline_asm_elementwise(
        KEY_GATHER,
        KEY_REGISTERS,
        [selector, low, base, places],
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
def _point(table, unit, last, slab, TOKENS: gl.constexpr, PER_BLOCK: gl.constexpr):
    """Address of the codes of each warp's unit; past the end of the last one."""
    SIZE: gl.constexpr = PER_BLOCK * TOKENS * 64
    unit = gl.maximum(gl.minimum(unit, last - 1), 0)
    return gl.load(table + unit // PER_BLOCK) + (slab * SIZE + unit % PER_BLOCK * (TOKENS * 64))


@gluon.jit
def _combine(
    output_memory,
    number_memory,
    outputs,
    maximum,
    total,
    partial,
    maxima,
    totals,
    rows,
    place,
    tile,
    row_count,
    columns,
    W: gl.constexpr,
):
    """Merge the results of a program's warps through shared memory, and store them."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    pair: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # [W, word 16, half 2, head 4, slot 4]
    layout: gl.constexpr = gl.BlockedLayout(
        [W, 1, 1, 1, 2], [1, 2, 2, 4, 2], [1, W, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    heads_as: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, layout)))
    results = output_memory._reinterpret(gl.float32, [W, 16, 2, 4, 4], plain)
    numbers = number_memory._reinterpret(gl.float32, [2, W, 4], pair)
    gl.thread_barrier()
    joined = _four(outputs[0], outputs[2], outputs[1], outputs[3])
    results.store(gl.reshape(joined, [W, 16, 2, 4, 4]))
    numbers.index(0).store(maximum)
    numbers.index(1).store(total)
    gl.thread_barrier()
    local = numbers.index(0).load(heads_as)
    largest = gl.max(local, 0)
    finite = gl.where(largest == float("-inf"), 0.0, largest)
    weights = gl.exp2(local - finite[None, :])
    sums = gl.sum(numbers.index(1).load(heads_as) * weights, 0)
    output = gl.sum(results.load(layout) * weights[:, None, None, :, None], 0)
    result_as: gl.constexpr = gl.SliceLayout(0, layout)
    head = tile * 4 + _axis(2, 4, 4, result_as)
    channel = _axis(0, 16, 4, result_as) * 4 + _axis(3, 4, 4, result_as)
    channel += _axis(1, 2, 4, result_as) * 64
    target = partial + ((rows + head).to(gl.int64) * columns + place) * 128
    gl.store(target + channel, output, mask=head < row_count)
    head = tile * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, heads_as))
    target = (rows + head) * columns + place
    gl.store(maxima + target, largest, mask=head < row_count)
    gl.store(totals + target, sums, mask=head < row_count)


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
):
    """Online softmax over one split: ``o = sum 2**(s - m) v``, ``l = sum 2**(s - m)``, ``m``.

    The last program of a KV head attends to its exact slots, each other one to a run of blocks. The
    launch may begin before the kernel ahead of it has ended: the codebooks are parameters, written
    long before, and all else is read and written after a wait.
    """
    slab = gl.program_id(0)
    tiles = (groups * steps + 3) // 4
    if gl.program_id(1) == splits * tiles:
        gdc_wait()
        gdc_launch_dependents()
        attend_exact(
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
            slab.to(gl.int64),
            columns,
            W,
            HAS_SOFTCAP,
        )
    else:
        _attend_packed(
            packed_query,
            shift,
            key_table,
            value_table,
            key_codebook,
            value_codebook,
            block_counts,
            partial,
            maxima,
            totals,
            packed_query_strides,
            scaling,
            softcap,
            kv_heads,
            groups,
            steps,
            slab,
            gl.program_id(1) // tiles,
            gl.program_id(1) % tiles,
            splits,
            columns,
            W,
            TOKENS,
            PER_BLOCK,
            HAS_SHIFT,
            HAS_SOFTCAP,
        )


@gluon.jit
def _attend_packed(
    packed_query,
    shift,
    key_table,
    value_table,
    key_codebook,
    value_codebook,
    block_counts,
    partial,
    maxima,
    totals,
    packed_query_strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    slab,
    split,
    tile,
    splits,
    columns,
    W: gl.constexpr,
    TOKENS: gl.constexpr,
    PER_BLOCK: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
):
    """Attend to a run of blocks, four query rows of one KV head.

    The warps walk the run in turn, a unit of TOKENS at a time; a warp's next codes are on their way
    to shared memory while it works, keys since the scores, values since the output. Shared memory
    is all ``memory``, so it begins where that does.
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
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.int32, [7, 8192], plain)
    thread = gl.arange(0, 32 * W, layout=threads)
    own, chosen = thread // 32, (thread % 32 == 0).to(gl.int32)
    origin = gl.inline_asm_elementwise(
        ADDRESS, "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1
    )
    fill(origin, thread, key_codebook, value_codebook, slab % kv_heads)
    key_barrier = origin + BARRIERS + 16 + own * 16
    key_target = origin + CODES + own * (TOKENS * 128)
    value_barrier, value_target = key_barrier + 8, key_target + TOKENS * 64
    size = 0 * thread + TOKENS * 64
    initialize(key_barrier, chosen)
    gdc_wait()
    gdc_launch_dependents()
    query_tile = _load_query(
        packed_query, packed_query_strides, slab, tile, kv_heads, groups, steps, W
    )
    units = gl.load(block_counts + slab // kv_heads) * PER_BLOCK
    share = (units + splits - 1) // splits
    first = split * share
    last = gl.minimum(first + share, units)
    slab_wide = slab.to(gl.int64)
    key_place = _point(key_table, first + own, last, slab_wide, TOKENS, PER_BLOCK)
    value_place = _point(value_table, first + own, last, slab_wide, TOKENS, PER_BLOCK)
    some = chosen * (first < last).to(gl.int32)
    copy(key_target, key_place, key_barrier, size, some)
    copy(value_target, value_place, value_barrier, size, some)
    lower, upper, exponent = _query_operand(query_tile, splits, W, left)
    factor = scaling * gl.exp2(gl.convert_layout(exponent, heads_as, assert_trivial=True))
    base = gl.inline_asm_elementwise(ADDRESS, "=r,r", [split], dtype=gl.int32, is_pure=True, pack=1)
    key_selector, key_low = _lane_constants(keys_as, True, W)
    value_selector, value_low = _lane_constants(values_as, False, W)
    key_codes = _code_places(base, keys_as, True, W, TOKENS)
    value_codes = _code_places(base, values_as, False, W, TOKENS)
    parity = 0 * thread
    pair = _axis(1, 16, 3, right) // 2 % 4 + 0 * _axis(0, W, 3, right)
    component = gl.where(_axis(2, 8, 3, right) // 4 == 0, 0xFFFF, -0x10000)
    masks = ()
    for i in gl.static_range(0, 4):
        masks = masks + (gl.where(pair == i, component, 0),)
    diagonal = _axis(1, 16, 3, mma) // 4 == _axis(2, 8, 3, mma) % 4
    head = tile * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, heads_as))
    valid = head < groups * steps
    rows = slab * (groups * steps)
    added = gl.zeros([W, 4], gl.float32, layout=heads_as)
    if HAS_SHIFT:
        added += (gl.load(shift + rows + head, mask=valid, other=0.0) * scaling)[None, :]
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, scores_as)))[:, None, None]
    maximum = gl.full([W, 4], float("-inf"), gl.float32, layout=heads_as)
    total = gl.zeros([W, 4, 8], gl.float32, layout=scores_as)
    nothing = gl.zeros([W, 16, 8], gl.float32, layout=mma)
    outputs = (nothing, nothing, nothing, nothing)
    gl.thread_barrier()
    await_copy(origin + BARRIERS, 0 * thread)
    for start in range(first, last, W):
        unit = start + W + own
        key_place = _point(key_table, unit, last, slab_wide, TOKENS, PER_BLOCK)
        value_place = _point(value_table, unit, last, slab_wide, TOKENS, PER_BLOCK)
        some = chosen * (start + W < last).to(gl.int32)
        await_copy(key_barrier, parity)
        there = start + warp < last
        scores = ()
        largest = gl.full([W, 4, 8], float("-inf"), gl.float32, layout=scores_as)
        for group in gl.static_range(0, TOKENS // 8):
            first_keys, second_keys = _key_operand(
                key_codes + group * 512, key_selector, key_low, base, W, right
            )
            zero = gl.zeros([W, 16, 8], gl.float32, layout=mma)
            acc = mma_v2(lower, first_keys, zero) + mma_v2(upper, second_keys, zero)
            scored = _scores(acc, diagonal, W, full) * factor[:, :, None] + added[:, :, None]
            if HAS_SOFTCAP:
                scored = soft_cap(scored, softcap)
            scored = gl.where(there, scored, float("-inf"))
            largest = gl.maximum(largest, scored)
            scores = scores + (scored,)
        copy(key_target, key_place, key_barrier, size, some)
        await_copy(origin + BARRIERS + 8, 0 * thread)
        await_copy(value_barrier, parity)
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
            weights = gl.exp2(scores[group] - finite[:, :, None])
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
                [value_selector, value_low, base, value_codes + group * 512],
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
        copy(value_target, value_place, value_barrier, size, some)
        parity = parity ^ 1
    await_copy(origin + BARRIERS + 8, 0 * thread)
    _combine(
        memory.index(4),
        memory.index(5),
        outputs,
        maximum,
        gl.sum(total, 2),
        partial,
        maxima,
        totals,
        rows,
        1 + split,
        tile,
        groups * steps,
        columns,
        W,
    )
