"""Mamba mixers whose activations pass marked points: rounded in use, observed in calibration.

A mixer keeps its module, parameters and name. What is attached to it, like what is attached to
attention, is one submodule ``squeeze`` and a forward of its own, which does what transformers' does
with the same functions, asks ``squeeze`` at every point, and calls ``dt_proj`` as a module where
transformers reads its weight, so that a packed one can stand there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from squeeze import magnitudes
from squeeze.linear import PackedLinear
from squeeze.model_info import MIXERS
from squeeze.types import Tensors

LIMIT = 127
# In the order of the data flow; the last two are one value, before and after the rotation.
POINTS = (
    "input",
    "gate",
    "conv_input",
    "scan_input",
    "step_rank",
    "step",
    "B",
    "C",
    "output",
    "rotated_output",
)


class MixerState(nn.Module):
    """What the swap attaches to one mixer: static int8 scales, kept in float32.

    Args:
        scales: Point to float32 ``[1]``; a point without one is left alone.
    """

    def __init__(self, scales: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, scale in (scales or {}).items():
            self.register_buffer(name, scale)

    @property
    def rotates(self) -> bool:
        """Whether the scan's output is rotated before it is rounded."""
        return "rotated_output" in self._buffers

    def forward(self, name: str, x: Tensor) -> Tensor:
        """Round ``x`` to the int8 grid of a point; its dtype stays."""
        scale = self._buffers.get(name)
        if scale is None:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return ((wide / scale).round().clamp(-LIMIT, LIMIT) * scale).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixerState:
        # Scales keep their dtype: ``model.to(torch.float16)`` must not round them.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self


class Observer(MixerState):
    """Histograms of what passes the points; nothing is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(len(POINTS), magnitudes.BINS, dtype=torch.int64)

    def forward(self, name: str, x: Tensor) -> Tensor:
        """Count ``x``, and the rotated output beside the output."""
        self.counts[POINTS.index(name)] += magnitudes.count(x)
        if name == "output":
            self.counts[POINTS.index("rotated_output")] += magnitudes.count(rotate(x))
        return x


def by_point(counts: Tensor) -> Tensors:
    """Name the histograms ``[points, BINS]`` of one mixer, without those of absent points."""
    return {name: row for name, row in zip(POINTS, counts, strict=True) if int(row.sum())}


def is_known(module: nn.Module) -> bool:
    """Whether this is a mixer whose forward we have."""
    return type(module).__name__ in FORWARDS


def attach(mixer: nn.Module, state: MixerState) -> None:
    """Give a mixer its points."""
    mixer.squeeze = state
    mixer.__dict__["forward"] = partial(FORWARDS[type(mixer).__name__], mixer)


def detach(mixer: nn.Module) -> None:
    """Undo ``attach``."""
    del mixer.squeeze
    del mixer.__dict__["forward"]


def rotate(x: Tensor) -> Tensor:
    """Multiply the last dimension by an orthonormal Hadamard matrix, which is its own inverse.

    A width of ``n * 2**k`` with ``n`` odd is rotated in ``n`` blocks.

    Args:
        x: ``[..., d]``, floating.
    Returns:
        Same shape and dtype; computed in float32 at least.
    """
    size = x.shape[-1] & -x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, size))
    half = 1
    while half < size:
        pairs = wide.unflatten(-1, (-1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        wide = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    return (wide * size**-0.5).flatten(-2).to(x.dtype)


def _output(mixer: Any, y: Tensor) -> Tensor:
    """Rotate, round and project the scan's output ``[B, T, d]``."""
    state: MixerState = mixer.squeeze
    y = state("rotated_output", rotate(y)) if state.rotates else state("output", y)
    return mixer.out_proj(y)  # type: ignore[no-any-return]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero what belongs to padding: ``[B, T, d]`` by ``[B, T]``."""
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)


