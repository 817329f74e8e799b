"""Launch the clustered linear layer for more rows of x than a few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from squeeze.kernels.lut_linear import few_rows, gluon_wide_layout
from squeeze.types import ClusteredWeight

ROWS = range(5, 65)  # rows of x for which this is the kernel to choose
SHARED_BYTES = 226 * 1024  # of a program, which has a multiprocessor to itself
# Microseconds: a warpgroup's step of 512 channels of 4-bit weights, 16 rows of x; turning 512
# channels of two rows to bytes; adding up slices, and a million partial outputs.
STEP, SPLIT, SLICES, PARTS = 0.53, 0.035, 2.5, 2.0
# Times that: a step of entries of two bytes, and of a program of eight warps.
TWO_PIECES, EIGHT_WARPS = 1.6, 1.1
COLUMNS = {8: 0.95, 16: 1.0, 32: 1.4, 64: 2.2}  # what a step takes by rows of x
UNDER_WAY = 40  # KB of indices on their way for which memory takes no longer than its rate


@dataclass(frozen=True)
class Shape:
    """How a product is divided among programs and warpgroups."""

    x_rows: int  # rows of x that have room
    slices: int  # of the channels, each with programs of its own
    steps: int  # of a slice
    programs: int  # of a slice
    own: int  # tiles of a program
    across: int  # warpgroups that share a tile
    warps: int
    depth: int  # planes of its steps that a warp has under way
    parts: int  # in which x is turned to bytes
    each: int  # pairs of blocks of x that a warp has under way
    halves: int  # of the entries: 2 looks them up by addition, 1 by choice

    def shared_bytes(self, bits: int, pieces: int) -> int:
        """Bytes of shared memory of a program."""
        return gluon_wide_layout.shared_bytes(
            self.warps, bits, self.depth, self.steps, 2 * self.x_rows, self.own, pieces, self.across
        )

    @property
    def registers(self) -> int:
        """Of a thread, at most."""
        return min(255, 2048 // self.warps)


def fits(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``, and is the one to choose."""
    return len(x) in ROWS and few_rows.takes(x, weight)


def lut_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` for ``x`` ``[rows, in]`` that ``fits``.

    Each kernel starts while the one before it ends and reads weight and bias then. So the kernels
    that wrote them must have ended when a kernel before this call began.
    """
    from squeeze.kernels.lut_linear import gluon_wide

    out_features, in_features = weight.shape
    count, u = len(x), weight.indices.shape[1] // weight.bits
    pieces = 1 if weight.codebook.dtype == torch.int8 else 2
    place = torch.cuda.get_device_properties(x.device)
    shape = divide(count, out_features, u, pieces, weight.bits, place.multi_processor_count)
    y = x.new_empty(count, out_features)
    parts = y
    if shape.slices > 1:
        parts = x.new_empty(shape.slices, count, out_features, dtype=torch.float32)
    gluon_wide.multiply[(shape.programs, shape.slices)](
        x, weight.indices, weight.codebook, weight.scale, bias, parts,
        count, x.stride(0), in_features, out_features,
        u=u, STEPS=shape.steps, X=shape.x_rows, OWN=shape.own, ACROSS=shape.across,
        EACH=shape.each, WARPS=shape.warps, PIECES=pieces, SHARED=weight.rows, BITS=weight.bits,
        ALIGNED=_aligned(x), FULL=in_features == 32 * u, WHOLE=out_features % 64 == 0,
        HALVES=shape.halves, SCALED=weight.scale is not None, BIASED=bias is not None,
        DEPTH=shape.depth, PARTS=shape.parts,
        num_warps=shape.warps, maxnreg=shape.registers, launch_pdl=True,
    )  # fmt: skip
    if shape.slices > 1:
        few_rows.add_up(parts, y)
    return y


def _aligned(x: Tensor) -> bool:
    """Whether four neighbouring channels of x can be read at once."""
    return x.data_ptr() % 8 == 0 and x.shape[1] % 4 == 0 and (len(x) == 1 or x.stride(0) % 4 == 0)


@cache
def divide(count: int, out_features: int, u: int, pieces: int, bits: int, processors: int) -> Shape:
    """The division that takes the least time.

    Every program turns its slice of x to bytes, so slices save that but have to be added up.
    """
    found: list[tuple[float, int, int, Shape]] = []
    while not found:
        found = list(_divisions(count, out_features, u, pieces, bits, processors))
        processors *= 2  # more programs than at once: the rows of fewer did not fit
    return min(found, key=lambda each: each[:3])[3]


def _divisions(
    count: int, out_features: int, u: int, pieces: int, bits: int, programs: int
) -> Iterator[tuple[float, int, int, Shape]]:
    """Divisions for so many programs that fit: microseconds, slices, across, shape."""
    x_rows = max(8, triton.next_power_of_2(count))
    for slices, steps in few_rows.slicings(triton.cdiv(u, few_rows.STEP_WORDS), programs):
        for warps in (8, 16) if x_rows * pieces**2 <= 32 else (8,):  # as registers suffice
            for across in (a for a in (1, 2, 4) if 4 * a <= warps):
                shape = _shape(
                    x_rows, slices, steps, across, warps, out_features, pieces, bits, programs
                )
                if shape.depth >= bits:
                    yield _cost(shape, count, out_features, pieces, bits), slices, across, shape


def _shape(
    x_rows: int, slices: int, steps: int, across: int, warps: int, out_features: int, pieces: int,
    bits: int, programs: int,
) -> Shape:  # fmt: skip
    """One division, with as many planes under way as have room."""
    tiles, groups = triton.cdiv(out_features, 64), warps // 4 // across
    each_slice = min(tiles, programs // slices)
    rounds = triton.cdiv(triton.cdiv(tiles, each_slice), groups)
    parts = 1 if steps <= across else 2
    shape = Shape(
        x_rows, slices, steps, each_slice, rounds * groups, across, warps, depth=0, parts=parts,
        each=min(4 // pieces, triton.cdiv(steps * x_rows // (2 * parts), warps)),
        halves=2 if bits == 4 and x_rows * pieces <= 16 else 1,
    )  # fmt: skip
    # The allocation is rounded up to 256 bytes and holds 256 more.
    left = SHARED_BYTES - 512 - shape.shared_bytes(bits, pieces)
    return replace(shape, depth=min(2 * bits, left // (1024 * warps)))


def _cost(shape: Shape, count: int, out_features: int, pieces: int, bits: int) -> float:
    """Microseconds, as fitted to measurements on an H200."""
    groups = shape.warps // 4 // shape.across
    step = STEP * COLUMNS[shape.x_rows] * max(bits, 3) / 4 * (TWO_PIECES if pieces == 2 else 1.0)
    step *= max(1.0, UNDER_WAY / (shape.warps * shape.depth))
    step *= EIGHT_WARPS if shape.warps == 8 else 1.0
    turns = shape.own // groups * triton.cdiv(shape.steps, shape.across)
    cost = turns * shape.warps // 4 * step + SPLIT * shape.steps * shape.x_rows / 2
    if shape.slices > 1:
        cost += SLICES + PARTS * shape.slices * count * out_features / 1e6
    return cost
