"""Linear layer over a clustered weight: the specification, one dense weight per call."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels import bits
from squeeze.kernels.lut_linear.outliers import corrections
from squeeze.types import ClusteredWeight


def entries(weight: ClusteredWeight) -> Tensor:
    """Read the codebook, float16 or int8, or from its bits float8."""
    book = weight.codebook
    return book.view(torch.float8_e4m3fn) if book.dtype == torch.uint8 else book


def reconstruct(weight: ClusteredWeight) -> Tensor:
    """Look up every index: ``W[o, i] = codebook[o / rows, i / columns, index[o, i]] * scale[o]``.

    Corrections of single weights are added to that.

    Args:
        weight: Any granularity and width.
    Returns:
        float32 ``[out, in]`` on the device of the indices.
    """
    out_features, in_features = weight.shape
    padded = -(-in_features // 32) * 32
    indices = bits.unpack(weight.indices, weight.bits, padded)[:, :in_features].long()
    groups, blocks, codes = weight.codebook.shape
    row = torch.arange(out_features, device=indices.device) // weight.rows
    column = torch.arange(in_features, device=indices.device) // weight.columns
    first = (row.unsqueeze(1) * blocks + column) * codes  # [out, in]
    dense = entries(weight).reshape(groups * blocks * codes).float()[first + indices]
    dense = dense if weight.scale is None else dense * weight.scale.float().unsqueeze(1)
    added = corrections(weight)
    return dense if added is None else dense + added


def lut_linear(x: Tensor, weight: ClusteredWeight, bias: Tensor | None = None) -> Tensor:
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
