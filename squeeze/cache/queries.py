"""Queries rounded to float8, as a kernel with float8 tensor cores would read them."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def to_float8(query: Tensor) -> Tensor:
    """Round every query to E4M3 numbers under one scale, which brings its largest to 448.

    Only numerics: products are taken in the query's own dtype, so nothing gets faster.

    Args:
        query: ``[B, H, T, D]``, in the basis that packed keys are stored in.

    Returns:
        Same shape and dtype; within 1/16 of the value, or 2**-10 of the scale where that is more.
    Source: Baek et al., 2025, FireQ, https://arxiv.org/abs/2505.20839: 4-bit keys and values are
        read by queries in float8.
    """
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST
    return ((wide / scale).to(torch.float8_e4m3fn).to(wide.dtype) * scale).to(query.dtype)
