"""Decoder layers of a decode step with their small kernels fused.

A decoder layer of a few tokens is some fifty launches, of which a dozen compute products and
attention. For the families that ``families`` spells out a recorded step runs instead: residual and
norm as one kernel, q, k and v as one product, rotation and append as one kernel, gate and up as one
product. Everything rounds where the modules round. Other layers run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from squeeze.attention import LayerState
from squeeze.cache import StaticPackedCache
from squeeze.families import refusal
from squeeze.joint import Joint
from squeeze.kernels.step_glue.api import add_rms_norm, join_heads, rope_append, silu_mul
from squeeze.layers import decoder_layers

MOST_TOKENS = 8  # of a step; more fill the device by themselves


class Normed(NamedTuple):
    """A layer's output and the same after the norm that follows."""

    hidden: Tensor
    result: Tensor
    norm: nn.Module


class FusedLayer:
    """Runs one decoder layer over a packed cache whose counts include the step's tokens.

    Args:
        layer: Its modules are read at every call.
        state: What the swap attached to its attention.
        after: The norm that follows the layer, or ``None``.
        passed: Where what it makes of its output's norm is left for who asks for it.
    """

    def __init__(
        self, layer: Any, state: LayerState, after: Any, passed: dict[str, Normed]
    ) -> None:
        self.layer, self.state, self.after, self.passed = layer, state, after, passed
        attention, mlp = layer.self_attn, layer.mlp
        self.inputs = Joint([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gates = Joint([mlp.gate_proj, mlp.up_proj])

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map ``[B, T, hidden]`` as the layer does, appending to the cache of the call."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        normed = take(self.passed, hidden_states, self.layer.input_layernorm)
        if normed is None:
            _, normed = self._norm(hidden_states, None, self.layer.input_layernorm)
        context = self._attend(normed, kwargs["past_key_values"], *kwargs["position_embeddings"])
        output = attention.o_proj(context)
        following = self.layer.post_attention_layernorm
        hidden, normed = self._norm(output, hidden_states, following)
        gated = silu_mul(*self.gates(normed), implementation=self.state.implementation)
        output = mlp.down_proj(gated)
        if self.after is None:
            return hidden + output
        hidden, normed = self._norm(output, hidden, self.after)
        self.passed["normed"] = Normed(hidden, normed, self.after)
        return hidden

    def _attend(self, normed: Tensor, cache: StaticPackedCache, cos: Tensor, sin: Tensor) -> Tensor:
        attention, implementation = self.layer.self_attn, self.state.implementation
        layer = cache.static_layers[attention.layer_idx]
        exact = layer.exact
        query, keys, values = (
            x.unflatten(-1, (-1, attention.head_dim)) for x in self.inputs(normed)
        )
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        query = rope_append(
            query,
            keys,
            values,
            cos,
            sin,
            exact.keys,
            exact.values,
            exact.counts.device,
            query_norm=None if norms[0] is None else norms[0].weight,
            key_norm=None if norms[1] is None else norms[1].weight,
            eps=0.0 if norms[0] is None else norms[0].variance_epsilon,
            implementation=implementation,
        )
        stored = (query, exact.keys, exact.values)
        output, _ = layer.read(*stored, attention.scaling, None, query.dtype)
        return join_heads(output, query.dtype, implementation=implementation)

    def _norm(self, x: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            x,
            norm.weight,
            norm.variance_epsilon,
            residual=residual,
            implementation=self.state.implementation,
        )


class Fusion:
    """The decoder layers of a model that a step runs fused, and why the others are not.

    Args:
        model: Squeezed, with packed layers.
        states: What the swap attached to its attention layers.

    Attributes:
        layers: Index to what runs the layer.
        reasons: Index to why a layer is not fused.
        moved: How often weights were moved to lie together: what was recorded before reads them
            where they no longer are.
        margins: Of layers that run both ways, in work that compares them.
    """

    def __init__(self, model: nn.Module, states: Mapping[int, LayerState]) -> None:
        self.layers: dict[int, FusedLayer] = {}
        self.reasons: dict[int, str] = {}
        self.passed: dict[str, Normed] = {}
        self.margins: list[Tensor] | None = None
        self.moved = 0
        found: list[Any] = decoder_layers(model)[1]
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        for index, layer in enumerate(found):
            reason = "its cache is not packed" if index not in states else refusal(layer)
            if reason is None and layer.input_layernorm.weight.dtype != dtype:
                reason = f"its norms are not of the model's {dtype}"
            if reason is not None:
                self.reasons[index] = reason
        last = _final_norm(decoder, found)
        self.final = last if last is not None and len(found) - 1 not in self.reasons else None
        for index, layer in enumerate(found):
            if index in self.reasons:
                continue
            following = self.final if index + 1 == len(found) else None
            if index + 1 < len(found) and index + 1 not in self.reasons:
                following = found[index + 1].input_layernorm
            self.layers[index] = FusedLayer(layer, states[index], following, self.passed)

    def join(self) -> bool:
        """Lay weights together that are read together; say whether any had come apart."""
        joints = [joint for layer in self.layers.values() for joint in (layer.inputs, layer.gates)]
        moved = sum([joint.join() for joint in joints])
        self.moved += moved
        return moved > 0

    @contextmanager
    def acting(self, cache: StaticPackedCache, tokens: int) -> Iterator[None]:
        """Run the layers fused, for a step of ``tokens`` per row that is counted in here."""
        if self.margins is None and self.layers:
            counts = [cache.static_layers[i].exact.counts.device for i in self.layers]
            torch._foreach_add_(counts, tokens)
        with self._standing_in():
            yield

    def compared(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Do work in which every layer runs both ways, and wait for how they differ.

        Returns:
            What the work returned, by fused layers, and the largest difference beyond what
            rounding explains: at most 0 if all is well.
        """
        margins: list[Tensor] = []
        self.margins = margins
        try:
            output = work()
        finally:
            self.margins = None
        return output, float(torch.stack(margins).max()) if margins else 0.0

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        stands: list[tuple[nn.Module, Callable[..., Tensor]]]
        stands = [(fused.layer, fused) for fused in self.layers.values()]
        if self.final is not None:
            stands.append((self.final, _FinalNorm(self.final, self.passed)))
        try:
            for module, fused in stands:
                own = fused if self.margins is None else _Both(module, fused, self.margins)
                module.__dict__["forward"] = own
            yield
        finally:
            self.passed.clear()
            for module, _ in stands:
                module.__dict__.pop("forward", None)


class _FinalNorm:
    """Hands out what the last layer has normalised already."""

    def __init__(self, norm: nn.Module, passed: dict[str, Normed]) -> None:
        self.norm, self.passed = norm, passed

    def __call__(self, hidden_states: Tensor) -> Tensor:
        found = take(self.passed, hidden_states, self.norm)
        return type(self.norm).forward(self.norm, hidden_states) if found is None else found


class _Both:
    """Runs a module as it is and then what takes its place, and notes how they differ."""

    def __init__(
        self, module: nn.Module, fused: Callable[..., Tensor], margins: list[Tensor]
    ) -> None:
        self.module, self.fused, self.margins = module, fused, margins

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # The module counts its tokens in; the other one writes the same slots again.
        expected: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        found = self.fused(*args, **kwargs)
        # Equal roundings of sums taken in another order: most results are equal, none is far off.
        allowed = max(2 * torch.finfo(expected.dtype).eps, 1e-5)
        error = (found.float() - expected.float()).norm()
        self.margins.append(error - allowed * expected.float().norm())
        return found


def take(passed: dict[str, Normed], hidden: Tensor, norm: nn.Module) -> Tensor | None:
    """Take what ``norm`` makes of this very tensor, if the layer before left it."""
    found = passed.pop("normed", None)
    if found is None or found.hidden is not hidden or found.norm is not norm:
        return None
    return found.result


def _final_norm(decoder: Any, layers: list[nn.Module]) -> Any:
    """Find the norm behind the last layer, if it is as those in the layers."""
    norm = getattr(decoder, "norm", None)
    same = type(norm) is type(getattr(layers[-1], "input_layernorm", None))
    return norm if same and norm is not None and "forward" not in vars(norm) else None
