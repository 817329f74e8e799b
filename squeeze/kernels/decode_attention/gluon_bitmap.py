"""Decode attention over bitmaps and four-bit survivors: bytes of tensor cores, no conversion.

One warp is a program and owns four query rows of one KV head and a run of 64-token units, or exact
slots. A tensor of 32 is one register of its lanes, and lane ``4 g + t`` is row ``g``, column pair
``t`` of a product's tile. Units reach shared memory by asynchronous copies, up to three at a time;
a lane then loads the whole groups whose bytes it holds of an operand.

Survivors return to their slots by byte permutation (see ``tiles/bitmap.py``). Twice such a byte is
16 times the code as a signed integer, and a dropped channel is zero, so four slots are a register
of an integer product ``m16n8k32``: tokens are the sixteen rows of keys, channels those of values.
Of the eight columns four rows take two each: the high and the low byte of a 16-bit query channel,
or of a 16-bit weight. Sums of integers are exact; queries are rounded to 15 bits of their largest
channel, weights to 14 bits of the largest of their unit or better.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from squeeze.kernels.decode_attention.gluon import _exact, _rows, _soft_cap

# A query row's largest channel as an integer; its high and low bytes are signed: 127 * 256.
QUERY_RANGE = gl.constexpr(32512.0)
# What makes a float32 hold an integer in its low bits, signed or not.
SIGNED, UNSIGNED = gl.constexpr(12582912.0), gl.constexpr(8388608.0)
# Integers are relative to no less, so that factors stay finite.
SMALLEST = gl.constexpr(1e-30)
# Exact slots of a step.
TOKENS = gl.constexpr(32)
# Shared memory: as many units as fit, or exact keys and values of a step.
SHARED_BYTES = gl.constexpr(2 * 32 * 128 * 2)

PERMUTE = gl.constexpr("prmt.b32 $0, $1, $2, $3;")
TRANSPOSE = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")
EXCHANGE = gl.constexpr("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;")
SPREAD = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
# NaN of a weight must reach the output, and integers have none.
LARGER = gl.constexpr("max.NaN.f32 $0, $1, $2;")
FOUR_BY_FOUR = gl.constexpr(
    """{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $4, $5, 0x5140;
    prmt.b32 b, $6, $7, 0x5140;
    prmt.b32 c, $4, $5, 0x7362;
    prmt.b32 d, $6, $7, 0x7362;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
    prmt.b32 $2, c, d, 0x5410;
    prmt.b32 $3, c, d, 0x7632;
    shl.b32 $0, $0, 1;
    shl.b32 $1, $1, 1;
    shl.b32 $2, $2, 1;
    shl.b32 $3, $3, 1;
    }"""
)


COMMIT = gl.constexpr("cp.async.commit_group; mov.b32 $0, 0;")


@gluon.constexpr_function
def wait(groups):
    """PTX that waits for all copies but those of the last groups, and for the warp's lanes."""
    return f"cp.async.wait_group {groups}; bar.warp.sync 0xffffffff; mov.b32 $0, 0;"


