"""Which layers hurt at which bits: every layer squeezed alone, the loss measured at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.evaluation.scoring import Progress
from squeeze.evaluation.suite import calibration_tokens, layer_costs
from squeeze.measurement import render
from squeeze.model_info import describe
from squeeze.plan import make_plan
from squeeze.recipe import Recipe, load

PARTS = ("weights", "keys", "values")


@dataclass(frozen=True)
class Cost:
    """Rise of the loss, nats per token, when one part of one layer is squeezed alone."""

    layer: int
    part: str
    bits: float
    loss_increase: float


@dataclass(frozen=True)
class Sensitivity:
    """All costs of a model, and the conditions they hold under."""

    rows: tuple[Cost, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"rows": [asdict(row) for row in self.rows], "conditions": self.conditions}

    def table(self) -> str:
        """Lay out layers down and part with effective bits across, nats per token."""
        columns = sorted({(PARTS.index(r.part), r.bits) for r in self.rows})
        table = Table("layer", *(f"{PARTS[part]} {bits:.2f}" for part, bits in columns))
        cells = {(r.layer, PARTS.index(r.part), r.bits): r.loss_increase for r in self.rows}
        for layer in sorted({row.layer for row in self.rows}):
            values = [cells.get((layer, *column)) for column in columns]
            table.add_row(str(layer), *("" if v is None else f"{v:+.4f}" for v in values))
        where = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        return f"{render(table)}\nloss increase, nats per token; {where}"


def inspect_layers(
    model: Any,
    tokenizer: Any,
    bits: Sequence[int],
    *,
    seed: int = 0,
    length: int = 1024,
    windows: int = 2,
    progress: Progress | None = None,
) -> Sensitivity:
    """Squeeze the weights, the keys and the values of one layer at a time.

    Weights by Fisher-weighted k-means, keys per channel, values per token, in groups that fit the
    model. The loss is measured in decode mode on held-out text.

    Args:
        model: Dense; restored afterwards.
        tokenizer: Its tokenizer.
        bits: Nominal widths to try.
        seed: Of the calibration text.
        length: Tokens of a window.
        windows: Number of windows.
        progress: Called as ``progress(stage, done, total)``.

    Raises:
        UnsupportedError: the model can take none of the three.
    """
    info = describe(model)
    recipes = {
        (p, b): recipe_for(p, b, info.attention[0].head_dim, seed) for p in PARTS for b in bits
    }
    plans = {
        key: make_plan(recipe, info, device=model.device.type) for key, recipe in recipes.items()
    }
    needed = {name for plan in plans.values() for name in plan.statistics}
    stats = None
    if needed:
        tokens = calibration_tokens(tokenizer, next(iter(recipes.values())).calibration)
        stats = calibrate(model, tokens.to(model.device), needed, folder=None, progress=progress)
    rows = []
    for (part, _), plan in plans.items():
        artifacts = compress(model, plan, stats)
        costs = layer_costs(
            model, tokenizer, artifacts, length=length, windows=windows, progress=progress
        )
        for cost in costs:
            width = cost["bits"] if part == "weights" else plan.effective_bits[part]
            rows.append(Cost(cost["layer"], part, round(width, 3), cost["loss_increase"]))
    conditions = {"mode": "decode", "length": length, "windows": windows, "seed": seed}
    return Sensitivity(tuple(rows), conditions)


def recipe_for(part: str, bits: int, head_dim: int, seed: int) -> Recipe:
    """Write the recipe that squeezes one part at one width."""
    calibration = {"samples": 8, "length": 512, "seed": seed}
    if part == "weights":
        return load({"weights": [{"method": "kmeans", "bits": bits}], "calibration": calibration})
    token_group = next(g for g in (64, 32, 16, 8, head_dim) if head_dim % g == 0)
    formats = {
        "keys": {"method": "affine", "bits": bits, "granularity": "channel", "group_size": 64},
        "values": {
            "method": "affine",
            "bits": bits,
            "granularity": "token",
            "group_size": token_group,
        },
    }
    sides = {side: formats[side] if side == part else {"bits": 16} for side in formats}
    return load({"kv_cache": sides})
