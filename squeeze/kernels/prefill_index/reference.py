"""What the kernels of a prefill index compute, in PyTorch: selection and lists."""

from __future__ import annotations

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
    B, H, R, C = weights.shape
    rows, capacity = range(first, first + R), ids.shape[-1]
    keep = chosen(weights, rows, limits, mass, floor, require)
    real = torch.arange(first, first + R, device=keep.device) * size < lengths[:, None]
    keep = keep & real[:, None, :, None]
    counts[..., first : first + R] = keep.sum(-1)
    begin = offsets[..., first : first + 1]
    ends = counts[..., first : first + R].cumsum(-1, dtype=torch.int32) + begin
    offsets[..., first + 1 : first + R + 1] = ends
    flat = keep.flatten(-2)
    # The last slot takes what is not listed.
    slots = (flat.cumsum(-1) + (begin - 1)).masked_fill_(~flat, capacity - 1)
    blocks = torch.arange(C, dtype=torch.int32, device=keep.device).repeat(R).expand(B, H, -1)
    ids.scatter_(-1, slots, blocks)


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
