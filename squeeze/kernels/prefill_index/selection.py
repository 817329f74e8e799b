"""Triton: list the heaviest blocks of every query block; ``reference`` is what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row(weights, require, block, width, REQUIRED: tl.constexpr, COLUMNS: tl.constexpr):
    """Load one query block's weights; return them, what is always taken, and the sort keys.

    Keys are the bits of weight + 2 where required + 4 for block 0 and the own one: floats of one
    sign order as their bits do. Blocks after the own one get -1.
    """
    ids = tl.arange(0, COLUMNS)
    visible = ids <= block
    weight = tl.load(weights + ids, mask=visible & (ids < width), other=0.0)
    always = (ids == block) | (ids == 0)
    wanted = always
    if REQUIRED:
        wanted = wanted | (tl.load(require + ids, mask=visible & (ids < width), other=0) != 0)
    rank = (weight + tl.where(wanted, 2.0, 0.0)) + tl.where(always, 4.0, 0.0)
    keys = tl.where(visible, rank.to(tl.int32, bitcast=True), -1)
    return weight, wanted & visible, keys


@triton.jit
def _kept(weight, wanted, keys, threshold, ties, floor, everything):
    """Mark the blocks above the threshold, and of those at it the nearest ``ties``."""
    equal = (keys == threshold).to(tl.int32)
    behind = tl.sum(equal, 0) - tl.cumsum(equal, 0)  # equals nearer than this one
    taken = (keys > threshold) | ((equal != 0) & (behind < ties))
    return (taken & ((weight >= floor) | wanted)) | (wanted & everything)


@triton.jit
def _select(
    weights, require, limits, mass, floor, lengths, counts, thresholds,
    weight_strides, require_strides, limit_stride, heads, first, rows, width, blocks, size, single,
    MASS: tl.constexpr, PER_HEAD: tl.constexpr, FLOOR: tl.constexpr, REQUIRED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find one query block's threshold by bisection, how many equals it takes, and its count.

    The heaviest blocks are those of keys >= t for the largest t at which they weigh ``mass`` of the
    row or are as many as the limit. At most 31 halvings of the bits find it without sorting: they
    end where no key, or one, lies between the ends, or where the limit is met exactly. There are
    none where what reaches ``floor`` is within the limit: then all of it is taken.
    """
    r = rows - 1 - tl.program_id(0)
    program = tl.program_id(1)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    block = first + r
    source = weights + b * weight_strides[0] + h * weight_strides[1] + r * weight_strides[2]
    asked = require
    if REQUIRED:
        asked += b * require_strides[0] + h * require_strides[1] + r * require_strides[2]
    weight, wanted, keys = _row(source, asked, block, width, REQUIRED, COLUMNS)
    limit = tl.load(limits + h * limit_stride + r)
    share = tl.load(mass + h) if PER_HEAD else single
    forced = tl.sum(wanted.to(tl.int32), 0)
    target = share * tl.sum(weight, 0)
    bounded = (share >= 1.0) | (forced >= limit)
    if not MASS:
        bounded = forced >= 0
    low = forced * 0
    high = low + 0x41000000  # 8.0, above every key
    most = tl.sum((keys >= low).to(tl.int32), 0)
    least = low  # of the keys reach ``high``, and ``most`` reach ``low``
    bound = tl.load(floor + program) if FLOOR else -1.0
    if FLOOR:  # what is heavy enough may be few
        heavy = (keys >= low) & ((weight >= bound) | wanted)
        fits = (tl.sum(heavy.to(tl.int32), 0) <= limit) & (bounded != 0)
        most = tl.where(fits, 0, most)
    step = low
    while (high - low > 1) & (most - least > 1) & ((most > limit) | (bounded == 0)):
        middle = low + (high - low) // 2
        above = keys >= middle
        count = tl.sum(above.to(tl.int32), 0)
        enough = count >= limit
        if MASS:
            held = tl.sum(tl.where(above, weight, 0.0), 0)
            enough = enough | ((held >= target) & (bounded == 0))
        low = tl.where(enough, middle, low)
        most = tl.where(enough, count, most)
        high = tl.where(enough, high, middle)
        least = tl.where(enough, least, count)
        step += 1
        if step % 6 == 0:  # the ends move up to keys: of many equals no halving would be left
            low = tl.min(tl.where(keys >= low, keys, high), 0)
            high = tl.max(tl.where(keys < high, keys, low), 0) + 1
    equal = keys == low
    number = tl.maximum(tl.sum(equal.to(tl.int32), 0), 1)
    ties = tl.maximum(tl.minimum(number, limit - tl.sum((keys > low).to(tl.int32), 0)), 0)
    if MASS:
        each = tl.sum(tl.where(equal, weight, 0.0), 0) / number
        missing = target - tl.sum(tl.where(keys > low, weight, 0.0), 0)
        needed = tl.ceil(missing / tl.where(each > 0.0, each, 1.0))
        needed = tl.maximum(tl.minimum(needed, number.to(tl.float32)), 1.0).to(tl.int32)
        ties = tl.where((bounded == 0) & (each > 0.0), tl.minimum(ties, needed), ties)
    kept = _kept(weight, wanted, keys, low, ties, bound, forced < limit)
    real = block * size < tl.load(lengths + b)
    place = program.to(tl.int64) * blocks + block
    tl.store(counts + place, tl.where(real, tl.sum(kept.to(tl.int32), 0), 0))
    tl.store(thresholds + 2 * place, low)
    tl.store(thresholds + 2 * place + 1, tl.where(forced < limit, ties, -1 - ties))


