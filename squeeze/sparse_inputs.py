"""Linear layers that leave small inputs out while a model decodes.

A layer keeps its module and its name. One submodule ``squeeze`` holds the thresholds, and a forward
of its own applies them, over a dense weight (whose columns of dead channels the kernel does not
read) or over a packed one (whose layout has no columns to skip: the inputs are zeroed).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from squeeze.kernels.sparse_gemv.api import by_columns, sparse_gemv, thresholded
from squeeze.linear import PackedLinear
from squeeze.types import Implementation


class Phase:
    """Forward pre-hook of the decoder: whether the running call continues a cache.

    A call of one token does, so that nothing has to ask a cache that lives on the device.
    """

    def __init__(self) -> None:
        self.decodes = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note it, before the layers run."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        cache = kwargs.get("past_key_values")
        single = tokens is not None and tokens.shape[1] == 1
        self.decodes = cache is not None and (single or int(cache.get_seq_length()) > 0)


class InputState(nn.Module):
    """What the swap attaches to one linear layer.

    Args:
        threshold: float32 ``[in]``; keeps its dtype.
        phase: Shared by the model's layers.
        implementation: ``reference`` or ``triton``, as the plan resolved it.
    """

    threshold: Tensor

    def __init__(
        self,
        threshold: Tensor,
        phase: Phase,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)
        self.phase, self.implementation = phase, Implementation(implementation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputState:
        # ``model.to(torch.float16)`` must not round thresholds.
        self._buffers["threshold"] = self.threshold.to(fn(self.threshold).device)
        return self


def attach(linear: nn.Module, state: InputState) -> None:
    """Give a linear layer, packed or not, its thresholds."""
    linear.squeeze = state
    linear.__dict__["forward"] = partial(_forward, linear)
    lay_out(linear)


def detach(linear: nn.Module) -> None:
    """Undo ``attach``; the weight lies by rows again."""
    del linear.squeeze
    del linear.__dict__["forward"]
    if isinstance(linear, nn.Linear):
        linear.weight.data = linear.weight.data.contiguous()


def lay_out(linear: nn.Module) -> None:
    """Store the weight as the layer's implementation reads it; its values and shape stay."""
    state: Any = linear.squeeze
    if isinstance(linear, nn.Linear) and state.implementation == Implementation.TRITON:
        linear.weight.data = by_columns(linear.weight.data)


def _forward(linear: Any, x: Tensor) -> Tensor:
    """Map ``[..., in]`` to ``[..., out]``, without small inputs while the model decodes."""
    state: InputState = linear.squeeze
    if not state.phase.decodes:
        return type(linear).forward(linear, x)  # type: ignore[no-any-return]
    if isinstance(linear, PackedLinear):
        return linear.product(thresholded(x, state.threshold), linear.bias)
    return sparse_gemv(
        x, linear.weight, state.threshold, linear.bias, implementation=state.implementation
    )
