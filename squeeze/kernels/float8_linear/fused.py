"""Launch the float8 product that looks entries up on its way to the tensor cores."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from squeeze.kernels.float8_linear.triton import ordered_tokens
from squeeze.types import ClusteredWeight

FAST_SUMS = True  # whether sums of less than float32 will do; False leaves all to the library
CHANNELS = 14336  # of x, up to which these err less than twice what rounding y to bfloat16 does
CAPABILITY = (9, 0)  # of GPUs; others keep to the library's product
STAGES = 6  # tiles of x in shared memory
ROWS, TOKENS, STEP = 128, 256, 128  # of y in a program, and its channels at a time
FILLED = 0.75  # from which the kernel is the faster


def fits(x: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel takes this weight and ``[..., in]``, and is the one to choose.

    That ``triton.fits`` is taken as known.
    """
    place = torch.cuda.get_device_properties(x.device)
    return (
        FAST_SUMS
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and x.shape[-1] <= CHANNELS
        and weight.bits == 4
        and weight.rows == 1
        and x.shape[-1] % STEP == 0
        and weight.indices.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device) == CAPABILITY
        and filled(x.numel() // x.shape[-1], weight.shape[0], place.multi_processor_count) >= FILLED
    )


def filled(tokens: int, out_features: int, processors: int) -> float:
    """Share of the multiprocessors' turns, one tile of outputs each, that outputs take."""
    tiles = triton.cdiv(tokens, TOKENS) * triton.cdiv(out_features, ROWS)
    turns = triton.cdiv(tiles, processors) * processors
    return tokens * out_features / (turns * TOKENS * ROWS)


def float8_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> Tensor:
    """Compute ``round(x) @ W.T + bias`` for ``x`` that ``fits``.

    The second kernel reads weight and bias before the first has ended; what wrote these must have
    ended when the first began, as it is not started early.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from squeeze.kernels.float8_linear import gluon

    out_features, in_features = weight.shape
    u = weight.indices.shape[1] // weight.bits
    codes, scale = ordered_tokens(x.reshape(-1, in_features), u)
    y = x.new_empty(*x.shape[:-1], out_features)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    tiles = triton.cdiv(len(codes), TOKENS) * triton.cdiv(out_features, ROWS)
    gluon.multiply[(tiles,)](
        TensorDescriptor.from_tensor(codes, [TOKENS, STEP], layout),
        weight.indices, weight.codebook, weight.scale, scale, bias, y, len(codes), out_features,
        u=u, BIASED=bias is not None, STAGES=STAGES, num_warps=8, launch_pdl=True,
    )  # fmt: skip
    return y