@triton.jit
def _write(
    weights, require, floor, counts, thresholds, offsets, ids,
    weight_strides, require_strides, heads, first, rows, width, blocks, capacity,
    FLOOR: tl.constexpr, REQUIRED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the ids that ``_select`` counted behind those of the query blocks before."""
    r = rows - 1 - tl.program_id(0)
    program = tl.program_id(1)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    block = first + r
    place = program.to(tl.int64) * blocks + block
    if tl.load(counts + place) > 0:
        source = weights + b * weight_strides[0] + h * weight_strides[1] + r * weight_strides[2]
        asked = require
        if REQUIRED:
            asked += b * require_strides[0] + h * require_strides[1] + r * require_strides[2]
        weight, wanted, keys = _row(source, asked, block, width, REQUIRED, COLUMNS)
        threshold = tl.load(thresholds + 2 * place)
        ties = tl.load(thresholds + 2 * place + 1)
        everything = ties >= 0
        ties = tl.where(everything, ties, -1 - ties)
        bound = tl.load(floor + program) if FLOOR else -1.0
        kept = _kept(weight, wanted, keys, threshold, ties, bound, everything)
        slots = tl.cumsum(kept.to(tl.int32), 0) - 1
        begin = tl.load(offsets + program.to(tl.int64) * (blocks + 1) + block)
        target = ids + program.to(tl.int64) * capacity + begin + slots
        tl.store(target, tl.arange(0, COLUMNS), mask=kept & (begin + slots < capacity))


def select_blocks(
    weights: Tensor,
    first: int,
    limits: Tensor,
    lengths: Tensor,
    size: int,
    mass: float | Tensor,
    floor: Tensor | None,
    require: Tensor | None,
    counts: Tensor,
    offsets: Tensor,
    ids: Tensor,
) -> None:
    """Launch; arguments are those of ``api.select_blocks``. Two launches and two small sums."""
    B, H, R, C = weights.shape
    blocks = counts.shape[-1]
    weights = weights if weights.stride(-1) == 1 else weights.contiguous()
    if require is not None:
        require = require.expand(B, H, R, C)
        require = (require if require.stride(-1) == 1 else require.contiguous()).view(torch.uint8)
    floor = None if floor is None else floor.expand(B, H, 1, 1).contiguous()
    shares = mass.contiguous() if isinstance(mass, Tensor) else None
    strides = weights.stride()[:3], (0, 0, 0) if require is None else require.stride()[:3]
    thresholds = torch.empty(B, H, blocks, 2, dtype=torch.int32, device=weights.device)
    columns = max(32, triton.next_power_of_2(C))
    options = {
        "FLOOR": floor is not None,
        "REQUIRED": require is not None,
        "COLUMNS": columns,
        "num_warps": min(16, max(1, columns // 512)),
    }
    _select[(R, B * H)](
        weights, require, limits, shares, floor, lengths, counts, thresholds,
        *strides, limits.stride(0) if limits.ndim == 2 else 0, H, first, R, C, blocks, size,
        1.0 if isinstance(mass, Tensor) else float(mass),
        MASS=isinstance(mass, Tensor) or mass < 1.0, PER_HEAD=isinstance(mass, Tensor), **options,
    )  # fmt: skip
    rows = slice(first, first + R)
    listed = counts[..., rows].cumsum(-1, dtype=torch.int32) + offsets[..., first : first + 1]
    offsets[..., first + 1 : first + R + 1] = listed
    _write[(R, B * H)](
        weights, require, floor, counts, thresholds, offsets, ids,
        *strides, H, first, R, C, blocks, ids.shape[-1], **options,
    )  # fmt: skip
