"""The one mutation: put artifacts into a model, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from squeeze import registry
from squeeze.attention import KVSettings, LayerState, register
from squeeze.cache_hook import CacheHook
from squeeze.decode_step import attach, detach
from squeeze.devices import device_of, require_in_place, stand_on_devices
from squeeze.errors import UnsupportedError
from squeeze.experts import PackedStack, expert_matrices, keep_names, replace_experts
from squeeze.folding import fold, folded_tables, unfold
from squeeze.fused import fused_shapes
from squeeze.linear import PackedLinear
from squeeze.mixer import MixerState
from squeeze.mixer import attach as attach_mixer
from squeeze.mixer import detach as detach_mixer
from squeeze.model_info import MIXERS
from squeeze.plan import Plan
from squeeze.plan_cache import KVPlan
from squeeze.quant.kv._raw import RawBlocks
from squeeze.recipe_values import build_transform
from squeeze.scaling import Scales, exponents_of, parameter_scales, scale, unscale
from squeeze.sparse_inputs import InputState, Phase
from squeeze.sparse_inputs import attach as attach_input
from squeeze.sparse_inputs import detach as detach_input
from squeeze.tensor_parallel import check_model, split_linear, split_state
from squeeze.types import Implementation, StoredWeight, Tensors, resolve_dtype


@dataclass(frozen=True)
class Artifacts:
    """What compression produced: the only thing that swap reads and export writes.

    Attributes:
        plan: What was decided.
        weights: Module name to packed weight.
        tables: Dotted buffer name (``model.layers.0.self_attn.squeeze.keys_center_center``) to the
            tensor a KV format or transform was fitted with.
    """

    plan: Plan
    weights: dict[str, StoredWeight]
    tables: Tensors

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor."""
        tables = sum(table.numel() * table.element_size() for table in self.tables.values())
        return tables + sum(weight.nbytes for weight in self.weights.values())


class Swap:
    """A model with artifacts in it; leaving the ``with`` block, or ``restore``, takes them out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.dense: str | None = None
        self.states: dict[int, LayerState] = {}
        self.names: dict[int, str] = {}
        self.hooks: list[Any] = []
        self.folded: Tensors = {}
        self.scales: Scales = {}
        self.mixers: list[str] = []
        self.inputs: list[str] = []
        self.restorable = True
        self.conversions: Any = vars(model).get("_weight_conversions")

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the model back its own modules and attention.

        Raises:
            UnsupportedError: the dense weights were freed, so there is nothing to go back to.
        """
        if not self.restorable:
            raise UnsupportedError(
                "swap",
                "the dense weights of this model were freed",
                "",
                "Load the dense model again, or swap with keep_dense=True",
            )
        self.detach_inputs()
        for name, module in self.modules.items():
            replace_module(self.model, name, module)
        self.modules = {}
        vars(self.model).pop("_weight_conversions", None)
        if self.conversions is not None:
            vars(self.model)["_weight_conversions"] = self.conversions
        self.unfold()
        self.detach_attention()
        self.detach_mixers()
        for name in ("squeeze_swap", "squeeze_statistics"):
            if name in vars(self.model):
                delattr(self.model, name)

    def unfold(self) -> None:
        """Take key scales and input scales out of the weights again."""
        unfold(self.model, self.folded)
        unscale(self.model, self.scales)
        self.folded, self.scales = {}, {}

    @property
    def rotated(self) -> set[str]:
        """Names of the linear layers whose weights hold a rotation of their inputs."""
        mixers: dict[str, Any] = {name: self.model.get_submodule(name) for name in self.mixers}
        return {f"{name}.out_proj" for name, mixer in mixers.items() if mixer.squeeze.rotates}

    def detach_inputs(self) -> None:
        """Undo ``attach_inputs``."""
        for name in self.inputs:
            detach_input(self.model.get_submodule(name))
        self.inputs = []

    def detach_mixers(self) -> None:
        """Undo ``attach_mixers``."""
        for name in self.mixers:
            detach_mixer(self.model.get_submodule(name))
        self.mixers = []

    def detach_attention(self) -> None:
        """Undo ``attach_attention``."""
        detach(self.model)
        for handle in self.hooks:
            handle.remove()
        self.hooks = []
        for name in self.names.values():
            del self.model.get_submodule(name).squeeze
        if self.dense is not None:
            self.model.set_attn_implementation(self.dense)
        self.states, self.names, self.dense = {}, {}, None


