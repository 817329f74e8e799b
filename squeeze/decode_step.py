"""The decode step of a squeezed model, recorded once as a CUDA graph and replayed for every token.

A step of a few tokens is hundreds of small kernels, and launching them one by one takes longer than
running them. The swap puts a ``DecodeStep`` in place of the model's ``forward``. It lets
every call pass but those of up to ``STEP_TOKENS`` tokens over a filled packed cache: these it runs
from static inputs, at counts that live on the device, records and replays. Blocks that are full
are encoded between replays, see ``step_encode``. A recording belongs to its cache and goes with it.

It acts wherever Triton kernels run on a GPU. Recording a step takes about as long as launching it,
so steps of one token are recorded when their kernels are compiled; those of several tokens, whose
number changes from step to step, once their kind has come ``OFTEN`` times over the cache.

    model.squeeze_step.enabled = False  # launches every kernel, as the model alone would

A model with forward hooks of somebody else's inside is not recorded, since no replay would run
them; one that gets such hooks, or other weights, needs a new cache.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from squeeze.attention import LayerState
from squeeze.cache import PackedCache, PackedLayer, StaticPackedCache, make_recordable, refusal
from squeeze.errors import SqueezeError, SqueezeWarning
from squeeze.fused_layer import MOST_TOKENS, Fusion
from squeeze.recorder import CudaGraphs, Recorder
from squeeze.step_encode import BlockEncoder
from squeeze.types import Implementation, resolve_dtype

# Most tokens of a step: prompt lookup and draft models propose up to about this many.
STEP_TOKENS = 16
# Calls of several tokens that pass before their kind is run, and then recorded, as a step.
OFTEN = 3
# Kinds recorded over one cache at a time; each holds its results and its list of kernels.
MOST_RECORDINGS = 8
KNOWN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
OWN = ("squeeze.", "transformers.")  # modules whose hooks do nothing in a step
FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")


class Call(NamedTuple):
    """What a step is told.

    Attributes:
        cache: Filled, and all rows are past their padding.
        tokens: int64 ``[B, T]``.
        positions: int64 ``[..., B or 1, T]``.
        kept: Newest tokens whose logits are wanted.
    """

    cache: StaticPackedCache
    tokens: Tensor
    positions: Tensor
    kept: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is recorded apart."""
        return (*self.tokens.shape, self.positions.shape, self.kept)


class Recording:
    """One kind of step over one cache: its inputs, which stay in place, and what repeats it.

    It holds no reference to the cache, which holds it.
    """

    @torch.inference_mode(False)
    def __init__(self, call: Call, places: Any) -> None:
        self.places = places
        self.tokens, self.positions = call.tokens.clone(), call.positions.clone()
        # Nobody reads it: without one, or with one row of numbers, models ask the device for zeros.
        self.mask = call.tokens.new_ones(len(call.tokens), 1, call.tokens.shape[1], 1).bool()
        self.replay: Any = None
        self.kind: Any = None
        self.fields: dict[str, Any] = {}

    def load(self, call: Call) -> None:
        """Take the inputs of a call."""
        self.tokens.copy_(call.tokens)
        self.positions.copy_(call.positions)

    def keep(self, output: Any, cache: Any) -> None:
        """Keep what the recorded step returns."""
        self.kind = type(output)
        self.fields = {name: x for name, x in output.items() if x is not cache}

    def result(self, cache: Any) -> Any:
        """Copy what the last replay returned."""
        fields = {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.fields.items()}
        return self.kind(**fields, past_key_values=cache)


