"""How one layer of a packed cache stores what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from squeeze.kernels.kv_encode.api import encode
from squeeze.kernels.kv_encode.layout import rotates, takes
from squeeze.types import Implementation, Tensors


@dataclass(frozen=True)
class Side:
    """The format, transforms and fitted parameters of the keys, or the values, of one layer."""

    format: Any
    parameters: Tensors
    transforms: tuple[tuple[Any, Tensors], ...] = ()

    def encode(
        self,
        x: Tensor,
        implementation: Implementation = Implementation.REFERENCE,
        out: Tensors | None = None,
        salience: Tensor | None = None,
    ) -> Tensors:
        """Transform and encode ``[..., H_kv, L, D]``, into ``out`` where it is given.

        A kernel, ``implementation`` triton, wants ``[N, B, H_kv, L, D]``; the result is the same
        up to the rounding of what the transforms compute.
        ``salience`` ``[..., 1 or H_kv, L]`` goes to the format beside its parameters.
        """
        center, matrix, transforms = None, None, self.transforms
        if implementation is Implementation.TRITON and takes(self.format, *x.shape[-2:]):
            center = self._center
            transforms = transforms if center is None else transforms[1:]
            names = [transform.info.name for transform, _ in transforms]
            if names == ["klt"] and rotates(self.format, *x.shape[-2:]):
                matrix, transforms = transforms[0][1]["forward"].float(), ()
        for transform, parameters in transforms:
            changed = transform.apply(x, parameters)  # at least float32
            x = changed.to(x.dtype) if self.format.info.name == "raw" else changed
        fitted = self.parameters
        fitted = fitted if salience is None else {**fitted, "salience": salience}
        return encode(
            self.format,
            x,
            fitted,
            implementation=implementation,
            center=center,
            matrix=matrix,
            out=out,
        )

    @cached_property
    def _center(self) -> Tensor | None:
        """What the first transform subtracts, ``[H_kv, D]`` in the stored basis, where it does.

        All others are linear, so the kernel that encodes can subtract after them instead.
        """
        names = [transform.info.name for transform, _ in self.transforms]
        if names.count("center") != 1 or names[0] != "center":
            return None
        center: Tensor = self.transforms[0][1]["center"].unsqueeze(-2)
        for transform, parameters in self.transforms[1:]:
            center = transform.apply(center, parameters)
        return center.squeeze(-2)

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
        queries: ``"float8"`` rounds the queries that read packed keys; ``None`` does not.
        salience: Which tokens a format protects that protects some: those with the largest
            ``"error"`` or the most ``"attention"``, or by ``"token_types"`` text before the rest.
    """

    keys: Side
    values: Side
    block_length: int
    sink_tokens: int
    residual_length: int
    implementation: Implementation
    offload: bool = False
    queries: str | None = None
    salience: str = "error"

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSpec:
        # A copy of a cache reads the same tables: they belong to the model.
        return self

    def ready(self, exact: int) -> int:
        """Count the blocks that are due among ``exact`` tokens of a row."""
        return max(0, (exact - self.sink_tokens - self.residual_length) // self.block_length)

    @cached_property
    def protects(self) -> bool:
        """Whether a format protects tokens."""
        return any(getattr(side.format, "protected", 0) for side in (self.keys, self.values))

    @property
    def exact_slots(self) -> int:
        """Tokens of a row that are exact at most between two calls, and one more."""
        return self.sink_tokens + self.residual_length + self.block_length
