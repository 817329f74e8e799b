"""The format of a side that the recipe leaves lossless while the other side is packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from squeeze.types import MethodInfo, Tensors


@dataclass(frozen=True)
class RawBlocks:
    """Keep blocks in the model's own dtype, one component ``x`` of ``[..., H_kv, L, D]``."""

    statistics: tuple[str, ...] = ()
    block_length: int = 32

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Need nothing."""
        return {}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Return a contiguous copy or ``x`` itself."""
        return {"x": x.contiguous()}

    def decode(self, packed: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Return float32 values."""
        return packed["x"].float()

    def bits_per_value(self, head_dim: int) -> float:
        """Count the model's 16 bits."""
        return 16.0

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Count nothing."""
        return 0

    def check(self, head_dim: int) -> None:
        """Accept every head size."""


RawBlocks.info = MethodInfo("kv", "raw", "Keep blocks as they are.", "", 0, RawBlocks)  # type: ignore[attr-defined]
