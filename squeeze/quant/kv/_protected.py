"""Salient tokens of a block: what a coarse format lost of them is stored beside it, at 4 bits.

Of every 128 tokens of a head a fixed number is protected, so blocks keep one shape. Three ways were
weighed. Tokens kept exact in buffers of the cache, masked out of their blocks, would serve every
format, but put a mask into every kernel, and rows whose buffers grow with the prompt into every
place that selects, crops, saves or moves rows. A second precision inside the codes, as the source
has it, would break the layout that lets a kernel read a block at once. As components of the block,
positions and remainders go wherever the block goes, cost nothing where there are none, and a kernel
adds them to scores and outputs that it has already: one dot product and one sum per token. What is
stored is the remainder, not the value, so nothing must be taken back first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias

import torch
from annotated_types import Ge, Le, MultipleOf
from torch import Tensor

from squeeze.types import Tensors

RUN = 128  # tokens among which a number is protected
# How many; a pair of them shares bytes.
Protected: TypeAlias = Annotated[int, Ge(0), Le(16), MultipleOf(2)]
# A remainder is ``(code - 7.5) * scale``, code 0 to 15.
MIDDLE = 7.5
HALF_MAX = torch.finfo(torch.float16).max


def protect(x: Tensor, decoded: Tensor, count: int, salience: Tensor | None) -> Tensors:
    """Store what a format lost of the most salient tokens.

    Args:
        x: ``[..., L, D]``, any float dtype; L a multiple of 128.
        decoded: float32, what the format makes of it.
        count: Tokens of every 128.
        salience: ``[..., L]``, leading dimensions may be 1; ``None`` is all equal. Of equally
            salient tokens those of which most was lost are protected, the first of them first.

    Returns:
        ``kept_at`` uint8 ``[..., L / 128, count]``, ascending; ``kept`` uint8 ``[..., L / 128,
        count / 2, D]``, token i in the low bits of byte row i, token ``i + count / 2`` in the
        high ones; ``kept_scale`` float16 ``[..., L / 128, count]``.
    """
    lost = (x.float() - decoded).unflatten(-2, (-1, RUN))
    order = lost.square().sum(-1).argsort(dim=-1, descending=True, stable=True)
    if salience is not None:
        ranked = salience.unflatten(-1, (-1, RUN)).expand(order.shape).gather(-1, order)
        order = order.gather(-1, ranked.argsort(dim=-1, descending=True, stable=True))
    place = order[..., :count].sort(-1).values
    rows = lost.gather(-2, place.unsqueeze(-1).expand(*place.shape, x.shape[-1]))
    scale = (rows.abs().amax(-1) / MIDDLE).clamp(max=HALF_MAX).to(torch.float16)
    step = scale.float().unsqueeze(-1)
    codes = torch.where(step == 0, 0.0, rows / step + MIDDLE).round().clamp(0, 15)
    low, high = codes.nan_to_num(0).to(torch.uint8).chunk(2, dim=-2)
    return {"kept_at": place.to(torch.uint8), "kept": low | high << 4, "kept_scale": scale}


def restore(decoded: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
    """Add what ``protect`` stored to ``decoded`` ``[..., L, D]``, float32."""
    codes = torch.cat([packed["kept"] & 15, packed["kept"] >> 4], dim=-2)
    rows = (codes.float() - MIDDLE) * packed["kept_scale"].float().unsqueeze(-1)
    # Slots that hold no block yet are decoded, too: whatever stands there must be a position.
    place = (packed["kept_at"] % RUN).long().unsqueeze(-1).expand(rows.shape)
    return decoded.unflatten(-2, (-1, RUN)).scatter_add(-2, place, rows).flatten(-3, -2)


def protected_bits(count: int, head_dim: int) -> float:
    """Count the bits that this adds per value: 4 per channel, a position and a scale."""
    return count * (4 * head_dim + 8 + 16) / (RUN * head_dim)
