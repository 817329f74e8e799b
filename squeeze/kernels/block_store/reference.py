"""What ``store_blocks`` does, in torch: every slot of a due row that it names is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from squeeze.types import Tensors


def store_blocks(
    blocks: Mapping[str, Tensor], segments: Sequence[Tensors], slots: Tensor, due: Tensor
) -> None:
    """Write each due row's block into the segment that has its slot; see the API."""
    rows = torch.arange(len(slots), device=slots.device)
    first = 0
    for segment in segments:
        size = len(next(iter(segment.values())))
        inside = due & (slots >= first) & (slots < first + size)
        place = (slots.long() - first).clamp(0, size - 1)
        for name, x in segment.items():
            held = x[place, rows]
            chosen = inside.view(-1, *[1] * (held.ndim - 1))
            x[place, rows] = torch.where(chosen, blocks[name][0], held)
        first += size
