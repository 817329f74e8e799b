"""Key centring: subtract each channel's mean, which softmax cannot see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from squeeze.registry import register
from squeeze.types import Tensors


@register(source="https://arxiv.org/abs/2410.02367", year=2024)
@dataclass(frozen=True)
class Center:
    """Subtract the mean of every key channel and add ``q . mean`` back to the scores.

    ``q . k = q . (k - c) + q . c``, so the change of basis is exact and a format spends its range
    on what differs between tokens. ``c`` is the mean of post-RoPE keys of calibration text per KV
    head and channel.

    Cost: ``4 * H_kv * D`` bytes per layer; one dot product per query and step.
    Source: Zhang et al., 2024, SageAttention, https://arxiv.org/abs/2410.02367, section 4.2.
    Differs: the mean is calibrated and fixed instead of taken over the keys at hand, because a
        cached block is encoded once; and the shift ``q . c`` is kept, because keys outside the
        packed blocks are attended as they are.
    """

    @property
    def statistics(self) -> tuple[str, ...]:
        """``key_mean``: float ``[H_kv, D]``."""
        return ("key_mean",)

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys only: an offset of values does not cancel for free."""
        return ("keys",)

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Take the mean over as ``center``, float32 ``[H_kv, D]``."""
        return {"center": statistics["key_mean"].to(torch.float32)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Subtract the centre.

        Args:
            x: Keys after RoPE, ``[..., H_kv, L, D]``.
            parameters: ``center`` ``[H_kv, D]``.
        Returns:
            Same shape, float32 (float64 for float64 keys).
        """
        return x - parameters["center"].unsqueeze(-2)

    def invert(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Add the centre back; shapes and dtype as in ``apply``."""
        return x + parameters["center"].unsqueeze(-2)

    def prepare_query(
        self, query: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Leave the query as it is and return what centred scores lack.

        Args:
            query: ``[B, H, T, D]``.
            parameters: ``center`` ``[H_kv, D]``; query head ``h`` reads row ``h // (H / H_kv)``.
        Returns:
            The query itself, and ``q . center`` ``[B, H, T]``, float32 (float64 for float64).
        """
        center = parameters["center"].to(torch.promote_types(query.dtype, torch.float32))
        grouped = query.to(center.dtype).unflatten(1, (center.shape[0], -1))
        shift = torch.einsum("bhgtd,hd->bhgt", grouped, center)
        return query, shift.flatten(1, 2)
