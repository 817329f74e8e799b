"""Palettes tuned by gradients through a soft assignment of weights to centroids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from squeeze import registry
from squeeze.errors import RecipeError, UnsupportedError
from squeeze.quant.weights._palette import Palette
from squeeze.quant.weights._student import Student
from squeeze.registry import register
from squeeze.types import ClusteredWeight


@register(source="https://arxiv.org/abs/2108.12659", year=2021)
@dataclass(frozen=True)
class Dkm(Palette):
    """Tune palettes on the dense model's predictions by differentiable k-means (DKM, eDKM).

    A weight w attends to the entries c of its codebook, ``a_j = softmax_j(-(w - c_j)^2 / tau)``,
    and stands for ``sum_j a_j c_j``, through which the loss reaches weights and entries. The loss
    is the divergence of the model's next-token distribution from the dense model's on calibration
    text; ``squeeze.distill`` runs it. The result is an ordinary palette.

    Attributes:
        bits, granularity, rows_per_codebook, entries, inputs: See ``Palette``.
        start: Method that makes the first palette: its name, or a mapping of ``method`` and
            parameters.
        derivative: Of what a weight stands for by the weight: of the ``attention``, or 1
            (``straight``), as if nothing were rounded; each weight then has a learning rate of its
            own (Adam), where attending weights of a codebook share one.
        temperature: tau, in squares of the mean gap between a codebook's entries.
        iterations: Rounds in which entries become the mean of the weights attending to them; with
            0 entries are trained themselves.
        steps: Training steps of the whole model.
        codebook_steps: Of these, the first, in which entries and scales alone are trained.
        batch: Calibration sequences in a step.
        entry_rate: Learning rate of entries, in units of the largest, and of the scales' logarithm.
        weight_rate: Learning rate of weights, in the same units.
        echo: Share of sequences whose second half repeats passages of the first, so that looking
            back is trained as well as guessing; see ``squeeze.echoes``.
        own_text: Share of sequences that the dense model wrote itself, going on from calibration
            text: fresh text where the calibration text is short.
        hidden: What a relative squared error of the layers' outputs counts beside the divergence.
        uniquify, marshal, shard: See ``squeeze.saved_tensors``; they count where there are
            ``iterations``, for without them no attention is kept for backward.

    Source: M. Cho et al. 2021, DKM, https://arxiv.org/abs/2108.12659, section 3; M. Cho et al.
        2023, eDKM, https://arxiv.org/abs/2309.00964.
    Differs: starts at a calibrated palette, whose indices stay fixed for the first steps while
        entries and scales are trained (codebook tuning, no k-means); the forward pass uses the
        nearest entry and the backward pass the attention's derivative or, with ``derivative:
        straight``, the identity (straight-through), so nothing changes when training ends; entries
        are parameters, with the derivative of their own members, unless ``iterations`` asks for the
        attention's means; entries and scales are rounded to what is stored throughout; predictions
        of the dense model, not labels.
    """

    start: str | dict[str, Any] = "kmeans"
    derivative: Literal["attention", "straight"] = "attention"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    iterations: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0)] = 200
    codebook_steps: Annotated[int, Field(ge=0)] = 20
    batch: Annotated[int, Field(ge=1)] = 4
    entry_rate: Annotated[float, Field(gt=0)] = 4e-3
    weight_rate: Annotated[float, Field(gt=0)] = 5e-4
    echo: Annotated[float, Field(ge=0, le=1)] = 0.0
    own_text: Annotated[float, Field(ge=0, le=1)] = 0.0
    hidden: Annotated[float, Field(ge=0)] = 0.0
    uniquify: bool = False
    marshal: bool = False
    shard: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the starting method asks of calibration."""
        return tuple(self.starting().statistics)

    def check(self, out_features: int, in_features: int) -> None:
        """Refuse shapes on which this would not save anything, and starts that store more.

        Raises:
            UnsupportedError: see above.
            RecipeError: ``iterations`` without the attention that they need.
        """
        super().check(out_features, in_features)
        if self.iterations and self.derivative != "attention":
            raise RecipeError(
                "weights: iterations",
                f"got {self.iterations} with derivative {self.derivative!r}",
                "0, or derivative 'attention'",
                "Leave one of the two out",
            )
        shape = (out_features, in_features)
        if self.starting().shape_bytes(*shape) != self.shape_bytes(*shape):
            raise UnsupportedError(
                "weights: start",
                "this start stores more than a palette",
                "a palette without sparse outliers",
                "Leave sparse_outliers out",
            )

    def starting(self) -> Any:
        """Build the method that makes the first palette.

        Raises:
            RecipeError: it is unknown, or makes no palette.
        """
        chosen = {"method": self.start} if isinstance(self.start, str) else dict(self.start)
        shared: dict[str, Any] = {
            "bits": self.bits,
            "granularity": self.granularity,
            "rows_per_codebook": self.rows_per_codebook,
            "entries": self.entries,
            "inputs": self.inputs,
        }
        name = chosen.pop("method")
        method = registry.get("weights", name, "weights: start")
        if not issubclass(method, Palette):
            raise RecipeError("weights: start", f"got {name!r}", "a method that makes palettes")
        return method(**shared, **chosen)

    def fit(
        self, weight: Tensor, statistics: Mapping[str, Tensor] | None = None
    ) -> ClusteredWeight:
        """Make the first palette; training is of a whole model, see ``student``."""
        fitted: ClusteredWeight = self.starting().fit(weight, statistics or {})
        return fitted

    def student(self, dense: Tensor, packed: ClusteredWeight) -> Student:
        """Make the trainable form of one weight.

        Args:
            dense: ``[out, in]``.
            packed: What ``fit`` returned for it.
        """
        return Student(self, dense, packed)