@gluon.constexpr_function
def product(kind):
    """PTX of a product of signed bytes with bytes of a kind."""
    return (
        f"mma.sync.aligned.m16n8k32.row.col.s32.s8.{kind}.s32 {{$0, $1, $2, $3}}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@gluon.constexpr_function
def registers(outputs, kind, inputs):
    """Constraints of an assembly whose outputs are written while inputs are still read."""
    return ",".join(["=&r"] * outputs + [kind] * inputs)


@gluon.constexpr_function
def words(count):
    """Types of that many results."""
    return (gl.int32,) * count


@gluon.constexpr_function
def others(far, keys):
    """Registers of a lane that hold the survivors past the fourth, ``far`` of each group."""
    return 0 if far == 0 else 4 if keys and far < 4 else 8


@gluon.constexpr_function
def unit_bytes(far):
    """Bytes of 64 tokens: bitmaps, four survivors of each group, the others, scales."""
    return 1024 + 1024 + 256 * far + 128


@gluon.constexpr_function
def copy(far):
    """PTX that starts copying 64 tokens, 16 bytes of a lane at a time.

    $1 is the lane's address in shared memory, $2 its number, $3 to $6 the components' addresses.
    """
    pieces = [f"[$1+{i}], [${3 + i // 1024}+{i % 1024}]" for i in range(0, 2048, 512)]
    text = [f"cp.async.cg.shared.global {piece}, 16;" for piece in pieces]
    if far:
        text.append(f"setp.lt.u32 p, $2, {16 * far};")
    for i in range(0, 256 * far, 512):
        text.append(f"@p cp.async.cg.shared.global [$1+{2048 + i}], [$5+{i}], 16;")
    text.append("setp.lt.u32 p, $2, 8;")
    text.append(f"@p cp.async.cg.shared.global [$1+{2048 + 256 * far}], [$6], 16;")
    return "\n".join(["{", ".reg .pred p;", *text, "mov.b32 $0, 0;", "}"])


@gluon.constexpr_function
def load(far, keys):
    """PTX of a lane's loads of 64 tokens: eight pairs of tokens and a group of each.

    Keys are two adjacent groups of pairs 8 apart, values one group of two adjacent pairs, 8 apart.
    Outputs: eight bitmaps, eight times the first four survivors, the others, two groups of keys in
    a register where they fit, and the scales of four pairs. Inputs: addresses of the lane's first
    bitmap, of its first other survivors, and of its first scales.
    """
    number = others(far, keys)
    group, other, scale = (f"${20 + number + i}" for i in range(3))
    text = []
    for i in range(4):
        for plane in range(2):
            first, place = 8 * plane + 2 * i, 1024 * plane + 256 * i
            if keys:
                text.append(f"ld.shared.v2.b32 {{${first}, ${first + 1}}}, [{group}+{place}];")
            else:
                text.append(f"ld.shared.b32 ${first}, [{group}+{place}];")
                text.append(f"ld.shared.b32 ${first + 1}, [{group}+{place + 32}];")
        place = 64 * far * i
        kind = {0: "", 1: "u8", 2: "u16", 4: "b32"}[far]
        wide = {0: "", 1: "u16", 2: "b32", 4: "v2.b32"}[far]
        if far == 4 and keys:
            pair = f"{{${16 + 2 * i}, ${17 + 2 * i}}}"
            text.append(f"ld.shared.{wide} {pair}, [{other}+{place}];")
        elif far and keys:
            text.append(f"ld.shared.{wide} ${16 + i}, [{other}+{place}];")
        elif far:
            text.append(f"ld.shared.{kind} ${16 + 2 * i}, [{other}+{place}];")
            text.append(f"ld.shared.{kind} ${17 + 2 * i}, [{other}+{place + 8 * far}];")
        text.append(f"ld.shared.b32 ${16 + number + i}, [{scale}+{32 * i}];")
    return "\n".join(text)


@gluon.constexpr_function
def expansion(far, position, doubled):
    """PTX that puts a group's survivors of both tokens into eight words of four slots.

    $0 to $3 are the first token's words and $4 to $7 the second's, $8 the bitmap, $9 the first four
    survivors, $10 the others from bit ``position`` on. A byte is 8 times the code's four bits, or
    16 times the code where ``doubled``.
    """
    text = ["{", ".reg .b32 n, f, s, h;"]
    # Fields stand at bit i of a nibble, so what they are multiplied by is 2**i smaller.
    steps, starts = (0x11111108, -0x11111118), (0x88888888, (4 + far + 7) * 0x11111111)
    above = {0: 0, 1: 0x78, 2: 0x7878, 4: 0x78787878}[far]
    for token in range(2):
        for name, source, shift, mask in (
            ("n", "$9", 4 * token - 3, 0x78787878),
            ("f", "$10", position + 4 * token - 3, above),
        ):
            way = f"shr.u32 {name}, {source}, {shift};" if shift > 0 else ""
            text.append(way or f"shl.b32 {name}, {source}, {-shift};")
            text.append(f"and.b32 {name}, {name}, {mask:#x};")
        for half in range(2):
            bit = 2 * token + half
            text.append(f"and.b32 s, $8, {0x11111111 << bit:#x};")
            factor, added = (steps[half] >> bit) % 2**32, starts[half] % 2**32
            text.append(f"mad.lo.u32 s, s, {factor:#x}, {added:#x};")
            text.append("shr.u32 h, s, 16;")
            first = 4 * token + 2 * half
            text.append(f"prmt.b32 ${first}, n, f, s;")
            text.append(f"prmt.b32 ${first + 1}, n, f, h;")
    if doubled:
        text += [f"shl.b32 ${i}, ${i}, 1;" for i in range(8)]
    return "\n".join([*text, "}"])


@gluon.jit
def _exchange(x, DISTANCE: gl.constexpr, CODE: gl.constexpr):
    """Fetch a register of the lane DISTANCE away, or number DISTANCE, as CODE says."""
    return gl.inline_asm_elementwise(
        CODE, "=r,r,r", [x, DISTANCE], dtype=x.dtype, is_pure=True, pack=1
    )


@gluon.jit
def _larger(x, y):
    """Larger of two, NaN if either is."""
    return gl.inline_asm_elementwise(
        LARGER, "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _largest(tiles, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Largest of all registers, and of COUNT lanes that differ in bits from FIRST's on."""
    NUMBER: gl.constexpr = len(tiles)
    result = tiles[0]
    for i in gl.static_range(1, NUMBER):
        result = _larger(result, tiles[i])
    for i in gl.static_range(0, COUNT):
        result = _larger(result, _exchange(result, FIRST << i, EXCHANGE))
    return result


@gluon.jit
def _permute(low, high, selector):
    """Byte i is byte ``selector >> 4 i & 7`` of high:low."""
    return gl.inline_asm_elementwise(
        PERMUTE, "=r,r,r,r", [low, high, selector], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _transpose(pairs):
    """Exchange the rows and columns of a matrix ``[8, 8]`` of 16-bit numbers, two in a lane."""
    return gl.inline_asm_elementwise(
        TRANSPOSE, "=r,r", [pairs], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _multiply(a, b, total, KIND: gl.constexpr):
    """Add the product of four registers of signed bytes and two of KIND to four of sums."""
    CONSTRAINTS: gl.constexpr = registers(4, "r", 10)
    return gl.inline_asm_elementwise(
        product(KIND),
        CONSTRAINTS,
        [a[0], a[1], a[2], a[3], b[0], b[1], total[0], total[1], total[2], total[3]],
        dtype=words(4),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _expand(loaded, i: gl.constexpr, FAR: gl.constexpr, KEYS: gl.constexpr, DOUBLED: gl.constexpr):
    """Expand pair and group i of what a lane loaded: four words of each token."""
    SHARED: gl.constexpr = KEYS and FAR < 4
    POSITION: gl.constexpr = i % 2 * 8 * FAR if SHARED else 0
    PLACE: gl.constexpr = 0 if FAR == 0 else 16 + (i // 2 if SHARED else i)
    return gl.inline_asm_elementwise(
        expansion(FAR, POSITION, DOUBLED),
        registers(8, "r", 3),
        [loaded[i], loaded[8 + i], loaded[PLACE]],
        dtype=words(8),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _load_query(query, strides, slab, kv_heads, groups, steps, lane):
    """Load the query rows as sixteen registers of bytes, two for each product's 32 channels.

    A lane holds the high (``g`` even) or low bytes of row ``g / 2`` at the channels of groups
    ``2 t`` and ``2 t + 1``. Returns them and what an integer of the lane's own head ``t`` is worth.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    index = gl.program_id(2) * 4 + lane // 8
    head = (slab % kv_heads) * groups + index // steps
    start = (slab // kv_heads) * strides[0] + head * strides[1] + (index % steps) * strides[2]
    pairs = query.to(gl.pointer_type(gl.int32), bitcast=True) + (start // 2 + lane % 4)
    numbers = ()
    sizes = ()
    for k in gl.static_range(0, 16):
        pair = gl.load(pairs + 4 * k, mask=index < groups * steps, other=0)
        first = (pair & 0xFFFF).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        second = (pair >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        numbers = numbers + (first, second)
        sizes = sizes + (gl.abs(first), gl.abs(second))
    smallest = gl.full([32], SMALLEST, gl.float32, lane.type.layout)
    largest = _larger(_largest(sizes, 1, 2), smallest)
    factor = QUERY_RANGE / largest
    high = lane // 4 % 2 == 0
    selector = gl.where(high, 0x51, 0x40)
    sign = gl.where(high, 0, 0x80808080 - 2**32)
    rounded = ()
    for i in gl.static_range(0, 32):
        # The low byte becomes signed by what is added to the high one.
        integer = (numbers[i] * factor + SIGNED).to(gl.int32, bitcast=True) + 128
        rounded = rounded + (integer,)
    both = gl.full([32], 0x5410, gl.int32, lane.type.layout)
    operand = ()
    for group in gl.static_range(0, 2):
        for quarter in gl.static_range(0, 4):
            four = rounded[8 * quarter + group : 8 * quarter + group + 7 : 2]
            front = _permute(four[0], four[1], selector)
            back = _permute(four[2], four[3], selector)
            operand = operand + (_permute(front, back, both) ^ sign,)
    # Codes are read as 16 times what they are.
    own = _exchange(largest, (lane % 4) * 8, SPREAD)
    return operand, own / (16.0 * QUERY_RANGE)


@gluon.jit
def _points(tables, unit, last, slab, lane, FAR: gl.constexpr, PER_BLOCK: gl.constexpr):
    """Point at a lane's first 16 bytes of each component of a unit; past the end of the last."""
    PAIRS: gl.constexpr = 32 * PER_BLOCK
    unit = gl.maximum(gl.minimum(unit, last - 1), 0)
    block, part = unit // PER_BLOCK, unit % PER_BLOCK
    bitmap = gl.load(tables[0] + block) + slab * (PAIRS * 32) + part * 1024
    codes = gl.load(tables[1] + block) + slab * (PAIRS * 8 * (4 + FAR))
    scales = gl.load(tables[2] + block) + slab * (PAIRS * 4) + part * 128
    near, other = codes + part * 1024, codes + (PAIRS * 32 + part * (256 * FAR))
    return bitmap + lane * 16, near + lane * 16, other + lane * 16, scales + lane * 16


@gluon.jit
def _copy(points, place, lane, FAR: gl.constexpr):
    """Start copying a unit to ``place`` in shared memory."""
    gl.inline_asm_elementwise(
        copy(FAR),
        "=r,r,r,l,l,l,l",
        [place + lane * 16, lane, points[0], points[1], points[2], points[3]],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _synchronize(lane, CODE: gl.constexpr):
    """Run an instruction on the asynchronous copies."""
    gl.inline_asm_elementwise(CODE, "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load(place, lane, FAR: gl.constexpr, KEYS: gl.constexpr):
    """Load what a lane needs of a unit; the last four registers are scales, two in each."""
    g, t = lane // 4, lane % 4
    group = g * 8 + t * 2 if KEYS else t * 16 + g
    COUNT: gl.constexpr = 20 + others(FAR, KEYS)
    return gl.inline_asm_elementwise(
        load(FAR, KEYS),
        registers(COUNT, "r", 3),
        [
            place + group * 4,
            place + (2048 + group * FAR),
            place + (2048 + 256 * FAR + g * 4),
        ],
        dtype=words(COUNT),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _scales(loaded):
    """Scales of both tokens of the lane's four pairs."""
    FIRST: gl.constexpr = len(loaded) - 4
    result = ()
    for i in gl.static_range(0, 4):
        pair = loaded[FIRST + i]
        low = (pair & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
        high = (pair >> 16).to(gl.int16).to(gl.float16, bitcast=True)
        result = result + (low.to(gl.float32), high.to(gl.float32))
    return result


@gluon.jit
def _scores(loaded, query, factor, FAR: gl.constexpr):
    """Dot products of the lane's head with both tokens of its four pairs, but for what is added."""
    zero = gl.zeros_like(loaded[0])
    scales = _scales(loaded)
    result = ()
    for i in gl.static_range(0, 4):
        total = (zero, zero, zero, zero)
        for group in gl.static_range(0, 2):
            keys = _expand(loaded, 2 * i + group, FAR, True, True)
            for half in gl.static_range(0, 2):
                tile = (keys[2 * half], keys[4 + 2 * half], keys[1 + 2 * half], keys[5 + 2 * half])
                operand = (query[4 * group + 2 * half], query[4 * group + 2 * half + 1])
                total = _multiply(tile, operand, total, "s8")
        for token in gl.static_range(0, 2):
            integer = total[2 * token] * 256 + total[2 * token + 1]
            result = result + (integer.to(gl.float32) * (scales[2 * i + token] * factor),)
    return result


@gluon.jit
def _quantize(weights):
    """Round a unit's weights to integers below ``2**15 + 1``, as operands of two products.

    Returns:
        Two registers for each 32 tokens, and what a unit of the integers is worth.
    """
    smallest = gl.full([32], SMALLEST, gl.float32, weights[0].type.layout)
    largest = _larger(_largest(weights, 4, 3), smallest)
    power = largest.to(gl.int32, bitcast=True) & 0x7F800000
    factor = ((254 + 14) * 2**23 - 2**32 - power).to(gl.float32, bitcast=True)
    selector = gl.full([32], 0x4051, gl.int32, largest.type.layout)
    operands = ()
    for half in gl.static_range(0, 2):
        for token in gl.static_range(0, 2):
            first = weights[4 * half + token] * factor + UNSIGNED
            second = weights[4 * half + 2 + token] * factor + UNSIGNED
            first, second = first.to(gl.int32, bitcast=True), second.to(gl.int32, bitcast=True)
            operands = operands + (_transpose(_permute(first, second, selector)),)
    # Integers have no NaN, so it goes on here.
    return operands, power.to(gl.float32, bitcast=True) * 2.0**-14 + largest * 0.0


@gluon.jit
def _values(loaded, weights, FAR: gl.constexpr):
    """Weighted sums of a unit's values, as integers: slots ``[16]`` of group g for head t."""
    zero = gl.zeros_like(loaded[0])
    totals = ()
    for _ in gl.static_range(0, 8):
        totals = totals + ((zero, zero, zero, zero),)
    for half in gl.static_range(0, 2):
        # As the transposed weights: pairs 2 t of both tiles of eight pairs, then pairs 2 t + 1.
        a = _expand(loaded, 4 * half, FAR, False, False)
        b = _expand(loaded, 4 * half + 2, FAR, False, False)
        c = _expand(loaded, 4 * half + 1, FAR, False, False)
        d = _expand(loaded, 4 * half + 3, FAR, False, False)
        operand = (weights[2 * half], weights[2 * half + 1])
        added = ()
        for quarter in gl.static_range(0, 4):
            tokens = ()
            for token in gl.static_range(0, 2):
                tokens = tokens + (
                    gl.inline_asm_elementwise(
                        FOUR_BY_FOUR,
                        registers(4, "r", 4),
                        [
                            a[4 * token + quarter],
                            b[4 * token + quarter],
                            c[4 * token + quarter],
                            d[4 * token + quarter],
                        ],
                        dtype=words(4),
                        is_pure=True,
                        pack=1,
                    ),
                )
            for side in gl.static_range(0, 2):
                tile = (
                    tokens[0][2 * side],
                    tokens[0][2 * side + 1],
                    tokens[1][2 * side],
                    tokens[1][2 * side + 1],
                )
                total = totals[2 * quarter + side]
                added = added + (_multiply(tile, operand, total, "u8"),)
        totals = added
    result = ()
    for i in gl.static_range(0, 8):
        result = result + (
            totals[i][0] * 256 + totals[i][1],
            totals[i][2] * 256 + totals[i][3],
        )
    return result


@gluon.jit
def _packed(
    query,
    shift,
    key_tables,
    value_tables,
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
    slab,
    split,
    splits,
    column,
    columns,
    HAS_SHIFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    OVERLAP: gl.constexpr,
    PER_BLOCK: gl.constexpr,
    KEY_FAR: gl.constexpr,
    VALUE_FAR: gl.constexpr,
    lanes: gl.constexpr,
):
    """Walk this split's share of the row's units, and store what it sums up to."""
    lane = gl.arange(0, 32, layout=lanes)
    count = gl.load(block_counts + slab // kv_heads) * PER_BLOCK
    first = split * count // splits
    last = (split + 1) * count // splits
    KEY_BYTES: gl.constexpr = unit_bytes(KEY_FAR)
    SIZE: gl.constexpr = KEY_BYTES + unit_bytes(VALUE_FAR)
    STAGES: gl.constexpr = SHARED_BYTES // SIZE
    place = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [lane], dtype=gl.int32, is_pure=True, pack=1
    )
    limit = place + STAGES * SIZE
    target = place
    for i in gl.static_range(0, STAGES):
        key_points = _points(key_tables, first + i, last, slab, lane, KEY_FAR, PER_BLOCK)
        value_points = _points(value_tables, first + i, last, slab, lane, VALUE_FAR, PER_BLOCK)
        if i < STAGES - 1:
            if first + i < last:
                _copy(key_points, target, lane, KEY_FAR)
                _copy(value_points, target + KEY_BYTES, lane, VALUE_FAR)
            _synchronize(lane, COMMIT)
            target += SIZE
    operand, factor = _load_query(query, strides, slab, kv_heads, groups, steps, lane)
    index = gl.program_id(2) * 4 + lane % 4
    valid = index < groups * steps
    row = slab * (groups * steps) + index
    added = gl.zeros([32], gl.float32, layout=lanes)
    if HAS_SHIFT:
        added = gl.load(shift + row, mask=valid, other=0.0) * scaling
    factor *= scaling
    maximum = gl.full([32], float("-inf"), gl.float32, layout=lanes)
    total = gl.zeros([32], gl.float32, layout=lanes)
    outputs = ()
    for _ in gl.static_range(0, 16):
        outputs = outputs + (total,)
    for unit in range(first, last):
        _synchronize(lane, wait(STAGES - 2))
        if unit + STAGES - 1 < last:
            _copy(key_points, target, lane, KEY_FAR)
            _copy(value_points, target + KEY_BYTES, lane, VALUE_FAR)
        _synchronize(lane, COMMIT)
        key_points = _points(key_tables, unit + STAGES, last, slab, lane, KEY_FAR, PER_BLOCK)
        value_points = _points(value_tables, unit + STAGES, last, slab, lane, VALUE_FAR, PER_BLOCK)
        keys = _load(place, lane, KEY_FAR, True)
        products = _scores(keys, operand, factor, KEY_FAR)
        scores = ()
        for i in gl.static_range(0, 8):
            score = products[i] + added
            scores = scores + (_soft_cap(score, softcap) if HAS_SOFTCAP else score,)
        largest = _larger(maximum, _largest(scores, 4, 3))
        decay = gl.exp2(maximum - largest)
        maximum = largest
        total *= decay
        values = _load(place + KEY_BYTES, lane, VALUE_FAR, False)
        scales = _scales(values)
        weights = ()
        for i in gl.static_range(0, 8):
            weight = gl.exp2(scores[i] - maximum)
            total += weight
            weights = weights + (weight * scales[i],)
        weights, worth = _quantize(weights)
        sums = _values(values, weights, VALUE_FAR)
        # Codes are read as 16 times what they are.
        worth *= 0.0625
        result = ()
        for slot in gl.static_range(0, 16):
            result = result + (outputs[slot] * decay + sums[slot].to(gl.float32) * worth,)
        outputs = result
        place = gl.where(place + SIZE == limit, limit - STAGES * SIZE, place + SIZE)
        target = gl.where(target + SIZE == limit, limit - STAGES * SIZE, target + SIZE)
    if OVERLAP:
        gdc_launch_dependents()
    target = partial + ((row * columns + column) * 128 + lane // 4)
    for slot in gl.static_range(0, 16):
        gl.store(target + 8 * slot, outputs[slot], mask=valid)
    for i in gl.static_range(0, 3):
        total += _exchange(total, 4 << i, EXCHANGE)
    gl.store(maxima + row * columns + column, maximum, mask=valid & (lane < 4))
    gl.store(totals + row * columns + column, total, mask=valid & (lane < 4))


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
    SLOTS: gl.constexpr,
    PER_BLOCK: gl.constexpr,
    KEY_FAR: gl.constexpr,
    VALUE_FAR: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Online softmax over one split: ``o = sum 2**(s - m) v``, ``l = sum 2**(s - m)``, ``m``.

    As ``gluon.attend`` for heads of 128 and four query rows of a program, eight of the exact slots.
    A block is PER_BLOCK units, a group has ``4 + FAR`` survivors.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    split = gl.program_id(0)
    slab = gl.program_id(1).to(gl.int64)
    columns = exact_splits + splits
    if split < exact_splits:
        dtype: gl.constexpr = query.dtype.element_ty
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
            gl.allocate_shared_memory(dtype, [TOKENS, 128], swizzled),
            gl.allocate_shared_memory(dtype, [TOKENS, 128], swizzled),
            128,
            8,
            SLOTS,
            TOKENS,
            HAS_SOFTCAP,
            mma,
            left,
            right,
        )
        head: gl.constexpr = gl.SliceLayout(0, mma)
        _, _, row, valid = _rows(slab, kv_heads, groups, steps, 8, head)
        gl.store(maxima + row * columns + split, maximum, mask=valid)
        gl.store(totals + row * columns + split, total, mask=valid)
    else:
        _packed(
            packed_query,
            shift,
            key_tables,
            value_tables,
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
            split - exact_splits,
            splits,
            split,
            columns,
            HAS_SHIFT,
            HAS_SOFTCAP,
            OVERLAP,
            PER_BLOCK,
            KEY_FAR,
            VALUE_FAR,
            lanes,
        )
