"""Encoding of the uniform formats in Triton: one launch reads blocks once and writes them packed.

A program takes whole groups of one head's block. It reduces each group, rounds its constants as the
format does, and packs the codes of the tokens that share bytes in registers.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.kv_encode import layout, rotation
from squeeze.kernels.kv_encode.layout import HEAD_TOKENS, Range, fields
from squeeze.kernels.kv_encode.rotation import rotated
from squeeze.types import Tensors

# Values that a program encodes, and its warps: few, so that most of a reduction is in registers.
# With fewer programs than ENOUGH, as when a decode step fills one block per head, a quarter each.
TILE, WARPS, ENOUGH = 4096, 1, 512
HALF_MAX = tl.constexpr(65504.0)
# Adding 1.5 * 2**23 rounds a small float32 to an integer, half to even, and leaves it in the low
# bits of the sum.
INTEGER = tl.constexpr(12582912.0)
# How ``graded`` sets the levels of 2 bits and of 1 bit.
CUT, DEVIATIONS = tl.constexpr((1 - 0.8) / 2), tl.constexpr(1.2)


class Launch(NamedTuple):
    """A kernel with its grid's size per head, its compile-time arguments and its warps."""

    kernel: Any
    tiles: int
    constants: dict[str, Any]
    warps: int


@triton.jit
def _matrix(x, slab, batch, kv_heads, strides):
    """Address of the matrix of one head: slabs count heads, then rows, then blocks."""
    head = slab % kv_heads
    row = slab // kv_heads % batch
    block = slab // kv_heads // batch
    return x + block * strides[0] + row * strides[1] + head * strides[2]


@triton.jit
def _round_down(x):
    """Round float32 to the largest float16 that is not above it."""
    nearest = x.to(tl.float16)
    lower = tl.maximum(x - tl.abs(x) * 2.0**-11 - 2.0**-25, -HALF_MAX).to(tl.float16)
    return tl.where(nearest.to(tl.float32) > x, lower, nearest)


