"""Dense packing of small unsigned integers into int32 words, for any width from 1 to 8.

A width is split into planes of 4, 2 and 1 bits (3 = 2 + 1, 8 = 4 + 4), so every field of a plane
lies inside one word and a shift and a mask read it. In a plane of width w, a run of ``length``
values takes ``length * w / 32`` words, and field i of word j is value ``i * words + j``: unpacking
field by field yields contiguous runs, in order. Planes follow each other, low bits first.

``pack_bytes`` does the same with bytes for words, for data that is read a byte at a time: there a
width of 8 is one plane.
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


def pack_bytes(values: Tensor, bits: int) -> Tensor:
    """Pack integers in ``[0, 2**bits)`` along the second dimension from the end.

    Args:
        values: Any integer dtype, ``[..., length, columns]``, length a multiple of 8.
        bits: Width, 1 to 8.
    Returns:
        uint8 ``[..., length * bits / 8, columns]``, contiguous: in a plane of width w and
        ``rows = length * w / 8``, field i of row j is value ``i * rows + j``.
    """
    if values.shape[-2] % 8:
        raise ValueError(f"length must be a multiple of 8, got {values.shape[-2]}")
    values = values.to(torch.uint8)
    planes, low = [], 0
    for width in _byte_planes(bits):
        fields = ((values >> low) & (2**width - 1)).unflatten(-2, (8 // width, -1))
        plane = fields[..., 0, :, :].clone()
        for i in range(1, 8 // width):
            plane |= fields[..., i, :, :] << (i * width)
        planes.append(plane)
        low += width
    return torch.cat(planes, dim=-2)


def unpack_bytes(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo ``pack_bytes``.

    Args:
        packed: uint8 ``[..., length * bits / 8, columns]``.
        bits: Width, 1 to 8.
        length: Number of values along that dimension, a multiple of 8.
    Returns:
        uint8 ``[..., length, columns]``.
    """
    start = low = 0
    result = None
    for width in _byte_planes(bits):
        rows = length * width // 8
        plane = packed[..., start : start + rows, :]
        parts = [(plane >> i) & (2**width - 1) for i in range(0, 8, width)]
        fields = torch.cat(parts, dim=-2) << low
        result = fields if result is None else result | fields
        start, low = start + rows, low + width
    assert result is not None
    return result


def _byte_planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes in bytes."""
    return (8,) if bits == 8 else PLANES[bits]
