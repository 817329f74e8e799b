"""Decoder layers one by one: what they are called with, copies to run, and the loss behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from squeeze import mixer
from squeeze.errors import UnsupportedError
from squeeze.fused import UnfusedExperts, unfuse


@dataclass(frozen=True)
class Call:
    """The arguments that one decoder layer was called with, but for its input.

    Attributes:
        hidden: The input, ``[1, T, hidden]``; of layers after the first it is not meant.
        args: Positional arguments, without the input.
        kwargs: Keyword arguments, without the input.
        named: The input was given by its name.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call a layer with an input, floating arguments in its dtype, all on its device."""
        args, kwargs = _like(self.args, hidden), _like(self.kwargs, hidden)
        if self.named:
            output = layer(*args, hidden_states=hidden, **kwargs)
        else:
            output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def sharing(self, other: Call) -> Call:
        """Return an equal call that holds another's tensors where they are equal, and no input."""
        return replace(
            self,
            hidden=self.hidden.new_empty(0),
            args=_shared(self.args, other.args),
            kwargs=_shared(self.kwargs, other.kwargs),
        )


class _Recorded(Exception):  # noqa: N818
    """Every decoder layer's arguments are known; the rest of the forward is not needed."""


class Layers:
    """The decoder layers of a model, to be run one at a time.

    Args:
        model: A causal language model; it stays as it is.
        device: Where layers run; by default where the model is.
        experts: Run fused experts as linear layers.

    Raises:
        UnsupportedError: no list of decoder layers is found in the model.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str | None = None, experts: bool = False
    ) -> None:
        self.model, self.experts = model, experts
        self.path, self.modules = decoder_layers(model)
        self.home = next(model.parameters()).device
        self.device = self.home if device is None else torch.device(device)

    def __len__(self) -> int:
        return len(self.modules)

    def name(self, index: int, inside: str) -> str:
        """Complete the dotted name of a module inside a layer."""
        return f"{self.path}.{index}.{inside}"

    def copy(self, index: int) -> nn.Module:
        """Copy one layer without gradients to the device, in the dtype to compute in.

        On a CPU that is float32, as products of half precision are slow there.
        """
        runner = copy.deepcopy(self.modules[index]).requires_grad_(False).to(self.device)
        for module in [m for m in runner.modules() if mixer.is_known(m)]:
            mixer.attach(module, mixer.MixerState())  # calls every linear layer, so hooks see it
        if self.device.type == "cpu":
            runner = runner.float()
        if self.experts:
            unfuse(runner)
        return runner

    def widen(self, hidden: Tensor) -> Tensor:
        """Bring an input to the device, in the dtype to compute in."""
        hidden = hidden.to(self.device)
        return hidden.float() if self.device.type == "cpu" else hidden

    def record(self, sample: Tensor, **kwargs: Any) -> list[Call]:
        """Learn the arguments of every decoder layer for tokens ``[T]``, without running any."""
        calls: list[Call] = []

        def stand_in(*args: Any, **kwargs: Any) -> Tensor:
            named = not args
            hidden = kwargs.pop("hidden_states") if named else args[0]
            calls.append(Call(hidden, args[1:], kwargs, named))
            if len(calls) == len(self):
                raise _Recorded
            return hidden

        try:
            with replaced(self.modules, stand_in), torch.no_grad():
                self.model(sample[None].to(self.home), **kwargs)
        except _Recorded:
            return calls
        raise UnsupportedError(self.path, f"{len(calls)} of {len(self)} layers were called")

    def forward(
        self, calls: Sequence[Sequence[Call]], inputs: list[list[Tensor]]
    ) -> Iterator[tuple[int, nn.Module, Iterator[None]]]:
        """Carry a few samples through one layer at a time, from the first.

        Args:
            calls: Of every sample and layer.
            inputs: Empty; gets the inputs of every layer and sample, ``[1, T, hidden]``, on the
                CPU, the last layer's output last.

        Yields:
            A layer's index, a copy of it, and what runs one sample after another.
        """
        inputs.append([self.widen(call[0].hidden).cpu() for call in calls])
        for index in range(len(self)):
            runner = self.copy(index)
            inputs.append([])
            own = [call[index] for call in calls]
            yield index, runner, self._run(runner, own, inputs[-2], inputs[-1])

    @torch.no_grad()
    def _run(
        self, runner: nn.Module, calls: list[Call], inputs: list[Tensor], outputs: list[Tensor]
    ) -> Iterator[None]:
        for call, hidden in zip(calls, inputs, strict=True):
            outputs.append(call.run(runner, self.widen(hidden)).cpu())
            yield

    def backward(
        self, tokens: Tensor, inputs: list[list[Tensor]], calls: Sequence[Sequence[Call]]
    ) -> Iterator[tuple[int, nn.Module, Iterator[tuple[int, Tensor]]]]:
        """Backpropagate each sample's loss through one layer at a time, from the last.

        Args:
            tokens: int64 ``[N, T]``.
            inputs: What ``forward`` gathered; it is emptied.
            calls: Of every sample and layer.

        Yields:
            A layer's index, a copy of it, and what differentiates one sample after another: each
            step gives the sample's index and the gradient of the layer's output.
        """
        with self._surroundings():
            pairs = zip(tokens, inputs.pop(), strict=True)
            grads = [self._loss_grad(sample, self.widen(x)).cpu() for sample, x in pairs]
        for index in reversed(range(len(self))):
            runner = self.copy(index)
            own = [call[index] for call in calls]
            yield index, runner, self.differentiate(runner, own, inputs.pop(), grads)

    def differentiate(
        self,
        runner: nn.Module,
        calls: Sequence[Call],
        inputs: Sequence[Tensor],
        grads: list[Tensor],
    ) -> Iterator[tuple[int, Tensor]]:
        """Backpropagate through a copied layer, one sample after another.

        Args:
            runner: The copy, which may have hooks.
            calls: Its arguments in every sample.
            inputs: Its inputs, likewise.
            grads: Gradients of its outputs; those of its inputs take their places.

        Yields:
            A sample's index and the gradient of its output, when it is done.
        """
        for sample, call in enumerate(calls):
            hidden, grad = self.widen(inputs[sample]).detach().requires_grad_(True), grads[sample]
            call.run(runner, hidden).backward(grad.to(self.device))
            assert hidden.grad is not None
            grads[sample] = hidden.grad.cpu()
            yield sample, grad

    def _loss_grad(self, sample: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of the summed next-token loss with respect to the last layer's output."""
        hidden = hidden.detach().requires_grad_(True)
        narrow = hidden.to(next(self.model.parameters()).dtype)

        def stand_in(*args: Any, **kwargs: Any) -> Tensor:
            return narrow

        ids = sample[None].to(self.device)
        with replaced(self.modules, stand_in), torch.enable_grad():
            logits = self.model(ids, use_cache=False).logits[0, :-1].float()
            loss = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            return torch.autograd.grad(loss, hidden)[0]

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Have everything but the layers on the device."""
        if self.device == self.home:
            yield
            return
        inside = {id(t) for m in self.modules for t in (*m.parameters(), *m.buffers())}
        tensors = (*self.model.parameters(), *self.model.buffers())
        moved = [(tensor, tensor.data) for tensor in tensors if id(tensor) not in inside]
        try:
            for tensor, data in moved:
                tensor.data = data.to(self.device)
            yield
        finally:
            for tensor, data in moved:
                tensor.data = data


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Find the linear modules of a layer by name."""
    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


