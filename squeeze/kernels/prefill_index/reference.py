"""What the kernels of a prefill index compute, in PyTorch: selection and lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def later(rows: range, blocks: int, device: torch.device) -> Tensor:
    """Mark the blocks after each query block's own, bool ``[R, C]``."""
    own = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return torch.arange(blocks, device=device) > own


def ranked(weights: Tensor, rows: range, require: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Order the blocks of each query block as ``select_blocks`` takes them.

    Returns:
        Block ids int64 ``[B, H, R, C]``, those after the query block's own last; and a mark of what
        is always taken, bool, broadcastable to it.
    """
    device, C = weights.device, weights.shape[-1]
    own = torch.arange(rows.start, rows.stop, device=device)[:, None]
    always = (torch.arange(C, device=device) == own) | (torch.arange(C, device=device) == 0)
    wanted = always if require is None else always | require
    # Weights reach 1: two more put what is required first, four more block 0 and the diagonal.
    rank = (weights + 2.0 * wanted + 4.0 * always).masked_fill(later(rows, C, device), -1.0)
    backwards = rank.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    return C - 1 - backwards, wanted


def chosen(
    weights: Tensor,
    rows: range,
    limits: Tensor,
    mass: float | Tensor,
    floor: Tensor | None,
    require: Tensor | None,
) -> Tensor:
    """Mark the blocks that ``select_blocks`` lists, bool ``[B, H, R, C]``."""
    hidden = later(rows, weights.shape[-1], weights.device)
    weights = weights.masked_fill(hidden, 0.0)
    order, wanted = ranked(weights, rows, require)
    allowed = torch.arange(order.shape[-1], device=weights.device) < limits[..., None]
    taken = torch.ones_like(order, dtype=torch.bool)
    if isinstance(mass, Tensor) or mass < 1.0:
        sorted_weights = weights.gather(-1, order)
        before = pad(sorted_weights.cumsum(-1)[..., :-1], (1, 0))
        missing = before < mass * weights.sum(-1, keepdim=True)
        taken &= missing | (mass >= 1.0) if isinstance(mass, Tensor) else missing
    if floor is not None:
        taken &= weights.gather(-1, order) >= floor
    taken |= wanted.expand_as(weights).gather(-1, order)
    keep = torch.zeros_like(weights, dtype=torch.bool)
    return keep.scatter_(-1, order, taken & allowed) & ~hidden


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
    """Write the lists; arguments are those of ``api.select_blocks``."""
    R, C = weights.shape[2:]
    keep = chosen(weights, range(first, first + R), limits, mass, floor, require)
    real = torch.arange(first, first + R, device=keep.device) * size < lengths[:, None]
    blocks = torch.arange(C, dtype=torch.int32, device=keep.device)
    append(keep & real[:, None, :, None], blocks, first, counts, offsets, ids)


def append(
    keep: Tensor, values: Tensor, first: int, counts: Tensor, offsets: Tensor, ids: Tensor
) -> None:
    """List what is kept of ``values [n]``, by ``keep [B, H, R, n]``, for rows from ``first`` on."""
    rows = slice(first, first + keep.shape[2])
    counts[..., rows] = keep.sum(-1)
    begin = offsets[..., first : first + 1]
    offsets[..., first + 1 : rows.stop + 1] = (
        counts[..., rows].cumsum(-1, dtype=torch.int32) + begin
    )
    flat = keep.flatten(-2)
    # The last slot takes what is not listed.
    slots = (flat.cumsum(-1) + (begin - 1)).masked_fill_(~flat, ids.shape[-1] - 1)
    ids.scatter_(-1, slots, values.expand(keep.shape).flatten(-2))


def levels(
    weights: Tensor, rows: range, limits: Tensor, masses: Sequence[float | Tensor]
) -> Tensor:
    """Return the level of each block, 0 to 3, or 4 for those skipped, ``[B, H, R, C]``."""
    hidden = later(rows, weights.shape[-1], weights.device)
    weights = weights.masked_fill(hidden, 0.0)
    order, _ = ranked(weights, rows)
    before = pad(weights.gather(-1, order).cumsum(-1)[..., :-1], (1, 0))
    total = weights.sum(-1, keepdim=True)
    own = torch.arange(rows.start, rows.stop, device=weights.device) + 1
    rank = torch.arange(weights.shape[-1], device=weights.device)
    end, found = torch.zeros_like(own), torch.zeros_like(order)
    for level, (mass, most) in enumerate(zip(masses, limits, strict=True)):
        everything = mass >= 1.0
        wanted = ((before < mass * total) | everything).sum(-1).clamp(min=0 if level else 2)
        end = torch.minimum(torch.maximum(wanted, end), end + most).minimum(own)  # [B, H, R]
        found += rank >= end[..., None]
    return torch.empty_like(order).scatter_(-1, order, found).masked_fill_(hidden, 4)


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
    """Write the lists; arguments are those of ``api.select_levels``."""
    R, C = weights.shape[2:]
    level = levels(weights, range(first, first + R), limits, masses)
    real = torch.arange(first, first + R, device=level.device) * size < lengths[:, None]
    level = level.masked_fill(~real[:, None, :, None], 4)
    blocks = torch.arange(C, dtype=torch.int32, device=level.device)
    append(level == 0, blocks, first, *exact)
    keep, runs, base = [], [], 0
    for h in (1, 2, 3):
        each = (size // 8) >> h
        keep.append((level == h).repeat_interleave(each, -1))
        runs.append(base + torch.arange(C * each, dtype=torch.int32, device=level.device))
        base += tokens // (8 << h)
    append(torch.cat(keep, -1), torch.cat(runs), first, *averaged)


def add_masses(weights: Tensor, octave: int, unit: float, held: Tensor) -> None:
    """Add weights to bins by their size; as ``api.add_masses`` has it."""
    weights = weights.flatten(-2)
    amounts = (weights * unit).long()
    bins = weights.log2().mul_(-octave).clamp_(0, held.shape[-1] - 1)
    held.scatter_add_(-1, bins.long(), amounts)


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
    """Sort and cut; arguments and results are those of ``api.choose_lines``."""
    T, N, device = columns.shape[-1], diagonals.shape[-1], columns.device
    pads = torch.zeros(columns.shape[0], dtype=torch.int64, device=device)
    pads = (pads if starts is None else starts)[:, None, None]  # [B, 1, 1]
    positions, distances = torch.arange(T, device=device), torch.arange(N, device=device)
    tokens = (positions + pads) % T  # where in the batch a position lies
    mass = columns.gather(-1, tokens.expand_as(columns))
    mass = mass.masked_fill((positions < size) | (positions >= T - pads), -1.0)
    chosen = _heaviest(mass, verticals, most[0])
    mass = diagonals.masked_fill(distances < nearest, torch.inf)
    mass = mass.masked_fill(distances * size >= T - pads, -1.0)
    if isinstance(slashes, Tensor):
        number: int | Tensor = slashes.clamp(min=nearest)
    else:
        number = max(slashes, nearest)
    return chosen, _heaviest(mass, number, most[1]).flip(-1)


def _heaviest(mass: Tensor, number: int | Tensor, most: int) -> Tensor:
    """Return where the heaviest are, ascending, int32 ``[B, H, most]``; n fills up."""
    n = mass.shape[-1]
    mass, best = mass.sort(dim=-1, descending=True, stable=True)
    mass, best = mass[..., :most], best[..., :most]
    number = number[:, None] if isinstance(number, Tensor) else number
    over = torch.arange(best.shape[-1], device=mass.device) >= number
    best = best.masked_fill((mass < 0) | over, n).sort().values
    return pad(best, (0, most - best.shape[-1]), value=n).int()


def list_lines(
    columns: Tensor, distances: Tensor, lengths: Tensor, size: int, blocks: int, first: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Write the lists out; arguments and results are those of ``api.list_lines``."""
    i = torch.arange(blocks, device=columns.device)[:, None]
    real = ((i * size < lengths[:, None, None]) & (i >= first))[:, None]  # [B, 1, N, 1]
    ids = pad((i - distances[:, :, None]).clamp(min=0), (1, 0))  # [B, H, N, 1 + S]
    keep = pad(ids[..., 1:] > 0, (1, 0), value=True) & real
    capacity = sum(min(row, distances.shape[-1]) + 1 for row in range(blocks))
    lists = compact(ids, keep, capacity)
    if columns.shape[-1] == 0:
        return *lists, None, None
    covered = torch.zeros(*distances.shape[:2], blocks + 1, dtype=torch.bool, device=i.device)
    covered.scatter_(-1, distances.long(), True)
    away = (i - columns[:, :, None] // size).clamp(min=0)  # [B, H, N, V]; 0 is always covered
    keep = ~covered.gather(-1, away.flatten(-2)).view(away.shape) & real
    capacity = sum(min(columns.shape[-1], max(0, row - 1) * size) for row in range(blocks))
    return *lists, *compact(columns[:, :, None], keep, capacity)


def compact(candidates: Tensor, keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Pack the kept candidates of every query block behind one another.

    Args:
        candidates: Integer ids, ``[B, H, N, C]`` or broadcastable to it, ascending along C.
        keep: bool ``[B, H, N, C]``.
        capacity: Upper bound of kept ids per row and head; the caller knows it without asking the
            device.
    Returns:
        Offsets int32 ``[B, H, N + 1]`` and ids int32 ``[B, H, capacity + 1]``; the last slot takes
        what was not kept.
    Cost: 17 bytes per candidate while packing, 4 per slot after.
    """
    offsets = pad(keep.sum(-1).cumsum(-1), (1, 0)).to(torch.int32)
    flat = keep.flatten(-2)  # [B, H, N * C]
    slots = flat.cumsum(-1, dtype=torch.int32).sub_(1).masked_fill_(~flat, capacity)
    values = candidates.to(torch.int32).expand(keep.shape).flatten(-2)
    ids = torch.zeros(*keep.shape[:2], capacity + 1, dtype=torch.int32, device=keep.device)
    return offsets, ids.scatter_(-1, slots.long(), values)
