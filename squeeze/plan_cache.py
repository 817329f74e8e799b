"""How a plan's cache stores every layer: its rows, their bits and their bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from squeeze.errors import RecipeError
from squeeze.model_info import AttentionInfo, ModelInfo, require_packable
from squeeze.plan_fold import settle_folds
from squeeze.plan_guard import finer_sides
from squeeze.quant.kv._raw import RawBlocks
from squeeze.recipe import KVSide, Recipe, layer_candidates, layer_sides
from squeeze.recipe_values import build_transform

DENSE_BITS = 16.0
# Tokens of a cache block unless the recipe says otherwise: what the decode kernel reads best.
BLOCK_LENGTH = 128
BITS_TOLERANCE = 1e-9  # of a mean compared with its bound
# Tables that do not grow with tokens are spread over this many, at batch 1.
AMORTISED_TOKENS = 32768


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
class Allocation:
    """A bound on the mean effective bits of the cache, and what was chosen under it.

    Attributes:
        mean_bits: The bound, over keys and values of all layers with full attention.
        layers: Those whose formats are chosen; the recipe's overrides name the others.
        implementation: What computes attention over packed layers.
        chosen: ``"mix"`` (formats differ between layers), ``"uniform"``, or empty before
            calibration: the plan then holds the widest uniform choice.
        measured: Held-out divergence from the dense model, nats per token, of ``"mix"`` and of the
            best ``"uniform"`` choice; empty where it was not measured.
    """

    mean_bits: float
    layers: tuple[int, ...]
    implementation: str
    chosen: str = ""
    measured: dict[str, float] = field(default_factory=dict)


def cache_rows(recipe: Recipe, info: ModelInfo, implementation: str) -> Iterable[KVPlan]:
    """Plan every layer's cache; nothing where the recipe has none or is lossless.

    Raises:
        UnsupportedError: the model or its head size cannot take it.
        RecipeError: an override names a layer that does not exist.
    """
    kv = recipe.kv_cache
    if kv is None or all_lossless(recipe, info):
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
        finer = finer_sides(kv, item.layer, info)
        keys, values = finer[:2] if finer else layer_sides(kv, item.layer, info.layers)
        keys = settle_folds(recipe, keys, info)
        row = KVPlan(keys=None, values=None, implementation=implementation, **common)
        row = packed_row(recipe, row, keys, values, implementation)
        if finer and row.reason:
            row = replace(row, reason="its huge key bias asks for 16 bits")
        yield row


def bound_of(
    recipe: Recipe, info: ModelInfo, rows: Sequence[KVPlan], implementation: str
) -> Allocation | None:
    """Return what is to be allocated, before anything is measured; ``None`` without a bound."""
    kv = recipe.kv_cache
    if kv is None or kv.mean_bits is None or not rows:
        return None
    named = {i % info.layers for override in kv.layers for i in override.match}
    full = {item.layer for item in info.attention if item.kind == "full_attention"}
    return Allocation(kv.mean_bits, tuple(sorted(full - named)), implementation)


def packed_row(
    recipe: Recipe, row: KVPlan, keys: KVSide, values: KVSide, implementation: str
) -> KVPlan:
    """Give a full-attention layer these formats.

    Raises:
        UnsupportedError: a format does not take the layer's head size.
        RecipeError: the block length holds no whole number of a format's groups.
    """
    if keys.method.lossless and values.method.lossless:
        reason = "the recipe keeps it at 16 bits"
        return KVPlan(
            layer=row.layer,
            module=row.module,
            keys=None,
            values=None,
            implementation="dense",
            kv_heads=row.kv_heads,
            head_dim=row.head_dim,
            reason=reason,
        )
    formats = [build_format(side, row) for side in (keys, values)]
    sizes = [side_bits(side, row) for side in (keys, values)]
    return replace(
        row,
        keys=keys.to_dict(),
        values=values.to_dict(),
        implementation=implementation,
        reason="",
        block_length=_block_length(recipe, formats),
        key_bits=sizes[0][0],
        value_bits=sizes[1][0],
        constant_bytes=sizes[0][1] + sizes[1][1],
    )


def side_bits(side: KVSide, row: KVPlan) -> tuple[float, int]:
    """Count a side's stored bits per value, and the bytes of its tables."""
    made = build_format(side, row)
    tables = made.constant_bytes(row.kv_heads, row.head_dim) + _transform_bytes(side, row)
    return made.bits_per_value(row.head_dim), tables


def cache_bits(rows: Sequence[KVPlan]) -> float:
    """Return the mean effective bits of keys and values, tables included."""
    bits = side_means(rows)
    return (bits["keys"] + bits["values"]) / 2


