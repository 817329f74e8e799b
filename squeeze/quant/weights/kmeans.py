"""Weights as indices into small codebooks that minimise the weighted rounding error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from squeeze.quant.weights._outliers import SparsePalette
from squeeze.registry import register
from squeeze.types import ClusteredWeight

DAMPING = 0.02  # share of the row's mean importance added to every weight


@register(source="https://arxiv.org/abs/2306.07629", year=2023)
@dataclass(frozen=True)
class KMeans(SparsePalette):
    """Cluster weights exactly, each weighted by how much the loss depends on it (SqueezeLLM).

    Minimises ``sum_i F_i (w_i - c(i))^2`` over codebooks of ``2**bits`` entries, where F is the
    diagonal of the Fisher information: the squared loss gradient, averaged over samples.
    Indices are packed densely, so 3 bits cost 3 bits.

    Attributes:
        bits: Width of an index.
        granularity: What shares a codebook: the tensor, a block of output rows, a row, or a tile
            of 8 rows by 64 columns.
        rows_per_codebook: Rows of a block when granularity is ``rows``.
        entries: ``float16`` entries, or ``int8`` or ``float8`` (E4M3) entries times a float16 scale
            per output row.
        inputs: ``float8`` rounds the inputs of each token to E4M3; see ``Palette``.
        sparse_outliers: See ``SparsePalette``.
        importance: Weight errors by the Fisher diagonal, or equally.

    Source: S. Kim et al. 2023, SqueezeLLM, https://arxiv.org/abs/2306.07629, section 4.1; exact
        one-dimensional clustering, H. Wang and M. Song 2011, and A. Gronlund et al. 2017,
        https://arxiv.org/abs/1701.07204.
    Differs: the clustering is a global optimum and not k-means++ with restarts; 8-bit entries with
        a row scale, refitted together with the indices; granularities other than a row; a share of
        the row's mean importance is added to every weight, because a calibration set that is
        silent about a weight does not make it free; sparse outliers are what errs most.
    """

    importance: Literal["fisher", "none"] = "fisher"

    @property
    def statistics(self) -> tuple[str, ...]:
        """Calibration statistics that ``fit`` takes as importance."""
        return () if self.importance == "none" else (self.importance,)

    def fit(
        self, weight: Tensor, statistics: Mapping[str, Tensor] | None = None
    ) -> ClusteredWeight:
        """Choose codebooks, scales and indices of one weight matrix.

        Args:
            weight: ``[out, in]``, any floating dtype, finite.
            statistics: Holds the importance, ``[out, in]``, at least 0, unless that is ``none``.
        Returns:
            The packed weight, on the device of ``weight``.
        Raises:
            ValueError: importance is needed and missing, or of another shape.
            UnsupportedError: see ``check``.
        Cost: one exact clustering; about 30 float64 working values per weight in flight.
        """
        self.check(weight.shape[0], weight.shape[1])
        dense = weight.detach().float()
        importance = (statistics or {}).get(self.importance)
        mass = self._mass(dense, importance)
        return self.spare(lambda rest: self.pack(*self.cluster(rest, mass)), dense, mass)

    def _mass(self, dense: Tensor, importance: Tensor | None) -> Tensor:
        """Damped importance, ``[out, in]``."""
        if not self.statistics:
            return torch.ones_like(dense)
        if importance is None:
            raise ValueError(f"importance {self.importance!r} needs its statistic")
        if importance.shape != dense.shape:
            raise ValueError(f"importance is {importance.shape}, the weight {dense.shape}")
        mass = importance.to(dense)
        mass = mass / mass.mean().clamp(min=1e-30)
        mean = mass.mean(1, keepdim=True)
        return mass + DAMPING * torch.where(mean > 0, mean, 1.0)
