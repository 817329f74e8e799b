"""Triton: add weights up by their size, in bins of a logarithmic scale."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WEIGHTS = 2048  # to one program


@triton.jit
def _add_masses(
    weights, held, number, unit,
    BINS: tl.constexpr, OCTAVE: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Add WEIGHTS weights of one head to its bins: integers, whose sums have no order."""
    program = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    weight = tl.load(weights + program * number + place, mask=place < number, other=0.0)
    amount = (weight * unit).to(tl.int64)
    taken = amount > 0
    bins = tl.log2(tl.where(taken, weight, 1.0)) * -OCTAVE
    bins = tl.minimum(tl.maximum(bins, 0.0), BINS - 1.0).to(tl.int32)
    tl.atomic_add(held + program * BINS + bins, amount, mask=taken, sem="relaxed")


def add_masses(weights: Tensor, octave: int, unit: float, held: Tensor) -> None:
    """Launch once; arguments are those of ``api.add_masses``."""
    weights, number = weights.contiguous(), weights.shape[2:].numel()
    _add_masses[(triton.cdiv(number, WEIGHTS), held.shape[:2].numel())](
        weights, held, number, unit,
        BINS=held.shape[-1], OCTAVE=octave, WEIGHTS=WEIGHTS, num_warps=4,
    )  # fmt: skip
