"""The module that takes the place of a linear layer whose weight was clustered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.kernels.lut_linear.api import lut_linear
from squeeze.types import ClusteredWeight, Implementation


class ClusteredLinear(nn.Module):
    """Apply ``x @ W.T + bias`` where only codebook indices of ``W`` are stored.

    There is no ``weight`` attribute: no dense weight is kept on any device. Indices, codebook and
    scale are buffers, so they travel in the state dict; ``.to(dtype)`` and its like move them but
    never change their dtype, because that would change the weight they stand for.

    Args:
        weight: What the weight method produced, or its ``empty`` for loading a checkpoint.
        bias: ``[out]`` or ``None``; becomes a parameter without gradient.
        implementation: ``reference`` or ``triton``, as the plan resolved it.
    """

    indices: Tensor
    codebook: Tensor
    scale: Tensor | None

    def __init__(
        self,
        weight: ClusteredWeight,
        bias: Tensor | None = None,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.rows, self.columns = weight.bits, weight.rows, weight.columns
        self.implementation = Implementation(implementation)
        self.register_buffer("indices", weight.indices)
        self.register_buffer("codebook", weight.codebook)
        self.register_buffer("scale", weight.scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        weight: ClusteredWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> ClusteredLinear:
        """Build the module with its bias in the dtype of the model."""
        return cls(weight, None if bias is None else bias.detach().to(dtype), implementation)

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
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        return lut_linear(x, self.clustered, self.bias, implementation=self.implementation)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does, with its effective bits."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, "
            f"effective_bits={self.clustered.effective_bits:.2f}, "
            f"implementation={self.implementation.value}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let ``fn`` move the packed weight but not cast it."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
