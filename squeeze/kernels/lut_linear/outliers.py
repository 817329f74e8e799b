"""Corrections of single weights as a dense matrix: the specification of what they add."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.types import ClusteredWeight


def corrections(weight: ClusteredWeight) -> Tensor | None:
    """Return what is added to the palette's values, float32 ``[out, in]``, or ``None``."""
    values, columns, offsets = (
        weight.outlier_values,
        weight.outlier_columns,
        weight.outlier_offsets,
    )
    if values is None or columns is None or offsets is None:
        return None
    dense = torch.zeros(weight.shape, device=values.device)
    numbers = torch.arange(weight.shape[0], device=values.device)
    counts = offsets.diff().long()
    rows = numbers.repeat_interleave(counts, output_size=len(values))
    dense[rows, columns.int() & 0xFFFF] = values.float()
    return dense
