"""Parts of packed weights: a run of rows, or of columns, cut out of what is stored.

A part stands for exactly the values of the weight that it was cut from. Where the border of a
codebook or of a group of scales does not fall on the cut, the part holds smaller ones, repeated.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from squeeze.kernels import bits
from squeeze.types import ClusteredWeight, IntegerWeight, PackedWeight

RUN = 32  # columns that are packed together, at least


def refuse_columns(weight: PackedWeight, size: int) -> str | None:
    """Say why ``columns_of`` cannot cut a weight into ``size`` parts, ``None`` if it can.

    Only the shape is read, so tensors on the meta device will do.
    """
    count = weight.shape[1] // size
    if weight.shape[1] % size:
        return f"{weight.shape[1]} columns for {size} processes"
    if isinstance(weight, IntegerWeight) and _group_size(weight, count) % RUN:
        return (
            f"groups of {weight.group_size} columns with one scale, which {size} processes would "
            f"cut every {count} columns"
        )
    return None


def rows_of(weight: PackedWeight, index: int, size: int) -> PackedWeight:
    """Cut out output rows.

    Args:
        weight: ``[out, in]``, ``out`` divisible by ``size``.
        index: Which part, from 0.
        size: Number of parts.

    Returns:
        ``[out / size, in]``, in tensors of its own.
    """
    count = weight.shape[0] // size
    rows = slice(index * count, (index + 1) * count)
    changed: dict[str, Any] = {"shape": (count, weight.shape[1])}
    stored = (
        ("codes", "scale", "zero", "row_scale")
        if isinstance(weight, IntegerWeight)
        else ("indices", "scale")
    )
    for name in stored:
        tensor = getattr(weight, name)
        changed[name] = None if tensor is None else tensor[rows].clone()
    if isinstance(weight, ClusteredWeight):
        changed["rows"], blocks = _blocks(weight.rows, weight.shape[0], rows)
        changed["codebook"] = weight.codebook[blocks.to(weight.codebook.device)]
        changed |= _outliers(weight, rows=rows)
    return replace(weight, **changed)


def columns_of(weight: PackedWeight, index: int, size: int) -> PackedWeight:
    """Cut out input columns.

    Args:
        weight: ``[out, in]``; ``refuse_columns`` has nothing against it.
        index: Which part, from 0.
        size: Number of parts.

    Returns:
        ``[out, in / size]``, in tensors of its own.
    """
    count = weight.shape[1] // size
    columns = slice(index * count, (index + 1) * count)
    if isinstance(weight, IntegerWeight):
        return _integer_columns(weight, columns)
    length = -(-weight.shape[1] // RUN) * RUN
    indices = bits.unpack(weight.indices, weight.bits, length)[:, columns]
    shared, blocks = _blocks(weight.columns, weight.shape[1], columns)
    return replace(
        weight,
        indices=bits.pack(pad(indices, (0, -count % RUN)), weight.bits),
        codebook=weight.codebook[:, blocks.to(weight.codebook.device)],
        shape=(weight.shape[0], count),
        columns=shared,
        **_outliers(weight, columns=columns),
    )


def _integer_columns(weight: IntegerWeight, columns: slice) -> IntegerWeight:
    """Cut out columns, in groups as large as the cut allows."""
    count, length = columns.stop - columns.start, weight.group_size
    size = _group_size(weight, count)
    packed = weight.codes.view(len(weight.codes), -1, bits.words(length, weight.bits))
    codes = bits.unpack(packed, weight.bits, length).flatten(1)[:, columns]
    codes = pad(codes, (0, -count % size)).unflatten(1, (-1, size))
    first = torch.arange(columns.start, columns.stop, size, device=weight.scale.device)
    group = first // length
    return replace(
        weight,
        codes=bits.pack(codes, weight.bits).flatten(1),
        scale=weight.scale[:, group],
        zero=None if weight.zero is None else weight.zero[:, group],
        exponents=None if weight.exponents is None else weight.exponents[columns].clone(),
        row_scale=None if weight.row_scale is None else weight.row_scale.clone(),
        group_size=size,
        shape=(weight.shape[0], count),
    )


def _group_size(weight: IntegerWeight, count: int) -> int:
    """Choose the columns of a part of ``count`` columns that share a scale."""
    if weight.group_size >= weight.shape[1]:
        return -(-count // RUN) * RUN
    return gcd(weight.group_size, count)


def _blocks(shared: int, length: int, part: slice) -> tuple[int, Tensor]:
    """Cut runs of ``shared`` that have one codebook each at the borders of a part.

    Returns:
        How many rows or columns of the part share a codebook, and the codebook of each run.
    """
    count = part.stop - part.start
    size = count if shared >= length else gcd(shared, count)
    return size, torch.arange(part.start, part.stop, size) // shared


def _outliers(
    weight: ClusteredWeight, rows: slice | None = None, columns: slice | None = None
) -> dict[str, Any]:
    """Select the corrections inside a part, ``None`` where it has none."""
    names = ("outlier_values", "outlier_columns", "outlier_offsets")
    values, places, offsets = (getattr(weight, name) for name in names)
    if values is None or places is None or offsets is None:
        return {}
    number = torch.arange(weight.shape[0], device=values.device)
    row = number.repeat_interleave(offsets.diff().long(), output_size=len(values))
    column = places.int() & 0xFFFF
    inside = torch.ones_like(row, dtype=torch.bool)
    begin, end = 0, weight.shape[0]
    if rows is not None:
        begin, end = rows.start, rows.stop
        inside = (row >= begin) & (row < end)
    if columns is not None:
        inside = (column >= columns.start) & (column < columns.stop)
        column = column - columns.start
    if not inside.any():
        return dict.fromkeys(names)
    counts = torch.bincount(row[inside] - begin, minlength=end - begin)
    column = column[inside]
    return {
        "outlier_values": values[inside],
        "outlier_columns": column.where(column < 2**15, column - 2**16).to(torch.int16),
        "outlier_offsets": pad(counts.cumsum(0), (1, 0)).to(torch.int32),
    }
