"""Dense-and-sparse: a palette for nearly all weights, the few worst errors stored beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels.lut_linear.api import reconstruct
from squeeze.quant.weights._palette import Palette
from squeeze.types import ClusteredWeight

COLUMNS = 65536  # a column number has 16 bits


@dataclass(frozen=True)
class SparsePalette(Palette):
    """A palette that may leave a share of the weights to exact corrections.

    A correction is what the palette's value lacks, float16 with a 16-bit column number, by rows.

    Attributes:
        bits, granularity, rows_per_codebook, entries, inputs: See ``Palette``.
        sparse_outliers: Share of all weights that have a correction; 32 bits each, and 32 a row.

    Source: S. Kim et al. 2023, SqueezeLLM, https://arxiv.org/abs/2306.07629, section 4.2.
    Differs: corrected are those with the largest importance times squared error after a first fit,
        and not the largest weights; a second fit no longer minds them.
    """

    sparse_outliers: Annotated[float, Field(ge=0, le=0.1)] = 0.0

    def empty(
        self, out_features: int, in_features: int, device: torch.device | str
    ) -> ClusteredWeight:
        """Allocate a packed weight of these parameters with undefined contents."""
        plain = super().empty(out_features, in_features, device)
        count = self._count(out_features, in_features)
        if not count:
            return plain
        return replace(
            plain,
            outlier_values=torch.empty(count, dtype=torch.float16, device=device),
            outlier_columns=torch.empty(count, dtype=torch.int16, device=device),
            outlier_offsets=torch.empty(out_features + 1, dtype=torch.int32, device=device),
        )

    def check(self, out_features: int, in_features: int) -> None:
        """Refuse shapes on which this would not save anything, and too many columns to number.

        Raises:
            UnsupportedError: see above.
        """
        super().check(out_features, in_features)
        if self.sparse_outliers and in_features > COLUMNS:
            raise UnsupportedError(
                f"sparse_outliers on a [{out_features}, {in_features}] weight",
                f"{in_features} columns",
                f"at most {COLUMNS}",
                "Ignore this module",
            )

    def spare(
        self, fit: Callable[[Tensor], ClusteredWeight], dense: Tensor, mass: Tensor
    ) -> ClusteredWeight:
        """Fit a weight, then without its worst errors once more, and correct those that remain.

        Args:
            fit: Packs a float32 ``[out, in]`` weight.
            dense: float32 ``[out, in]``.
            mass: What an error of each weight counts, broadcastable to ``[out, in]``.
        """
        fitted, count = fit(dense), self._count(*dense.shape)
        if not count:
            return fitted
        values = reconstruct(fitted)
        worst = _worst(dense - values, mass, count)
        fitted = fit(torch.where(worst, values, dense))
        errors = dense - reconstruct(fitted)
        worst = _worst(errors, mass, count)
        rows, columns = worst.nonzero().unbind(1)
        counts = torch.bincount(rows, minlength=len(dense))
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return replace(
            fitted,
            outlier_values=errors[rows, columns].half(),
            outlier_columns=columns.where(columns < 32768, columns - COLUMNS).to(torch.int16),
            outlier_offsets=offsets.int(),
        )

    def _count(self, out_features: int, in_features: int) -> int:
        """Number of corrections of a matrix."""
        return round(self.sparse_outliers * out_features * in_features)


def _worst(errors: Tensor, mass: Tensor, count: int) -> Tensor:
    """Mark the ``count`` errors that cost most, bool ``[out, in]``."""
    cost = (errors.square() * mass).flatten()
    # Ties go to the first, on every device.
    chosen = cost.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(cost, dtype=torch.bool).index_fill_(0, chosen, True).view_as(errors)
