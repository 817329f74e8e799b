"""Linear layer over an integer weight: the specification, one dense weight per call."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels import bits
from squeeze.types import IntegerWeight


def codes(weight: IntegerWeight) -> Tensor:
    """Unpack the codes, uint8 ``[out, in]``."""
    rows, groups = weight.scale.shape
    packed = weight.codes.view(rows, groups, -1)
    return bits.unpack(packed, weight.bits, weight.group_size).flatten(1)[:, : weight.shape[1]]


def zeros(weight: IntegerWeight) -> Tensor:
    """Give the zero point of every group, uint8 ``[out, groups]``."""
    if weight.zero is not None:
        return weight.zero
    return torch.full_like(weight.scale, 2 ** (weight.bits - 1), dtype=torch.uint8)


def reconstruct(weight: IntegerWeight) -> Tensor:
    """Compute ``W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g] * 2**-exponent[i]``.

    Codes times scales are exact in float32: 9 bits times 11.

    Args:
        weight: Any width and group size; exponents count unless they are folded elsewhere.
    Returns:
        float32 ``[out, in]`` on the device of the codes.
    """
    group = torch.arange(weight.shape[1], device=weight.codes.device) // weight.group_size
    steps = codes(weight).float() - zeros(weight).float()[:, group]
    dense = steps * weight.scale.float()[:, group]
    if weight.exponents is None or weight.folded:
        return dense
    return dense * torch.exp2(-weight.exponents.float())


def integer_linear(x: Tensor, weight: IntegerWeight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ W.T + bias`` with the weight rounded to the dtype of ``x``.

    The dense weight exists during the call and is freed with it.

    Args:
        x: ``[..., in]``, float16, bfloat16, float32 or float64.
        weight: ``[out, in]``.
        bias: ``[out]`` or ``None``.
    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    dense = reconstruct(weight).to(x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
