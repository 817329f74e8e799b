"""Which layers hurt at which bits: every layer squeezed alone, the loss measured at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import yaml
from rich.table import Table

from squeeze.calibrate import Stats, calibrate
from squeeze.compress import compress
from squeeze.evaluation.probe import PROMPT_TOKENS, WINDOWS
from squeeze.evaluation.scoring import Progress
from squeeze.evaluation.sensitivity import SIDES, measure_and_allocate
from squeeze.evaluation.suite import calibration_texts, calibration_tokens, layer_costs
from squeeze.measurement import render
from squeeze.model_info import ModelInfo, describe
from squeeze.plan import KV_LOSS, Plan, make_plan
from squeeze.recipe import Recipe, load

PARTS = ("weights", *SIDES)
GROUP_TOKENS = 64  # of the keys that are measured
# A layer whose narrowest keys or values diverge this much, and this many times the median layer.
HIGH_DIVERGENCE, HIGH_RATIO = 0.01, 10.0


@dataclass(frozen=True)
class Cost:
    """What it costs to squeeze one part of one layer alone, nats per token.

    Attributes:
        layer: Index of the layer.
        part: ``weights``, ``keys`` or ``values``.
        bits: Effective.
        loss_increase: Rise of the loss on text.
        divergence: KL(dense || squeezed) of the predictions, for keys and values: the same with
            far less noise.
    """

    layer: int
    part: str
    bits: float
    loss_increase: float
    divergence: float | None = None


@dataclass(frozen=True)
class Finding:
    """Something about one layer that a recipe should heed."""

    layer: int
    part: str
    text: str


@dataclass(frozen=True)
class Sensitivity:
    """All costs of a model, the conditions they hold under, and what follows.

    Attributes:
        rows: Costs.
        conditions: Mode, lengths, counts, seed.
        findings: Layers that stand out.
        recommended: A ``kv_cache`` section; ``None`` where the cache was not inspected.
        reason: What was measured of it, beside the best uniform choice.
    """

    rows: tuple[Cost, ...]
    conditions: dict[str, Any]
    findings: tuple[Finding, ...] = ()
    recommended: dict[str, Any] | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def table(self) -> str:
        """Lay out the costs, then the findings and the recommended section."""
        where = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        rises = {_cell(r): f"{r.loss_increase:+.4f}" for r in self.rows}
        known = {_cell(r): f"{r.divergence:.1e}" for r in self.rows if r.divergence is not None}
        lines = [_grid(rises), f"loss increase, nats per token; {where}"]
        if known:
            lines += [_grid(known), "divergence KL(dense || squeezed), nats per token"]
        lines += [f"layer {f.layer} {f.part}: {f.text}" for f in self.findings]
        if self.recommended is not None:
            lines += [self.reason, "recommended:", _yaml({"kv_cache": self.recommended})]
        return "\n".join(lines)


def inspect_layers(
    model: Any,
    tokenizer: Any,
    bits: Sequence[int],
    *,
    parts: Sequence[str] = PARTS,
    mean_bits: float | None = None,
    seed: int = 0,
    length: int = 1024,
    windows: int = 2,
    progress: Progress | None = None,
) -> Sensitivity:
    """Squeeze the weights, the keys and the values of one layer at a time.

    Weights by Fisher-weighted k-means, keys per channel, values per token, in groups that fit the
    model; the loss is measured in decode mode. Keys and values are measured as an allocation does,
    on calibration text with facts in it, and the section it would choose is recommended.

    Args:
        model: Dense; restored afterwards.
        tokenizer: Its tokenizer.
        bits: Nominal widths to try.
        parts: Any of ``weights``, ``keys``, ``values``; keys and values go together.
        mean_bits: Bound of the recommended section; by default halfway between the widths.
        seed: Of the calibration text.
        length: Tokens of a window (weights).
        windows: Number of windows (weights).
        progress: Called as ``progress(stage, done, total)``.

    Raises:
        UnsupportedError: the model cannot take what is asked for.
        RecipeError: ``mean_bits`` is under what the narrowest formats need.
    """
    info = describe(model)
    conditions: dict[str, Any] = {"mode": "decode", "seed": seed}
    rows: list[Cost] = []
    if "weights" in parts:
        size = {"length": length, "windows": windows}
        conditions["weights"] = f"{windows} windows of {length} tokens"
        rows += _weights(model, tokenizer, info, bits, seed, progress, size)
    if not set(parts) & set(SIDES):
        return Sensitivity(tuple(rows), conditions)
    conditions["cache"] = f"{WINDOWS} prompts of up to {PROMPT_TOKENS} tokens with facts in them"
    recipe = cache_recipe(bits, info.attention[0].head_dim, mean_bits)
    plan = make_plan(recipe, info, device=model.device.type)
    texts = calibration_texts(recipe.calibration)
    plan, stats = measure_and_allocate(
        model, tokenizer, plan, None, texts, seed=seed, progress=progress
    )
    costs = _cache(recipe, plan, stats)
    return Sensitivity(
        (*rows, *costs),
        conditions,
        (*huge_biases(info, costs), *outliers(costs)),
        section(plan),
        plan.notes[-1],
    )


def cache_recipe(bits: Sequence[int], head_dim: int, mean_bits: float | None) -> Recipe:
    """Write the recipe that chooses each layer's keys and values among these widths."""
    group = next(g for g in (64, 32, 16, 8, head_dim) if head_dim % g == 0)
    cache: dict[str, Any] = {
        "keys": {"method": "affine", "granularity": "channel", "group_size": GROUP_TOKENS},
        "values": {"method": "affine", "granularity": "token", "group_size": group},
        "candidates": {side: [{"bits": width} for width in bits] for side in SIDES},
    }
    if mean_bits is None:
        widest = load({"kv_cache": {**cache, "mean_bits": 16.0}}).kv_cache
        assert widest is not None and widest.candidates is not None
        sides = (*widest.candidates.keys, *widest.candidates.values)
        found = [side.method.build().bits_per_value(head_dim) for side in sides]
        mean_bits = (min(found) + max(found)) / 2
    return load({"kv_cache": {**cache, "mean_bits": mean_bits}})


