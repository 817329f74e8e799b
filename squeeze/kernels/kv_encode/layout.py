"""What the encoding kernels write, and which blocks they take; imports nothing of Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

UNIFORM = ("affine", "graded")
WIDTHS = (1, 2, 3, 4, 8)
HEAD_TOKENS = 128  # under one scale of float8, granularity head
# A kernel that rotates takes so many channels at a time, and at least so many columns.
DEPTH, LEAST_COLUMNS = 16, 8

Shapes = dict[str, tuple[tuple[int, int], torch.dtype]]


class Range(NamedTuple):
    """Channels of a head that share a width: what one launch encodes.

    Attributes:
        bits: Width of a code.
        channel: Whether a group is tokens of a channel, not channels of a token.
        group: Members of a group.
        symmetric: Whether there is no zero.
        graded: Whether the levels stand as ``graded`` sets them.
        row: Scales that lie in a row, those of the other ranges included.
        size: Channels.
        first: First channel. The ranges before it have bits too.
        bits_before: Widths of the ranges before it together.
    """

    bits: int
    channel: bool
    group: int
    symmetric: bool
    graded: bool
    row: int
    size: int
    first: int = 0
    bits_before: int = 0


def ranges(format: Any, size: int) -> tuple[Range, ...]:
    """List the ranges of a head of ``size`` channels that have bits, for a uniform format."""
    if format.info.name == "affine":
        channel, group = format.granularity == "channel", format.group_size
        row = size if channel else size // group
        return (Range(format.bits, channel, group, format.symmetric, False, row, size),)
    share = size // len(format.widths)
    return tuple(
        Range(
            width,
            channel=True,
            group=format.group_size,
            symmetric=False,
            graded=True,
            row=format.live * share,
            size=share,
            first=i * share,
            bits_before=sum(format.widths[:i]),
        )
        for i, width in enumerate(format.widths[: format.live])
    )


def takes(format: Any, length: int, size: int) -> bool:
    """Say whether a kernel encodes blocks ``[length, size]``.

    It takes every ``float8`` block, and those of ``affine`` and ``graded`` of widths 1, 2, 3, 4 and
    8 whose rows of packed bytes do not cut a channel's group unevenly: all lengths that are powers
    of two, and more.
    """
    if format.info.name == "float8":
        return True
    if format.info.name not in UNIFORM:
        return False
    return all(_fits(part, length) for part in ranges(format, size))


def rotates(format: Any, length: int, size: int) -> bool:
    """Say whether a kernel also multiplies the blocks that it takes by a matrix of their head.

    It does where groups are tokens of a channel, so that a program needs few columns.
    """
    if format.info.name not in UNIFORM or size % DEPTH or not takes(format, length, size):
        return False
    parts = ranges(format, size)
    return all(part.channel and columns(part) >= LEAST_COLUMNS for part in parts)


def columns(part: Range) -> int:
    """Count the columns that a program can have at most: a power of two that divides the range."""
    return part.size & -part.size


def fields(bits: int) -> int:
    """Count the tokens that share a row of bytes in the narrowest plane of a width."""
    return 8 if bits == 3 else 8 // bits


def shapes(format: Any, length: int, size: int) -> Shapes:
    """Name each component's last two dimensions and its dtype, for blocks ``[length, size]``."""
    if format.info.name == "float8":
        scales = length // HEAD_TOKENS if format.scale == "head" else length
        return {
            "codes": ((length, size), torch.uint8),
            "scale": ((scales, 1), torch.float16),
        }
    parts = ranges(format, size)
    rows = sum(part.bits for part in parts) * length // 8
    constants = (length // parts[0].group if parts[0].channel else length, parts[0].row)
    names = ("scale",) if parts[0].symmetric else ("scale", "zero")
    codes = ((rows, parts[0].size), torch.uint8)
    return {"codes": codes} | dict.fromkeys(names, (constants, torch.float16))


def _fits(part: Range, length: int) -> bool:
    """Say whether the kernel packs a range of blocks of ``length`` tokens."""
    rows = length // fields(part.bits)
    even = not part.channel or rows % part.group == 0 or part.group % rows == 0
    return part.bits in WIDTHS and even
