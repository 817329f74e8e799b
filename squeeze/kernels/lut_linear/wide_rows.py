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
# Microseconds: a warpgroup's step of 512 channels of 4-bit weights, 16 rows of x; adding up slices,
# and a million partial outputs.
STEP, SLICES, PARTS = 0.53, 2.5, 2.0
SENDING = 1.4  # the same, adding up in a cluster
# Times that: a step of entries of two bytes, and of a program of eight warps.
TWO_PIECES, EIGHT_WARPS = 1.6, 1.2
COLUMNS = {8: 0.95, 16: 1.0, 32: 1.4, 64: 2.2}  # what a step takes by rows of x
UNDER_WAY = 24  # KB of indices on their way for which memory takes no longer than its rate


@dataclass(frozen=True)
class Shape:
    """How a product is divided among programs and warpgroups."""

    x_rows: int  # rows of x that have room
    slices: int  # of the channels, each with programs of its own
    steps: int  # of a slice
    held: int  # of them, those whose x has room at once
    programs: int  # of a slice
    own: int  # tiles of a program
    across: int  # warpgroups that share a tile
    warps: int
    depth: int  # planes of its steps that a warp has under way
    halves: int  # of the entries: 2 looks them up by addition, 1 by choice
    cluster: int  # programs that add up their outputs among them: one of each slice, or 1

    @property
    def parts(self) -> int:
        """Partial outputs."""
        return self.slices // self.cluster

    def shared_bytes(self, bits: int, pieces: int) -> int:
        """Bytes of shared memory of a program."""
        return gluon_wide_layout.shared_bytes(
            self.warps, bits, self.depth, self.held, 2 * self.x_rows, self.own, pieces,
            self.across, self.cluster,
        )  # fmt: skip

    @property
    def registers(self) -> int:
        """Of a thread, at most: the next kernel's programs of one warp are to fit beside."""
        return 112 if self.warps == 16 else 240


