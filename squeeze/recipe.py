"""The recipe: what the user asked for, checked strictly and frozen.

A recipe is YAML (or a dict) with up to five sections, all optional: ``weights``, ``kv_cache``,
``attention``, ``calibration`` and ``evaluate``. Every key and value is checked here, so that
everything after may trust it; whether a given model can run it is the plan's question.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from squeeze.errors import RecipeError, nearest
from squeeze.recipe_parse import Parser, layer_candidates, layer_sides
from squeeze.recipe_schema import schema
from squeeze.recipe_values import KVCache, KVSide, Method, Recipe, WeightRule

__all__ = [
    "KVCache",
    "KVSide",
    "Method",
    "Recipe",
    "WeightRule",
    "layer_candidates",
    "layer_sides",
    "load",
    "schema",
    "shipped",
]


def shipped() -> dict[str, Path]:
    """Return the recipes that come with squeeze: name to path."""
    inside, beside = Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes"
    folder = inside if inside.is_dir() else beside
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
) -> Recipe:
    """Read a recipe from a shipped name, a file, a mapping, or pass one through.

    Args:
        recipe: ``"kv4"``, ``"my.yaml"``, a mapping as YAML would give, or a ``Recipe``.
        overrides: ``{"kv_cache.keys.bits": 3}`` or ``["kv_cache.keys.bits=3"]``.

    Raises:
        RecipeError: naming file, path, value, what is allowed and the nearest known name.
    """
    if isinstance(recipe, Recipe):
        if not overrides:
            return recipe
        raw, name, origin = recipe.to_dict(), recipe.name, recipe.origin
    elif isinstance(recipe, Mapping):
        raw, name, origin = copy.deepcopy(dict(recipe)), "recipe", "recipe"
    else:
        path = _find(recipe)
        raw, name, origin = _read(path), path.stem, path.name
    for key, value in _parse_overrides(overrides):
        _override(raw, key, value, origin)
    return Parser(origin).recipe(raw, name)


def _find(recipe: str | Path) -> Path:
    path, known = Path(recipe), shipped()
    if str(recipe) in known:
        return known[str(recipe)]
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(
            "recipe",
            f"no file {str(recipe)!r}",
            "a path to a YAML file, or one of " + ", ".join(known),
            nearest(path.stem, known),
        )
    raise RecipeError(
        "recipe",
        f"unknown recipe {str(recipe)!r}",
        "a path to a YAML file, or one of " + ", ".join(known),
        nearest(str(recipe), known) or "Check the spelling, or pass a path",
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and not the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice@{line}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.constructor.ConstructorError as error:
        key, _, line = str(error.problem).partition("@")
        raise RecipeError(
            f"{path.name}, line {line or '?'}", key, "each key once", "Remove one of the two"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path.name}, line {mark.line + 1}" if mark else path.name
        what = getattr(error, "problem", None) or "not text"
        raise RecipeError(
            place, f"not YAML ({what})", "a YAML mapping", "Fix the syntax there"
        ) from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RecipeError(
            path.name, f"holds a {type(raw).__name__}", "a YAML mapping", "Start with 'version: 1'"
        )
    return raw


def _parse_overrides(
    overrides: Mapping[str, Any] | Sequence[str] | None,
) -> list[tuple[str, Any]]:
    if overrides is None:
        return []
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RecipeError("--set", f"got {item!r}", "path=value", "e.g. kv_cache.keys.bits=3")
        pairs.append((key, yaml.safe_load(value)))
    return pairs


def _override(raw: dict[str, Any], key: str, value: Any, origin: str) -> None:
    place: Any = raw
    *parents, last = key.split(".")
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(
            f"--set {key}",
            f"{origin} has nothing at that path",
            "a path of keys and list indices",
            "e.g. weights.0.bits=3",
        ) from error