def uniform_rows(
    recipe: Recipe, rows: Sequence[KVPlan], allocation: Allocation
) -> list[tuple[KVPlan, ...]]:
    """List the uniform choices under a bound that no other one exceeds on both sides, widest first.

    A uniform choice gives one pair of candidates to all layers that are to be chosen.

    Raises:
        RecipeError: every choice is over the bound.
    """
    assert recipe.kv_cache is not None and recipe.kv_cache.candidates is not None
    candidates, found = recipe.kv_cache.candidates, []
    for pair in itertools.product(candidates.keys, candidates.values):
        made = tuple(
            packed_row(recipe, row, *pair, allocation.implementation)
            if row.layer in allocation.layers
            else row
            for row in rows
        )
        bits = side_means(made)
        found.append((bits["keys"], bits["values"], made))
    fitting = [x for x in found if (x[0] + x[1]) / 2 <= allocation.mean_bits + BITS_TOLERANCE]
    if not fitting:
        least = min((keys + values) / 2 for keys, values, _ in found)
        raise RecipeError(
            f"{recipe.origin}: kv_cache.mean_bits",
            f"{allocation.mean_bits} is under what the narrowest candidates need",
            f"at least {least:.3f} effective bits here",
            "Raise it, or add narrower candidates",
        )
    exceeded = [
        any(o[0] >= x[0] and o[1] >= x[1] and o[:2] != x[:2] for o in fitting) for x in fitting
    ]
    widest = [x for x, over in zip(fitting, exceeded, strict=True) if not over]
    return [made for *_, made in sorted(widest, key=lambda x: (-x[0] - x[1], -x[0]))]


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


def all_lossless(recipe: Recipe, info: ModelInfo) -> bool:
    """Say whether a recipe's cache section stores everything as it is."""
    assert recipe.kv_cache is not None
    layers = max(info.layers, 1)
    sides = [
        side
        for i in range(layers)
        for candidates in layer_candidates(recipe.kv_cache, i, layers)
        for side in candidates
    ]
    return all(side.method.lossless for side in sides)


def build_format(side: KVSide, item: AttentionInfo | KVPlan) -> Any:
    """Make the format of one side, checked against the head size."""
    made = side.method.build()
    if made is None:
        return RawBlocks()
    made.check(item.head_dim)
    return made


def _transform_bytes(side: KVSide, item: AttentionInfo | KVPlan) -> int:
    # A transform with parameters holds one float32 per channel of each head, or says otherwise.
    total = 0
    for entry in side.transforms:
        transform = build_transform(entry)[1]
        if hasattr(transform, "constant_bytes"):
            total += transform.constant_bytes(item.kv_heads, item.head_dim)
        elif transform.statistics:
            total += 4 * item.kv_heads * item.head_dim
    return total


def side_means(kv_cache: Sequence[KVPlan]) -> dict[str, float]:
    """Return the mean effective bits of keys and of values, tables included."""
    bits = {"keys": DENSE_BITS, "values": DENSE_BITS}
    rows = [row for row in kv_cache if not row.reason or "16 bits" in row.reason]
    sizes = [row.kv_heads * row.head_dim for row in rows]
    for side, attribute in (("keys", "key_bits"), ("values", "value_bits")):
        if rows:
            total = sum(getattr(r, attribute) * n for r, n in zip(rows, sizes, strict=True))
            # Tables are shared by both sides: half of them is charged to each.
            total += 8 * sum(row.constant_bytes for row in rows) / 2 / AMORTISED_TOKENS
            bits[side] = total / sum(sizes)
    return bits


def kv_bytes(
    attention: Sequence[AttentionInfo | KVPlan],
    dtype_bits: int,
    rows: Sequence[KVPlan],
    sink_tokens: int,
    residual: int,
    context: int,
    batch: int,
) -> dict[str, int]:
    """Count the allocated bytes of a cache; see ``Plan.kv_bytes``."""
    item = dtype_bits / 8
    by_layer = {row.layer: row for row in rows}
    before = after = total = largest = 0.0
    for layer in attention:
        values = layer.kv_heads * layer.head_dim
        dense = 2 * values * context * item
        row = by_layer.get(layer.layer)
        before += dense
        if row is None or row.keys is None:
            after += dense
            continue
        exact = min(context, sink_tokens + residual + row.block_length)
        blocks = max(0, (context - sink_tokens - residual) // row.block_length)
        packed = blocks * row.block_length * values * (row.key_bits + row.value_bits) / 8
        after += packed + 2 * values * exact * item + row.constant_bytes / batch
        total, largest = total + packed, max(largest, packed)
    counted = {"before": before, "after": after, "packed": total, "largest_layer": largest}
    return {name: round(count * batch) for name, count in counted.items()}