def swap(model: PreTrainedModel, artifacts: Artifacts, *, keep_dense: bool = True) -> Swap:
    """Put artifacts into a model, in place.

    Use it as a function, or in a ``with`` block that restores the model at the end.

    Args:
        model: A dense causal language model of the kind the plan was made for.
        artifacts: What ``compress`` or ``load`` returned.
        keep_dense: Keep the dense weights in memory for ``restore``; ``False`` frees them.

    Raises:
        UnsupportedError: the model is squeezed already, is another model, fails the self-test, or
            is spread over devices or processes in a way that cannot be followed.
    """
    if getattr(model, "squeeze_swap", None) is not None:
        raise UnsupportedError(
            "swap",
            "this model is squeezed already",
            "a dense model",
            "Restore it first, or load it again",
        )
    require_in_place(model)
    check_model(model, artifacts.plan)
    done = Swap(model)
    packs = any(row.keys for row in artifacts.plan.kv_cache)
    expected = _two_calls(model) if packs else None
    rounding = 0.0 if expected is None else float((_one_call(model) - expected).abs().max())
    try:
        attach_attention(done, artifacts.plan, artifacts.tables)
        attach_mixers(done, artifacts.plan, artifacts.tables)
        # All layers that have scales, also where a part of the artifacts is swapped: that changes
        # no output, and weights were fitted to projections that hold them.
        folded = folded_tables(artifacts.tables)
        fold(model, folded)
        done.folded = folded
        if expected is not None:
            _self_test(model, expected, rounding)
        # After the test: where a bias is scaled, its weight is once the packed one stands there.
        scales = _input_scales(model, artifacts)
        scale(model, scales)
        done.scales = scales
        modules = dict(model.named_modules())
        _swap_experts(done, artifacts)
        for row in artifacts.plan.weights:
            if row.experts:
                continue
            original = _linear(modules, row.module, row.shape)
            weight: Any = artifacts.weights[row.module]
            done.modules[row.module] = original
            device = original.weight.device
            replacement = PackedLinear.from_weight(
                _to(weight, device),  # type: ignore[arg-type]
                original.bias,
                dtype=original.weight.dtype,
                implementation=Implementation(row.implementation),
            )
            replace_module(model, row.module, split_linear(model, row.module, replacement))
        attach_inputs(done, artifacts.plan, artifacts.tables)
    except BaseException:
        done.restore()
        raise
    if not keep_dense and done.modules:
        done.modules, done.restorable = {}, False
    finish(done)
    return done


def finish(done: Swap) -> None:
    """Give the model ``squeeze_swap``, ``squeeze_statistics`` and, over a packed cache, a step."""
    model: Any = done.model
    done.hooks += stand_on_devices(model)
    model.squeeze_swap = done
    model.squeeze_statistics = MethodType(statistics, model)
    if any(state.kv is not None for state in done.states.values()):
        attach(model, done.states)


