"""Karhunen-Loeve rotation: order the directions of a head by what they contribute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from squeeze.registry import register
from squeeze.types import Tensors

# Least importance of a channel, as a share of its head's largest: keeps the basis invertible.
FLOOR = 1e-4


@register(source="https://arxiv.org/abs/2502.15304", year=2025)
@dataclass(frozen=True)
class Klt:
    """Rotate every head into the principal directions of what calibration saw, largest first.

    With ``C`` the covariance of a head's keys and ``s_d**2 = E[q_d**2]`` over the queries that read
    it, ``diag(s) C diag(s) = U diag(v) U'``, ``v`` falling. Stored are ``k' = k diag(s) U``, the
    query becomes ``q' = q diag(1/s) U``, and ``q . k = q' . k'`` exactly. Every component of ``q'``
    has about the same mean square, so an error costs the same in every component of ``k'`` while
    its variance falls steeply: a format that spends bits by position (``graded``) gains by it. For
    values ``s`` is 1 and the output is rotated back once per step.

    The channels must be the model's own, up to a shift: only ``center`` may come before it.

    Cost: ``8 * H_kv * D**2`` bytes per layer; ``D`` multiply-adds per value when it is stored and
        per query channel and step.
    Source: Hong et al., 2025, SVDq, https://arxiv.org/abs/2502.15304, latent channels; calibrated
        once, as in Staniszewski and Lancucki, 2025, KVTC, https://arxiv.org/abs/2511.01815.
    Differs: weighted by the queries, which decide what an error of a key counts; fitted to keys
        after RoPE spread over all positions, so nothing is rotated at read time.
    """

    @property
    def statistics(self) -> tuple[str, ...]:
        """``kv_samples``, float ``[H_kv, N, D]``, and ``kv_importance``, float ``[H_kv, D]``."""
        return ("kv_samples", "kv_importance")

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys and values."""
        return ("keys", "values")

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Find the directions of every head.

        Args:
            statistics: ``kv_samples`` ``[H_kv, N, D]`` and ``kv_importance`` ``[H_kv, D]``.
        Returns:
            ``forward`` and its inverse ``backward``, float32 ``[H_kv, D, D]``; rows of vectors are
            multiplied from the left.
        """
        samples = statistics["kv_samples"].double()
        scale = _scale(statistics["kv_importance"].double())
        centred = (samples - samples.mean(1, keepdim=True)) * scale.unsqueeze(1)
        _, vectors = torch.linalg.eigh(centred.mT @ centred / samples.shape[1])
        vectors = vectors.flip(-1)
        # An eigenvector's sign is arbitrary: let its largest component be positive.
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        return {
            "forward": (scale.unsqueeze(-1) * vectors).float().contiguous(),
            "backward": (vectors.mT / scale.unsqueeze(-2)).float().contiguous(),
        }

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Two float32 matrices per KV head."""
        return 8 * heads * head_dim**2

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Rotate into the principal directions.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype.
            parameters: ``forward`` and ``backward``.
        Returns:
            Same shape, float32 (float64 for float64 input).
        """
        return _multiply(x, parameters["forward"])

    def invert(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Rotate back; shapes and dtype as in ``apply``."""
        return _multiply(x, parameters["backward"])

    def prepare_query(
        self, query: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Move the query ``[B, H, T, D]`` into the stored basis; its dtype stays, without shift.

        Query head ``h`` takes the basis of KV head ``h // (H / H_kv)``.
        """
        matrix = parameters["backward"].mT
        grouped = query.unflatten(1, (matrix.shape[0], -1)).flatten(2, 3)
        return _multiply(grouped, matrix).to(query.dtype).reshape(query.shape), None


def _scale(importance: Tensor) -> Tensor:
    """Root of the importance ``[H_kv, D]``, floored, and 1 in the head's geometric mean."""
    least = importance.amax(1, keepdim=True) * FLOOR
    logarithm = torch.maximum(importance, least).clamp(min=1e-30).log() / 2
    return (logarithm - logarithm.mean(1, keepdim=True)).exp()


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """``x [..., H_kv, L, D]`` times each head's ``[D, D]``, at least in float32.

    All vectors of a head are the rows of one product: neither they nor the matrix are copied for
    every block.
    """
    heads = x.movedim(-3, 0)
    wide = heads.to(
        torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format
    )
    product = wide.flatten(1, -2) @ matrix.to(wide.dtype)
    return product.view(heads.shape).movedim(0, -3)
