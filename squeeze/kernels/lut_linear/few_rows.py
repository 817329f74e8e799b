"""Launch the clustered linear layer for few rows of x."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.lut_linear import gluon_layout
from squeeze.types import ClusteredWeight

STEP_WORDS = 16  # words of each plane in a step, 512 channels
ROWS = 16  # rows of x up to which this is the kernel to choose
TILES = 1  # sixteens of weight rows of a tile
SHARED_BYTES = 112 * 1024  # of a program, where two are to fit a multiprocessor
PARTS_PER_STEP = 500_000  # partial outputs written and added up in the time of a step
LONG = 16  # steps of a row; where it has more, eight warps take less time by fours
# Tiles of a program up to which they are few, and the next kernel had better not start before x is
# read where a warp has but a step of each.
BRIEF = 2
CAPABILITY = (9, 0)  # of GPUs; others keep to the other kernels


@dataclass(frozen=True)
class Shape:
    """How a product is divided among programs, warps and registers."""

    x_rows: int  # rows of x that have room
    slices: int  # of the channels, each with programs of its own
    steps: int  # of a slice
    programs: int  # of a slice
    own: int  # tiles of a program
    across: int  # warps that share a tile
    warps: int
    each: int  # blocks of x that a warp has under way
    halves: int  # of the entries: 2 looks them up by addition, 1 by choice
    late: bool  # whether the next kernel starts only when x has been read

    @property
    def column_tiles(self) -> int:
        """Eights of columns: two per row of x."""
        return -(-self.x_rows // 4)

    @property
    def registers(self) -> int:
        """Of a thread, at most."""
        return 1024 // self.warps

    def shared_bytes(self, bits: int, pieces: int) -> int:
        """Bytes of shared memory of a program."""
        return gluon_layout.shared_bytes(
            self.warps, TILES, bits, self.steps, self.x_rows, self.own, pieces, self.across,
            self.column_tiles,
        )  # fmt: skip


@triton.jit
def _add_up(parts, y, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum of parts[p, i] in float32."""
    gdc_launch_dependents()
    gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = place < size
    total = tl.load(parts + place, mask=keep, other=0.0)
    for p in tl.static_range(1, PARTS):
        total += tl.load(parts + p * size.to(tl.int64) + place, mask=keep, other=0.0)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=keep)


def fits(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``, and is the one to choose."""
    return 0 < len(x) <= ROWS and takes(x, weight)


def takes(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether weights of this form can be streamed, and multiplied by x of this dtype."""
    u = weight.indices.shape[1] // weight.bits
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.bits in (2, 3, 4)
        and weight.codebook.shape[1] == 1
        and u % 4 == 0
        and weight.indices.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device) == CAPABILITY
    )


