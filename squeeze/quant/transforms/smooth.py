"""Key smoothing: move the magnitude of key channels into the query."""

from __future__ import annotations

import math
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
        fold: With ``pairs``, put the factors of pairs, rounded to powers of two, into the weights
            that make queries and keys. What is left, where there are outliers, acts after RoPE.
        shared: With ``fold``, all heads have the same factors there. The plan sets it where these
            go into a norm that the heads share.
    Cost: ``4 * H_kv * D`` bytes per layer and one multiplication per query channel and step;
        ``H_kv * D`` bytes more with ``fold``, and nothing but these without outliers.
    Source: Baek et al., 2025, FireQ, https://arxiv.org/abs/2505.20839, scaling before and after
        RoPE; formulas as in its code, https://github.com/llm-fireq/fireq (strength 1, pairs, three
        outliers).
    Differs: folded factors are powers of two, so that the weights are scaled and restored without
        rounding; without ``fold`` both kinds act after RoPE, where they are one diagonal matrix, on
        any model. The source's common target magnitude is left out, as our formats scale
        themselves.
    """

    strength: Annotated[float, Ge(0), Le(1)] = 0.5
    pairs: bool = False
    outliers: Annotated[int, Ge(0)] = 0
    fold: bool = False
    shared: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """``kv_samples``: keys of calibration text, float ``[H_kv, N, D]``."""
        return ("kv_samples",)

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys only: no query takes a factor of values."""
        return ("keys",)

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Choose the factors.

        Returns:
            ``factor``, float32 ``[H_kv, D]``. With ``fold`` also ``folded``, int8 ``[H_kv, D]``:
            the layer's own keys are divided by ``2**folded``, and ``factor``, absent without
            outliers, is what those still lack.
        """
        keys = statistics["kv_samples"].float()
        loudest = keys.abs().amax(1)
        if not self.pairs:
            return {"factor": self._relative(loudest).exp()}
        low, high = keys.chunk(2, dim=-1)
        radius = torch.hypot(low, high).amax(1).repeat(1, 2)
        whole = self._relative(torch.where(self._apart(loudest), loudest, radius))
        if not self.fold:
            return {"factor": whole.exp()}
        together = self._relative(radius)
        if self.shared:
            together = together.mean(0, keepdim=True).expand_as(together)
        folded = (together / math.log(2)).round()
        rest = {"factor": (whole - folded * math.log(2)).exp()} if self.outliers else {}
        return {"folded": folded.to(torch.int8), **rest}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Divide by the factors.

        Args:
            x: Keys as the layer makes them, after RoPE, ``[..., H_kv, L, D]``.
            parameters: ``factor`` ``[H_kv, D]``, if there is one.
        Returns:
            Same shape, float32 (float64 for float64 keys).
        """
        return x / parameters["factor"].unsqueeze(-2) if "factor" in parameters else x

    def invert(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Multiply by the factors; shapes and dtype as in ``apply``."""
        return x * parameters["factor"].unsqueeze(-2) if "factor" in parameters else x

    def prepare_query(
        self, query: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply the query ``[B, H, T, D]`` by its head's factors; there is no shift.

        The product is rounded to the query's dtype.
        """
        if "factor" not in parameters:
            return query, None
        factor = parameters["factor"]
        grouped = query.unflatten(1, (factor.shape[0], -1))
        return (grouped * factor[:, None, None, :]).flatten(1, 2).to(query.dtype), None

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Count the bytes of the tables."""
        factors = 4 if self.outliers or not self.fold else 0
        return (factors + self.fold) * heads * head_dim

    def _relative(self, magnitude: Tensor) -> Tensor:
        """Logarithms of the factors that magnitudes ``[H_kv, D]`` ask for."""
        least = magnitude.amax(1, keepdim=True).clamp(min=1e-30) * FLOOR
        logarithm = torch.maximum(magnitude, least).log() * self.strength
        return logarithm - logarithm.mean(1, keepdim=True)

    def _apart(self, loudest: Tensor) -> Tensor:
        """Mark each head's outliers and their partners, bool ``[H_kv, D]``."""
        size = loudest.shape[1]
        chosen = loudest.topk(min(self.outliers, size), dim=1).indices
        both = torch.cat([chosen, (chosen + size // 2) % size], dim=1)
        return torch.zeros_like(loudest, dtype=torch.bool).scatter(1, both, True)
