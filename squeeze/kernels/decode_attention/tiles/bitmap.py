"""Tile functions of ``bitmap``: survivors go back to their channels by byte permutation.

Per group of 16 channels (see ``quant/kv/bitmap.py``) the bitmap gives two words whose eight
nibbles are eight channels' bits. One multiplication adds up the bits below each, which is the
place of that channel's survivor among at most eight; a dropped channel gets 8 added. That word
selects for ``prmt``, which fetches a byte of four survivors at once and, where the 8 is set,
repeats the sign of a byte: zero, as none is negative.

Four-bit codes then lie in bits 3 to 6 of a byte, which under the exponent of 16 (bfloat16) or 128
(float16) read as ``offset + code``. Float16 survivors are permuted by low and high bytes, and
multiplied in float16 whatever the query's dtype. A register ends up with two numbers that
neighbour each other along the reduced dimension: channels of keys, both tokens of a pair of values.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from squeeze.kernels.decode_attention.product import multiply, multiply_add

COMPONENTS = ("bitmap", "codes", "scale")
PARAMETERS = ()


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...]:
    """Compile-time facts: see the names in ``score``."""
    groups = head_dim // 16
    padded = triton.next_power_of_2(groups)
    interpreted = int(triton.knobs.runtime.interpret)
    facts = (length, groups, groups & -groups, padded, format.kept)
    return (*facts, format.survivor_bits, interpreted)


def parts(format: Any, head_dim: int) -> tuple[int, int, int]:
    """Channel ranges the query and the output are held in: one."""
    return (1, head_dim, max(16, triton.next_power_of_2(head_dim)))


def warps(format: Any) -> int:
    """Warps of a program with few query rows: one holds the bytes of a block in its registers."""
    return 1 if format.survivor_bits == 4 else 2


@triton.constexpr_function
def _operand(dtype, survivor_bits):
    """Dtype of the products: float16 survivors have the bits of none but it and float32."""
    return tl.float16 if survivor_bits == 16 and dtype == tl.bfloat16 else dtype


@triton.constexpr_function
def _offset(dtype, survivor_bits):
    """What a dropped channel reads as in an operand of ``dtype``."""
    return {tl.bfloat16: 24.0, tl.float16: 136.0}.get(dtype, 0.0) if survivor_bits == 4 else 0.0


@triton.jit
def _permute(low, high, selector, INTERPRETED: tl.constexpr):
    """``prmt``: byte i is byte ``selector >> 4 i & 7`` of high:low, or with 8 set its sign."""
    if INTERPRETED:
        result = tl.zeros_like(selector)
        for i in tl.static_range(0, 4):
            place = selector >> (4 * i)
            byte = tl.where(place & 4 != 0, high, low) >> ((place & 3) * 8)
            filled = tl.where(byte & 0x80 != 0, 0xFF, 0)
            result |= tl.where(place & 8 != 0, filled, byte & 0xFF) << (8 * i)
    else:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def _mix(low, high, SELECTOR: tl.constexpr, INTERPRETED: tl.constexpr):
    """``_permute`` with one selector for all."""
    return _permute(low, high, tl.full(low.shape, SELECTOR, tl.int32), INTERPRETED)


@triton.jit
def _select(words, CODE: tl.constexpr, INTERPRETED: tl.constexpr):
    """``words & 0x00FF00FF ^ CODE`` in one instruction, which the compiler does not find."""
    if INTERPRETED:
        result = (words & 0x00FF00FF) ^ CODE
    else:
        mask = tl.full(words.shape, 0x00FF00FF, tl.int32)
        code = tl.full(words.shape, CODE, tl.int32)
        result = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x6A;",
            "=r,r,r,r",
            [words, mask, code],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def _places(META: tl.constexpr):
    """Number of every group of every pair, ``[L / 2, groups]``, and which groups there are."""
    group = tl.arange(0, META[3])
    places = tl.arange(0, META[0] // 2)[:, None] * META[1] + group[None, :]
    return places, (group < META[1])[None, :]


@triton.jit
def _read(places, inside, META: tl.constexpr):
    """Load integers as int32, unmasked where the groups are a power of two."""
    words = tl.load(places) if META[1] == META[3] else tl.load(places, mask=inside, other=0)
    return words.to(tl.int32)


@triton.jit
def _word(base, FIRST: tl.constexpr, COUNT: tl.constexpr, META: tl.constexpr):
    """COUNT, at most four, survivors of every group from FIRST on, a byte each, as int32."""
    UNITS: tl.constexpr = META[0] // 2 * META[1]
    places, inside = _places(META)
    start = base + FIRST * UNITS
    if COUNT == 4:
        result = _read(start.to(tl.pointer_type(tl.int32)) + places, inside, META)
    else:
        result = tl.zeros_like(places)
        if COUNT & 2:
            result = _read(start.to(tl.pointer_type(tl.uint16)) + places, inside, META)
        if COUNT & 1:
            single = _read(start + (COUNT & 2) * UNITS + places, inside, META)
            result |= single << (8 * (COUNT & 2))
    return result


@triton.jit
def _plane(tables, block, slab, PLANE: tl.constexpr, META: tl.constexpr):
    """One byte of every survivor: the first four of each group, and the others."""
    KEPT: tl.constexpr = META[4]
    PLANES: tl.constexpr = 1 if META[5] == 4 else 4
    SIZE: tl.constexpr = META[0] // 2 * META[1] * KEPT
    LOW: tl.constexpr = KEPT if KEPT < 4 else 4
    address = tl.load(tables[1] + block).to(tl.pointer_type(tl.uint8))
    base = tl.multiple_of(address, 16) + slab * (SIZE * PLANES) + PLANE * SIZE
    return _word(base, 0, LOW, META), _word(base, LOW, KEPT - LOW, META)


@triton.jit
def _selectors(tables, block, slab, META: tl.constexpr):
    """Selectors of four slots in their low halves: quarters of the first tokens, then the second.

    Of a group's first half bits are counted from below, of its second half from above, where the
    last survivor is, as their order in the format allows.
    """
    address = tl.load(tables[0] + block).to(tl.pointer_type(tl.int32))
    base = tl.multiple_of(address, 16) + slab * (META[0] // 2 * META[1])
    places, inside = _places(META)
    words = _read(base + places, inside, META)
    result = ()
    for token in tl.static_range(0, 2):
        first = (words >> (2 * token)) & 0x11111111
        second = (words >> (2 * token + 1)) & 0x11111111
        # 0x88888888 and (k + 7) * 0x11111111, as signed numbers.
        below = first * 0x11111108 - 0x77777778
        above = (META[4] + 7) * 0x11111111 - 2**32 - second * 0x11111118
        result = result + (below, below >> 16, above, above >> 16)
    return result


@triton.jit
def _expanded_codes(tables, block, slab, META: tl.constexpr):
    """Words of four slots' codes in bits 3 to 6 of each byte: eight, in the selectors' order."""
    selectors = _selectors(tables, block, slab, META)
    low, high = _plane(tables, block, slab, 0, META)
    result = ()
    for i in tl.static_range(0, 8):
        if i < 4:
            near, far = (low << 3) & 0x78787878, (high << 3) & 0x78787878
        else:
            near, far = (low >> 1) & 0x78787878, (high >> 1) & 0x78787878
        result = result + (_permute(near, far, selectors[i], META[6]),)
    return result


@triton.jit
def _expanded_halves(tables, block, slab, META: tl.constexpr):
    """Float16 survivors at their slots: each quarter's words of slots 0 and 2, then of 1 and 3."""
    selectors = _selectors(tables, block, slab, META)
    even, odd = (), ()
    for token in tl.static_range(0, 2):
        low = _plane(tables, block, slab, 2 * token, META)
        high = _plane(tables, block, slab, 2 * token + 1, META)
        for quarter in tl.static_range(0, 4):
            selector = selectors[4 * token + quarter]
            ones = tl.full(selector.shape, 0x01010101, tl.int32)
            # These bytes have a sign, so what is dropped is masked.
            alive = _permute(ones, ones, selector, META[6]) * 255
            lower = _permute(low[0], low[1], selector, META[6]) & alive
            upper = _permute(high[0], high[1], selector, META[6]) & alive
            even = even + (_mix(lower, upper, 0x6240, META[6]),)
            odd = odd + (_mix(lower, upper, 0x7351, META[6]),)
    return even, odd


