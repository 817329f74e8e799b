"""The plan: what will happen to which module, saving how many bytes, computed by what.

Made from the recipe and the model's configuration alone, but for layers whose key bias turns out to
be huge once the weights are read. Everything that can be refused is refused here, and the executor
makes no decisions afterwards.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from squeeze import plan_guard, plan_table, registry
from squeeze.errors import DeviceError, RecipeError, nearest
from squeeze.matching import matches
from squeeze.model_info import ModelInfo
from squeeze.plan_activations import ActivationPlan, activation_rows
from squeeze.plan_cache import (
    DENSE_BITS,
    Allocation,
    KVPlan,
    all_lossless,
    bound_of,
    cache_rows,
    kv_bytes,
    side_means,
    uniform_rows,
)
from squeeze.plan_mixer import MixerPlan, mixer_rows
from squeeze.plan_prefill import PrefillPlan, prefill_notes, prefill_rows, prefill_statistics
from squeeze.plan_scaling import with_producers
from squeeze.plan_weights import PREDICTORS, WeightAllocation
from squeeze.plan_weights import bound_of as weight_bound
from squeeze.plan_weights import uniform_rows as uniform_weights
from squeeze.recipe import Recipe, WeightRule, layer_candidates
from squeeze.recipe_values import build_transform
from squeeze.types import Implementation, resolve_dtype

# Measured for an allocation under a bound on mean bits, and not by calibration itself.
KV_LOSS = "kv_loss"


@dataclass(frozen=True)
class WeightPlan:
    """What happens to one linear layer, or to one fused parameter of a layer's experts.

    ``producer`` is the module that takes the inverses of input scales, where there are such.
    ``shape`` is that of one matrix; ``experts`` of them are meant, 0 stands for a linear layer.
    """

    module: str
    method: dict[str, Any]
    implementation: str
    shape: tuple[int, int]
    effective_bits: float
    bytes_before: int
    bytes_after: int
    producer: str = ""
    experts: int = 0

    @property
    def values(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1] * max(1, self.experts)


@dataclass(frozen=True)
class StepPlan:
    """How a recorded decode step runs one layer: fused, or for ``reason`` as it is."""

    layer: int
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that will be done, before anything is.

    Attributes:
        recipe: The recipe's mapping.
        model: Name or path of the model, as asked.
        model_type: Architecture.
        dtype: Of the dense tensors.
        device: ``"cpu"`` or ``"cuda"``.
        weights: One entry per compressed linear layer.
        kv_cache: One entry per attention layer, empty when the recipe has no such section.
        prefill: One entry per attention layer, empty likewise.
        sink_tokens: First tokens of each row kept exact.
        residual_length: Newest tokens kept exact.
        statistics: Names that calibration must measure, sorted.
        effective_bits: ``weights``, ``keys``, ``values``: stored bits per value, all included.
        weight_bytes: Whole model: ``before`` and ``after``.
        kv_bytes: At ``context`` and ``batch``, allocated: ``before`` and ``after``; of the latter
            ``packed`` are blocks, ``largest_layer`` of these in one layer.
        kv_constant_bytes: Tables that do not grow with tokens.
        context: Tokens the KV bytes are counted at.
        batch: Rows the KV bytes are counted at.
        notes: What was left dense, and why.
        allocation: The bound on mean bits, where the recipe has one.
        offload: Packed blocks live in CPU memory.
        queries: How queries that read packed keys are rounded: ``"float8"``, or not at all.
        salience: What makes a token one that a format protects.
        mixers: One entry per Mamba mixer whose forward is ours.
        activations: One entry per linear layer that leaves small inputs out in decode.
        weight_allocation: The bound on mean bits of weights, where the recipe has one.
        steps: One entry per layer whose cache is packed: how a recorded decode step runs it.
    """

    recipe: dict[str, Any]
    model: str
    model_type: str
    dtype: str
    device: str
    weights: tuple[WeightPlan, ...]
    kv_cache: tuple[KVPlan, ...]
    prefill: tuple[PrefillPlan, ...]
    sink_tokens: int
    residual_length: int
    statistics: tuple[str, ...]
    effective_bits: dict[str, float]
    weight_bytes: dict[str, int]
    kv_bytes: dict[str, int]
    kv_constant_bytes: int
    context: int
    batch: int
    notes: tuple[str, ...] = field(default=())
    allocation: Allocation | None = None
    offload: bool = False
    queries: str | None = None
    salience: str = "error"
    mixers: tuple[MixerPlan, ...] = ()
    activations: tuple[ActivationPlan, ...] = ()
    weight_allocation: WeightAllocation | None = None
    steps: tuple[StepPlan, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``from_dict`` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from ``to_dict``'s data, or from the same after JSON."""
        rows: dict[str, type] = {
            "weights": WeightPlan,
            "kv_cache": KVPlan,
            "prefill": PrefillPlan,
            "mixers": MixerPlan,
            "activations": ActivationPlan,
            "steps": StepPlan,
        }
        known = {f.name for f in fields(cls)}
        data = {key: value for key, value in data.items() if key in known}
        for key, row in rows.items():
            data[key] = tuple(row(**_tupled(item)) for item in data.get(key, ()))
        if data.get("allocation"):
            data["allocation"] = Allocation(**_tupled(data["allocation"]))
        if data.get("weight_allocation"):
            data["weight_allocation"] = WeightAllocation.from_dict(data["weight_allocation"])
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**values)

    @property
    def lossless(self) -> bool:
        """Whether the squeezed model is the dense one."""
        packed = any(row.keys or row.values for row in self.kv_cache)
        sparse = self.activations or any(row.acts for row in self.prefill)
        return not (self.weights or packed or sparse)

    def table(self) -> str:
        """Lay the plan out as text, rows that repeat over layers folded into one."""
        return "\n".join(plan_table.lines(self))