def fits(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``, and is the one to choose."""
    return len(x) in ROWS and few_rows.takes(x, weight)


def lut_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` for ``x`` ``[rows, in]`` that ``fits``.

    Each kernel starts while the one before it ends and reads weight and bias then. So the kernels
    that wrote them must have ended when a kernel before this call began.
    """
    from squeeze.kernels.lut_linear import gluon_wide

    out_features = weight.shape[0]
    count, u = len(x), weight.indices.shape[1] // weight.bits
    pieces = 1 if weight.codebook.dtype == torch.int8 else 2
    place = torch.cuda.get_device_properties(x.device)
    shape = divide(count, out_features, u, pieces, weight.bits, place.multi_processor_count)
    y = x.new_empty(count, out_features)
    parts = y
    if shape.parts > 1:
        parts = x.new_empty(shape.parts, count, out_features, dtype=torch.float32)
    gluon_wide.multiply[(shape.programs, shape.parts)](
        _image(x, u, shape), weight.indices, weight.codebook, weight.scale, bias, parts,
        count, out_features,
        u=u, STEPS=shape.steps, HELD=shape.held, X=shape.x_rows, OWN=shape.own, ACROSS=shape.across,
        CLUSTER=shape.cluster, WARPS=shape.warps, PIECES=pieces, SHARED=weight.rows,
        BITS=weight.bits, WHOLE=out_features % 64 == 0, SCALED=weight.scale is not None,
        BIASED=bias is not None, DEPTH=shape.depth, HALVES=shape.halves,
        num_warps=shape.warps, num_ctas=shape.cluster, maxnreg=shape.registers, launch_pdl=True,
    )  # fmt: skip
    if shape.parts > 1:
        few_rows.add_up(parts, y)
    return y


def _image(x: Tensor, u: int, shape: Shape) -> Tensor:
    """Make bytes of x, by steps of all slices."""
    from squeeze.kernels.lut_linear import gluon_wide_inputs

    steps, size = shape.slices * shape.steps, gluon_wide_layout.step_bytes(2 * shape.x_rows)
    image = torch.empty(steps * size // 4, dtype=torch.int32, device=x.device)
    gluon_wide_inputs.make_image[(steps * shape.x_rows // 2,)](
        x, image, len(x), x.stride(0), x.shape[1], u=u, STEPS=steps, X=shape.x_rows,
        HALVES=shape.halves, ALIGNED=_aligned(x), FULL=x.shape[1] == 32 * u,
        num_warps=1, launch_pdl=True,
    )  # fmt: skip
    return image


def _aligned(x: Tensor) -> bool:
    """Whether four neighbouring channels of x can be read at once."""
    return x.data_ptr() % 8 == 0 and x.shape[1] % 4 == 0 and (len(x) == 1 or x.stride(0) % 4 == 0)


@cache
def divide(count: int, out_features: int, u: int, pieces: int, bits: int, processors: int) -> Shape:
    """The division that takes the least time; of equal ones the one in which most share a tile."""
    found: list[tuple[float, int, int, Shape]] = []
    while not found:
        found = list(_divisions(count, out_features, u, pieces, bits, processors))
        processors *= 2  # more programs than at once: the rows of fewer did not fit
    return min(found, key=lambda each: each[:3])[3]


def _divisions(
    count: int, out_features: int, u: int, pieces: int, bits: int, programs: int
) -> Iterator[tuple[float, int, int, Shape]]:
    """Divisions for so many programs that fit: microseconds, slices, less across, shape."""
    x_rows = max(8, triton.next_power_of_2(count))
    for slices, steps in few_rows.slicings(triton.cdiv(u, few_rows.STEP_WORDS), programs):
        for warps in (8, 16) if x_rows * pieces**2 <= 32 else (8,):  # as registers suffice
            for across in (a for a in (1, 2, 4) if 4 * a <= warps):
                for cluster in _clusters(slices, across, out_features, pieces, programs):
                    shape = _shape(
                        x_rows, slices, steps, across, warps, cluster, out_features, pieces, bits,
                        programs,
                    )  # fmt: skip
                    if shape.depth >= 1:
                        cost = _cost(shape, count, out_features, pieces, bits)
                        yield cost, slices, -across, shape


def _clusters(
    slices: int, across: int, out_features: int, pieces: int, programs: int
) -> tuple[int, ...]:
    """Programs of a cluster: two take less time where each has one tile and all its warps share it.

    Clusters of four take longer, and of those whose programs need most of the shared memory of a
    multiprocessor an H200 runs 30 at once.
    """
    alone = slices * triton.cdiv(out_features, 64) <= programs
    return (1, 2) if slices == 2 and across == 4 and pieces == 1 and alone else (1,)


def _shape(
    x_rows: int, slices: int, steps: int, across: int, warps: int, cluster: int,
    out_features: int, pieces: int, bits: int, programs: int,
) -> Shape:  # fmt: skip
    """One division; where x has no room in a cluster, two steps of each warpgroup have.

    For less than 4 bits that takes longer than adding up slices. Planes of whole steps are under
    way then: with others, whose addresses are of two steps, it takes longer by a twentieth.
    """
    tiles, groups = triton.cdiv(out_features, 64), warps // 4 // across
    each_slice = min(tiles, programs // slices)
    rounds = triton.cdiv(triton.cdiv(tiles, each_slice), groups)
    shape = Shape(
        x_rows, slices, steps, steps, each_slice, rounds * groups, across, warps, depth=0,
        halves=2 if bits == 4 and x_rows * pieces <= 16 else 1, cluster=cluster,
    )  # fmt: skip
    found = _deepest(shape, bits, pieces)
    if found.depth < 1 and cluster > 1 and bits == 4 and steps > 2 * across:
        found = _deepest(replace(shape, held=2 * across), bits, pieces)
        return replace(found, depth=found.depth // bits * bits)
    return found


def _deepest(shape: Shape, bits: int, pieces: int) -> Shape:
    """The division with as many planes under way as have room."""
    # The allocation is rounded up to 256 bytes and holds 512 more, of which 256 lie in the 227 KB.
    left = SHARED_BYTES - 512 - shape.shared_bytes(bits, pieces)
    turns = shape.own // (shape.warps // 4 // shape.across) * triton.cdiv(shape.steps, shape.across)
    return replace(shape, depth=min(2 * bits, turns * bits, left // (1024 * shape.warps)))


def _cost(shape: Shape, count: int, out_features: int, pieces: int, bits: int) -> float:
    """Microseconds but for what all divisions take, as fitted to measurements on an H200."""
    groups = shape.warps // 4 // shape.across
    step = STEP * COLUMNS[shape.x_rows] * max(bits, 3) / 4 * (TWO_PIECES if pieces == 2 else 1.0)
    step *= max(1.0, UNDER_WAY / (shape.warps * shape.depth))
    step *= EIGHT_WARPS if shape.warps == 8 else 1.0
    turns = shape.own // groups * triton.cdiv(shape.steps, shape.across)
    cost = turns * shape.warps // 4 * step
    if shape.cluster > 1:
        cost += SENDING
    elif shape.slices > 1:
        cost += SLICES + PARTS * shape.slices * count * out_features / 1e6
    return cost