@triton.jit
def _pair_tokens(tiles, SECOND: tl.constexpr, THIRD: tl.constexpr, INTERPRETED: tl.constexpr):
    """Join each quarter's words of both tokens, then split it into slots 0, 1 and slots 2, 3."""
    result = ()
    for quarter in tl.static_range(0, 4):
        first, second = tiles[quarter], tiles[4 + quarter]
        lower = _mix(first, second, SECOND, INTERPRETED)
        result = result + (lower, _mix(first, second, THIRD, INTERPRETED))
    return result


@triton.jit
def _join_neighbours(tiles):
    """Join tiles 0 and 1, 2 and 3, ... along a new last dimension."""
    COUNT: tl.constexpr = len(tiles) // 2
    joined = ()
    for i in tl.static_range(0, COUNT):
        joined = joined + (tl.join(tiles[2 * i], tiles[2 * i + 1]),)
    return joined


@triton.jit
def _stack(tiles):
    """Join eight tiles: three last dimensions are the bits of a tile's number, lowest first."""
    return _join_neighbours(_join_neighbours(_join_neighbours(tiles)))[0]


@triton.jit
def _numbers(tables, block, slab, dtype: tl.constexpr, VALUES: tl.constexpr, META: tl.constexpr):
    """All numbers of a block, ``offset + code`` or float16 survivors, still in groups.

    Shape ``[L / 2, groups, 2, 2, 2, parity, pair]``. Of keys the three are the bits of a quarter,
    then the token, and a slot is ``4 * quarter + 2 * pair + parity``. Of values they are bits 1, 2
    and 3 of the slot, parity is bit 0, and pair the token.
    """
    if META[5] == 4:
        tiles = _expanded_codes(tables, block, slab, META)
        if VALUES:
            tiles = _pair_tokens(tiles, 0x5410, 0x7632, META[6])
        # A dropped channel is 0 and becomes code 0: the sign bit is turned.
        CODE: tl.constexpr = 0x41C041C0 if dtype == tl.bfloat16 else 0x58405840
        words = _stack(tiles)
        both = _select(tl.join(words, words >> 8), CODE, META[6])
    else:
        even, odd = _expanded_halves(tables, block, slab, META)
        if VALUES:
            even = _pair_tokens(even, 0x5410, 0x7632, META[6])
            odd = _pair_tokens(odd, 0x5410, 0x7632, META[6])
        both = tl.join(_stack(even), _stack(odd))
    halves = tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))
    if dtype == tl.float32:
        result = halves.to(tl.float16, bitcast=True).to(tl.float32) - _offset(tl.float16, META[5])
    else:
        result = halves.to(dtype, bitcast=True)
    return result