def _tupled(item: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in item.items()}


def make_plan(
    recipe: Recipe,
    info: ModelInfo,
    *,
    device: str | torch.device | None = None,
    context: int = 8192,
    batch: int = 1,
) -> Plan:
    """Decide everything that a recipe does to a model.

    Args:
        recipe: What was asked.
        info: The model.
        device: Where it will run; by default a GPU if there is one.
        context: Tokens to count KV bytes at.
        batch: Rows to count KV bytes at.

    Raises:
        UnsupportedError: this model cannot take a section; the message says why.
        DeviceError: a GPU or Triton is asked for and not here.
        RecipeError: targets that match nothing, or layers that do not exist.
    """
    device = resolve_device(device)
    implementation = resolve_implementation(device, recipe.implementation)
    notes: list[str] = []
    weights, weight_allocation = _weights(recipe, info, implementation)
    kv_cache = tuple(cache_rows(recipe, info, implementation))
    allocation = bound_of(recipe, info, kv_cache, implementation)
    if allocation is not None:
        kv_cache = uniform_rows(recipe, kv_cache, allocation)[0]
    prefill = tuple(prefill_rows(recipe, info, implementation, device))
    for rows, what in ((kv_cache, "KV cache"), (prefill, "prefill")):
        reasons = sorted({row.reason for row in rows if row.reason})
        for reason in reasons:
            layers = [row.layer for row in rows if row.reason == reason]
            notes.append(f"{what} of layers {plan_table.ranges(layers)} stays dense: {reason}")
    linear = sorted(set(range(info.layers)) - {row.layer for row in kv_cache})
    if kv_cache and linear:
        layers_ = plan_table.ranges(linear)
        notes.append(
            f"KV cache of layers {layers_} stays dense: linear attention keeps its own cache"
        )
    notes += plan_guard.notes(recipe.kv_cache, info) if kv_cache else []
    notes += prefill_notes(recipe)
    if weights:
        done = {row.module for row in weights}
        left = [name for name in info.linears if name not in done]
        if left:
            notes.append(
                f"{len(left)} linear layers stay dense: {', '.join(plan_table.fold(left))}"
            )
        left = [name for name in info.experts if name not in done]
        if left:
            notes.append(f"experts stay dense: {', '.join(plan_table.fold(left))}")
    activations = tuple(activation_rows(recipe, info, weights, implementation))
    if activations and not all(row.skips for row in activations):
        zeroed = plan_table.fold(row.module for row in activations if not row.skips)
        notes.append(f"small inputs of {', '.join(zeroed)} are zeroed, their weights read whole")
    mixers = mixer_rows(weights, info, recipe.origin)
    rounded = [row.module for row in mixers if row.method]
    if rounded:
        notes.append(f"activations of {', '.join(plan_table.fold(rounded))} are rounded to int8")
    kv = recipe.kv_cache
    sink_tokens, residual = (kv.sink_tokens, kv.residual_length) if kv else (0, 0)
    saved = sum(row.bytes_before - row.bytes_after for row in weights)
    return Plan(
        recipe=recipe.to_dict(),
        model=info.source,
        model_type=info.model_type,
        dtype=info.dtype,
        device=device,
        weights=weights,
        kv_cache=kv_cache,
        prefill=prefill,
        sink_tokens=sink_tokens,
        residual_length=residual,
        statistics=_statistics(recipe, info),
        effective_bits=_effective_bits(weights, kv_cache),
        weight_bytes={"before": info.parameter_bytes, "after": info.parameter_bytes - saved},
        kv_bytes=kv_bytes(
            info.attention, info.dtype_bits, kv_cache, sink_tokens, residual, context, batch
        ),
        kv_constant_bytes=sum(row.constant_bytes for row in kv_cache),
        context=context,
        batch=batch,
        notes=tuple(notes),
        allocation=allocation,
        weight_allocation=weight_allocation,
        offload=bool(kv and kv.offload),
        queries=kv.queries if kv else None,
        salience=kv.salience if kv else "error",
        mixers=mixers,
        activations=activations,
        steps=tuple(_steps(info, kv_cache, activations)),
    )