def statistics(model: Any) -> dict[str, Any]:
    """Measurements of the last forward.

    Returns:
        ``density``: a list over attention layers of lists over query heads; the share of causal
        query-key pairs that was computed, 1.0 where attention was dense.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)
    states = model.squeeze_swap.states
    layers = range(config.num_hidden_layers)
    rows = []
    for layer in layers:
        measured = states[layer].density if layer in states else None
        rows.append([1.0] * heads if measured is None else [float(d) for d in measured])
    return {"density": rows}


def attach_attention(done: Swap, plan: Plan, tables: Mapping[str, Tensor]) -> None:
    """Attach layer states, the attention function and the cache hook that the plan asks for."""
    model = done.model
    kv = {row.layer: row for row in plan.kv_cache if row.keys is not None}
    prefill = {row.layer: row for row in plan.prefill if row.acts}
    if not kv and not prefill:
        return
    text = model.config.get_text_config(decoder=True)
    if text.model_type != plan.model_type or text.num_hidden_layers < 1 + max([*kv, *prefill]):
        raise UnsupportedError(
            "swap",
            f"the model is {text.model_type!r} with {text.num_hidden_layers} layers",
            f"the kind that the plan was made for, {plan.model_type!r}",
            "Plan again",
        )
    dense = text._attn_implementation
    name = register(dense)
    modules = {row.layer: row.module for row in plan.kv_cache}
    modules |= {row.layer: row.module for row in plan.prefill}
    for layer, module in modules.items():
        device = device_of(model, module)
        row, policy = kv.get(layer), prefill.get(layer)
        prefix = f"{module}.squeeze."
        state = LayerState(
            dense,
            settings(row, plan) if row else None,
            registry.get("prefill", policy.policy["method"])(**_parameters(policy.policy))
            if policy and policy.policy
            else None,
            row.implementation if row else policy.implementation if policy else "reference",
            {
                n.removeprefix(prefix): _move(t, device)
                for n, t in tables.items()
                if n.startswith(prefix)
            },
            policy.quantize if policy else None,
            policy.quantize_min_length if policy else 0,
        )
        split_state(model, module, state)
        model.get_submodule(module).squeeze = state
        done.states[layer], done.names[layer] = state, module
    done.dense = dense
    model.set_attn_implementation(name)
    hook = CacheHook(text, done.states)
    done.hooks.append(model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True))
    if hook.asks_types:
        # The whole model gets them, and a decoder inside it may not.
        done.hooks.append(model.register_forward_pre_hook(hook.read_types, with_kwargs=True))


def attach_mixers(done: Swap, plan: Plan, tables: Mapping[str, Tensor]) -> None:
    """Give the mixers that the plan names our forward, and the scales of their activations."""
    modules = dict(done.model.named_modules())
    for row in plan.mixers:
        device = device_of(done.model, row.module)
        if type(modules.get(row.module)).__name__ not in MIXERS:
            raise UnsupportedError(
                f"swap: {row.module}",
                f"found {type(modules.get(row.module)).__name__}",
                " or ".join(MIXERS),
                "Use the model that the plan was made for",
            )
        prefix = f"{row.module}.squeeze."
        scales = {
            n.removeprefix(prefix): _move(t, device)
            for n, t in tables.items()
            if n.startswith(prefix)
        }
        attach_mixer(modules[row.module], MixerState(scales))
        done.mixers.append(row.module)


def attach_inputs(done: Swap, plan: Plan, tables: Mapping[str, Tensor]) -> None:
    """Give the linear layers that the plan names their input thresholds."""
    if not plan.activations:
        return
    phase = Phase()
    for row in plan.activations:
        device = device_of(done.model, row.module)
        threshold = _move(tables[f"{row.module}.squeeze.threshold"], device)
        linear = done.model.get_submodule(row.module)
        attach_input(linear, InputState(threshold, phase, Implementation(row.implementation)))
        done.inputs.append(row.module)
    hook = done.model.get_decoder().register_forward_pre_hook(phase, with_kwargs=True)
    done.hooks.append(hook)


def settings(row: KVPlan, plan: Plan) -> KVSettings:
    """Build the objects that one layer's plan names."""
    return KVSettings(
        chain(row.keys),
        chain(row.values),
        row.block_length,
        plan.sink_tokens,
        plan.residual_length,
        plan.offload,
        plan.queries,
        plan.salience,
    )


