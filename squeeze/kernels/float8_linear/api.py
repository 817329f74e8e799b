"""Check a call of the linear layer with E4M3 inputs and hand it to the chosen implementation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from squeeze.kernels.float8_linear import reference
from squeeze.kernels.linear_checks import require_triton
from squeeze.kernels.lut_linear import api as lut
from squeeze.kernels.lut_linear.reference import entries
from squeeze.types import ClusteredWeight, Implementation


def float8_linear(
    x: Tensor,
    weight: ClusteredWeight,
    bias: Tensor | None = None,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Compute ``round(x) @ W.T + bias``: tokens are rounded to E4M3, each under its own scale.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32; the reference also takes float64.
        weight: ``[out, in]`` on the device of ``x``; entries are uint8, the bits of E4M3.
        bias: ``[out]`` or ``None``.
        implementation: ``reference`` forms the dense weight of this layer for the call; ``triton``
            forms it in E4M3 and multiplies on float8 tensor cores where there are enough tokens
            for that, else multiplies the rounded tokens by the packed weight. ``auto`` belongs to
            the plan and is refused here.
    Returns:
        ``[..., out]`` in the dtype of ``x``. A token's result does not depend on what the others
        are; their number chooses the kernel. Sums are of float32, except in ``fused``, for
        bfloat16, where ``fused.FAST_SUMS`` says so.
    Raises:
        ValueError: shapes, dtypes, devices that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: ``weight.nbytes`` read per call; many tokens also write and read a byte per weight, and
        per input.
    """
    lut.check(x, weight, bias)
    if weight.codebook.dtype != torch.uint8:
        raise ValueError(f"codebook is {weight.codebook.dtype}, not uint8")
    if implementation == Implementation.REFERENCE:
        return reference.float8_linear(x, weight, bias)
    if implementation != Implementation.TRITON:
        raise ValueError("implementation auto is resolved while planning, not at run time")
    require_triton("float8_linear", x)
    from squeeze.kernels.float8_linear import fused, triton

    if triton.fits(x, weight):
        return (fused if fused.fits(x, weight) else triton).float8_linear(x, weight, bias)
    # Before the kernel that rounds: few rows need one between what writes a weight and their own.
    wide = replace(weight, codebook=entries(weight).half())
    return lut.lut_linear(triton.rounded_inputs(x), wide, bias, implementation=implementation)