def _steps(
    info: ModelInfo, kv_cache: Sequence[KVPlan], activations: Sequence[ActivationPlan]
) -> Iterable[StepPlan]:
    """Say of every layer with a packed cache whether a recorded step runs it fused."""
    packed = {row.layer for row in kv_cache if row.keys}
    for item, reason in zip(info.attention, info.step_reasons, strict=True):
        inside = item.module.rpartition(".")[0] + "."
        if any(row.module.startswith(inside) for row in activations):
            reason = reason or "small inputs of its products are left out"
        if item.layer in packed:
            yield StepPlan(item.layer, reason)


def resolve_device(device: str | torch.device | None) -> str:
    """Name the device type to run on, checking that one asked for exists."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise DeviceError(
            "--device",
            f"got {str(device)!r}",
            "cpu, cuda, cuda:N",
            nearest(kind, ("cpu", "cuda")) or "Choose one of these",
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "--device",
            "'cuda' was asked for and torch sees no GPU",
            "cpu here",
            "Leave --device out, or install a CUDA build of torch",
        )
    return str(device)


def resolve_implementation(device: str, wanted: str | Implementation = Implementation.AUTO) -> str:
    """Choose reference or triton for a device, once, before anything runs."""
    wanted = Implementation(wanted)
    on_gpu = device.startswith("cuda")
    if wanted is Implementation.AUTO:
        wanted = Implementation.TRITON if on_gpu else Implementation.REFERENCE
    if wanted is Implementation.TRITON:
        if importlib.util.find_spec("triton") is None:
            raise DeviceError(
                "implementation",
                "'triton' is needed and not installed",
                "reference, or triton once installed",
                "pip install triton",
            )
        if not on_gpu:
            raise DeviceError(
                "implementation",
                "'triton' was asked for on the CPU",
                "reference or auto on a CPU",
                "Use --device cuda, or 'auto'",
            )
    return wanted.value


def _weights(
    recipe: Recipe, info: ModelInfo, implementation: str
) -> tuple[tuple[WeightPlan, ...], WeightAllocation | None]:
    chosen: dict[str, WeightRule] = {}
    shapes: dict[str, tuple[int, ...]] = {**info.linears, **info.experts}
    width = info.dtype_bits
    for i, rule in enumerate(recipe.weights):
        hit = [n for n in shapes if matches(n, rule.targets) and not matches(n, rule.ignore)]
        if not hit:
            raise RecipeError(
                f"{recipe.origin}: weights.{i}.targets",
                f"{list(rule.targets)} matches no linear layer of this {info.model_type} model",
                ", ".join(plan_table.fold(list(shapes))[:12]) or "nothing here is an nn.Linear",
                "Name modules or parts of their names",
            )
        chosen |= dict.fromkeys(hit, rule)
    rows = []
    for name, rule in chosen.items():
        if rule.method.lossless and rule.mean_bits is None:
            continue
        *experts, out, columns = shapes[name]
        count = experts[0] if experts else 0
        before = max(1, count) * out * columns * width // 8
        row = WeightPlan(name, {}, implementation, (out, columns), 0.0, before, 0, "", count)
        rows.append(repack(row, rule.method.to_dict()))
    bound = weight_bound(recipe, chosen)
    if bound is not None:
        rows = list(uniform_weights(rows, bound, repack, recipe.origin))
    return _produced(rows, info.model_type), bound


def repack(row: WeightPlan, method: Mapping[str, Any]) -> WeightPlan:
    """Give a module another method, sizes counted again; its producer is not known yet.

    Raises:
        UnsupportedError: the method does not take this shape.
    """
    made = build_method(method)
    made.check(*row.shape)
    return replace(
        row,
        method=dict(method),
        effective_bits=made.shape_bits(*row.shape),
        bytes_after=max(1, row.experts) * made.shape_bytes(*row.shape),
        producer="",
    )


def build_method(method: Mapping[str, Any]) -> Any:
    """Build a weight method from its mapping."""
    parameters = {key: value for key, value in method.items() if key != "method"}
    return registry.get("weights", method["method"])(**parameters)


def _produced(rows: Sequence[WeightPlan], model_type: str) -> tuple[WeightPlan, ...]:
    """Name the producers of modules whose methods scale their inputs."""
    scaling = [
        row.module
        for row in rows
        if getattr(build_method(row.method), "scales_inputs", False) and not row.experts
    ]
    return with_producers(rows, scaling, model_type)


def with_weights(plan: Plan, rows: Sequence[WeightPlan], **changes: Any) -> Plan:
    """Return the plan with other methods of its modules, its bits and bytes counted again."""
    rows = _produced(rows, plan.model_type)
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    before = plan.weight_bytes["before"]
    return replace(
        plan,
        weights=rows,
        effective_bits=_effective_bits(rows, plan.kv_cache),
        weight_bytes={"before": before, "after": before - saved},
        **changes,
    )


def with_cache(plan: Plan, rows: Sequence[KVPlan], **changes: Any) -> Plan:
    """Return the plan with other cache rows, its bits and bytes counted again."""
    rows = tuple(rows)
    exact = (plan.sink_tokens, plan.residual_length, plan.context, plan.batch)
    item_bits = resolve_dtype(plan.dtype).itemsize * 8
    return replace(
        plan,
        kv_cache=rows,
        effective_bits=_effective_bits(plan.weights, rows),
        kv_bytes=kv_bytes(rows, item_bits, rows, *exact),
        kv_constant_bytes=sum(row.constant_bytes for row in rows),
        **changes,
    )


def _statistics(recipe: Recipe, info: ModelInfo) -> tuple[str, ...]:
    names: set[str] = set()
    for rule in recipe.weights:
        made = rule.method.build()
        names |= set(made.statistics) if made else set()
        names |= set(getattr(made, "mixer_statistics", ()))
        for one in rule.candidates:
            names |= set(one.build().statistics)
        if rule.mean_bits is not None and not names & set(PREDICTORS):
            names.add(PREDICTORS[-1])
    if recipe.kv_cache and not all_lossless(recipe, info):
        for layer in range(info.layers):
            for side in itertools.chain(*layer_candidates(recipe.kv_cache, layer, info.layers)):
                made = side.method.build()
                names |= set(made.statistics) if made else set()
                for entry in side.transforms:
                    names |= set(build_transform(entry)[1].statistics)
        if recipe.kv_cache.mean_bits is not None:
            names.add(KV_LOSS)
    for sparse in recipe.activations:
        names |= set(sparse.method.build().statistics)
    return tuple(sorted(names | prefill_statistics(recipe)))


def _effective_bits(weights: Sequence[WeightPlan], kv_cache: Sequence[KVPlan]) -> dict[str, float]:
    count = sum(row.values for row in weights)
    stored = 8 * sum(row.bytes_after for row in weights)
    return {"weights": stored / count if count else DENSE_BITS, **side_means(kv_cache)}