def routed(layer: nn.Module) -> set[str]:
    """Name the linear modules of unfused experts, which read the tokens routed to them."""
    paths = [name for name, m in layer.named_modules() if isinstance(m, UnfusedExperts)]
    return {name for name in linears(layer) if any(name.startswith(f"{p}.") for p in paths)}


def decoder_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Find the longest module list whose members hold attention or mixers with a layer index.

    Raises:
        UnsupportedError: there is none.
    """
    best: tuple[str, list[nn.Module]] = ("", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best[1]):
            indexed = (any(hasattr(m, "layer_idx") for m in layer.modules()) for layer in module)
            if all(indexed):
                best = (name, list(module))
    if not best[1]:
        raise UnsupportedError(
            type(model).__name__, "no list of decoder layers was found",
            "decoder-only models whose attention modules carry layer_idx",
        )  # fmt: skip
    return best


@contextmanager
def replaced(layers: list[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let another function stand in for every layer's forward."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            if old is not None:
                layer.__dict__["forward"] = old


def _like(value: Any, hidden: Tensor) -> Any:
    """Bring tensors to a device, floating ones to a dtype too, in tuples and mappings as well."""
    if isinstance(value, tuple):
        return tuple(_like(item, hidden) for item in value)
    if isinstance(value, dict):
        return {name: _like(item, hidden) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(hidden) if value.is_floating_point() else value.to(hidden.device)
    return value


def _shared(value: Any, other: Any) -> Any:
    """Take another's tensors where they are equal."""
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(_shared(mine, its) for mine, its in zip(value, other, strict=True))
    if isinstance(value, dict) and isinstance(other, dict):
        return {name: _shared(item, other.get(name)) for name, item in value.items()}
    same = isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    return other if same else value
