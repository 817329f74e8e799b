"""Triton: choose the heaviest columns and block diagonals of every head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE = 16384  # masses that a program holds in registers; more are read anew for every halving


@triton.jit
def _keys(mass, first, start, length, n, size, nearest, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Return sort keys of one tile, the bits of masses: inf if forced, -1 if not to be chosen."""
    own = first + tl.arange(0, TILE)
    if COLUMNS:
        valid = (own >= size) & (own < length)
        value = tl.load(mass + start + own, mask=valid, other=0.0)
    else:
        valid = (own < n) & (own * size < length)
        value = tl.load(mass + own, mask=valid, other=0.0)
        value = tl.where(own < nearest, float("inf"), value)
    return tl.where(valid, value.to(tl.int32, bitcast=True), -1)


@triton.jit
def _choose(
    mass, starts, numbers, ids, n, tokens, count, single, size, nearest, heads, halvings,
    COLUMNS: tl.constexpr, PER_HEAD: tl.constexpr, HAS_STARTS: tl.constexpr, TILE: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """List the heaviest of one head, columns ascending, diagonals descending; ``n`` fills up.

    All of keys >= t are taken for the largest t at which they are as many as wanted, the first of
    equals only as far as they fit. Halving the range of bits finds t without sorting.
    """
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + program // heads).to(tl.int32) if HAS_STARTS else 0
    length = tokens - start
    mass += program * n
    wanted = single
    if PER_HEAD:
        wanted = tl.minimum(tl.load(numbers + program % heads), count)
    wanted = wanted if COLUMNS else tl.minimum(tl.maximum(wanted, nearest), count)
    held = _keys(mass, 0, start, length, n, size, nearest, COLUMNS, TILE)
    low = wanted * 0
    high = low + 0x7F800001
    for _ in range(halvings):
        middle = low + (high - low) // 2
        number = tl.sum((held >= middle).to(tl.int32), 0)
        if not HELD:
            for first in range(TILE, n, TILE):
                keys = _keys(mass, first, start, length, n, size, nearest, COLUMNS, TILE)
                number += tl.sum((keys >= middle).to(tl.int32), 0)
        enough = number >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = low * 0
    equal = low * 0
    for first in range(0, n, TILE):
        keys = _keys(mass, first, start, length, n, size, nearest, COLUMNS, TILE)
        above += tl.sum((keys > low).to(tl.int32), 0)
        equal += tl.sum((keys == low).to(tl.int32), 0)
    ties = tl.maximum(tl.minimum(equal, wanted - above), 0)
    total = tl.minimum(above + ties, wanted)
    listed = low * 0
    target = ids + program * count
    for first in range(0, n, TILE):
        keys = _keys(mass, first, start, length, n, size, nearest, COLUMNS, TILE)
        same = (keys == low).to(tl.int32)
        taken = ((keys > low) | ((same != 0) & (tl.cumsum(same, 0) <= ties))).to(tl.int32)
        slots = listed + tl.cumsum(taken, 0) - 1
        slots = slots if COLUMNS else total - 1 - slots
        keep = (taken != 0) & (slots >= 0) & (slots < total)
        # Diagonals that fill up are the farthest: they come first.
        place = slots if COLUMNS else slots + count - total
        tl.store(target + place, first + tl.arange(0, TILE), mask=keep)
        listed += tl.sum(taken, 0)
        ties -= tl.sum(same, 0)
    for first in range(0, count, 1024):
        slots = first + tl.arange(0, 1024)
        unused = slots >= total if COLUMNS else slots < count - total
        tl.store(target + slots, slots * 0 + n, mask=unused & (slots < count))


def choose_lines(
    columns: Tensor,
    diagonals: Tensor,
    starts: Tensor | None,
    size: int,
    nearest: int,
    verticals: int | Tensor,
    slashes: int | Tensor,
    most: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Launch twice; arguments and results are those of ``api.choose_lines``."""
    B, H, T = columns.shape
    found = []
    for mass, numbers, count in zip((columns, diagonals), (verticals, slashes), most, strict=True):
        n = mass.shape[-1]
        ids = torch.empty(B, H, count, dtype=torch.int32, device=mass.device)
        each = numbers.contiguous() if isinstance(numbers, Tensor) else None
        single = min(numbers, count) if isinstance(numbers, int) else 0
        tile = max(1024, min(WHOLE, triton.next_power_of_2(n)))
        if count:
            _choose[(B * H,)](
                mass.contiguous(), starts, each, ids,
                n, T, count, single, size, nearest, H, 31,
                COLUMNS=mass is columns, PER_HEAD=each is not None, HAS_STARTS=starts is not None,
                TILE=tile, HELD=n <= tile, num_warps=min(16, tile // 256),
            )  # fmt: skip
        found.append(ids)
    return found[0], found[1]
