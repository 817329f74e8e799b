"""Launch the sparse-input linear layer for one row of x as a stream of live columns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

UNITS = (8, 16, 32)  # all lanes copy, and pieces of columns are whole lines
SHARES = 16  # at most
WARPS, FEW_WARPS = 16, 8  # of a program
SHORT = 32768  # units times channels up to which a program has few, and one of the next call fits
GROUPS = 4  # of copies under way
EACH, FEW_EACH = 4, 2  # copies of a group, 16 bytes a lane
FEW_CHUNKS = 2  # up to which a group has few copies, and more programs fit a multiprocessor
CHANNELS = 65536  # the list has 16 bits for a channel
LIST_BYTES = 64 * 1024  # of shared memory for the list of a program
NARROW = 1  # units that a column's piece takes in time beside its own
START, SUM_COST = 8, 12  # a program's start, a second kernel for the shares; in units of work
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (9, 0)  # of GPUs; others keep to the other kernels


@dataclass(frozen=True)
class Shape:
    """How a product is divided."""

    units: int  # eights of outputs of a program
    shares: int  # of the channels
    warps: int  # of a program
    chunks: int  # 32 channels each, of a warp

    @property
    def each(self) -> int:
        """Copies of a group."""
        return EACH if self.chunks > FEW_CHUNKS else FEW_EACH


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``."""
    out_features, in_features = weight.shape
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and len(x) == 1
        and in_features <= CHANNELS
        and out_features % 8 == 0
        and weight.stride(1) % 8 == 0
        and weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device) == CAPABILITY
    )


def sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``[1, out]`` for ``x`` ``[1, in]`` and a weight by columns that ``fits``.

    The kernel starts while the one before it ends and reads thresholds then. So the kernel that
    wrote them must have ended when a kernel before this call began.
    """
    from squeeze.kernels.sparse_gemv import stream
    from squeeze.kernels.sparse_gemv.triton import add_shares

    out_features, in_features = weight.shape
    place = torch.cuda.get_device_properties(x.device)
    shape = divide(out_features, in_features, place.multi_processor_count)
    y = x.new_empty(1, out_features)
    split = shape.shares > 1
    parts = x.new_empty(shape.shares, 1, out_features, dtype=torch.float32) if split else y
    blocks = triton.cdiv(out_features, 8 * shape.units)
    stream.multiply[(blocks, shape.shares)](
        x, weight, threshold, bias, parts, out_features, in_features, weight.stride(1),
        UNITS=shape.units, CHUNKS=shape.chunks, GROUPS=GROUPS, EACH=shape.each,
        WARPS=shape.warps, BIASED=bias is not None and not split,
        num_warps=shape.warps, launch_pdl=True,
    )  # fmt: skip
    if split:
        add_shares(parts, bias, y)
    return y


@cache
def divide(out_features: int, in_features: int, processors: int) -> Shape:
    """The division with the least work for the busiest multiprocessor.

    Of equal ones the one with the fewest shares, whose sums need not be written and read again.
    """
    every = triton.cdiv(out_features, 8)
    found = []
    for units, shares in itertools.product(UNITS, range(1, SHARES + 1)):
        channels = triton.cdiv(in_features, shares)
        waves = triton.cdiv(triton.cdiv(every, units) * shares, processors)
        warps = FEW_WARPS if waves == 1 and units * channels <= SHORT else WARPS
        chunks = triton.cdiv(channels, 32 * warps)
        if chunks * warps * 128 > LIST_BYTES or chunks > 4 * GROUPS * EACH:
            continue
        work = (units + NARROW) * chunks * warps / WARPS + START
        found.append((waves * work + SUM_COST * (shares > 1), shares, -units, warps, chunks))
    _, shares, units, warps, chunks = min(found)
    return Shape(-units, shares, warps, chunks)
