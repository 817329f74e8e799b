"""Key smoothing: move the magnitude of key channels into the query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from squeeze.registry import register
from squeeze.types import Tensors

# Least magnitude of a channel, as a share of its head's largest: a channel that was silent in
# calibration must not be blown up.
FLOOR = 2**-10


@register(source="https://arxiv.org/abs/2505.20839", year=2025)
@dataclass(frozen=True)
class Smooth:
    """Divide every key channel by a calibrated factor and multiply the query by it.

    ``q . k = (q s) . (k / s)``, so the change of basis is exact, and a format whose scale spans
    channels (granularity token) no longer serves the loudest of them alone. With ``m`` the largest
    magnitude of a channel in calibration, ``s = m**strength``, over its geometric mean in the head.

    Args:
        strength: 1 makes all channels equally loud, 0 changes nothing. In between the query's
            growth is spared, which decides what an error of a channel costs.
        pairs: Give channels ``i`` and ``i + D / 2`` one factor, from their largest
            ``hypot(k_i, k_{i + D/2})``: RoPE turns such a pair and leaves that radius alone, so
            the factor is that of the keys before RoPE.
        outliers: With ``pairs``, so many loudest channels per head, and the partners of these,
            keep factors of their own, as one of them is loud after RoPE and the other is not.
    Cost: ``4 * H_kv * D`` bytes per layer; one multiplication per query channel and step.
    Source: Baek et al., 2025, FireQ, https://arxiv.org/abs/2505.20839, scaling before and after
        RoPE; formulas as in its code, https://github.com/llm-fireq/fireq (strength 1, pairs, three
        outliers).
    Differs: both factors act after RoPE, where they are one diagonal matrix, instead of the first
        being folded into the projections: exact for any rotary layout, projection norm and bias.
        The source's common target magnitude is left out, as our formats scale themselves.
    """

    strength: Annotated[float, Ge(0), Le(1)] = 0.5
    pairs: bool = False
    outliers: Annotated[int, Ge(0)] = 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """``kv_samples``: keys of calibration text, float ``[H_kv, N, D]``."""
        return ("kv_samples",)

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys only: no query takes a factor of values."""
        return ("keys",)

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Choose the factors: ``factor``, float32 ``[H_kv, D]``."""
        keys = statistics["kv_samples"].float()
        loudest = keys.abs().amax(1)
        magnitude = loudest
        if self.pairs:
            low, high = keys.chunk(2, dim=-1)
            magnitude = torch.hypot(low, high).amax(1).repeat(1, 2)
            apart = self._apart(loudest)
            magnitude = torch.where(apart, loudest, magnitude)
        least = magnitude.amax(1, keepdim=True).clamp(min=1e-30) * FLOOR
        logarithm = torch.maximum(magnitude, least).log() * self.strength
        return {"factor": (logarithm - logarithm.mean(1, keepdim=True)).exp()}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Divide by the factors.

        Args:
            x: Keys after RoPE, ``[..., H_kv, L, D]``.
            parameters: ``factor`` ``[H_kv, D]``.
        Returns:
            Same shape, float32 (float64 for float64 keys).
        """
        return x / parameters["factor"].unsqueeze(-2)

    def invert(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Multiply by the factors; shapes and dtype as in ``apply``."""
        return x * parameters["factor"].unsqueeze(-2)

    def prepare_query(
        self, query: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply the query ``[B, H, T, D]`` by its head's factors; there is no shift.

        The product is rounded to the query's dtype.
        """
        factor = parameters["factor"]
        grouped = query.unflatten(1, (factor.shape[0], -1))
        return (grouped * factor[:, None, None, :]).flatten(1, 2).to(query.dtype), None

    def _apart(self, loudest: Tensor) -> Tensor:
        """Mark each head's outliers and their partners, bool ``[H_kv, D]``."""
        size = loudest.shape[1]
        chosen = loudest.topk(min(self.outliers, size), dim=1).indices
        both = torch.cat([chosen, (chosen + size // 2) % size], dim=1)
        return torch.zeros_like(loudest, dtype=torch.bool).scatter(1, both, True)
