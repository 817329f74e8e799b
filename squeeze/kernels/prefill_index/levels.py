"""Triton: list blocks to read exactly and as averages, by weight; ``reference`` is what it does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.prefill_index.selection import _row


@triton.jit
def _end(weight, keys, total, share, most, begin, own):
    """Find where one level ends: its threshold, how many equals it takes, and the rank.

    Blocks of keys >= t are taken for the largest t at which they weigh ``share`` of the row and
    are ``begin`` or more, or are as many as the level may end at. 31 halvings of the bits find it.
    """
    limit = tl.minimum(begin + most, own)
    target = tl.where(share < 1.0, share * total, float("inf"))
    low = own * 0
    high = low + 0x41000000  # 8.0, above every key
    for _ in range(31):
        middle = low + (high - low) // 2
        above = keys >= middle
        number = tl.sum(above.to(tl.int32), 0)
        held = tl.sum(tl.where(above, weight, 0.0), 0)
        enough = (number >= limit) | ((held >= target) & (number >= begin))
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    equal = keys == low
    number = tl.maximum(tl.sum(equal.to(tl.int32), 0), 1)
    above = tl.sum((keys > low).to(tl.int32), 0)
    each = tl.sum(tl.where(equal, weight, 0.0), 0) / number
    missing = target - tl.sum(tl.where(keys > low, weight, 0.0), 0)
    needed = tl.ceil(missing / tl.where(each > 0.0, each, 1.0))
    needed = tl.maximum(tl.minimum(needed, number.to(tl.float32)), 1.0).to(tl.int32)
    needed = tl.where(each > 0.0, needed, tl.where(missing > 0.0, number, 1))
    end = tl.minimum(tl.maximum(above + needed, begin), limit)
    return low, end - above, end


@triton.jit
def _select(
    weights, full, lengths, exact, averaged, thresholds, weight_strides, first, limits, heads, rows,
    width, blocks, size, single, half, quarter, eighth,
    PER_HEAD: tl.constexpr, EACH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find one query block's four levels and count what it lists."""
    r = rows - 1 - tl.program_id(0)
    program = tl.program_id(1)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    block = first + r
    source = weights + b * weight_strides[0] + h * weight_strides[1] + r * weight_strides[2]
    weight, _, keys = _row(source, source, block, width, False, COLUMNS)
    total = tl.sum(weight, 0)
    place = program.to(tl.int64) * blocks + block
    begin = block * 0 + tl.minimum(block + 1, 2)
    runs = block * 0
    for level in tl.static_range(4):
        if level == 0:
            share = tl.load(full + h) if PER_HEAD else single
        elif level == 1:
            share = half
        elif level == 2:
            share = quarter
        else:
            share = eighth
        most = tl.load(limits + level * rows + r)
        # The first level holds two at least, within its limit.
        most = most - begin if level == 0 else most
        low, ties, end = _end(weight, keys, total, share, most, begin, block + 1)
        if level > 0:
            runs += (end - begin) * (EACH >> level)
        else:
            real = block * size < tl.load(lengths + b)
            tl.store(exact + place, tl.where(real, end, 0))
        begin = end
        tl.store(thresholds + 8 * place + 2 * level, low)
        tl.store(thresholds + 8 * place + 2 * level + 1, ties)
    tl.store(averaged + place, tl.where(real, runs, 0))


@triton.jit
def _write(
    weights, exact, thresholds, offsets, ids, run_offsets, run_ids, weight_strides, first, heads,
    rows, width, blocks, capacity, run_capacity, tokens,
    EACH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the ids that ``_select`` counted behind those of the query blocks before."""
    r = rows - 1 - tl.program_id(0)
    program = tl.program_id(1)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    block = first + r
    place = program.to(tl.int64) * blocks + block
    if tl.load(exact + place) > 0:
        source = weights + b * weight_strides[0] + h * weight_strides[1] + r * weight_strides[2]
        _, _, keys = _row(source, source, block, width, False, COLUMNS)
        own = tl.arange(0, COLUMNS)
        begin = tl.load(offsets + program.to(tl.int64) * (blocks + 1) + block)
        run = tl.load(run_offsets + program.to(tl.int64) * (blocks + 1) + block)
        listed = own < 0
        base = tokens * 0
        for level in tl.static_range(4):
            low = tl.load(thresholds + 8 * place + 2 * level)
            ties = tl.load(thresholds + 8 * place + 2 * level + 1)
            equal = (keys == low).to(tl.int32)
            behind = tl.sum(equal, 0) - tl.cumsum(equal, 0)  # equals nearer than this one
            taken = (keys > low) | ((equal != 0) & (behind < ties))
            new = taken & (listed == 0)
            slots = tl.cumsum(new.to(tl.int32), 0) - 1
            if level == 0:
                target = ids + program.to(tl.int64) * capacity + begin + slots
                tl.store(target, own, mask=new & (begin + slots < capacity))
            else:
                for i in tl.static_range(EACH >> level):
                    slot = run + slots * (EACH >> level) + i
                    target = run_ids + program.to(tl.int64) * run_capacity + slot
                    tl.store(
                        target, base + own * (EACH >> level) + i, mask=new & (slot < run_capacity)
                    )
                run += tl.sum(new.to(tl.int32), 0) * (EACH >> level)
                base += tokens // (8 << level)
            listed = listed | taken


def select_levels(
    weights: Tensor,
    first: int,
    limits: Tensor,
    lengths: Tensor,
    size: int,
    tokens: int,
    masses: Sequence[float | Tensor],
    exact: Sequence[Tensor],
    averaged: Sequence[Tensor],
) -> None:
    """Launch; arguments are those of ``api.select_levels``. Two launches and two small sums."""
    B, H, R, C = weights.shape
    blocks = exact[0].shape[-1]
    weights = weights if weights.stride(-1) == 1 else weights.contiguous()
    full = masses[0].contiguous() if isinstance(masses[0], Tensor) else None
    thresholds = torch.empty(B, H, blocks, 8, dtype=torch.int32, device=weights.device)
    columns = max(32, triton.next_power_of_2(C))
    options = {"EACH": size // 8, "COLUMNS": columns, "num_warps": min(16, max(1, columns // 512))}
    strides = weights.stride()[:3]
    _select[(R, B * H)](
        weights, full, lengths, exact[0], averaged[0], thresholds, strides, first, limits, H, R, C,
        blocks, size, *(1.0 if isinstance(mass, Tensor) else float(mass) for mass in masses),
        PER_HEAD=full is not None, **options,
    )  # fmt: skip
    rows, behind = slice(first, first + R), slice(first + 1, first + R + 1)
    for counts, offsets, _ in (exact, averaged):
        listed = counts[..., rows].cumsum(-1, dtype=torch.int32)
        torch.add(listed, offsets[..., first : first + 1], out=offsets[..., behind])
    _write[(R, B * H)](
        weights, exact[0], thresholds, exact[1], exact[2], averaged[1], averaged[2], strides, first,
        H, R, C, blocks, exact[2].shape[-1], averaged[2].shape[-1], tokens, **options,
    )  # fmt: skip
