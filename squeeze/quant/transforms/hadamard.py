"""Hadamard rotation: spread outlier channels over a head before quantizing it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from squeeze.registry import register
from squeeze.types import Tensors


@register(source="https://arxiv.org/abs/2404.00456", year=2024)
@dataclass(frozen=True)
class Hadamard:
    """Rotate every head by an orthonormal Walsh-Hadamard matrix.

    ``q . k = (q H) . (k H)`` and ``sum p v = (sum p v H) H``: the query is rotated once per step
    and the output of rotated values once, whatever the length of the context. ``H`` is symmetric
    and its own inverse. A head of ``D = n * 2**k`` channels with ``n`` odd is rotated in ``n``
    blocks of ``2**k`` channels (64, 128: whole; 80: five blocks of 16; 96: three of 32).

    Cost: no parameters; ``D`` multiply-adds per value.
    Source: Ashkboos et al., 2024, QuaRot, https://arxiv.org/abs/2404.00456, section 4.
    Differs: applied to keys after RoPE and to values inside the cache instead of fused into
        weights; block-diagonal where the source uses tabulated Hadamard matrices of other sizes.
    """

    @property
    def statistics(self) -> tuple[str, ...]:
        """No calibration."""
        return ()

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys and values."""
        return ("keys", "values")

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Return no parameters; the matrix follows from D."""
        return {}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Rotate the last dimension.

        Args:
            x: ``[..., D]``, any float dtype.
            parameters: Empty.
        Returns:
            Same shape, float32 (float64 for float64 input).
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = x.shape[-1] & -x.shape[-1]
        matrix = _matrix(size, wide.dtype, wide.device)
        return (wide.unflatten(-1, (-1, size)) @ matrix).flatten(-2)

    def invert(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Rotate back; shapes and dtype as in ``apply``."""
        return self.apply(x, parameters)

    def prepare_query(
        self, query: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate the query ``[B, H, T, D]``; its dtype stays and there is no shift."""
        return self.apply(query, parameters).to(query.dtype), None


@functools.lru_cache(maxsize=16)
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build the orthonormal Walsh-Hadamard matrix ``[size, size]``; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * size**-0.5).to(device, dtype)