@triton.jit
def _affine_constants(
    tiles,
    inside,
    AXIS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    GRADED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Reduce tiles of the same groups along AXIS to their float16 scale and zero."""
    COUNT: tl.constexpr = len(tiles)
    poison = tiles[0]
    if SYMMETRIC:
        high = tl.abs(tiles[0])
        for i in tl.static_range(1, COUNT):
            high = tl.maximum(high, tl.abs(tiles[i]))
            poison += tiles[i]
        high = tl.max(high, AXIS)
        low = high * 0.0
        levels = 2.0 ** (BITS - 1) - 1.0
    else:
        low = tiles[0]
        high = tiles[0]
        for i in tl.static_range(1, COUNT):
            low = tl.minimum(low, tiles[i])
            high = tl.maximum(high, tiles[i])
            poison += tiles[i]
        low = tl.min(tl.where(inside, low, HALF_MAX), AXIS)
        high = tl.max(tl.where(inside, high, -HALF_MAX), AXIS)
        levels = 2.0**BITS - 1.0
    # Minimum and maximum pass over NaN, the sum does not; no sum of clamped values overflows.
    poison = tl.sum(poison, AXIS)
    if GRADED:
        if BITS == 1:
            low, high = _two_levels(tiles, AXIS, GROUP)
        elif BITS == 2:
            cut = (high - low) * CUT
            low += cut
            high -= cut
        zero = tl.clamp(low, -HALF_MAX, HALF_MAX).to(tl.float16)
        spread = high - low
    else:
        zero = _round_down(low)
        spread = high - zero.to(tl.float32)
    known = poison == poison
    zero = tl.where(known, zero, float("nan")).to(tl.float16)
    spread = tl.where(known, spread, float("nan"))
    return tl.div_rn(spread, tl.full(spread.shape, levels, tl.float32)).to(tl.float16), zero


@triton.jit
def _two_levels(tiles, AXIS: tl.constexpr, GROUP: tl.constexpr):
    """Return the mean less and plus 1.2 standard deviations; sums in float64, as in ``graded``."""
    total = tiles[0].to(tl.float64)
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i].to(tl.float64)
    mean = tl.sum(total, AXIS) * (1.0 / GROUP)
    squares = tl.zeros_like(total)
    for i in tl.static_range(len(tiles)):
        offset = tiles[i].to(tl.float64) - tl.expand_dims(mean, AXIS)
        squares += offset * offset
    reach = tl.sqrt(tl.sum(squares, AXIS) * (1.0 / GROUP)) * DEVIATIONS
    return (mean - reach).to(tl.float32), (mean + reach).to(tl.float32)


@triton.jit
def _codes(offset, step, inverse, usable, known, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Round ``offset / step`` half to even as if correctly divided; codes in the low 8 bits.

    The remainder of a first quotient is exact, which leaves the second within ``2**-22`` units of
    its last place of the truth. A step has 11 bits, so a quotient of float32 is half an odd integer
    or further from it than that, and than half a unit. Where no step is usable the quotient is
    0, and where nothing is known the code is.
    """
    HALF: tl.constexpr = 2.0 ** (BITS - 1) if SYMMETRIC else 0.0
    first = offset * inverse
    quotient = tl.fma(tl.fma(-first, step, offset), inverse, first)
    quotient = tl.where(usable, quotient, 0.0)
    quotient = tl.clamp(quotient, -HALF, 2.0**BITS - 1.0 - HALF)
    origin = tl.where(known, INTEGER + HALF, INTEGER)
    return (quotient + origin).to(tl.int32, bitcast=True)


@triton.jit
def _pack(planes, code, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Put a field's codes into the rows of bytes: of 3 bits, two rows of the low two, one above."""
    if BITS != 3:
        result = (planes[0] | (code << (FIELD * BITS)), planes[1], planes[2])
    else:
        low = (code & 3) << (FIELD // 2 * 2)
        top = planes[2] | (((code >> 2) & 1) << FIELD)
        if FIELD % 2 == 0:
            result = (planes[0] | low, planes[1], top)
        else:
            result = (planes[0], planes[1] | low, top)
    return result


@triton.jit
def _affine(
    x,
    codes,
    scale,
    zero,
    center,
    matrix,
    x_strides,
    code_strides,
    constant_strides,
    batch,
    kv_heads,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CHANNEL: tl.constexpr,
    FIELDS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    ITEMS: tl.constexpr,
    GRADED: tl.constexpr,
    CONSTANTS: tl.constexpr,
    CENTERS: tl.constexpr,
    HEAD: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Encode ITEMS groups of every field of one head's block, in a range of D channels.

    Field f of a row of bytes belongs to token ``f * ROWS + row``, so a program loads the same
    rectangle of each of FIELDS token ranges and packs them without exchanging data. An item is a
    group of the rectangle: MEMBERS tokens of a channel, tile ``[MEMBERS, ITEMS]``, or GROUP
    channels of a token padded to MEMBERS, tile ``[ITEMS, MEMBERS]``. COUNT items make up a range;
    SPAN ranges share a channel's group when it is longer than ROWS. A row of scales is CONSTANTS
    long, one of centres CENTERS, or 0 without any. Where HEAD is not 0, ``x`` has HEAD channels,
    and encoded are D columns of its product with the head's ``matrix``, of which ITEMS is a
    divisor; else DEPTH and STAGES are unused. All arithmetic is float32 without contraction, but
    the product's and the sums of 1 bit; the quotient is correctly rounded.
    """
    TILES: tl.constexpr = (COUNT + ITEMS - 1) // ITEMS
    AXIS: tl.constexpr = 0 if CHANNEL else 1
    program = tl.program_id(0)
    slab = (program // TILES).to(tl.int64)
    item = program % TILES * ITEMS + tl.arange(0, ITEMS)
    member = tl.arange(0, MEMBERS)
    if CHANNEL:
        token = (item // D * MEMBERS)[None, :] + member[:, None]
        channel = (item % D)[None, :]
        inside = (member < MEMBERS)[:, None]
        mask = (item < COUNT)[None, :] & inside
    else:
        token = (item // (D // GROUP))[:, None]
        channel = (item % (D // GROUP) * GROUP)[:, None] + member[None, :]
        inside = (member < GROUP)[None, :]
        mask = (item < COUNT)[:, None] & inside
    head = slab % kv_heads
    if CENTERS:
        shift = tl.load(center + head * CENTERS + channel, mask=mask, other=0.0)
    source = _matrix(x, slab, batch, kv_heads, x_strides)
    if HEAD:
        first = program % TILES * ITEMS // D * MEMBERS + member[:, None]
        products = rotated(
            source,
            matrix + head * HEAD * HEAD,
            first,
            channel,
            x_strides[3],
            FIELDS,
            ROWS,
            MEMBERS,
            ITEMS,
            HEAD,
            DEPTH,
            STAGES,
        )
    source += channel
    constant = item // D * CONSTANTS + item % D if CHANNEL else item
    scale = _matrix(scale, slab, batch, kv_heads, constant_strides) + constant
    zero = _matrix(zero, slab, batch, kv_heads, constant_strides) + constant
    places = token * D + channel
    empty = tl.zeros_like(places)
    planes = (empty, empty, empty)
    for group in tl.static_range(FIELDS // SPAN):
        tiles = ()
        for part in tl.static_range(SPAN):
            if HEAD:
                tile = products[group * SPAN + part]
            else:
                tokens = (token + (group * SPAN + part) * ROWS).to(tl.int64)
                tile = tl.load(source + tokens * x_strides[3], mask=mask, other=0.0).to(tl.float32)
            if CENTERS:
                tile -= shift
            tile = tl.clamp(tile, -HALF_MAX, HALF_MAX, propagate_nan=tl.PropagateNan.ALL)
            tiles = tiles + (tile,)
        step, minimum = _affine_constants(tiles, inside, AXIS, BITS, SYMMETRIC, GRADED, GROUP)
        skipped = group * (COUNT // D * CONSTANTS if CHANNEL else COUNT)
        tl.store(scale + skipped, step, mask=item < COUNT)
        if not SYMMETRIC:
            tl.store(zero + skipped, minimum, mask=item < COUNT)
        step = tl.expand_dims(step.to(tl.float32), AXIS)
        known = step == step
        usable = (step > 0) & (step < float("inf"))
        divisor = tl.where(usable, step, 1.0)
        inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
        for part in tl.static_range(SPAN):
            offset = tiles[part]
            if not SYMMETRIC:
                offset -= tl.expand_dims(minimum.to(tl.float32), AXIS)
            code = _codes(offset, divisor, inverse, usable, known, BITS, SYMMETRIC)
            planes = _pack(planes, code, group * SPAN + part, BITS)
    target = _matrix(codes, slab, batch, kv_heads, code_strides) + places
    tl.store(target, planes[0].to(tl.uint8), mask=mask)
    if BITS == 3:
        tl.store(target + ROWS * D, planes[1].to(tl.uint8), mask=mask)
        tl.store(target + 2 * ROWS * D, planes[2].to(tl.uint8), mask=mask)


@triton.jit
def _float8(
    x,
    codes,
    scale,
    center,
    x_strides,
    code_strides,
    constant_strides,
    batch,
    kv_heads,
    LENGTH: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_CENTER: tl.constexpr,
):
    """Encode TOKENS tokens of one head's block, tile ``[TOKENS, WIDTH]``.

    The scale ``2**e`` comes from the bits of the largest magnitude: ``448 = 1.75 * 2**8``, so
    ``e = exponent - 8``, and one more past a significand of 1.75. Dividing by it is exact but for
    subnormals, where it rounds once. The cast to E4M3 is integer arithmetic, so it needs no
    hardware support: round the significand to 3 bits, half to even, or, below ``2**-6``, to a
    multiple of ``2**-9``.
    """
    TILES: tl.constexpr = (LENGTH + TOKENS - 1) // TOKENS
    program = tl.program_id(0)
    slab = (program // TILES).to(tl.int64)
    token = program % TILES * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)[None, :]
    mask = (token < LENGTH)[:, None] & (channel < D)
    source = _matrix(x, slab, batch, kv_heads, x_strides) + channel
    places = token[:, None].to(tl.int64) * x_strides[3]
    value = tl.load(source + places, mask=mask, other=0.0).to(tl.float32)
    if HAS_CENTER:
        shift = tl.load(center + slab % kv_heads * D + channel, mask=channel < D, other=0.0)
        value = tl.where(mask, value - shift, 0.0)
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    largest = tl.max(bits, 1)
    if SHARED:
        largest = tl.broadcast_to(tl.max(largest, 0), largest.shape)
    exponent = (largest >> 23) - 135 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.where(largest == 0, 0, tl.minimum(tl.maximum(exponent, -24), 15))
    unknown = largest > 0x7F800000
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    size = bits.to(tl.float32, bitcast=True) * inverse[:, None]
    size = tl.minimum(size, 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 2.0**-6, small, normal) | sign
    code = tl.where(unknown[:, None], 0x7F, code)
    target = _matrix(codes, slab, batch, kv_heads, code_strides) + token[:, None] * D + channel
    tl.store(target, code.to(tl.uint8), mask=mask)
    power = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    power = tl.where(unknown, float("nan"), power).to(tl.float16)
    target = _matrix(scale, slab, batch, kv_heads, constant_strides)
    if SHARED:
        target += token // TOKENS
        tl.store(target, power, mask=token % TOKENS == 0)
    else:
        tl.store(target + token, power, mask=token < LENGTH)


def encode(
    format: Any, x: Tensor, center: Tensor | None, matrix: Tensor | None, out: Tensors | None
) -> Tensors:
    """Encode blocks; arguments as in ``api.encode``, for a format and blocks that it takes.

    Raises:
        ValueError: what the kernel would misread.
    """
    blocks, batch, heads, length, size = x.shape
    shapes = layout.shapes(format, length, size)
    if out is None:
        out = {
            name: x.new_empty(blocks, batch, heads, *shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
    _check(format, x, center, matrix, out, shapes)
    slabs = blocks * batch * heads
    if not slabs:
        return out
    if format.info.name == "float8":
        launch = describe_float8(format, slabs, length, size, center is not None)
        _launch(launch, x, center, None, out)
        return out
    for part in layout.ranges(format, size):
        launch = describe(part, slabs, length, size, center is not None, matrix is not None)
        channels = slice(part.first, part.first + part.size)
        shift = None if center is None else center[:, channels]
        source = x[..., channels] if matrix is None else x
        factors = None if matrix is None else matrix[..., channels]
        _launch(launch, source, shift, factors, _components(part, length, out))
    return out


def describe(
    part: Range, slabs: int, length: int, head_dim: int, centered: bool, multiplied: bool = False
) -> Launch:
    """Choose tile sizes for a range of channels and name the compile-time arguments.

    Args:
        part: The range.
        slabs: Blocks times rows times heads.
        length: Tokens of a block.
        head_dim: Channels of a head.
        centered: Whether a centre is subtracted.
        multiplied: Whether the head's matrix comes first.
    """
    rows = length // fields(part.bits)
    members = min(part.group, rows) if part.channel else triton.next_power_of_2(part.group)
    span = part.group // members if part.channel else 1
    count = rows // members * part.size if part.channel else rows * (part.size // part.group)
    tile = _tile(slabs * length * part.size)
    if part.bits == 3 or (part.graded and part.bits == 1):
        tile //= 2  # three rows of bytes, and sums in float64, take more registers
    items = min(max(1, tile // (members * fields(part.bits))), triton.next_power_of_2(count))
    constants = {"BITS": part.bits, "SYMMETRIC": part.symmetric, "CHANNEL": part.channel}
    constants |= {"FIELDS": fields(part.bits), "SPAN": span, "ROWS": rows, "GROUP": part.group}
    constants |= {"MEMBERS": members, "D": part.size, "COUNT": count, "ITEMS": items}
    constants |= {"GRADED": part.graded, "CONSTANTS": part.row}
    constants |= {"CENTERS": head_dim if centered else 0, "HEAD": 0, "DEPTH": 0, "STAGES": 0}
    warps = WARPS
    if multiplied:
        product = rotation.describe(part, slabs, length, head_dim, count)
        items, warps = product.items, product.warps
        constants |= product.constants | {"ITEMS": items}
    return Launch(_affine, triton.cdiv(count, items), constants, warps)


def describe_float8(format: Any, slabs: int, length: int, head_dim: int, centered: bool) -> Launch:
    """Choose tokens per program: those of a scale, or as many as make a tile; as ``describe``."""
    shared = format.scale == "head"
    width = triton.next_power_of_2(head_dim)
    most = max(1, _tile(slabs * length * head_dim) // width)
    tokens = HEAD_TOKENS if shared else min(most, triton.next_power_of_2(length))
    constants = {"LENGTH": length, "D": head_dim, "WIDTH": width, "TOKENS": tokens}
    constants |= {"SHARED": shared, "HAS_CENTER": centered}
    # A scale of a head is one program's, however many values share it.
    warps = max(WARPS, 2 * tokens * width // TILE)
    return Launch(_float8, triton.cdiv(length, tokens), constants, warps)


def _tile(values: int) -> int:
    """Values of a program, out of all that a launch encodes."""
    return TILE if values >= ENOUGH * TILE else TILE // 4


def _components(part: Range, length: int, out: Tensors) -> Tensors:
    """Where the codes and constants of a range go."""
    if not part.graded:
        return out
    first = part.bits_before * length // 8
    codes = out["codes"][..., first : first + part.bits * length // 8, :]
    constants = slice(part.first, part.first + part.size)
    return {"codes": codes} | {name: out[name][..., constants] for name in ("scale", "zero")}


def _launch(
    launch: Launch, x: Tensor, center: Tensor | None, matrix: Tensor | None, out: Tensors
) -> None:
    """Run a kernel over all slabs."""
    blocks, batch, heads = x.shape[:3]
    # Arguments that an option leaves unused point at something that exists.
    unused = out["scale"]
    tables = [out["codes"], out["scale"], unused if center is None else center]
    if launch.kernel is _affine:
        tables.insert(2, out.get("zero", unused))
        tables.append(unused if matrix is None else matrix)
    launch.kernel[(blocks * batch * heads * launch.tiles,)](
        x,
        *tables,
        x.stride()[:4],
        out["codes"].stride()[:3],
        out["scale"].stride()[:3],
        batch,
        heads,
        **launch.constants,
        num_warps=launch.warps,
        enable_fp_fusion=False,
    )


def _check(
    format: Any,
    x: Tensor,
    center: Tensor | None,
    matrix: Tensor | None,
    out: Tensors,
    shapes: layout.Shapes,
) -> None:
    """Raise ValueError for what the kernel would misread."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernel takes float16, bfloat16 and float32, not {x.dtype}")
    if x.stride(-1) != 1:
        raise ValueError("channels of x must be adjacent")
    _, _, heads, length, size = x.shape
    if length % format.block_length:
        raise ValueError(f"{length} tokens are no multiple of {format.block_length}")
    if format.info.name == "affine" and format.granularity == "token" and size % format.group_size:
        raise ValueError(f"groups of {format.group_size} do not divide {size} channels")
    for name, (shape, dtype) in shapes.items():
        part, expected = out[name], (*x.shape[:3], *shape)
        if part.shape != expected or part.dtype != dtype:
            raise ValueError(f"out {name} is {part.dtype} {tuple(part.shape)}, not {expected}")
        if not part[:1, :1, :1].is_contiguous():
            raise ValueError(f"out {name} must be contiguous within a head")
        if name == "zero" and part.stride() != out["scale"].stride():
            raise ValueError("out zero must have the strides of scale")
    for name, table, shape in (
        ("center", center, (heads, size)),
        ("matrix", matrix, (heads, size, size)),
    ):
        if table is not None and (
            table.shape != shape or table.dtype != torch.float32 or not table.is_contiguous()
        ):
            raise ValueError(f"{name} must be contiguous float32 {shape}")
