"""The modules that take the place of a linear layer whose weight was packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.kernels.float8_linear import api as float8
from squeeze.kernels.integer_linear import api as integer
from squeeze.kernels.lut_linear import api as lut
from squeeze.types import ClusteredWeight, Implementation, IntegerWeight, PackedWeight


class PackedBuffers(nn.Module):
    """A module whose buffers move with it and are never cast: that would change what they mean."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let ``fn`` move the packed weight but not cast it."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class PackedLinear(PackedBuffers):
    """Apply ``x @ W.T + bias`` where only a packed form of ``W`` is stored.

    There is no ``weight`` attribute: no dense weight is kept on any device. The packed tensors are
    buffers, so they travel in the state dict; ``.to(dtype)`` and its like move them but never
    change their dtype, because that would change the weight they stand for.

    Args:
        weight: What the weight method produced, or its ``empty`` for loading a checkpoint.
        bias: ``[out]`` or ``None``; becomes a parameter without gradient.
        implementation: ``reference`` or ``triton``, as the plan resolved it.

    Attributes:
        part: Computes a call where this is one process's part of a layer
            (``squeeze.tensor_parallel``).
    """

    part: Callable[[PackedLinear, Tensor], Tensor] | None = None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits = weight.bits
        self.implementation = Implementation(implementation)
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        weight: PackedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> PackedLinear:
        """Build the module that suits the weight, with its bias in the dtype of the model."""
        bias = None if bias is None else bias.detach().to(dtype)
        if isinstance(weight, IntegerWeight):
            return IntegerLinear(weight, bias, implementation)
        return ClusteredLinear(weight, bias, implementation)

    @property
    def packed(self) -> PackedWeight:
        """The stored weight, as views of the buffers."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` with another bias, or none."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        return self.product(x, self.bias) if self.part is None else self.part(self, x)

    def reconstruct(self) -> Tensor:
        """Return the dense weight, float32 ``[out, in]``."""
        return reconstruct(self.packed)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does, with its effective bits."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, "
            f"effective_bits={self.packed.effective_bits:.2f}, "
            f"implementation={self.implementation.value}"
        )


class ClusteredLinear(PackedLinear):
    """A linear layer over codebook indices."""

    indices: Tensor
    codebook: Tensor
    scale: Tensor | None
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    outlier_offsets: Tensor | None

    def __init__(
        self,
        weight: ClusteredWeight,
        bias: Tensor | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> None:
        super().__init__(weight, bias, implementation)
        self.rows, self.columns, self.inputs = weight.rows, weight.columns, weight.inputs
        for name in ("scale", "outlier_values", "outlier_columns", "outlier_offsets"):
            if getattr(weight, name) is None:
                self.register_buffer(name, None)

    @property
    def clustered(self) -> ClusteredWeight:
        """The stored weight, as views of the buffers."""
        return ClusteredWeight(
            self.indices,
            self.codebook,
            self.scale,
            self.bits,
            (self.out_features, self.in_features),
            self.rows,
            self.columns,
            self.outlier_values,
            self.outlier_columns,
            self.outlier_offsets,
            self.inputs,
        )

    @property
    def packed(self) -> ClusteredWeight:
        """The stored weight, as views of the buffers."""
        return self.clustered

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` with another bias, or none."""
        return multiply(x, self.clustered, bias, self.implementation)


class IntegerLinear(PackedLinear):
    """A linear layer over integers with a scale per group."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    exponents: Tensor | None
    row_scale: Tensor | None

    def __init__(
        self,
        weight: IntegerWeight,
        bias: Tensor | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> None:
        super().__init__(weight, bias, implementation)
        self.group_size, self.folded = weight.group_size, weight.folded
        for name in ("zero", "exponents", "row_scale"):
            if getattr(weight, name) is None:
                self.register_buffer(name, None)

    @property
    def packed(self) -> IntegerWeight:
        """The stored weight, as views of the buffers."""
        return IntegerWeight(
            self.codes,
            self.scale,
            self.zero,
            self.exponents,
            self.bits,
            self.group_size,
            (self.out_features, self.in_features),
            self.folded,
            self.row_scale,
        )

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` with another bias, or none."""
        return integer.integer_linear(x, self.packed, bias, implementation=self.implementation)


def multiply(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, implementation: Implementation
) -> Tensor:
    """Compute ``x @ W.T + bias`` for any packed weight."""
    if isinstance(weight, IntegerWeight):
        return integer.integer_linear(x, weight, bias, implementation=implementation)
    if weight.inputs == "float8":
        return float8.float8_linear(x, weight, bias, implementation=implementation)
    return lut.lut_linear(x, weight, bias, implementation=implementation)


def unfolded(weight: PackedWeight) -> PackedWeight:
    """Let a weight whose inputs are scaled elsewhere stand for the matrix over unscaled inputs."""
    if isinstance(weight, IntegerWeight) and weight.folded:
        return replace(weight, folded=False)
    return weight


def reconstruct(weight: PackedWeight) -> Tensor:
    """Return the dense weight that a packed one stands for, float32 ``[out, in]``."""
    if isinstance(weight, IntegerWeight):
        return integer.reconstruct(weight)
    return lut.reconstruct(weight)
