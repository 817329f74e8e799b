"""The plan: what will happen to which module, saving how many bytes, computed by what.

Made from the recipe and the model's configuration alone. Everything that can be refused is refused
here, and the executor makes no decisions afterwards.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from squeeze import plan_table, registry
from squeeze.errors import DeviceError, RecipeError, UnsupportedError, nearest
from squeeze.model_info import SINK_LOGITS, AttentionInfo, ModelInfo, require_packable
from squeeze.quant.kv._raw import RawBlocks
from squeeze.recipe import KVSide, Method, Recipe, WeightRule, layer_sides
from squeeze.types import Implementation

DENSE_BITS = 16.0
# Tokens of a cache block unless the recipe says otherwise: what the decode kernel reads best.
BLOCK_LENGTH = 128
# Tables that do not grow with tokens are spread over this many, at batch 1.
AMORTISED_TOKENS = 32768


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
class KVPlan:
    """How one layer stores its keys and values.

    ``keys`` and ``values`` are format mappings with their transforms, or ``None`` where the layer
    keeps transformers' own cache (``reason`` says why).
    """

    layer: int
    module: str
    keys: dict[str, Any] | None
    values: dict[str, Any] | None
    implementation: str
    kv_heads: int
    head_dim: int
    block_length: int = 0
    key_bits: float = DENSE_BITS
    value_bits: float = DENSE_BITS
    constant_bytes: int = 0
    reason: str = ""


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
        kv_bytes: At ``context`` and ``batch``: ``before`` and ``after``, allocated.
        kv_constant_bytes: Tables that do not grow with tokens.
        context: Tokens the KV bytes are counted at.
        batch: Rows the KV bytes are counted at.
        notes: What was left dense, and why.
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
    kv_cache = tuple(_kv_cache(recipe, info, implementation))
    prefill = tuple(_prefill(recipe, info, implementation))
    for rows, what in ((kv_cache, "KV cache"), (prefill, "prefill")):
        reasons = sorted({row.reason for row in rows if row.reason})
        for reason in reasons:
            layers = [row.layer for row in rows if row.reason == reason]
            notes.append(f"{what} of layers {plan_table.ranges(layers)} stays dense: {reason}")
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
        kv_bytes=_kv_bytes(info, kv_cache, sink_tokens, residual, context, batch),
        kv_constant_bytes=sum(row.constant_bytes for row in kv_cache),
        context=context,
        batch=batch,
        notes=tuple(notes),
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


def _kv_cache(recipe: Recipe, info: ModelInfo, implementation: str) -> Iterable[KVPlan]:
    kv = recipe.kv_cache
    if kv is None or _all_lossless(recipe, info):
        return
    require_packable(info, f"{recipe.origin}: kv_cache")
    for i, override in enumerate(kv.layers):
        for layer in override.match:
            if not -info.layers <= layer < info.layers:
                raise RecipeError(
                    f"{recipe.origin}: kv_cache.layers.{i}.match",
                    f"layer {layer} is not in this model",
                    f"{-info.layers} to {info.layers - 1}",
                    "Count from 0, or from the end with negative numbers",
                )
    for item in info.attention:
        common: dict[str, Any] = {
            "layer": item.layer,
            "module": item.module,
            "kv_heads": item.kv_heads,
            "head_dim": item.head_dim,
        }
        if item.kind != "full_attention":
            reason = f"{item.kind.replace('_', ' ')} keeps its own cache"
            yield KVPlan(keys=None, values=None, implementation="dense", reason=reason, **common)
            continue
        keys, values = layer_sides(kv, item.layer, info.layers)
        if keys.method.lossless and values.method.lossless:
            yield KVPlan(
                keys=None,
                values=None,
                implementation="dense",
                reason="the recipe keeps it at 16 bits",
                **common,
            )
            continue
        formats = [build_format(side, item) for side in (keys, values)]
        yield KVPlan(
            keys=keys.to_dict(),
            values=values.to_dict(),
            implementation=implementation,
            block_length=_block_length(recipe, formats),
            key_bits=formats[0].bits_per_value(item.head_dim),
            value_bits=formats[1].bits_per_value(item.head_dim),
            constant_bytes=sum(f.constant_bytes(item.kv_heads, item.head_dim) for f in formats)
            + sum(_transform_bytes(side, item) for side in (keys, values)),
            **common,
        )


def _block_length(recipe: Recipe, formats: list[Any]) -> int:
    assert recipe.kv_cache is not None
    length = recipe.kv_cache.block_length or max(BLOCK_LENGTH, *(f.block_length for f in formats))
    for made in formats:
        if length % made.block_length:
            raise RecipeError(
                f"{recipe.origin}: kv_cache.block_length",
                f"{length} tokens hold no whole number of groups of {made.block_length}",
                f"a multiple of {made.block_length}",
                "Change block_length or group_size",
            )
    return length


def _all_lossless(recipe: Recipe, info: ModelInfo) -> bool:
    assert recipe.kv_cache is not None
    sides = [
        s
        for i in range(max(info.layers, 1))
        for s in layer_sides(recipe.kv_cache, i, max(info.layers, 1))
    ]
    return all(side.method.lossless for side in sides)


def build_format(side: KVSide, item: AttentionInfo | KVPlan) -> Any:
    """Make the format of one side, checked against the head size."""
    made = side.method.build()
    if made is None:
        return RawBlocks()
    made.check(item.head_dim)
    return made


def _transform_bytes(side: KVSide, item: AttentionInfo) -> int:
    # Every transform with parameters holds one float32 per channel of each head.
    with_tables = [n for n in side.transforms if registry.get("transform", n)().statistics]
    return 4 * len(with_tables) * item.kv_heads * item.head_dim


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
    if recipe.kv_cache and not _all_lossless(recipe, info):
        for layer in range(info.layers):
            for side in layer_sides(recipe.kv_cache, layer, info.layers):
                made = side.method.build()
                names |= set(made.statistics) if made else set()
                for name in side.transforms:
                    names |= set(registry.get("transform", name)().statistics)
    if recipe.attention and recipe.attention.prefill:
        names |= set(recipe.attention.prefill.build().statistics)
    return tuple(sorted(names))


def _effective_bits(
    weights: tuple[WeightPlan, ...], kv_cache: tuple[KVPlan, ...]
) -> dict[str, float]:
    count = sum(row.shape[0] * row.shape[1] for row in weights)
    bits = {"weights": DENSE_BITS, "keys": DENSE_BITS, "values": DENSE_BITS}
    if count:
        bits["weights"] = 8 * sum(row.bytes_after for row in weights) / count
    rows = [row for row in kv_cache if not row.reason or "16 bits" in row.reason]
    sizes = [row.kv_heads * row.head_dim for row in rows]
    for side, attribute in (("keys", "key_bits"), ("values", "value_bits")):
        if rows:
            total = sum(getattr(r, attribute) * n for r, n in zip(rows, sizes, strict=True))
            # Tables are shared by both sides: half of them is charged to each.
            total += 8 * sum(row.constant_bytes for row in rows) / 2 / AMORTISED_TOKENS
            bits[side] = total / sum(sizes)
    return bits


def _kv_bytes(
    info: ModelInfo,
    rows: tuple[KVPlan, ...],
    sink_tokens: int,
    residual: int,
    context: int,
    batch: int,
) -> dict[str, int]:
    item = info.dtype_bits / 8
    by_layer = {row.layer: row for row in rows}
    before = after = 0.0
    for layer in info.attention:
        values = layer.kv_heads * layer.head_dim
        dense = 2 * values * context * item
        row = by_layer.get(layer.layer)
        before += dense
        if row is None or row.keys is None:
            after += dense
            continue
        exact = sink_tokens + residual + row.block_length
        blocks = max(0, (context - sink_tokens - residual) // row.block_length)
        packed = blocks * row.block_length * values * (row.key_bits + row.value_bits) / 8
        after += packed + 2 * values * exact * item + row.constant_bytes / batch
    return {"before": round(before * batch), "after": round(after * batch)}
