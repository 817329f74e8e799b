"""State-space models in 8 bits: weights, and what flows around the selective scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squeeze.kernels import bits as packing
from squeeze.magnitudes import quantile
from squeeze.registry import register
from squeeze.types import IntegerWeight, Tensors

BITS, LIMIT = 8, 127
SCAN_INPUT = "scan_input"
SMALLEST = 2.0**-24


@register(source="https://arxiv.org/abs/2410.13229", year=2024)
@dataclass(frozen=True)
class Quamba:
    """Round a Mamba mixer's weights and activations to int8, the scan's input clipped (Quamba).

    Every activation of a mixer gets one static scale, ``max |x| / 127`` over calibration text, so
    that nothing is measured at run time. Two need care. The scan's input has rare huge values to
    which the recurrence is sensitive: its scale comes from a percentile and the rest saturates.
    The scan's output has outlier channels: it is rotated by a Hadamard matrix H before it is
    rounded, and the output projection holds ``W H``, which undoes that (``W H H y = W y``).
    Weights are symmetric int8 with a float16 scale per output row. The convolution, ``A``, ``D``,
    norms and the recurrent state keep their precision.

    Attributes:
        percentile: Share of the scan's input that is not clipped, in percent.
        hadamard: Rotate the scan's output.

    Cost: 8 bits per weight and 16 per output row; ``d log2 d`` additions per token to rotate.
    Source: H.-Y. Chiang et al. 2024, Quamba, https://arxiv.org/abs/2410.13229, section 4.
    Differs: weight scales per row and not per tensor; time step, B, C and gate have scales of their
        own; the percentile is of all calibration values and not a moving average over samples; a
        width of ``n * 2**k`` with ``n`` odd is rotated in ``n`` blocks and not by tabulated
        matrices; the convolution is not rounded; products of rounded numbers are computed in the
        model's dtype.
    """

    percentile: Annotated[float, Field(gt=50, le=100)] = 99.999
    hadamard: bool = True

    @property
    def statistics(self) -> tuple[str, ...]:
        """The weights themselves need none."""
        return ()

    @property
    def mixer_statistics(self) -> tuple[str, ...]:
        """What ``fit_mixer`` takes; a method that has this takes whole mixers."""
        return ("mixer_magnitudes",)

    def fit_mixer(self, magnitudes: Mapping[str, Tensor]) -> Tensors:
        """Choose the static scale of every activation of one mixer.

        Args:
            magnitudes: Activation to histogram, int64 ``[BINS]`` (``squeeze.magnitudes``);
                ``output`` before and ``rotated_output`` after the rotation.
        Returns:
            Activation to scale, float32 ``[1]``: the size of one int8 step.
        """
        shares = dict.fromkeys(magnitudes, 1.0) | {SCAN_INPUT: self.percentile / 100}
        unused = "output" if self.hadamard else "rotated_output"
        return {
            name: (quantile(counts, shares[name]) / LIMIT).clamp(min=SMALLEST).view(1)
            for name, counts in magnitudes.items()
            if name != unused
        }

    def fit(self, weight: Tensor, statistics: Mapping[str, Tensor] | None = None) -> IntegerWeight:
        """Round one weight matrix.

        Args:
            weight: ``[out, in]``, any floating dtype, finite.
            statistics: Not read.
        Returns:
            The packed weight, on the device of ``weight``.
        """
        dense = weight.detach().float()
        scale = (dense.abs().amax(1, keepdim=True) / LIMIT).clamp(SMALLEST, 65000.0).half()
        codes = (dense / scale.float()).round().clamp(-LIMIT, LIMIT).to(torch.int16)
        described = self.empty(weight.shape[0], weight.shape[1], weight.device)
        padded = described.group_size - weight.shape[1]
        codes = torch.nn.functional.pad(codes + 2 ** (BITS - 1), (0, padded))
        return described.with_tensors({"codes": packing.pack(codes, BITS), "scale": scale})

    def empty(
        self, out_features: int, in_features: int, device: torch.device | str
    ) -> IntegerWeight:
        """Allocate a packed weight with undefined contents."""
        group = -(-in_features // 32) * 32
        words = packing.words(group, BITS)
        return IntegerWeight(
            torch.empty(out_features, words, dtype=torch.int32, device=device),
            torch.empty(out_features, 1, dtype=torch.float16, device=device),
            None,
            None,
            BITS,
            group,
            (out_features, in_features),
        )

    def shape_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a matrix of this shape will take, all tensors included."""
        return self.empty(out_features, in_features, "meta").nbytes

    def shape_bits(self, out_features: int, in_features: int) -> float:
        """Effective bits per weight of a matrix of this shape."""
        return self.empty(out_features, in_features, "meta").effective_bits

    def check(self, out_features: int, in_features: int) -> None:
        """Any shape will do."""
