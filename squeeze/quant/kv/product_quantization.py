"""Product quantization: sub-vectors of a head as indices into codebooks of calibrated centroids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels.bits import pack, unpack, words
from squeeze.registry import register
from squeeze.types import Tensors

HALF_MAX = torch.finfo(torch.float16).max
ITERATIONS = 25
NEIGHBOURS = 8  # centroids that a point may move to in one iteration
RELATIVE_FLOOR = 1e-4  # least importance of a channel, as a share of the mean


@register(source="https://arxiv.org/abs/2504.03661", year=2025)
@dataclass(frozen=True)
class ProductQuantization:
    """Store each sub-vector as the index of its nearest centroid.

    Sub-vector ``j`` of M = D / ``subvector`` holds channels ``j, j + M, j + 2 M, ...``, so that two
    channels that RoPE rotates together (``i`` and ``i + D / 2``) meet in one sub-vector: their
    common density is a ring or a disc, which centroids follow and separate channels cannot.
    Codebooks belong to one layer and KV head and come from k-means over calibration text, an error
    of channel ``d`` counting ``importance[d]``, when encoding too. A sub-vector past a float16
    centroid saturates at the nearest; NaN becomes the first centroid.

    Args:
        bits: Width of one code: ``2**bits`` centroids; ``bits / subvector`` bits per value.
        subvector: Channels of a sub-vector, 2 or 4; divides D.
    Cost: ``bits / subvector`` bits per value, and ``2**(bits + 1) * D`` bytes of codebooks per head
        and side. Encoding compares every sub-vector with every centroid, 64 MiB at a time.
    Source: Wang et al., 2025, MILLION, https://arxiv.org/abs/2504.03661, section 3; the weights of
        k-means follow Hooper et al., 2024, KVQuant, https://arxiv.org/abs/2401.18079, section 3.2.
    Differs: codebooks per layer and head instead of one of each kind for the model; channels
        that rotate together share a sub-vector instead of neighbours; importance-weighted.
    """

    bits: Literal[4, 5, 6, 7, 8] = 8
    subvector: Literal[2, 4] = 2

    @property
    def statistics(self) -> tuple[str, ...]:
        """Sampled keys or values, and what an error of each channel counts."""
        return ("kv_importance", "kv_samples")

    @property
    def block_length(self) -> int:
        """Tokens are independent; 32 pack at any width."""
        return 32

    def check(self, head_dim: int) -> None:
        """Refuse a head that is no whole number of sub-vectors.

        Raises:
            UnsupportedError: ``subvector`` does not divide ``head_dim``.
        """
        if head_dim % self.subvector:
            raise UnsupportedError(
                "kv_cache",
                f"subvector {self.subvector} does not divide heads of {head_dim} channels",
                ", ".join(str(n) for n in (2, 4) if head_dim % n == 0) or "no product_quantization",
                "Change subvector",
            )

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Cluster the sampled sub-vectors of every head.

        Args:
            statistics: ``kv_samples`` ``[H_kv, N, D]`` and ``kv_importance`` ``[H_kv, D]``.
        Returns:
            ``codebook`` float16 ``[H_kv, 2**bits, M, subvector]``: one code's centroids of all
            sub-vectors are adjacent. ``root`` float32 ``[H_kv, M, subvector]``: what a channel's
            error is multiplied by where distances are compared.
        """
        parts = self._split(statistics["kv_samples"].float())  # [H_kv, N, M, w]
        importance = statistics["kv_importance"].float()
        importance = importance / importance.mean(1, keepdim=True).clamp(min=1e-30)
        root = self._split(importance.clamp(min=RELATIVE_FLOOR).sqrt())  # [H_kv, M, w]
        points = (parts * root.unsqueeze(1)).transpose(1, 2)  # [H_kv, M, N, w]
        centroids = _kmeans(points.flatten(0, 1), 2**self.bits).unflatten(0, points.shape[:2])
        centroids = (centroids / root.unsqueeze(2)).transpose(1, 2)
        codebook = centroids.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).contiguous()
        return {"codebook": codebook, "root": root.contiguous()}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Find the nearest centroids.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype; L a multiple of 32.
            parameters: ``codebook`` and ``root``.
        Returns:
            ``codes``: uint8 ``[..., H_kv, L, M]`` at 8 bits, otherwise int32 ``[..., H_kv,
            bits * L / 32, M]``, packed along tokens in one run.
        """
        root = parameters["root"]
        parts = self._split(x.float()) * root.unsqueeze(1)
        codes = _nearest(parts, parameters["codebook"].float() * root.unsqueeze(1))
        if self.bits < 8:
            codes = pack(codes.mT, self.bits).mT.contiguous()
        return {"codes": codes}

    def decode(
        self,
        packed: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Look the centroids up.

        Args:
            packed: What ``encode`` returned, with any leading dimensions.
            parameters: ``codebook``.
            dtype: Of the result.
        Returns:
            ``[..., H_kv, L, D]``.
        """
        codes, codebook = packed["codes"], parameters["codebook"]
        if self.bits < 8:
            length = codes.shape[-2] * 32 // self.bits
            codes = unpack(codes.mT, self.bits, length).mT
        heads, entries, count, width = codebook.shape
        columns = torch.arange(count, device=codes.device)
        rows = torch.arange(heads, device=codes.device).view(-1, 1, 1) * entries
        index = (rows + codes.long()) * count + columns
        parts = codebook.to(dtype).view(-1, width)[index]  # [..., H_kv, L, M, w]
        return parts.transpose(-1, -2).flatten(-2)

    def bits_per_value(self, head_dim: int) -> float:
        """Count the stored bits per value; nothing but codes is stored."""
        return words(32, self.bits) / self.subvector

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Count the codebooks and roots of one side of one layer."""
        return (2 * 2**self.bits + 4) * heads * head_dim

    def _split(self, x: Tensor) -> Tensor:
        """``[..., D]`` to sub-vectors ``[..., M, w]``."""
        return x.unflatten(-1, (self.subvector, -1)).transpose(-1, -2)


def _nearest(parts: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest centroid, uint8 ``[..., H_kv, L, M]``.

    ``||c||^2 - 2 x . c``, element by element: a matrix product might round differently for another
    number of rows, and a batch of two would no longer equal two batches of one.
    """
    rows = parts.flatten(0, -5) if parts.dim() > 4 else parts.reshape(1, *parts.shape[-4:])
    center = codebook.mean(1)  # [H_kv, M, w]; distances between far-off points would cancel
    table = (codebook - center.unsqueeze(1)).permute(0, 2, 3, 1)  # [H_kv, M, w, K]
    norm = table.square().sum(2)
    heads, entries, count = codebook.shape[:3]
    step = max(1, _distances_at_once(parts) // (heads * entries * count))
    codes = torch.empty(rows.shape[:-1], dtype=torch.uint8, device=parts.device)
    for row in range(rows.shape[0]):
        for start in range(0, rows.shape[2], step):
            chunk = rows[row, :, start : start + step] - center.unsqueeze(1)  # [H_kv, S, M, w]
            codes[row, :, start : start + step] = _distances(chunk, table, norm).argmin(-1)
    return codes.view(parts.shape[:-1])


def _distances(points: Tensor, table: Tensor, norm: Tensor) -> Tensor:
    """Squared distances less the points' own norms: ``[P, S, M, K]`` of ``[P, S, M, w]``."""
    result = torch.addcmul(
        norm.unsqueeze(1), points[..., 0:1], table[:, :, 0].unsqueeze(1), value=-2
    )
    for i in range(1, points.shape[-1]):
        result.addcmul_(points[..., i : i + 1], table[:, :, i].unsqueeze(1), value=-2)
    return result


def _kmeans(points: Tensor, clusters: int) -> Tensor:
    """Cluster each problem of ``[P, N, w]`` by Lloyd's algorithm into ``[P, clusters, w]``."""
    step = max(1, _distances_at_once(points) // (points.shape[1] * clusters))
    return torch.cat([_kmeans_chunk(part, clusters) for part in points.split(step)])


def _kmeans_chunk(points: Tensor, clusters: int) -> Tensor:
    """Start from k-means++ with fixed draws; an empty cluster keeps its centroid.

    After the first round a point only moves between the nearest neighbours of its centroid, which
    still never raises the error.
    """
    mean = points.mean(1, keepdim=True)
    points = points - mean
    centroids = _plus_plus(points, clusters)
    table = centroids.transpose(1, 2).unsqueeze(1)  # [P, 1, w, K]
    owner = _distances(points.unsqueeze(2), table, table.square().sum(2)).squeeze(2).argmin(-1)
    problems = torch.arange(len(points), device=points.device).unsqueeze(1)
    for _ in range(ITERATIONS):
        index = owner.unsqueeze(-1).expand_as(points)
        sums = torch.zeros_like(centroids).scatter_add_(1, index, points)
        counts = torch.zeros_like(centroids).scatter_add_(1, index, torch.ones_like(points))
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        spread = (centroids.unsqueeze(1) - centroids.unsqueeze(2)).square().sum(-1)
        near = spread.topk(min(NEIGHBOURS, clusters), largest=False).indices  # [P, K, n]
        options = near[problems, owner]  # [P, N, n]
        there = centroids[problems.unsqueeze(2), options]  # [P, N, n, w]
        best = (there - points.unsqueeze(2)).square().sum(-1).argmin(-1, keepdim=True)
        owner = options.gather(-1, best).squeeze(-1)
    return centroids + mean


def _plus_plus(points: Tensor, clusters: int) -> Tensor:
    """Choose points one by one, with a chance that grows with the squared distance to the rest."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(clusters, generator=generator).to(points.device)
    problems = torch.arange(len(points), device=points.device)
    chosen = [points[:, 0]]
    distance = (points - points[:, :1]).square().sum(-1)
    for i in range(1, clusters):
        mass = distance.cumsum(1)
        place = torch.searchsorted(mass, mass[:, -1:] * draws[i], right=True).squeeze(1)
        chosen.append(points[problems, place.clamp(max=points.shape[1] - 1)])
        distance = distance.minimum((points - chosen[-1].unsqueeze(1)).square().sum(-1))
    return torch.stack(chosen, dim=1)


def _distances_at_once(x: Tensor) -> int:
    """Distances held at a time: 64 MiB of float32, or what a CPU's cache holds."""
    return 2**19 if x.device.type == "cpu" else 2**24