def lut_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` for ``x`` ``[rows, in]`` that ``fits``.

    Each kernel starts while the one before it ends and reads weight and bias then. So the kernels
    that wrote them must have ended when a kernel before this call began.
    """
    from squeeze.kernels.lut_linear import gluon

    out_features, in_features = weight.shape
    count, u = len(x), weight.indices.shape[1] // weight.bits
    pieces = 1 if weight.codebook.dtype == torch.int8 else 2
    place = torch.cuda.get_device_properties(x.device)
    shape = divide(count, out_features, u, pieces, weight.bits, place.multi_processor_count)
    y = x.new_empty(count, out_features)
    parts = y
    if shape.slices > 1:
        parts = x.new_empty(shape.slices, count, out_features, dtype=torch.float32)
    gluon.multiply[(shape.programs, shape.slices)](
        x, weight.indices, weight.codebook, weight.scale, bias, parts,
        count, x.stride(0), in_features, out_features,
        u=u, STEPS=shape.steps, X=shape.x_rows, OWN=shape.own, ACROSS=shape.across,
        TILES=TILES, COLUMN_TILES=shape.column_tiles, EACH=shape.each, WARPS=shape.warps,
        PIECES=pieces, SHARED=weight.rows, BITS=weight.bits,
        ALIGNED=x.data_ptr() % 4 == 0 and (count == 1 or x.stride(0) % 2 == 0),
        FULL=in_features == 32 * u, WHOLE=out_features % (16 * TILES) == 0,
        HALVES=shape.halves, SCALED=weight.scale is not None, BIASED=bias is not None,
        LATE=shape.late,
        num_warps=shape.warps, maxnreg=shape.registers, launch_pdl=True,
    )  # fmt: skip
    if shape.slices > 1:
        add_up(parts, y)
    return y


def add_up(parts: Tensor, y: Tensor) -> None:
    """Write the sum of partial outputs ``[slices, rows, out]`` to ``y``."""
    _add_up[(triton.cdiv(y.numel(), 512),)](
        parts, y, y.numel(), PARTS=len(parts), BLOCK=512, num_warps=4, launch_pdl=True
    )


@cache
def divide(count: int, out_features: int, u: int, pieces: int, bits: int, processors: int) -> Shape:
    """The division with the least work for the busiest warp.

    Eight warps of 128 registers, or sixteen of 64 for 2 to 4 rows of x and bytes of 2 bits, or of 3
    where a program has few tiles: two programs fit a multiprocessor if their shared memory does,
    and the next kernel's weights come while this one ends. A step of a warp takes about as long as
    one more kernel for adding up slices, and a third of what a start takes that nothing hides.
    """
    found: list[tuple[float, int, int, Shape]] = []
    while not found:
        found = _divisions(count, out_features, u, pieces, bits, processors)
        processors *= 2  # more programs than at once: the rows of fewer did not fit
    return min(found, key=lambda each: each[:3])[3]


def _divisions(
    count: int, out_features: int, u: int, pieces: int, bits: int, programs: int
) -> list[tuple[float, int, int, Shape]]:
    """Divisions for so many programs that fit: cost in steps of a warp, slices, choice, shape."""
    x_rows = triton.next_power_of_2(count)
    tiles, all_steps = triton.cdiv(out_features, 16), triton.cdiv(u, STEP_WORDS)
    warps, sharing = _warps(x_rows, all_steps, tiles > BRIEF * programs, pieces, bits)
    found = []
    for slices, steps in slicings(all_steps, programs):
        each_slice = min(tiles, programs // slices)
        for choice, across in enumerate(sharing):
            groups = warps // across
            rounds = triton.cdiv(triton.cdiv(tiles, each_slice), groups)
            shape = Shape(
                x_rows, slices, steps, each_slice, rounds * groups, across, warps,
                each=min(2 if warps == 16 else 4, triton.cdiv(steps * x_rows, warps)),
                halves=2 if bits == 4 and x_rows <= 8 else 1,
                late=steps <= across and rounds <= BRIEF,
            )  # fmt: skip
            used = shape.shared_bytes(bits, pieces)
            cost = rounds * triton.cdiv(steps, across) + 3.0 * (used > SHARED_BYTES)
            if slices > 1:
                cost += 1 + slices * x_rows * out_features / PARTS_PER_STEP
            if used <= 2 * SHARED_BYTES:
                found.append((cost, slices, choice, shape))
    return found


def _warps(
    x_rows: int, all_steps: int, many_tiles: bool, pieces: int, bits: int
) -> tuple[int, tuple[int, ...]]:
    """Warps of a program, and how many of them may share a tile, of equal ones the first."""
    if x_rows == 1:
        return 8, (8, 4, 2, 1)
    if x_rows > 4 or pieces > 1:
        return 8, (1, 2, 4, 8)
    if bits == 4 or (bits == 3 and many_tiles):
        return 8, (4,) if all_steps > LONG else (8, 4, 2, 1)
    return 16, (1, 2, 4, 8, 16)


def slicings(all_steps: int, programs: int) -> Iterator[tuple[int, int]]:
    """Numbers of slices, and the steps of each."""
    for slices in range(1, min(all_steps, programs) + 1):
        steps = triton.cdiv(all_steps, slices)
        if triton.cdiv(all_steps, steps) == slices:
            yield slices, steps