def huge_biases(info: ModelInfo, costs: Sequence[Cost]) -> list[Finding]:
    """Name the layers whose keys have a huge bias, and say what their bits cost."""
    found = []
    for bias in info.key_biases or ():
        own = [c for c in costs if (c.layer, c.part) == (bias.layer, "keys")]
        measured = ", ".join(f"{c.divergence:.1e} at {c.bits:.2f} bits" for c in own)
        lost = max(0.0, bias.lost_bits(GROUP_TOKENS))
        text = (
            f"the {bias.projection} bias has norm {bias.norm:.0f} (median of all layers "
            f"{bias.usual:.0f}, weights {bias.weight_norm:.0f}); it costs per-channel keys "
            f"{lost:.1f} bits, others {bias.lost_bits(None):.1f}; keys diverge by {measured}"
        )
        found.append(Finding(bias.layer, "keys", text))
    return found


def outliers(costs: Sequence[Cost]) -> list[Finding]:
    """Name the layers whose keys or values at the narrowest width cost far more than others'."""
    found = []
    for side in SIDES:
        own = [c for c in costs if c.part == side and c.divergence is not None]
        narrow = [c for c in own if c.bits == min(x.bits for x in own)]
        usual = median(c.divergence or 0.0 for c in narrow) if narrow else 0.0
        for cost in narrow:
            divergence = cost.divergence or 0.0
            if divergence > HIGH_DIVERGENCE and divergence > HIGH_RATIO * usual:
                text = (
                    f"{divergence:.1e} nats per token of divergence at {cost.bits:.2f} bits, "
                    f"{usual:.1e} in the median layer"
                )
                found.append(Finding(cost.layer, side, text))
    return found


def section(plan: Plan) -> dict[str, Any]:
    """Write a plan's cache as a recipe section: the commonest formats, then overrides."""
    rows = [row for row in plan.kv_cache if row.keys and row.values]
    base = {side: _commonest([getattr(row, side) for row in rows]) for side in SIDES}
    layers: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for row in rows:
        override = {}
        for side in SIDES:
            own = getattr(row, side)
            changed = {k: v for k, v in own.items() if base[side].get(k) != v}
            if changed:
                override[side] = changed if own["method"] == base[side]["method"] else own
        if override:
            layers.setdefault(repr(override), (override, []))[1].append(row.layer)
    exact = {"sink_tokens": plan.sink_tokens, "residual_length": plan.residual_length}
    overrides = [{"match": match, **override} for override, match in layers.values()]
    return {**base, **exact, **({"layers": overrides} if overrides else {})}


def _commonest(sides: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(sides, key=sides.count)


def _weights(
    model: Any,
    tokenizer: Any,
    info: ModelInfo,
    bits: Sequence[int],
    seed: int,
    progress: Progress | None,
    size: dict[str, int],
) -> list[Cost]:
    """Costs of every layer's weights at every width."""
    calibration = {"samples": 8, "length": 512, "seed": seed}
    recipes = [
        load({"weights": [{"method": "kmeans", "bits": width}], "calibration": calibration})
        for width in bits
    ]
    plans = [make_plan(recipe, info, device=model.device.type) for recipe in recipes]
    needed = {name for plan in plans for name in plan.statistics}
    tokens = calibration_tokens(tokenizer, recipes[0].calibration).to(model.device)
    stats = calibrate(model, tokens, needed, progress=progress)
    costs = []
    for plan in plans:
        made = compress(model, plan, stats)
        costs += layer_costs(model, tokenizer, made, progress=progress, **size)
    return [Cost(c["layer"], "weights", round(c["bits"], 3), c["loss_increase"]) for c in costs]


def _cache(recipe: Recipe, plan: Plan, stats: Stats) -> list[Cost]:
    """Costs of every layer's keys and values at every width, from the statistics."""
    assert recipe.kv_cache is not None and recipe.kv_cache.candidates is not None
    rows = []
    for row in plan.kv_cache:
        if row.module in stats.tensors[KV_LOSS]:
            for side, losses in zip(SIDES, stats.tensors[KV_LOSS][row.module], strict=True):
                options = getattr(recipe.kv_cache.candidates, side)
                for option, (divergence, rise) in zip(options, losses.tolist(), strict=True):
                    width = option.method.build().bits_per_value(row.head_dim)
                    rows.append(Cost(row.layer, side, round(width, 3), rise, divergence))
    return rows


def _cell(row: Cost) -> tuple[int, int, float]:
    return row.layer, PARTS.index(row.part), row.bits


def _grid(cells: dict[tuple[int, int, float], str]) -> str:
    """Lay out layers down, and part with effective bits across."""
    columns = sorted({(part, bits) for _, part, bits in cells})
    table = Table("layer", *(f"{PARTS[part]} {bits:.2f}" for part, bits in columns))
    for layer in sorted({layer for layer, *_ in cells}):
        table.add_row(str(layer), *(cells.get((layer, part, bits), "") for part, bits in columns))
    return render(table)


def _yaml(section: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(section, sort_keys=False, default_flow_style=None, width=100)
    return text.rstrip()