class DecodeStep:
    """Takes the place of a model's ``forward``; see the module.

    Args:
        model: Squeezed, with packed layers.
        states: What the swap attached to its attention layers.

    Attributes:
        enabled: ``False`` lets every call pass.
        fuses: Run layers fused where they can be, see ``fused_layer``; set it before a cache is
            filled.
        fusion: What is fused, and why the rest is not; ``None`` before the first step.
        recorder: Records and replays; by default CUDA graphs, for models on a GPU.
        encoder: Encodes the blocks that steps have filled.
    """

    def __init__(self, model: Any, states: dict[int, LayerState]) -> None:
        self.model, self.states = model, states
        self.replaced = vars(model).get("forward")
        self.forward = model.forward
        self.enabled = self.fuses = True
        self.fusion: Fusion | None = None
        self.recorder: Recorder | None = None
        self.encoder = BlockEncoder()
        self.warned: set[str] = set()
        self.warm: set[Any] = set()
        self.watched = self.verified = self.compared = False
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a recorded step where the call is one, the model's own ``forward`` elsewhere."""
        call = self._read(args, kwargs) if self._acts() else None
        output = None if call is None else self._step(call)
        return self.forward(*args, **kwargs) if output is None else output

    def _acts(self) -> bool:
        """Say whether steps may be recorded now; never asks the device."""
        if not self.enabled or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self.recorder is None and self.model.device.type == "cuda":
            self.recorder = CudaGraphs()
        if self.recorder is None or self.model.training:
            return False
        # Reference implementations wait for the device; who chose one on a GPU compares with it.
        chosen = {state.implementation for state in self.states.values()}
        if isinstance(self.recorder, CudaGraphs) and chosen != {Implementation.TRITON}:
            return False
        return not self.recorder.busy()

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Understand a call as a step; ``None`` for others, with a warning where it is one."""
        if args:
            names = list(self._parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache, tokens = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if not isinstance(cache, PackedCache) or not isinstance(tokens, Tensor):
            return None
        rows, steps = tokens.shape
        total = cache.get_seq_length()
        if not total or not steps or steps > STEP_TOKENS or cache.padded_right:
            return None
        layers = cache.packed_layers
        if len(layers[0].pads) != rows or max(layers[0].pads) > total:
            return None
        if isinstance(cache, StaticPackedCache) and not cache.takes(steps):
            return None
        reason = self._refusal(cache, kwargs)
        if reason is None and not getattr(cache, "recordings", None):
            reason = self._hooked()
        if reason is not None:
            self._warn(reason)
            return None
        if any(_judges(layer, steps) for layer in layers):
            return None  # what attends to the tokens decides how they are stored
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(total, total + steps, device=tokens.device)[None]
        kept = kwargs.get("logits_to_keep", 0)
        kept = kept if 0 < kept < steps else steps
        call = Call(make_recordable(cache, STEP_TOKENS), tokens, positions, kept)
        asked = call.cache.recordings.asked
        asked[call.kind] += 1
        return call if steps == 1 or asked[call.kind] > OFTEN else None

    @functools.cached_property
    def _parameters(self) -> dict[str, Any]:
        return dict(inspect.signature(self.forward).parameters)

    def _refusal(self, cache: PackedCache, kwargs: dict[str, Any]) -> str | None:
        """Say why a step cannot be recorded, ``None`` if it can."""
        devices = set(map(str, (getattr(self.model, "hf_device_map", None) or {}).values()))
        if len(devices) > 1:
            return f"the model is on several devices ({', '.join(sorted(devices))})"
        if (getattr(self.model, "_tp_size", None) or 1) > 1:
            return "the model is split by tensor parallelism"
        if "position_ids" not in self._parameters:
            return "the model counts positions itself"
        if any(state.kv and state.kv.salience == "token_types" for state in self.states.values()):
            return "kv_cache.salience asks for the kinds of tokens"
        if not isinstance(cache, StaticPackedCache) and (reason := refusal(cache)):
            return reason
        config = self.model.config
        asked = [name for name in FLAGS if kwargs.get(name) or getattr(config, name, False)]
        asked += [
            name
            for name, value in kwargs.items()
            if name not in (*KNOWN, *FLAGS, "logits_to_keep", "return_dict")
            and value is not None
            and value is not False
        ]
        if asked:
            return f"the call asks for {', '.join(asked)}"
        if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
            return "the call switches use_cache or return_dict off"
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            return "logits_to_keep is a tensor"
        if kwargs.get("position_ids") is None and kwargs.get("attention_mask") is not None:
            return "the call has a mask and no position_ids"
        return None

    def _hooked(self) -> str | None:
        """Say which module has hooks that somebody else put there: no replay runs them."""
        for name, module in self.model.named_modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            # Those of the model itself run around the step.
            if name and not all(_owned(hook) for hook in hooks):
                return f"{name} has forward hooks, which a replay does not run"
        return None

    def _step(self, call: Call) -> Any:
        """Run one step and count it; ``None`` when it turns out that it cannot be recorded."""
        cache, steps = call.cache, call.tokens.shape[1]
        cache.reserve(cache.get_seq_length() + steps)
        recording = self._recording(call)
        recording.load(call)
        try:
            output = self._run(call, recording)
        except RuntimeError as error:  # what CUDA and torch raise where a step waits for the host
            self.enabled = False
            cache.recordings.clear()
            cache.rewind()
            self._warn(f"recording failed ({_first_line(error)})")
            return None
        cache.count(steps)
        if cache.is_due:
            assert self.recorder is not None
            reason = self.encoder.encode(cache, self.recorder)
            if reason is not None:
                self._warn(reason, "each row's blocks are encoded by launches of their own")
        for state in self.states.values():
            if state.density is not None or state.padding is not None:
                state.density = state.padding = None
        return output

    def _recording(self, call: Call) -> Recording:
        """Find what was recorded for such a call, as long as everything is where it was."""
        cache = call.cache
        weight: Any = self.model.get_input_embeddings().weight
        fusion = self._fusion(call)
        moved = None if fusion is None else fusion.moved
        places = (weight.data_ptr(), moved, *cache.places())
        found: Recording | None = cache.recordings.get(call.kind)
        if found is None or found.places != places:
            if found is not None:
                cache.recordings.clear()
            if fusion is not None and fusion.join():
                places = (places[0], fusion.moved, *places[2:])
            found = cache.recordings[call.kind] = Recording(call, places)
        return found

    def _fusion(self, call: Call) -> Fusion | None:
        """Return what fuses the layers of a step, ``None`` where none is to be fused."""
        if not self.fuses or call.tokens.shape[1] > MOST_TOKENS:
            return None
        if self.fusion is None:
            self.fusion = Fusion(self.model, self.states)
        return self.fusion if self.fusion.layers else None

    def _run(self, call: Call, recording: Recording) -> Any:
        """Replay the step, or do what stands before that: warm up, watch, record, verify.

        The first step of a kind compiles and tunes its kernels; the first of the model is then
        watched for waiting; the first replay with other inputs than the recorded ones is compared.
        Each of these computes a token, so that nothing is computed in vain but the comparison.
        """
        cache, recorder = call.cache, self.recorder
        assert recorder is not None
        if recording.replay is None:
            sizes = (*call.tokens.shape, call.kept, cache.static_layers[0].capacity)
            kind = (*sizes, self.fuses)
            if kind not in self.warm:
                self.warm.add(kind)
                return self._warm_up(call, recording)
            held = [step for step in cache.recordings.values() if step.replay is not None]
            if len(held) >= MOST_RECORDINGS:
                return self._launch(call, recording)
            if not self.watched:
                with recorder.watch():
                    output = self._launch(call, recording)
                self.watched = True
                return output
            recording.replay, output = recorder.record(lambda: self._launch(call, recording))
            recording.keep(output, cache)
            cache.rewind()
        elif not self.verified:
            expected = self._launch(call, recording).logits.clone()
            cache.rewind()
            recording.replay()
            self._compare(recording.fields["logits"], expected)
            return recording.result(cache)
        recording.replay()
        return recording.result(cache)

    def _warm_up(self, call: Call, recording: Recording) -> Any:
        """Launch a step of a new kind; the first that is fused is compared layer by layer."""
        fusion = self._fusion(call)
        if fusion is None or self.compared:
            return self._launch(call, recording)
        try:
            output, off = fusion.compared(lambda: self._launch(call, recording))
        except (RuntimeError, ValueError, SqueezeError) as error:
            reason = f"fused layers fail ({_first_line(error)})"
        else:
            if off <= 0:
                self.compared = True
                return output
            reason = f"fused layers are off by {off:.3g} more than rounding explains"
        self.fuses = False
        call.cache.rewind()
        self._warn(reason, "layers run as they are")
        return self._launch(call, recording)

    def _launch(self, call: Call, recording: Recording) -> Any:
        """Launch the step's kernels from the static inputs, by the device's counts alone."""
        kwargs: dict[str, Any] = {}
        if "logits_to_keep" in self._parameters:
            kwargs["logits_to_keep"] = call.kept
        fusion = self._fusion(call)
        fused = nullcontext() if fusion is None else fusion.acting(call.cache, call.tokens.shape[1])
        with torch.inference_mode(False), torch.no_grad(), call.cache.on_device(), fused:
            return self.forward(
                input_ids=recording.tokens,
                attention_mask=recording.mask,
                position_ids=recording.positions,
                past_key_values=call.cache,
                use_cache=True,
                **kwargs,
            )

    def _compare(self, logits: Tensor, expected: Tensor) -> None:
        """Refuse a recorded step that depends on more than its inputs and the cache.

        Raises:
            RuntimeError: replayed and launched steps differ.
        """
        eps = torch.finfo(resolve_dtype(self.model.dtype)).eps
        error = float((logits - expected).abs().max())
        allowed = 4 * eps * float(expected.abs().max())
        if not error <= allowed:
            raise RuntimeError(f"a replayed step is off by {error:.3g}, at most {allowed:.3g}")
        self.verified = True

    def _warn(
        self, reason: str, effect: str = "every kernel of every step is launched by itself"
    ) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(
                f"decode step: {reason}, so {effect}, which is slower. "
                "Set model.squeeze_step.enabled = False to do so on purpose.",
                SqueezeWarning,
                stacklevel=4,
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _owned(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(OWN)


def _judges(layer: PackedLayer, steps: int) -> bool:
    """Say whether blocks come due whose format asks which of their tokens matter."""
    spec, counts = layer.spec, layer.exact.counts.host
    return spec.protects and any(spec.ready(count + steps) for count in counts)


def attach(model: Any, states: dict[int, LayerState]) -> None:
    """Put a ``DecodeStep`` before the ``forward`` of a model that packs its cache."""
    model.squeeze_step = model.forward = DecodeStep(model, states)


def detach(model: nn.Module) -> None:
    """Undo ``attach``; whoever wrapped ``forward`` since keeps a step that lets all calls pass."""
    attributes = vars(model)
    if "squeeze_step" not in attributes:
        return
    step: DecodeStep = attributes.pop("squeeze_step")
    step.enabled = False
    if attributes.get("forward") is step:
        del model.forward
        if step.replaced is not None:
            model.forward = step.replaced
