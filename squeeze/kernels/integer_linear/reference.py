"""Linear layer over an integer weight: the specification, one dense weight per call."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels import bits
from squeeze.kernels.float8_linear.reference import round_inputs
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


def scales(weight: IntegerWeight) -> Tensor:
    """Give the scale of every group, float16 ``[out, groups]``: exact in either form."""
    if weight.row_scale is None:
        return weight.scale
    own = weight.scale.view(torch.float8_e4m3fn).float()
    return (own * weight.row_scale[:, None]).half()


def reconstruct(weight: IntegerWeight) -> Tensor:
    """Compute ``W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g] * 2**-exponent[i]``.

    Codes times scales are exact in float32: 9 bits times 11. Four bits times E4M3 scales are exact
    in bfloat16, too.

    Args:
        weight: Any width and group size; exponents count unless they are folded elsewhere.
    Returns:
        float32 ``[out, in]`` on the device of the codes.
    """
    group = torch.arange(weight.shape[1], device=weight.codes.device) // weight.group_size
    steps = codes(weight).float() - zeros(weight).float()[:, group]
    dense = steps * scales(weight).float()[:, group]
    if weight.exponents is None or weight.folded:
        return dense
    return dense * torch.exp2(-weight.exponents.float())


def integer_linear(x: Tensor, weight: IntegerWeight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ W.T + bias`` with the weight rounded to the dtype of ``x``.

    Where ``row_scale`` is given, ``(round(x) @ W.T) * token_scale + bias`` instead, in float32 or
    for float64 inputs in that: products are exact and sums are of float32. The dense weight exists
    during the call and is freed with it.

    Args:
        x: ``[..., in]``, float16, bfloat16, float32 or float64.
        weight: ``[out, in]``.
        bias: ``[out]`` or ``None``.
    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    if weight.row_scale is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        tokens, scale = round_inputs(x)
        y = tokens.to(wide) @ reconstruct(weight).to(wide).T * scale.to(wide)
        return (y if bias is None else y + bias.to(wide)).to(x.dtype)
    dense = reconstruct(weight).to(x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
