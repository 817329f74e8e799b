"""Launch the decoding of a clustered weight of which a row has one codebook."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from squeeze.kernels.lut_linear.few_rows import CAPABILITY
from squeeze.types import ClusteredWeight

WARPS = 4  # of a program
BITS = (2, 3, 4)  # of an index
FORMS = (torch.int8, torch.float16)  # of entries


def fits(dense: Tensor, weight: ClusteredWeight) -> bool:
    """Whether the kernel writes this weight to ``[out, in]``."""
    columns = weight.indices.shape[1] // weight.bits * 32
    return (
        dense.is_cuda
        and dense.dtype in (torch.bfloat16, torch.float16)
        and weight.bits in BITS
        and weight.codebook.dtype in FORMS
        and weight.codebook.shape[1] == 1
        and columns == weight.shape[1]
        and columns % 256 == 0
        and weight.indices.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(dense.device) == CAPABILITY
    )


def decode(weight: ClusteredWeight, dense: Tensor) -> None:
    """Write the weight to ``dense`` ``[out, in]`` that ``fits``, contiguous.

    The kernel starts while the one before it ends and reads the weight then. So the kernels that
    wrote it must have ended when a kernel before this call began.
    """
    from squeeze.kernels.lut_linear import gluon_dense

    out_features, in_features = weight.shape
    u = in_features // 32
    gluon_dense.decode_rows[(triton.cdiv(out_features * (u // 8), 32 * WARPS),)](
        weight.indices, weight.codebook, weight.scale, dense, out_features,
        u=u, ROWS=weight.rows, BITS=weight.bits, SCALED=weight.scale is not None, WARPS=WARPS,
        num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
