"""Launch the clustered linear layer for more rows of x than a few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from squeeze.kernels.lut_linear import few_rows, gluon_layout
from squeeze.types import ClusteredWeight

ROWS = range(0)  # rows of x for which this is the kernel to choose
WARPS = 8
TWO_BYTES = 112 * 1024  # of shared memory of a program, where two fit a multiprocessor
ONE_BYTES = 226 * 1024  # where one does
# Microseconds: a warpgroup's step of 512 channels, and of 4-bit weights where two programs fit a
# multiprocessor; a block of x for each warp; adding up slices, and a million partial outputs.
STEP, BESIDE, BLOCK, SLICES, PARTS = 1.3, 2.1, 0.4, 1.5, 2.0


@dataclass(frozen=True)
class Shape:
    """How a product is divided among programs and warpgroups."""

    x_rows: int  # rows of x that have room
    slices: int  # of the channels, each with programs of its own
    steps: int  # of a slice
    programs: int  # of a slice
    own: int  # tiles of a program
    across: int  # warpgroups that share a tile
    each: int  # blocks of x that a warp has under way
    halves: int  # of the entries: 2 looks them up by addition, 1 by choice

    def shared_bytes(self, bits: int, pieces: int) -> int:
        """Bytes of shared memory of a program."""
        return gluon_layout.wide_shared_bytes(
            WARPS, bits, self.steps, self.x_rows, 2 * self.x_rows, self.own, pieces, self.across
        )

    def registers(self, pieces: int) -> int:
        """Of a thread, at most."""
        return 128 if self.x_rows * pieces <= 32 else 255


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
        EACH=shape.each, WARPS=WARPS, PIECES=pieces, SHARED=weight.rows, BITS=weight.bits,
        ALIGNED=x.data_ptr() % 4 == 0 and (count == 1 or x.stride(0) % 2 == 0),
        FULL=in_features == 32 * u, WHOLE=out_features % 64 == 0,
        HALVES=shape.halves, SCALED=weight.scale is not None, BIASED=bias is not None,
        num_warps=WARPS, maxnreg=shape.registers(pieces), launch_pdl=True,
    )  # fmt: skip
    if shape.slices > 1:
        few_rows.add_up(parts, y)
    return y


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
    tiles = triton.cdiv(out_features, 64)
    for slices, steps in few_rows.slicings(triton.cdiv(u, few_rows.STEP_WORDS), programs):
        each_slice = min(tiles, programs // slices)
        blocks = triton.cdiv(steps * x_rows, WARPS)
        for across in (1, 2):
            groups = WARPS // 4 // across
            rounds = triton.cdiv(triton.cdiv(tiles, each_slice), groups)
            shape = Shape(
                x_rows, slices, steps, each_slice, rounds * groups, across,
                each=min(4, blocks), halves=2 if bits == 4 and x_rows * pieces <= 16 else 1,
            )  # fmt: skip
            used = shape.shared_bytes(bits, pieces) + 512
            if used > ONE_BYTES:
                continue
            beside = bits == 4 and used <= TWO_BYTES and shape.registers(pieces) <= 128
            cost = rounds * triton.cdiv(steps, across) * (BESIDE if beside else STEP)
            cost += blocks * BLOCK
            if slices > 1:
                cost += SLICES + PARTS * slices * count * out_features / 1e6
            yield cost, slices, across, shape
