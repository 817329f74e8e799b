"""Launch the sparse-input linear layer for one row of x as a stream of live columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

WARPS = 16  # of a program
RESIDENT = 1  # programs per multiprocessor
GROUPS = 4  # of copies under way
EACH = 2  # copies of a group, 16 bytes a lane
CHANNELS = 65536  # the list has 16 bits for a channel
LIST_BYTES = 128 * 1024  # of shared memory for the lists of a program
SUM_COST = 12  # a second kernel for the shares, in units of work
CAPABILITY = (9, 0)  # of GPUs; others keep to the other kernels
NARROW = 1.15  # how much slower columns come in pieces of less than 128 bytes


@dataclass(frozen=True)
class Shape:
    """How a product is divided."""

    units: int  # eights of outputs of a program
    shares: int  # of the channels
    chunks: int  # 32 channels each, of a warp


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``."""
    out_features, in_features = weight.shape
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
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
        UNITS=shape.units, CHUNKS=shape.chunks, GROUPS=GROUPS, EACH=EACH, WARPS=WARPS,
        BIASED=bias is not None and not split, num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
    if split:
        add_shares(parts, bias, y)
    return y


@cache
def divide(out_features: int, in_features: int, processors: int) -> Shape:
    """The division with the least work for the busiest multiprocessor."""
    every = triton.cdiv(out_features, 8)
    found = []
    for units in range(1, 33):
        for shares in range(1, 17):
            chunks = triton.cdiv(in_features, 32 * WARPS * shares)
            if chunks * WARPS * 128 > LIST_BYTES:
                continue
            programs = triton.cdiv(every, units) * shares
            work = triton.cdiv(programs, processors * RESIDENT) * units * chunks * RESIDENT
            cost = work * (NARROW if units < 8 else 1.0) + SUM_COST * (shares > 1)
            found.append((cost, -units, shares, chunks))
    _, units, shares, chunks = min(found)
    return Shape(-units, shares, chunks)
