"""Check a call of the clustered linear layer and hand it to the chosen implementation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from squeeze.kernels import bits
from squeeze.kernels.linear_checks import require_triton
from squeeze.kernels.lut_linear import reference
from squeeze.types import ClusteredWeight, Implementation


def reconstruct(weight: ClusteredWeight) -> Tensor:
    """Return the dense weight the indices stand for, float32 ``[out, in]``."""
    return reference.reconstruct(weight)


def lut_linear(
    x: Tensor,
    weight: ClusteredWeight,
    bias: Tensor | None = None,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Compute ``x @ W.T + bias`` where ``W`` is packed codebook indices.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32; the reference also takes float64.
        weight: ``[out, in]`` on the device of ``x``.
        bias: ``[out]`` or ``None``.
        implementation: ``reference`` forms the dense weight of this layer for the call; ``triton``
            decodes tiles in registers. ``auto`` belongs to the plan and is refused here.
    Returns:
        ``[..., out]`` in the dtype of ``x``.
    Raises:
        ValueError: shapes, dtypes, devices that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: ``weight.nbytes`` read per call by Triton; plus one dense weight by the reference.
    """
    check(x, weight, bias)
    if implementation == Implementation.REFERENCE:
        return reference.lut_linear(x, weight, bias)
    if implementation != Implementation.TRITON:
        raise ValueError("implementation auto is resolved while planning, not at run time")
    require_triton("lut_linear", x)
    from squeeze.kernels.lut_linear import outliers_triton, triton

    if weight.codebook.dtype == torch.uint8:  # E4M3: float16 holds every value
        weight = replace(weight, codebook=reference.entries(weight).half())
        x = x.clone()  # few rows need a kernel between what writes a weight and their own
    y = triton.lut_linear(x, weight, bias)
    return y if weight.outlier_values is None else outliers_triton.add_outliers(x, weight, y)


def check(x: Tensor, weight: ClusteredWeight, bias: Tensor | None) -> None:
    """Refuse tensors that contradict one another."""
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x ends in {x.shape[-1]} channels, the weight takes {in_features}")
    words = bits.words(-(-in_features // 32) * 32, weight.bits)
    if tuple(weight.indices.shape) != (out_features, words):
        raise ValueError(f"indices are {tuple(weight.indices.shape)}, not {(out_features, words)}")
    groups = (-(-out_features // weight.rows), -(-in_features // weight.columns))
    if tuple(weight.codebook.shape) != (*groups, 2**weight.bits):
        raise ValueError(
            f"codebook is {tuple(weight.codebook.shape)}, not {(*groups, 2**weight.bits)}"
        )
    if weight.codebook.dtype not in (torch.int8, torch.uint8, torch.float16):
        raise ValueError(f"codebook is {weight.codebook.dtype}, not int8, uint8 or float16")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias is {tuple(bias.shape)}, not {(out_features,)}")
    if weight.indices.device != x.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.indices.device}")
