"""The plan: what will happen to which module, saving how many bytes, computed by what.

Made from the recipe and the model's configuration alone, but for layers whose key bias turns out to
be huge once the weights are read. Everything that can be refused is refused here, and the executor
makes no decisions afterwards.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from squeeze import plan_guard, plan_table
from squeeze.errors import DeviceError, RecipeError, UnsupportedError, nearest
from squeeze.model_info import SINK_LOGITS, ModelInfo, require_packable
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
from squeeze.recipe import Method, Recipe, WeightRule, layer_candidates
from squeeze.recipe_values import build_transform
from squeeze.types import Implementation, resolve_dtype

# Measured for an allocation under a bound on mean bits, and not by calibration itself.
KV_LOSS = "kv_loss"


@dataclass(frozen=True)
class WeightPlan:
    """What happens to one linear layer."""

    module: str
    method: dict[str, Any]
    implementation: str
    shape: tuple[int, int]
    effective_bits: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class PrefillPlan:
    """Which prefill policy one layer follows; ``None`` is dense (``reason`` says why)."""

    layer: int
    module: str
    policy: dict[str, Any] | None
    implementation: str
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``from_dict`` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from ``to_dict``'s data, or from the same after JSON."""
        rows: dict[str, type] = {"weights": WeightPlan, "kv_cache": KVPlan, "prefill": PrefillPlan}
        known = {f.name for f in fields(cls)}
        data = {key: value for key, value in data.items() if key in known}
        for key, row in rows.items():
            data[key] = tuple(row(**_tupled(item)) for item in data[key])
        if data.get("allocation"):
            data["allocation"] = Allocation(**_tupled(data["allocation"]))
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**values)

    @property
    def lossless(self) -> bool:
        """Whether the squeezed model is the dense one."""
        packed = any(row.keys or row.values for row in self.kv_cache)
        return not (self.weights or packed or any(row.policy for row in self.prefill))

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
    weights = tuple(_weights(recipe, info, implementation))
    kv_cache = tuple(cache_rows(recipe, info, implementation))
    allocation = bound_of(recipe, info, kv_cache, implementation)
    if allocation is not None:
        kv_cache = uniform_rows(recipe, kv_cache, allocation)[0]
    prefill = tuple(_prefill(recipe, info, implementation))
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
    if weights:
        done = {row.module for row in weights}
        left = [name for name in info.linears if name not in done]
        if left:
            notes.append(
                f"{len(left)} linear layers stay dense: {', '.join(plan_table.fold(left))}"
            )
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
        offload=bool(kv and kv.offload),
        queries=kv.queries if kv else None,
        salience=kv.salience if kv else "error",
    )


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


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name equals, contains as a component, or (``re:``) matches a pattern."""
    parts = name.split(".")
    return any(
        re.search(pattern[3:], name)
        if pattern.startswith("re:")
        else pattern == name or pattern in parts or any(p.startswith(pattern) for p in parts)
        for pattern in patterns
    )


def _weights(recipe: Recipe, info: ModelInfo, implementation: str) -> Iterable[WeightPlan]:
    chosen: dict[str, WeightRule] = {}
    for i, rule in enumerate(recipe.weights):
        hit = [n for n in info.linears if matches(n, rule.targets) and not matches(n, rule.ignore)]
        if not hit:
            raise RecipeError(
                f"{recipe.origin}: weights.{i}.targets",
                f"{list(rule.targets)} matches no linear layer of this {info.model_type} model",
                ", ".join(plan_table.fold(list(info.linears))[:12])
                or "nothing here is an nn.Linear",
                "Name modules or parts of their names",
            )
        chosen |= dict.fromkeys(hit, rule)
    for name, rule in chosen.items():
        method = rule.method.build()
        if method is None:
            continue
        out, columns = info.linears[name]
        method.check(out, columns)
        yield WeightPlan(
            module=name,
            method=rule.method.to_dict(),
            implementation=implementation,
            shape=(out, columns),
            effective_bits=method.shape_bits(out, columns),
            bytes_before=out * columns * info.dtype_bits // 8,
            bytes_after=method.shape_bytes(out, columns),
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


def _prefill(recipe: Recipe, info: ModelInfo, implementation: str) -> Iterable[PrefillPlan]:
    method: Method | None = recipe.attention.prefill if recipe.attention else None
    if method is None:
        return
    section = f"{recipe.origin}: attention.prefill"
    require_packable(info, section)
    if info.model_type in SINK_LOGITS:
        raise UnsupportedError(
            section,
            f"a {info.model_type!r} model cannot take it: its attention has learned sink "
            "logits, which the sparse kernel does not add",
            "models without sink logits",
            "Remove attention.prefill from the recipe",
        )
    for item in info.attention:
        if item.kind != "full_attention":
            reason = f"{item.kind.replace('_', ' ')} is already local"
            yield PrefillPlan(item.layer, item.module, None, "dense", reason)
        else:
            yield PrefillPlan(item.layer, item.module, method.to_dict(), implementation)


def _statistics(recipe: Recipe, info: ModelInfo) -> tuple[str, ...]:
    names: set[str] = set()
    for rule in recipe.weights:
        made = rule.method.build()
        names |= set(made.statistics) if made else set()
    if recipe.kv_cache and not all_lossless(recipe, info):
        for layer in range(info.layers):
            for side in itertools.chain(*layer_candidates(recipe.kv_cache, layer, info.layers)):
                made = side.method.build()
                names |= set(made.statistics) if made else set()
                for entry in side.transforms:
                    names |= set(build_transform(entry)[1].statistics)
        if recipe.kv_cache.mean_bits is not None:
            names.add(KV_LOSS)
    if recipe.attention and recipe.attention.prefill:
        names |= set(recipe.attention.prefill.build().statistics)
    return tuple(sorted(names))


def _effective_bits(weights: Sequence[WeightPlan], kv_cache: Sequence[KVPlan]) -> dict[str, float]:
    count = sum(row.shape[0] * row.shape[1] for row in weights)
    stored = 8 * sum(row.bytes_after for row in weights)
    return {"weights": stored / count if count else DENSE_BITS, **side_means(kv_cache)}
