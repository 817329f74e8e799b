"""Weights as integers with a scale per group of columns: the formats that every runtime reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels import bits as packing
from squeeze.quant.weights._rounding import round_gptq, round_nearest, row_scales
from squeeze.registry import register
from squeeze.types import IntegerWeight

RATIOS = 20  # exponents of the activation magnitude that the scale search tries, from 0 up


@register(source="https://arxiv.org/abs/2210.17323", year=2022)
@dataclass(frozen=True)
class Integer:
    """Round weights to even steps per group, by RTN, GPTQ, or either after AWQ's scaling.

    ``W = (code - zero) * scale`` with one scale per row and group of columns. GPTQ rounds column
    by column and lets later columns make up for the error in the layer's output; AWQ first
    multiplies columns with large inputs, which are then divided, so that these round more finely.

    Attributes:
        bits: Width of a code.
        group_size: Columns sharing a scale, a multiple of 32; 0 for the whole row.
        symmetric: Zero is the middle code; else a group stores the code that stands for zero.
        rounding: To the ``nearest`` value, or by ``gptq``.
        scaling: ``awq``, or ``none``.
        order: Which columns GPTQ rounds first: those with large inputs, or as they are stored.
        damping: Share of the mean diagonal of the Hessian that GPTQ adds to its diagonal.
        inputs: ``float8`` rounds the inputs of each token to E4M3 under a scale of their own, and
            keeps the scales of groups as E4M3 times a power of two per row, for at most 4 bits.
            Codes less zero, and inputs, are then exact in E4M3, and weights in bfloat16.

    Source: E. Frantar et al. 2022, GPTQ, https://arxiv.org/abs/2210.17323, section 3.3 and
        algorithm 1; J. Lin et al. 2023, AWQ, https://arxiv.org/abs/2306.00978, section 3.2;
        D. Baek et al. 2025, FireQ, https://arxiv.org/abs/2505.20839, for float8 inputs.
    Differs: AWQ's scales are powers of two, so that what makes the inputs takes their inverses
        exactly; its search measures the error by ``X^T X`` and magnitude by the root mean square,
        and does not clip; ranges use all codes and clip nothing; scales have 8 significant bits;
        grids of columns rounded by activation stay those of the weight before rounding, so groups
        are stored in order; channels without activation are rounded and not cleared. FireQ has one
        scale per tensor where we have powers of two per row, and rounds the products of codes and
        scales to E4M3; its scales of channels are AWQ's here (``scaling``).
    """

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Annotated[int, Field(ge=0, multiple_of=32)] = 128
    symmetric: bool = True
    rounding: Literal["nearest", "gptq"] = "nearest"
    scaling: Literal["none", "awq"] = "none"
    order: Literal["activation", "given"] = "activation"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    inputs: Literal["float8"] | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """Calibration statistics that ``fit`` needs."""
        calibrated = self.rounding == "gptq" or self.scaling == "awq"
        return ("hessian",) if calibrated else ()

    @property
    def scales_inputs(self) -> bool:
        """Whether ``fit`` takes ``exponents``, which modules of the same inputs share."""
        return self.scaling == "awq"

    def input_exponents(self, weights: Sequence[Tensor], hessian: Tensor) -> Tensor:
        """Search how far each column is scaled up before it is rounded (AWQ).

        Args:
            weights: float32 ``[out, in]`` each, of all modules that read the same inputs.
            hessian: float32 ``[in, in]``, the mean of ``x x^T`` over these inputs.
        Returns:
            int8 ``[in]``, powers of two, the best of 20 by the summed error of the outputs.
        """
        magnitude = hessian.diagonal().clamp(min=0).sqrt()
        magnitude = magnitude.clamp(min=float(magnitude.max()) * 1e-4 or 1.0).log2()
        best, least = torch.zeros_like(magnitude), torch.inf
        for turn in range(RATIOS):
            exponents = magnitude * (turn / RATIOS)
            exponents = torch.round(exponents - (exponents.amax() + exponents.amin()) / 2)
            error = sum(self._error(weight, hessian, exponents) for weight in weights)
            if error < least:
                best, least = exponents, error
        return best.to(torch.int8)

    def _error(self, weight: Tensor, hessian: Tensor, exponents: Tensor) -> float:
        """Mean square of the output error of nearest rounding, summed over outputs."""
        power = torch.exp2(exponents)
        group_size = self._group_size(weight.shape[1])
        scaled = weight * power
        common = (group_size, self.bits, self.symmetric)
        codes, grid = round_nearest(scaled, *common, self._row_scales(scaled))
        group = torch.arange(weight.shape[1], device=weight.device) // group_size
        error = grid.columns(group).decode(codes) / power - weight
        return float(((error @ hessian) * error).sum())

    def fit(self, weight: Tensor, statistics: Mapping[str, Tensor] | None = None) -> IntegerWeight:
        """Choose scales, zeros and codes of one weight matrix.

        Args:
            weight: ``[out, in]``, any floating dtype, finite.
            statistics: ``hessian`` float32 ``[in, in]`` where ``statistics`` names it; with ``awq``
                also ``exponents`` int8 ``[in]``, searched for this weight alone if missing.
        Returns:
            The packed weight, on the device of ``weight``.
        Raises:
            ValueError: the Hessian is needed and missing, or of another shape.
            UnsupportedError: see ``check``.
        Cost: GPTQ: float64 ``[in, in]`` three times, one float32 copy of the weight.
        """
        out_features, in_features = weight.shape
        self.check(out_features, in_features)
        dense, given = weight.detach().float(), statistics or {}
        hessian = self._hessian(given, dense) if self.statistics else dense.new_empty(0)
        exponents = None
        if self.scales_inputs:
            found = given.get("exponents")
            exponents = self.input_exponents([dense], hessian) if found is None else found
            power = torch.exp2(exponents.to(dense))
            dense, hessian = dense * power, hessian / power / power[:, None]
        group_size = self._group_size(in_features)
        common = (group_size, self.bits, self.symmetric)
        row = self._row_scales(dense)
        if self.rounding == "gptq":
            by_activation = self.order == "activation"
            codes, grid = round_gptq(dense, hessian, *common, by_activation, self.damping, row)
        else:
            codes, grid = round_nearest(dense, *common, row)
        codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -in_features % group_size))
        packed = packing.pack(codes.unflatten(1, (-1, group_size)), self.bits)
        return IntegerWeight(
            packed.flatten(1),
            grid.scale.half() if row is None else _bits_of(grid.scale / row[:, None]),
            None if self.symmetric else grid.zero.to(torch.uint8),
            exponents,
            self.bits,
            group_size,
            (out_features, in_features),
            row_scale=row,
        )

    def empty(
        self, out_features: int, in_features: int, device: torch.device | str
    ) -> IntegerWeight:
        """Allocate a packed weight of these parameters with undefined contents."""
        group_size = self._group_size(in_features)
        groups = -(-in_features // group_size)
        words = groups * packing.words(group_size, self.bits)

        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return IntegerWeight(
            make(out_features, words, dtype=torch.int32),
            make(out_features, groups, dtype=torch.uint8 if self.inputs else torch.float16),
            None if self.symmetric else make(out_features, groups, dtype=torch.uint8),
            make(in_features, dtype=torch.int8) if self.scales_inputs else None,
            self.bits,
            group_size,
            (out_features, in_features),
            row_scale=make(out_features, dtype=torch.float32) if self.inputs else None,
        )

    def shape_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a matrix of this shape will take, all tensors included."""
        return self.empty(out_features, in_features, "meta").nbytes

    def shape_bits(self, out_features: int, in_features: int) -> float:
        """Effective bits per weight of a matrix of this shape."""
        return self.empty(out_features, in_features, "meta").effective_bits

    def check(self, out_features: int, in_features: int) -> None:
        """Refuse shapes on which this would not save anything.

        Raises:
            UnsupportedError: codes, scales and padding take 16 bits per weight or more; or inputs
                are rounded to E4M3, which does not hold the codes.
        """
        if self.inputs and self.bits > 4:
            raise UnsupportedError(
                "integer: inputs",
                f"inputs in {self.inputs} and {self.bits} bits",
                "at most 4 bits",
                "Set bits: 4, or leave inputs out",
            )
        effective = self.shape_bits(out_features, in_features)
        if effective >= 16:
            raise UnsupportedError(
                f"integer on a [{out_features}, {in_features}] weight",
                f"{effective:.1f} effective bits per weight, scales and padding included",
                "less than 16",
                "Choose fewer bits or a smaller group_size, or ignore this module",
            )

    def _group_size(self, in_features: int) -> int:
        """Columns sharing a scale; a row shorter than a group is one group."""
        row = -(-in_features // 32) * 32
        return min(self.group_size or row, row)

    def _row_scales(self, weight: Tensor) -> Tensor | None:
        """Powers of two per row for scales in E4M3, float32 ``[out]``."""
        if not self.inputs:
            return None
        return row_scales(weight, self.bits, self.symmetric)

    def _hessian(self, statistics: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Find and check the Hessian."""
        count = dense.shape[1]
        hessian = statistics.get("hessian")
        if hessian is None:
            raise ValueError(f"rounding {self.rounding}, scaling {self.scaling} need a hessian")
        if tuple(hessian.shape) != (count, count):
            raise ValueError(f"hessian is {tuple(hessian.shape)}, not {(count, count)}")
        return hessian.to(dense)


def _bits_of(scale: Tensor) -> Tensor:
    """Store values of E4M3, uint8."""
    return scale.to(torch.float8_e4m3fn).view(torch.uint8)
