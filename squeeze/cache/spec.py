"""How one layer of a packed cache stores what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from squeeze.types import Implementation, Tensors


@dataclass(frozen=True)
class Side:
    """The format, transforms and fitted parameters of the keys, or the values, of one layer."""

    format: Any
    parameters: Tensors
    transforms: tuple[tuple[Any, Tensors], ...] = ()

    def encode(self, x: Tensor) -> Tensors:
        """Transform and encode ``[..., H_kv, L, D]``."""
        if self.format.info.name != "raw":
            x = x.float()
        for transform, parameters in self.transforms:
            x = transform.apply(x, parameters).to(x.dtype)
        return self.format.encode(x, self.parameters)  # type: ignore[no-any-return]

    def decode(self, packed: Tensors) -> Tensor:
        """Undo ``encode`` up to the rounding, float32."""
        x: Tensor = self.format.decode(packed, self.parameters)
        for transform, parameters in reversed(self.transforms):
            x = transform.invert(x, parameters)
        return x


@dataclass(frozen=True)
class LayerSpec:
    """What the plan says of one layer, as objects.

    Attributes:
        keys: How keys are stored.
        values: How values are stored.
        block_length: Tokens encoded together.
        sink_tokens: First tokens of each row that stay exact.
        residual_length: Newest tokens that stay exact, at least.
        implementation: What computes attention.
        offload: Keep packed blocks in CPU memory.
    """

    keys: Side
    values: Side
    block_length: int
    sink_tokens: int
    residual_length: int
    implementation: Implementation
    offload: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSpec:
        # A copy of a cache reads the same tables: they belong to the model.
        return self

    def ready(self, exact: int) -> int:
        """Count the blocks that are due among ``exact`` tokens of a row."""
        return max(0, (exact - self.sink_tokens - self.residual_length) // self.block_length)

    @property
    def exact_slots(self) -> int:
        """Tokens of a row that are exact at most between two calls, and one more."""
        return self.sink_tokens + self.residual_length + self.block_length
