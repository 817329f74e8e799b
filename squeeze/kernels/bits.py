"""Dense packing of small unsigned integers into int32 words, for any width from 1 to 8.

A width is split into planes of 4, 2 and 1 bits (3 = 2 + 1, 8 = 4 + 4), so every field of a plane
lies inside one word and a shift and a mask read it. In a plane of width w, a run of ``length``
values takes ``length * w / 32`` words, and field i of word j is value ``i * words + j``: unpacking
field by field yields contiguous runs, in order. Planes follow each other, low bits first.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (4, 4),
}


def words(length: int, bits: int) -> int:
    """Count the int32 words that ``length`` values take; ``length`` is a multiple of 32."""
    if length % 32:
        raise ValueError(f"length must be a multiple of 32, got {length}")
    return length * bits // 32


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers in ``[0, 2**bits)`` along the last dimension.

    Args:
        values: Any integer dtype, ``[..., length]``, length a multiple of 32.
        bits: Width, 1 to 8.
    Returns:
        int32 ``[..., length * bits / 32]``, contiguous.
    """
    values = values.to(torch.int32)
    planes, low = [], 0
    for width in PLANES[bits]:
        count = words(values.shape[-1], width)
        fields = ((values >> low) & (2**width - 1)).unflatten(-1, (32 // width, count))
        word = fields[..., 0, :].clone()
        for i in range(1, 32 // width):
            word |= fields[..., i, :] << (i * width)
        planes.append(word)
        low += width
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo ``pack``.

    Args:
        packed: int32 ``[..., length * bits / 32]``.
        bits: Width, 1 to 8.
        length: Number of values, a multiple of 32.
    Returns:
        uint8 ``[..., length]``.
    """
    result = torch.zeros(*packed.shape[:-1], length, dtype=torch.uint8, device=packed.device)
    start = low = 0
    for width in PLANES[bits]:
        count = words(length, width)
        plane = packed[..., start : start + count]
        shifts = torch.arange(0, 32, width, dtype=torch.int32, device=packed.device)
        fields = (plane.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (2**width - 1)
        result |= fields.flatten(-2).to(torch.uint8) << low
        start, low = start + count, low + width
    return result
