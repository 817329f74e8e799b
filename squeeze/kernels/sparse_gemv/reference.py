"""Linear layer over thresholded inputs: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def thresholded(x: Tensor, threshold: Tensor) -> Tensor:
    """Zero what is not above its channel's threshold; NaN stays.

    Args:
        x: ``[..., in]``, floating.
        threshold: float32 ``[in]``, at least 0; infinite where a channel never counts.
    Returns:
        Like ``x``.
    """
    return torch.where(x.abs() <= threshold, torch.zeros((), dtype=x.dtype, device=x.device), x)


def sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``thresholded(x) @ W.T + bias``.

    Args:
        x: ``[..., in]``, floating.
        weight: ``[out, in]`` in the dtype of ``x``, any strides.
        threshold: float32 ``[in]``.
        bias: ``[out]`` or ``None``.
    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    return torch.nn.functional.linear(thresholded(x, threshold), weight, bias)
