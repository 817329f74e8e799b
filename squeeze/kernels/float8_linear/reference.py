"""Linear layer over E4M3 entries and inputs: the specification, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels.lut_linear.reference import reconstruct
from squeeze.types import ClusteredWeight


def round_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round every token to E4M3 under the least power of two that brings it within 448, its range.

    A power of two costs a float format no precision but at most one bit of its range, and bfloat16
    holds ``codes * scale`` exactly: kernels may read either.

    Args:
        x: ``[..., in]``, any floating dtype.
    Returns:
        codes, float8_e4m3fn ``[..., in]``, and scale, float32 ``[..., 1]``, NaN for a token with a
        value that is not finite.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    significand, exponent = torch.frexp(largest)  # 448 = 0.875 * 2**9
    exponent = torch.where(largest > 0, exponent - 9 + (significand > 0.875).int(), -126)
    scale = torch.exp2(exponent.clamp(min=-126).float())
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (wide / scale).to(torch.float8_e4m3fn), scale


def rounded_inputs(x: Tensor) -> Tensor:
    """Return what the rounded inputs stand for, ``[..., in]`` in the dtype of ``x``.

    Exact, but that float16 has no place for 65536, which 65504 stands for then.
    """
    codes, scale = round_inputs(x)
    limit = torch.finfo(x.dtype).max
    return (codes.float() * scale).clamp(-limit, limit).to(x.dtype)


def float8_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None = None) -> Tensor:
    """Compute ``(codes @ W.T) * scale + bias`` in float32, or for float64 inputs in that.

    The dense weight exists during the call and is freed with it.

    Args:
        x: ``[..., in]``, float16, bfloat16, float32 or float64.
        weight: ``[out, in]``.
        bias: ``[out]`` or ``None``.
    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes, scale = round_inputs(x)
    y = codes.to(wide) @ reconstruct(weight).to(wide).T * scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
