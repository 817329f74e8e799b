"""Launch the integer linear layer for few rows of x."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.types import IntegerWeight

ROWS = 16  # of x
WARPS = 16
COPIES = 4  # of 16 bytes per row of a tile that a lane has under way
SHARED_BYTES = 224 * 1024  # of a program
CAPABILITY = (9, 0)  # of GPUs; others keep to the other kernels


@dataclass(frozen=True)
class Shape:
    """How a product is divided."""

    x_rows: int  # rows of x that have room
    slices: int  # of the columns, each with programs of its own
    chunks: int  # 128 columns each, of a slice
    programs: int  # of a slice
    own: int  # tiles of 16 rows of a program
    depth: int  # chunks of a warp under way


@triton.jit
def _add_up(parts, bias, y, size, out_features, PARTS: tl.constexpr, BIASED: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """y[i] = sum of parts[p, i] in float32, plus the bias."""
    gdc_launch_dependents()
    gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = place < size
    total = tl.load(parts + place, mask=keep, other=0.0)
    for p in tl.static_range(1, PARTS):
        total += tl.load(parts + p * size.to(tl.int64) + place, mask=keep, other=0.0)
    if BIASED:
        total += tl.load(bias + place % out_features, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=keep)


def fits(x: Tensor, weight: IntegerWeight) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and 0 < len(x) <= ROWS
        and weight.bits in (4, 8)
        and (weight.group_size == 64 or weight.group_size % 128 == 0)
        and weight.shape[1] % 128 == 0
        and weight.shape[1] % weight.group_size == 0
        and weight.codes.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device) == CAPABILITY
    )


def integer_linear(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` for ``x`` ``[rows, in]`` that ``fits``.

    Each kernel starts while the one before it ends and reads weights then. So the kernel that wrote
    a weight must have ended when a kernel before this call began.
    """
    from squeeze.kernels.integer_linear import stream

    out_features, in_features = weight.shape
    place = torch.cuda.get_device_properties(x.device)
    u, rows = weight.group_size // 32, len(x)
    shape = divide(rows, out_features, in_features, u, weight.bits, place.multi_processor_count)
    split = shape.slices > 1
    y = x.new_empty(rows, out_features)
    parts = x.new_empty(shape.slices, rows, out_features, dtype=torch.float32) if split else y
    stream.multiply[(shape.programs, shape.slices)](
        x, weight.codes, weight.scale, weight.zero, weight.exponents, bias, parts,
        rows, x.stride(0), in_features, out_features, weight.scale.shape[1],
        u=u, BITS=weight.bits, X=shape.x_rows, OWN=shape.own, CHUNKS=shape.chunks,
        DEPTH=shape.depth, WARPS=WARPS, ASYMMETRIC=weight.zero is not None,
        SCALED=weight.exponents is not None and not weight.folded,
        BIASED=bias is not None and not split, num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
    if split:
        _add_up[(triton.cdiv(y.numel(), 512),)](
            parts, bias, y, y.numel(), out_features, PARTS=shape.slices, BIASED=bias is not None,
            BLOCK=512, num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return y


@cache
def divide(
    count: int, out_features: int, in_features: int, u: int, bits: int, processors: int
) -> Shape:
    """The division with the fewest chunks for the busiest warp that shared memory has room for."""
    from squeeze.kernels.integer_linear import stream

    x_rows = triton.next_power_of_2(count)
    depth = COPIES * 4 // bits
    tiles, every = triton.cdiv(out_features, 16), in_features // 128
    found = []
    for slices in range(1, min(every, processors) + 1):
        chunks = triton.cdiv(every, slices)
        programs = min(tiles, max(1, processors // slices))
        own = triton.cdiv(tiles, programs)
        while own > 1 and _bytes(stream, depth, bits, chunks, x_rows, own, u) > SHARED_BYTES:
            own -= 1
        if _bytes(stream, depth, bits, chunks, x_rows, own, u) > SHARED_BYTES:
            continue
        programs = triton.cdiv(tiles, own)
        waves = triton.cdiv(programs * slices, processors)
        cost = waves * (own * triton.cdiv(chunks, WARPS) + 2) + (slices > 1)
        found.append((cost, slices, chunks, programs, own))
    _, slices, chunks, programs, own = min(found)
    return Shape(x_rows, triton.cdiv(every, chunks), chunks, programs, own, depth)


def _bytes(stream, depth: int, bits: int, chunks: int, x_rows: int, own: int, u: int) -> int:
    """Shared memory of a program."""
    return stream.shared_bytes(WARPS, depth, bits // 4, chunks, x_rows, own, u) + 512
