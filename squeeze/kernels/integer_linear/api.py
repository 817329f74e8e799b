"""Check a call of the integer linear layer and hand it to the chosen implementation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from squeeze.kernels import bits
from squeeze.kernels.integer_linear import reference
from squeeze.kernels.linear_checks import require_triton
from squeeze.types import Implementation, IntegerWeight


def reconstruct(weight: IntegerWeight) -> Tensor:
    """Return the dense weight the codes stand for, float32 ``[out, in]``."""
    return reference.reconstruct(weight)


def signed_codes(weight: IntegerWeight) -> tuple[Tensor, Tensor]:
    """Return codes and zeros less ``2**(bits - 1)``, int8 ``[out, in]`` and ``[out, groups]``."""
    middle = 2 ** (weight.bits - 1)
    both = (reference.codes(weight), reference.zeros(weight))
    codes, zeros = ((x.to(torch.int16) - middle).to(torch.int8) for x in both)
    return codes, zeros


def scales(weight: IntegerWeight) -> Tensor:
    """Return the scale of every group, float16 ``[out, groups]``."""
    return reference.scales(weight)


def integer_linear(
    x: Tensor,
    weight: IntegerWeight,
    bias: Tensor | None = None,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Compute ``x @ W.T + bias`` where ``W`` is packed integers with a scale per group.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32; the reference also takes float64.
        weight: ``[out, in]`` on the device of ``x``. With ``row_scale``, tokens are rounded to E4M3
            first, each under its own power of two.
        bias: ``[out]`` or ``None``.
        implementation: ``reference`` forms the dense weight of this layer for the call; ``triton``
            decodes tiles in registers. ``auto`` belongs to the plan and is refused here. Rounded
            tokens and such weights are exact in bfloat16, and multiplied as such by ``triton``.
    Returns:
        ``[..., out]`` in the dtype of ``x``.
    Raises:
        ValueError: shapes, dtypes, devices that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: ``weight.nbytes`` read per call by Triton; plus one dense weight by the reference.
    """
    _check(x, weight, bias)
    if implementation == Implementation.REFERENCE:
        return reference.integer_linear(x, weight, bias)
    if implementation != Implementation.TRITON:
        raise ValueError("implementation auto is resolved while planning, not at run time")
    require_triton("integer_linear", x)
    from squeeze.kernels.integer_linear import triton

    if weight.row_scale is not None:
        from squeeze.kernels.float8_linear.triton import rounded_inputs

        # Before the kernel that rounds: few rows need one between what writes a scale and theirs.
        weight = replace(weight, scale=reference.scales(weight), row_scale=None)
        x = rounded_inputs(x)
    return triton.integer_linear(x, weight, bias)


def _check(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> None:
    """Refuse tensors that contradict one another."""
    out_features, in_features = weight.shape
    groups = -(-in_features // weight.group_size)
    if x.shape[-1] != in_features:
        raise ValueError(f"x ends in {x.shape[-1]} channels, the weight takes {in_features}")
    words = groups * bits.words(weight.group_size, weight.bits)
    expected = {
        "codes": (weight.codes, (out_features, words)),
        "scale": (weight.scale, (out_features, groups)),
        "zero": (weight.zero, (out_features, groups)),
        "exponents": (weight.exponents, (in_features,)),
        "row_scale": (weight.row_scale, (out_features,)),
        "bias": (bias, (out_features,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
    stored = torch.float16 if weight.row_scale is None else torch.uint8
    if weight.scale.dtype != stored:
        raise ValueError(f"scale is {weight.scale.dtype}, not {stored}")
    if weight.codes.device != x.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.codes.device}")