def _convolve(mixer: Any, x: Tensor, cache: Any, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Run the causal convolution over ``[B, T, d]``, from the cached state on."""
    functions, length = sys.modules[type(mixer).__module__], x.shape[1]
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    x, layer = x.transpose(1, 2), mixer.layer_idx
    state = None if cache is None else cache.get_conv_state(layer, state_idx=0)
    if state is not None and length == 1 and not cache.is_recording_past(layer):
        x = functions.causal_conv1d_update(x, state, weight, bias, activation=mixer.activation)
    else:
        if cache is not None:
            x = cache.update_conv_state(x, layer, conv_kernel_size=mixer.conv_kernel_size)
        x = functions.causal_conv1d_fn(x, weight, bias, activation=mixer.activation, **kwargs)
    return _masked(x[:, :, -length:].transpose(1, 2), mask)


def _mamba(
    mixer: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run a Mamba mixer on ``[B, T, hidden]``."""
    state, functions = mixer.squeeze, sys.modules[type(mixer).__module__]
    single = hidden_states.shape[1] == 1
    memory = None
    if cache_params is not None:
        memory = cache_params.get_recurrent_state(mixer.layer_idx, state_idx=0)
    hidden = state("input", _masked(hidden_states, attention_mask))
    x, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
    gate = state("gate", gate)
    x = _convolve(mixer, state("conv_input", x), cache_params, attention_mask, **kwargs)
    x = state("scan_input", x)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    rank, b, c = mixer.x_proj(x).split(sizes, dim=-1)
    b, c = state("B", b), state("C", c)
    step = state("step", _without_bias(mixer.dt_proj, state("step_rank", rank)))
    bias = None if mixer.dt_proj.bias is None else mixer.dt_proj.bias.float()
    a = -torch.exp(mixer.A_log.float())
    if memory is not None and single:
        y = functions.mamba_selective_state_update(
            memory, x[:, 0], step[:, 0], a, b[:, 0], c[:, 0], mixer.D,
            z=gate[:, 0], dt_bias=bias, dt_softplus=True,
        )[:, None]  # fmt: skip
    else:
        y, memory = functions.mamba_selective_scan(
            x.transpose(1, 2), step.transpose(1, 2), a, b.transpose(1, 2), c.transpose(1, 2),
            D=mixer.D.float(), z=gate.transpose(1, 2), delta_bias=bias, delta_softplus=True,
            return_last_state=True, use_mambapy=mixer.use_mambapy,
            use_associative_scan=mixer.use_associative_scan,
        )  # fmt: skip
        y = y.transpose(1, 2)
        if cache_params is not None:
            cache_params.update_recurrent_state(memory, mixer.layer_idx)
    return _output(mixer, y.to(hidden_states.dtype))


def _mamba2(
    mixer: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run a Mamba2 mixer on ``[B, T, hidden]``."""
    state, functions = mixer.squeeze, sys.modules[type(mixer).__module__]
    batch, length, _ = hidden_states.shape
    memory = None
    if cache_params is not None:
        memory = cache_params.get_recurrent_state(mixer.layer_idx, state_idx=0)
    hidden = state("input", _masked(hidden_states, attention_mask))
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    gate, x, step = mixer.in_proj(hidden).split(sizes, dim=-1)
    gate, step = state("gate", gate), state("step", step)
    x = _convolve(mixer, state("conv_input", x), cache_params, attention_mask, **kwargs)
    shared = mixer.n_groups * mixer.ssm_state_size
    x, b, c = x.split([mixer.intermediate_size, shared, shared], dim=-1)
    x, b, c = state("scan_input", x), state("B", b), state("C", c)
    a = -torch.exp(mixer.A_log.float())
    x = x.unflatten(-1, (mixer.num_heads, mixer.head_dim))  # [B, T, H, P]
    b, c = (s.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)) for s in (b, c))
    if memory is not None and length == 1:
        wide = (-1, mixer.head_dim)
        y = functions.mamba2_selective_state_update(
            memory, x[:, 0], step[:, 0, :, None].expand(batch, *wide),
            a[:, None, None].expand(*wide, mixer.ssm_state_size), b[:, 0], c[:, 0],
            mixer.D[:, None].expand(*wide), z=None,
            dt_bias=mixer.dt_bias[:, None].expand(*wide), dt_softplus=True, **kwargs,
        )[:, None]  # fmt: skip
    else:
        y, memory = functions.mamba2_chunk_scan(
            x, step, a, b, c, chunk_size=mixer.chunk_size, D=mixer.D, z=None,
            return_final_states=True, dt_bias=mixer.dt_bias, dt_softplus=True,
            initial_states=memory, dt_limit=mixer.time_step_limit, **kwargs,
        )  # fmt: skip
        if cache_params is not None:
            cache_params.update_recurrent_state(memory, layer_idx=mixer.layer_idx)
    y = mixer.norm(y.reshape(batch, length, -1), gate)
    return _output(mixer, y.to(hidden_states.dtype))


def _without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer, packed or not, without its bias."""
    if isinstance(linear, PackedLinear):
        return linear.product(x, None)
    bias, linear.bias = linear.bias, None  # type: ignore[assignment]
    try:
        result: Tensor = linear(x)  # as a module, so that hooks see it
    finally:
        linear.bias = bias  # type: ignore[assignment]
    return result


FORWARDS: dict[str, Callable[..., Tensor]] = dict(zip(MIXERS, (_mamba, _mamba2), strict=True))
