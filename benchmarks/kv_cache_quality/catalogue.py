"""What squeeze can store a cache in: formats with their parameters, and recipes with their bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from squeeze import recipe, registry
from squeeze.cli.ls import parameters
from squeeze.errors import SqueezeError
from squeeze.model_info import ModelInfo, describe
from squeeze.plan import make_plan
from squeeze.recipe import KVCache, KVSide, Recipe

HEAD_SIZES = (64, 128)


def formats() -> str:
    """Describe every KV format and transform of the registry as Markdown."""
    lines = ["| method | what it stores | parameters | source |", "|---|---|---|---|"]
    for kind in ("kv", "transform"):
        for name in registry.names(kind):
            info = registry.info(kind, name)
            idea = info.idea.replace("``", "`").replace("|", "\\|")
            allowed = "<br>".join(f"`{k}`: {v}" for k, v in parameters(info.cls).items())
            source = f"[{info.year}]({info.source})"
            lines.append(f"| `{name}` | {idea} | {allowed} | {source} |")
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """Describe every recipe that only packs the cache: both sides, and effective bits by D."""
    model = describe("reference")
    sizes = [f"bits at D = {size}" for size in HEAD_SIZES]
    lines = ["| " + " | ".join(["recipe", "keys", "values", *sizes, "for what"]) + " |"]
    lines.append("|---|---|---|" + "---:|" * len(sizes) + "---|")
    for name, path in recipe.shipped().items():
        made = recipe.load(name)
        if not made.kv_cache or made.weights or made.attention:
            continue
        found = [_bits(made, model, size) for size in HEAD_SIZES]
        cells = [f"`{name}`", *_sides(made.kv_cache), *found, _purpose(path)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _purpose(path: Path) -> str:
    """Return the first sentence of the comment that a recipe starts with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(x.lstrip("# ") for x in takewhile(lambda x: x.startswith("#"), lines))
    return comment.partition(". ")[0].rstrip(".") + "."


def _sides(kv: KVCache) -> list[str]:
    """Write both sides of a cache in a few words each."""
    if kv.mean_bits is not None:
        return [f"chosen per layer under {kv.mean_bits} mean bits"] * 2
    rules = f"; {len(kv.layers)} rules for single layers" if kv.layers else ""
    return [_side(side) + rules for side in (kv.keys, kv.values)]


def _side(side: KVSide) -> str:
    """Write format and transforms with their parameters."""
    transforms = [{"method": t} if isinstance(t, str) else t for t in side.transforms]
    return "; ".join(_method(entry) for entry in [side.method.to_dict(), *transforms])


def _method(entry: Mapping[str, Any]) -> str:
    """Write one method with its parameters."""
    rest = [f"{key} {value}".lower() for key, value in entry.items() if key != "method"]
    return ", ".join([f"`{entry['method']}`", *rest])


def _bits(made: Recipe, model: ModelInfo, head_dim: int) -> str:
    """Return the mean of both sides' effective bits with heads of ``head_dim``."""
    layers = tuple(dataclasses.replace(item, head_dim=head_dim) for item in model.attention)
    try:
        plan = make_plan(made, dataclasses.replace(model, attention=layers), device="cpu")
    except SqueezeError:
        return "not possible"
    return f"{(plan.effective_bits['keys'] + plan.effective_bits['values']) / 2:.2f}"
