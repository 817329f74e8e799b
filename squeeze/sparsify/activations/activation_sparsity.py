"""Thresholds under which an input of a linear layer is not worth reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squeeze.magnitudes import quantile
from squeeze.registry import register


@register(source="https://arxiv.org/abs/2409.01366", year=2024)
@dataclass(frozen=True)
class ActivationSparsity:
    """Skip, in decode, weight columns whose input is small, a threshold per channel (CHESS).

    Leaving channel j out of ``y = W x`` costs ``|x_j| |W_:,j|`` in y. One bound T on that cost
    serves a whole layer, the quantile of calibration text that the wanted share of all inputs
    stays under, so channels that meet large columns have low thresholds:
    ``t_j = T / |W_:,j|``. Only layers that bear it are made sparse: the attention's query and
    output and the second half of the feed-forward network; keys and values stay exact.

    Attributes:
        sparsity: Share of inputs that count as zero, on calibration text.

    Cost: 4 bytes per input channel; of the weights ``1 - sparsity`` is read per token.
    Source: J. He et al. 2024, CHESS, https://arxiv.org/abs/2409.01366, section 3 (a threshold per
        channel from the cost of leaving it out; selected layers).
    Differs: what is compared is the input that ``down_proj`` multiplies and not the gate times the
        mean of ``up_proj``'s outputs, so these are all computed; column norms count; tokens of the
        prompt are computed in full.
    """

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @property
    def statistics(self) -> tuple[str, ...]:
        """Histogram of what each input costs."""
        return ("input_importance",)

    def fit(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Choose the thresholds of one linear layer.

        Args:
            weight: ``[out, in]``, floating.
            statistics: ``input_importance`` int64 ``[BINS]``: ``|x_j| |W_:,j|`` of calibration
                text (``squeeze.magnitudes``).
        Returns:
            float32 ``[in]``; infinite for a channel whose column is zero.
        """
        bound = quantile(statistics["input_importance"], self.sparsity)
        norms = weight.detach().float().norm(dim=0)
        return torch.where(norms > 0, bound.to(norms) / norms, torch.inf)