@triton.jit
def _keys(tables, block, slab, dtype: tl.constexpr, META: tl.constexpr):
    """One block of keys ``[L, width]`` in the order of tensor cores: see ``_reorder``.

    Tokens come in runs of 16, first the first tokens of eight pairs and then the second ones. Four
    threads share a token and own whole groups. How many channels in a row a thread holds is chosen
    by the compiler: eight where it sees single bytes loaded, which odd counts of survivors need,
    and else four.
    """
    LANES: tl.constexpr = 4 if META[3] > 4 else META[3]
    numbers = _numbers(tables, block, slab, dtype, False, META)
    # pairs / 8, pair, lane, group, quarter bits (low, high), token, parity, pair of slots
    shape: tl.constexpr = (META[0] // 16, 8, LANES, META[3] // LANES, 2, 2, 2, 2, 2)
    tile = tl.reshape(numbers, shape)
    if META[4] % 2:
        tile = tl.permute(tile, (0, 6, 1, 5, 3, 2, 4, 7, 8))
    else:
        tile = tl.permute(tile, (0, 6, 1, 5, 4, 3, 2, 7, 8))
    return tl.reshape(tile, (META[0], 16 * META[3]))


@triton.jit
def _reorder(query, META: tl.constexpr):
    """Order the channels of ``[M, width]`` as ``_keys`` does."""
    M: tl.constexpr = query.shape[0]
    LANES: tl.constexpr = 4 if META[3] > 4 else META[3]
    # groups / apart, quarter, pair, parity, apart
    rows = tl.reshape(query, (M, META[3] // META[2], 4, 2, 2, META[2]))
    rows = tl.permute(rows, (0, 2, 3, 4, 1, 5))
    rows = tl.reshape(rows, (M, 2, 2, 2, 2, LANES, META[3] // LANES))
    if META[4] % 2:
        rows = tl.permute(rows, (0, 1, 6, 5, 2, 4, 3))
    else:
        rows = tl.permute(rows, (0, 1, 2, 6, 5, 4, 3))
    return tl.reshape(rows, (M, 16 * META[3]))


@triton.jit
def _values(tables, block, slab, dtype: tl.constexpr, META: tl.constexpr):
    """One block of values ``[L, width]``."""
    numbers = _numbers(tables, block, slab, dtype, True, META)
    shape: tl.constexpr = (META[0] // 2, META[3] // META[2], META[2], 2, 2, 2, 2, 2)
    tile = tl.permute(tl.reshape(numbers, shape), (0, 7, 1, 5, 4, 3, 6, 2))
    return tl.reshape(tile, (META[0], 16 * META[3]))


@triton.jit
def _scales(tables, block, slab, META: tl.constexpr):
    """Load each token's scale, float32 ``[L]``; 1 where survivors have none."""
    if META[5] == 16:
        result = tl.full((META[0],), 1.0, tl.float32)
    else:
        half: tl.constexpr = tl.pointer_type(tl.float16)
        scales = tl.multiple_of(tl.load(tables[2] + block).to(half), 16) + slab * META[0]
        result = tl.load(scales + tl.arange(0, META[0])).to(tl.float32)
    return result


@triton.jit
def score(tables, block, slab, query, META: tl.constexpr):
    """Dot products ``[M, L]`` of the query parts with one block of keys.

    META: block length L, groups of 16 channels, how far apart a group's channels are, groups as a
    power of two, survivors of a group, bits of one, whether this is interpreted.
    """
    M: tl.constexpr = query[0].shape[0]
    L: tl.constexpr = META[0]
    dtype: tl.constexpr = _operand(query[0].dtype, META[5])
    rows = query[0].to(tl.float32)
    largest = tl.full((M,), 1.0, tl.float32)
    if dtype != query[0].dtype:
        # Float16 has the bits but not the range of bfloat16.
        largest = tl.maximum(tl.max(tl.abs(rows), 1), 1e-30)
        rows = rows / largest[:, None]
    rows = rows.to(dtype)
    keys = _keys(tables, block, slab, dtype, META)
    product = multiply(_reorder(rows, META), tl.trans(keys))
    product -= tl.sum(rows.to(tl.float32), 1)[:, None] * _offset(dtype, META[5])
    product = tl.permute(tl.reshape(product, (M, L // 16, 2, 8)), (0, 1, 3, 2))
    scales = largest[:, None] * _scales(tables, block, slab, META)[None, :]
    return tl.reshape(product, (M, L)) * scales


@triton.jit
def accumulate(tables, block, slab, weights, output, dtype: tl.constexpr, META: tl.constexpr):
    """Add weights ``[M, L]`` (float32) times one block of values to the output parts."""
    inner: tl.constexpr = _operand(dtype, META[5])
    operand = (weights * _scales(tables, block, slab, META)[None, :]).to(inner)
    values = _values(tables, block, slab, inner, META)
    lost = tl.sum(operand.to(tl.float32), 1) * _offset(inner, META[5])
    return (multiply_add(operand, values, output[0]) - lost[:, None],)