def chain(side: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Turn a side of the plan into its transforms in order, then its format."""
    assert side is not None
    transforms = tuple(build_transform(entry) for entry in side.get("transforms", ()))
    if side.get("bits") == 16:
        return (*transforms, ("format", RawBlocks()))
    made = registry.get("kv", side["method"])(**_parameters(side))
    basis = (("basis", made.basis),) if hasattr(made, "basis") else ()
    return (*transforms, *basis, ("format", made))


def _parameters(method: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key not in ("method", "transforms")}


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if device.type == "meta" else tensor.to(device)


def _linear(modules: Mapping[str, nn.Module], name: str, shape: tuple[int, int]) -> nn.Linear:
    module = modules.get(name)
    if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != tuple(shape):
        found = type(module).__name__ if module is not None else "nothing"
        raise UnsupportedError(
            f"swap: {name}",
            f"found {found}",
            f"an nn.Linear of {shape[0]} x {shape[1]}",
            "Use the model that the plan was made for",
        )
    return module


def _swap_experts(done: Swap, artifacts: Artifacts) -> None:
    """Replace the mixtures of experts that have packed parameters."""
    rows = [row for row in artifacts.plan.weights if row.experts]
    if not rows:
        return
    found = fused_shapes(done.model)
    stacks = {}
    for row in rows:
        if found.get(row.module) != (row.experts, *row.shape):
            raise UnsupportedError(
                f"swap: {row.module}",
                f"found {found.get(row.module, 'nothing')}",
                f"{row.experts} experts of {row.shape[0]} x {row.shape[1]}",
                "Use the model that the plan was made for",
            )
        device = expert_matrices(done.model, row.module)[0].device
        weight: Any = _to(artifacts.weights[row.module], device)
        stacks[row.module] = PackedStack(weight, Implementation(row.implementation))
    done.modules |= replace_experts(done.model, stacks)
    keep_names(done.model)


def _input_scales(model: nn.Module, artifacts: Artifacts) -> Scales:
    """Select the input scales of parameters that are not about to be replaced."""
    rows = artifacts.plan.weights
    replaced = {f"{row.module}.weight" for row in rows}
    scales = parameter_scales(model, rows, exponents_of(artifacts.weights))
    return {name: found for name, found in scales.items() if name not in replaced}


def _to(weight: StoredWeight, device: torch.device) -> StoredWeight:
    return weight.with_tensors({n: tensor.to(device) for n, tensor in weight.tensors().items()})


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` points."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _test_tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    return (torch.arange(14, device=device) % (vocabulary - 1) + 1).view(2, 7)


@torch.no_grad()
def _one_call(model: PreTrainedModel) -> Tensor:
    """The logits of ``_two_calls`` without a cache: they differ by rounding alone."""
    training = model.training
    model.eval()
    logits = model(_test_tokens(model), use_cache=False).logits[:, -1:]
    model.train(training)
    return logits.float()  # type: ignore[no-any-return]


@torch.no_grad()
def _two_calls(model: PreTrainedModel) -> Tensor:
    """Logits of one step after a short prompt, over whatever cache the model makes."""
    ids = _test_tokens(model)
    training = model.training
    model.eval()
    first = model(ids[:, :-1], use_cache=True)
    logits = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
    model.train(training)
    return logits.float()  # type: ignore[no-any-return]


def _self_test(model: PreTrainedModel, expected: Tensor, rounding: float) -> None:
    """Compare a prompt and one step with the dense model's, while everything is still exact.

    Large keys amplify rounding, so what it does to this model, ``rounding``, widens the tolerance.

    Raises:
        UnsupportedError: the architecture does something to keys and values that the packed cache
            does not know.
    """
    config = model.config.get_text_config(decoder=True)
    eps = torch.finfo(resolve_dtype(model.dtype)).eps
    tolerance = 8 * eps * config.num_hidden_layers * float(expected.abs().max().clamp(min=1e-3))
    tolerance = max(tolerance, 4 * rounding)
    error = float((_two_calls(model) - expected).abs().max())
    if not error <= tolerance:
        raise UnsupportedError(
            "swap",
            f"a {config.model_type!r} model fails the self-test: one step over a cache in "
            f"which all is still exact differs from the dense model by {error:.3g}",
            f"at most {tolerance:.3g}",
            "Remove kv_cache from the recipe for this architecture",
        )
