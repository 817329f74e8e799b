"""Launch the product of many rows that looks entries up on their way to the tensor cores."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from squeeze.kernels.lut_linear.few_rows import CAPABILITY
from squeeze.types import ClusteredWeight

ROWS = range(257, 1 << 31)  # of x, with which it is chosen; fewer have kernels of their own
FORMS = (torch.int8, torch.float16)  # of entries
STAGES = 5  # pairs of tiles of x in shared memory
OUTPUTS, TOKENS, TILE = 128, 256, 32  # of y in a program at a time; channels of a tile of x
DECODED = 20000  # outputs whose weights are decoded to memory in the time of a turn
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def fits(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel takes this weight and ``[rows, in]``, and is the one to choose."""
    return (
        x.is_cuda
        and len(x) in ROWS
        and takes(x, weight)
        and (weight.rows == 1 or x.dtype == torch.bfloat16)  # the rest was not seen to be right
        and torch.cuda.get_device_capability(x.device) == CAPABILITY
        and faster(
            len(x),
            weight.shape[0],
            torch.cuda.get_device_properties(x.device).multi_processor_count,
        )
    )


def takes(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel computes this product at all, on a GPU that has what it needs."""
    out_features, in_features = weight.shape
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and weight.bits == 4
        and weight.codebook.dtype in FORMS
        and weight.codebook.shape[1] == 1
        and in_features % (32 * TILE) == 0
        and out_features % 8 == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and weight.indices.data_ptr() % 16 == 0
    )


def faster(rows: int, out_features: int, processors: int) -> bool:
    """Whether it takes no longer than decoding the weight and the library's product.

    Counted in turns of the multiprocessors, a tile of outputs each. The library has smaller tiles
    where these leave much idle: its product takes the turns that its outputs would fill.
    """
    library = rows * out_features / (processors * TOKENS * OUTPUTS)
    turns = triton.cdiv(_tiles(rows, out_features), processors)
    return turns <= library + out_features / DECODED


def _tiles(rows: int, out_features: int) -> int:
    """Count the tiles of y."""
    return triton.cdiv(rows, TOKENS) * triton.cdiv(out_features, OUTPUTS)


def lut_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` for ``x`` ``[rows, in]`` that the kernel ``takes``.

    The kernel reads weight and bias before the one in front of it has ended; what wrote these must
    have ended when that one began.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from squeeze.kernels.lut_linear import gluon_many

    out_features, in_features = weight.shape
    y = x.new_empty(len(x), out_features)
    x_layout = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    y_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    gluon_many.multiply[(min(_tiles(len(x), out_features), processors),)](
        TensorDescriptor.from_tensor(x, [TOKENS, TILE], x_layout),
        TensorDescriptor.from_tensor(y, [TOKENS, OUTPUTS // 2], y_layout),
        weight.indices, weight.codebook, weight.scale, bias, len(x), out_features,
        u=in_features // 32, ROWS=weight.rows, SCALED=weight.scale is not None,
        BIASED=bias is not None, STAGES=STAGES, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return y
