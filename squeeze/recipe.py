"""The recipe: what the user asked for, checked strictly and frozen.

A recipe is YAML (or a dict) with up to five sections, all optional: ``weights``, ``kv_cache``,
``attention``, ``calibration`` and ``evaluate``. Every key and value is checked here, so that
everything after may trust it; whether a given model can run it is the plan's question.
"""

from __future__ import annotations

import copy
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from squeeze import registry
from squeeze.errors import RecipeError, nearest
from squeeze.types import Implementation

VERSION = 1
LOSSLESS_BITS = 16


class Section(BaseModel):
    """A strict, frozen part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Method(Section):
    """One method by name with its parameters; ``build`` makes the method object.

    ``bits: 16`` is the lossless setting: the tensor stays as it is and ``build`` returns ``None``.
    """

    kind: str
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether this leaves the tensor in the model's own precision."""
        return self.parameters.get("bits") == LOSSLESS_BITS

    def build(self) -> Any:
        """Make the method object, or ``None`` when lossless."""
        if self.lossless:
            return None
        known = {f.name for f in fields(registry.get(self.kind, self.name))}
        kept = {key: value for key, value in self.parameters.items() if key in known}
        return registry.get(self.kind, self.name)(**kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that the recipe file would hold."""
        return {"method": self.name, **self.parameters}


class WeightRule(Section):
    """Which modules one weight method applies to; later rules win."""

    method: Method
    targets: tuple[str, ...] = ("self_attn", "attn", "attention", "mlp", "feed_forward")
    ignore: tuple[str, ...] = ("lm_head", "embed")


class LayerOverride(Section):
    """KV settings of some layers; negative indices count from the end."""

    match: tuple[int, ...]
    keys: dict[str, Any] = Field(default_factory=dict)
    values: dict[str, Any] = Field(default_factory=dict)


class KVSide(Section):
    """Format and transforms of the keys, or of the values."""

    method: Method
    transforms: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that the recipe file would hold."""
        result = self.method.to_dict()
        return {**result, "transforms": list(self.transforms)} if self.transforms else result


class KVCache(Section):
    """How the cache stores keys and values, and how many tokens stay exact."""

    keys: KVSide
    values: KVSide
    sink_tokens: int = 4
    residual_length: int = 128
    layers: tuple[LayerOverride, ...] = ()


class Attention(Section):
    """Sparse attention policies."""

    prefill: Method | None = None


class Calibration(Section):
    """Text that statistics are measured on."""

    data: str = "books"
    samples: Annotated[int, Field(ge=1)] = 32
    length: Annotated[int, Field(ge=16)] = 512
    seed: int = 0


class Evaluate(Section):
    """What ``run`` measures; counts are at 2048 tokens and shrink at longer lengths."""

    tasks: tuple[str, ...] = ("books_perplexity", "needle")
    modes: tuple[Literal["decode", "prefill"], ...] = ("decode", "prefill")
    lengths: tuple[Annotated[int, Field(ge=64)], ...] = (2048, 8192)
    windows: Annotated[int, Field(ge=1)] = 4
    facts: Annotated[int, Field(ge=1)] = 24
    sensitivity: bool = True


class Recipe(Section):
    """A whole recipe; ``origin`` says where it came from, for error messages and reports."""

    name: str = "recipe"
    origin: str = "recipe"
    weights: tuple[WeightRule, ...] = ()
    kv_cache: KVCache | None = None
    attention: Attention | None = None
    implementation: str = "auto"
    calibration: Calibration = Calibration()
    evaluate: Evaluate = Evaluate()

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that ``load`` reads back to an equal recipe."""
        result: dict[str, Any] = {"version": VERSION}
        if self.weights:
            result["weights"] = [
                {**r.method.to_dict(), "targets": list(r.targets), "ignore": list(r.ignore)}
                for r in self.weights
            ]
        if self.kv_cache:
            kv = self.kv_cache
            result["kv_cache"] = {
                "keys": kv.keys.to_dict(),
                "values": kv.values.to_dict(),
                "sink_tokens": kv.sink_tokens,
                "residual_length": kv.residual_length,
                "layers": [
                    {"match": list(o.match), "keys": o.keys, "values": o.values} for o in kv.layers
                ],
            }
        if self.attention and self.attention.prefill:
            result["attention"] = {"prefill": self.attention.prefill.to_dict()}
        if self.implementation != "auto":
            result["implementation"] = self.implementation
        result["calibration"] = self.calibration.model_dump(mode="json")
        result["evaluate"] = self.evaluate.model_dump(mode="json")
        return result


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
    return _Parser(origin).recipe(raw, name)


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


class _Parser:
    """Turn a raw mapping into a ``Recipe``, with errors that name the place."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def error(self, path: str, received: str, allowed: str = "", remedy: str = "") -> RecipeError:
        return RecipeError(
            f"{self.origin}: {path}" if path else self.origin, received, allowed, remedy
        )

    def mapping(self, raw: Any, path: str, known: Sequence[str] | None = None) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise self.error(
                path, f"got {raw!r}", "a mapping of keys to values", "Indent the keys under it"
            )
        for key in raw:
            if known is not None and key not in known:
                raise self.error(
                    _join(path, key),
                    f"unknown key {key!r}",
                    ", ".join(known),
                    nearest(key, known) or "Remove it",
                )
        return raw

    def recipe(self, raw: dict[str, Any], name: str) -> Recipe:
        sections = (
            "version",
            "weights",
            "kv_cache",
            "attention",
            "implementation",
            "calibration",
            "evaluate",
        )
        raw = self.mapping(raw, "", sections)
        version = raw.get("version", VERSION)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise self.error("version", f"got {version!r}", str(VERSION), "Write 'version: 1'")
        if version > VERSION:
            raise self.error(
                "version",
                f"recipe format {version} is newer than this squeeze",
                f"up to {VERSION}",
                "Upgrade squeeze",
            )
        implementation = raw.get("implementation", "auto")
        known = [item.value for item in Implementation]
        if implementation not in known:
            raise self.error(
                "implementation",
                f"got {implementation!r}",
                ", ".join(known),
                nearest(implementation, known) or "Choose one",
            )
        return Recipe(
            name=name,
            origin=self.origin,
            implementation=implementation,
            weights=self.weights(raw.get("weights") or []),
            kv_cache=self.kv_cache(raw["kv_cache"]) if raw.get("kv_cache") else None,
            attention=self.attention(raw["attention"]) if raw.get("attention") else None,
            calibration=self.section(Calibration, raw.get("calibration") or {}, "calibration"),
            evaluate=self.section(Evaluate, raw.get("evaluate") or {}, "evaluate"),
        )

    def section(self, cls: type[Any], raw: Any, path: str) -> Any:
        known = list(cls.model_fields)
        raw = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in self.mapping(raw, path, known).items()
        }
        try:
            return cls(**raw)
        except ValidationError as failure:
            raise self.from_pydantic(failure, path) from failure

    def from_pydantic(self, failure: ValidationError, path: str) -> RecipeError:
        first = failure.errors()[0]
        place = _join(path, *first["loc"])
        return self.error(place, f"got {first['input']!r}", _allowed(first), "Change the value")

    def weights(self, raw: Any) -> tuple[WeightRule, ...]:
        if not isinstance(raw, list):
            raise self.error(
                "weights", f"got {raw!r}", "a list of rules", "Start each rule with '- '"
            )
        rules = []
        for i, rule in enumerate(raw):
            path = f"weights.{i}"
            rule = dict(self.mapping(rule, path))
            scope = {key: rule.pop(key) for key in ("targets", "ignore") if key in rule}
            for key, value in scope.items():
                if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                    raise self.error(
                        f"{path}.{key}",
                        f"got {value!r}",
                        "a list of module names or parts of them",
                        f"e.g. {key}: [self_attn, mlp]",
                    )
            method = self.method(rule, "weights", path, ("targets", "ignore"))
            rules.append(WeightRule(method=method, **{k: tuple(v) for k, v in scope.items()}))
        return tuple(rules)

    def kv_cache(self, raw: Any) -> KVCache:
        known = list(KVCache.model_fields)
        raw = self.mapping(raw, "kv_cache", known)
        for side in ("keys", "values"):
            if side not in raw:
                raise self.error(
                    f"kv_cache.{side}",
                    "is missing",
                    "a format",
                    "Add it; {bits: 16} stores it as it is",
                )
        sides = {
            side: self.kv_side(raw[side], side, f"kv_cache.{side}") for side in ("keys", "values")
        }
        for key in ("sink_tokens", "residual_length"):
            value = raw.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.error(
                    f"kv_cache.{key}",
                    f"got {value!r}",
                    "an integer of at least 0",
                    "It counts tokens kept exact",
                )
        counts = {key: raw[key] for key in ("sink_tokens", "residual_length") if key in raw}
        overrides = raw.get("layers") or []
        if not isinstance(overrides, list):
            raise self.error(
                "kv_cache.layers",
                f"got {overrides!r}",
                "a list of overrides",
                "e.g. - {match: [0, -1], keys: {bits: 8}}",
            )
        layers = tuple(
            self.layer(item, raw, f"kv_cache.layers.{i}") for i, item in enumerate(overrides)
        )
        return KVCache(**sides, **counts, layers=layers)

    def layer(self, raw: Any, base: dict[str, Any], path: str) -> LayerOverride:
        raw = self.mapping(raw, path, list(LayerOverride.model_fields))
        match = raw.get("match")
        if not isinstance(match, list) or not all(type(i) is int for i in match):
            raise self.error(
                f"{path}.match", f"got {match!r}", "a list of layer numbers", "e.g. match: [0, -1]"
            )
        for side in ("keys", "values"):
            merged = merge_side(base[side], self.mapping(raw.get(side) or {}, f"{path}.{side}"))
            self.kv_side(merged, side, f"{path}.{side}")
        return LayerOverride(
            match=tuple(match), keys=raw.get("keys") or {}, values=raw.get("values") or {}
        )

    def kv_side(self, raw: Any, side: str, path: str) -> KVSide:
        raw = dict(self.mapping(raw, path))
        transforms = raw.pop("transforms", None) or []
        if not isinstance(transforms, list):
            raise self.error(
                f"{path}.transforms",
                f"got {transforms!r}",
                "a list of transforms",
                "e.g. transforms: [center]",
            )
        for name in transforms:
            cls: Any = registry.get("transform", name, f"{self.origin}: {path}.transforms")
            if side not in cls().sides:
                raise self.error(
                    f"{path}.transforms",
                    f"{name!r} does not apply to {side}",
                    " and ".join(cls().sides),
                    "Remove it there",
                )
        method = self.method(raw, "kv", path, ("transforms",))
        return KVSide(method=method, transforms=tuple(transforms))

    def attention(self, raw: Any) -> Attention:
        raw = self.mapping(raw, "attention", list(Attention.model_fields))
        if not raw.get("prefill"):
            return Attention()
        prefill = self.mapping(raw["prefill"], "attention.prefill")
        return Attention(prefill=self.method(prefill, "prefill", "attention.prefill", ()))

    def method(
        self, raw: dict[str, Any], kind: str, path: str, siblings: tuple[str, ...]
    ) -> Method:
        raw = dict(raw)
        name = raw.pop("method", None)
        if name is None:
            if raw != {"bits": LOSSLESS_BITS}:
                raise self.error(
                    f"{path}.method",
                    "is missing",
                    ", ".join(registry.names(kind)),
                    "Name a method; {bits: 16} alone is lossless",
                )
            name = registry.names(kind)[0]
        cls: Any = registry.get(kind, name, f"{self.origin}: {path}.method")
        hints = typing.get_type_hints(cls, include_extras=True)
        known = {f.name: hints[f.name] for f in fields(cls) if f.init}
        required = [
            f.name
            for f in fields(cls)
            if f.init and f.default is MISSING and f.default_factory is MISSING
        ]
        for key, value in raw.items():
            if key not in known:
                every = [*known, "method", *siblings]
                raise self.error(
                    _join(path, key),
                    f"unknown key {key!r} of method {name!r}",
                    ", ".join(every),
                    nearest(key, every) or "Remove it",
                )
            if not (key == "bits" and value == LOSSLESS_BITS and kind != "prefill"):
                self.value(value, known[key], _join(path, key), key)
        for key in required:
            if key not in raw and raw.get("bits") != LOSSLESS_BITS:
                raise self.error(
                    _join(path, key),
                    f"is missing for method {name!r}",
                    describe(known[key]),
                    f"Add '{key}:'",
                )
        return Method(kind=kind, name=name, parameters=raw)

    def value(self, value: Any, hint: Any, path: str, key: str) -> None:
        try:
            TypeAdapter(hint).validate_python(
                tuple(value) if isinstance(value, list) else value, strict=True
            )
        except ValidationError as failure:
            extra = f", or {LOSSLESS_BITS} (lossless)" if key == "bits" else ""
            raise self.error(
                path,
                f"got {value!r}",
                describe(hint) + extra,
                nearest(str(value), _choices(hint)) or "Change the value",
            ) from failure


def merge_side(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a layer's override over a side; naming another method drops the base's parameters."""
    if override.get("method", base.get("method")) != base.get("method"):
        return dict(override)
    return {**base, **override}


def layer_sides(kv_cache: KVCache, layer: int, layers: int) -> tuple[KVSide, KVSide]:
    """Return the keys' and values' settings of one layer, overrides applied in order.

    Args:
        kv_cache: The section.
        layer: Index of the layer, from 0.
        layers: Number of decoder layers.
    """
    sides = {"keys": kv_cache.keys.to_dict(), "values": kv_cache.values.to_dict()}
    for override in kv_cache.layers:
        if layer in [i + layers if i < 0 else i for i in override.match]:
            for side in sides:
                sides[side] = merge_side(sides[side], getattr(override, side))
    parser = _Parser("recipe")
    return (
        parser.kv_side(sides["keys"], "keys", "kv_cache.keys"),
        parser.kv_side(sides["values"], "values", "kv_cache.values"),
    )


def describe(hint: Any) -> str:
    """Say in words which values an annotation allows."""
    choices = _choices(hint)
    if choices:
        return ", ".join(choices)
    if typing.get_origin(hint) is Annotated:
        base, *marks = typing.get_args(hint)
        bounds = []
        for mark in marks:
            for sign, word in (
                ("ge", "at least"),
                ("gt", "above"),
                ("le", "at most"),
                ("lt", "below"),
            ):
                bound = getattr(mark, sign, None)
                if bound is not None:
                    bounds.append(f"{word} {bound}")
            if isinstance(mark, annotated_types.MultipleOf):
                bounds.append(f"a multiple of {mark.multiple_of}")
        return " ".join([describe(base), " and ".join(bounds)]).strip()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in typing.get_args(hint))
    if hint is types.NoneType:
        return "null"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, str(hint))


def _choices(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Annotated:
        return _choices(typing.get_args(hint)[0])
    return [str(v) for v in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []


def _allowed(error: Any) -> str:
    context, kind = error.get("ctx") or {}, error["type"]
    if "expected" in context:
        return str(context["expected"])
    for key, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if key in context:
            return f"a number of {word} {context[key]}"
    return {
        "int_type": "an integer",
        "bool_type": "true or false",
        "string_type": "text",
        "tuple_type": "a list",
    }.get(kind, error["msg"])


def _join(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part not in ("", None))


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, methods and their parameters included."""

    def method(kind: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        options = []
        for name in registry.names(kind):
            cls = registry.get(kind, name)
            hints = typing.get_type_hints(cls, include_extras=True)
            properties: dict[str, Any] = {"method": {"const": name}, **extra}
            for item in fields(cls):
                properties[item.name] = _parameter(hints[item.name], item, kind)
            options.append(
                {
                    "type": "object",
                    "description": registry.info(kind, name).idea,
                    "properties": properties,
                    "required": ["method"],
                    "additionalProperties": False,
                }
            )
        lossless = {
            "type": "object",
            "properties": {"bits": {"const": LOSSLESS_BITS}},
            "required": ["bits"],
            "additionalProperties": False,
        }
        return {"anyOf": [*options, lossless] if kind != "prefill" else options}

    strings = {"type": "array", "items": {"type": "string"}}
    sides = {}
    for side in ("keys", "values"):
        usable = [
            n for n in registry.names("transform") if side in registry.get("transform", n)().sides
        ]
        sides[side] = method("kv", {"transforms": {"type": "array", "items": {"enum": usable}}})
    layer = {
        "type": "object",
        "required": ["match"],
        "additionalProperties": False,
        "properties": {
            "match": {"type": "array", "items": {"type": "integer"}},
            "keys": {"type": "object"},
            "values": {"type": "object"},
        },
    }
    count = {"type": "integer", "minimum": 0}
    kv = {
        "type": "object",
        "required": ["keys", "values"],
        "additionalProperties": False,
        "properties": {
            **sides,
            "sink_tokens": count,
            "residual_length": count,
            "layers": {"type": "array", "items": layer},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "squeeze recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "version": {"const": VERSION},
            "weights": {
                "type": "array",
                "items": method("weights", {"targets": strings, "ignore": strings}),
            },
            "kv_cache": kv,
            "attention": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"prefill": method("prefill", {})},
            },
            "implementation": {"enum": [item.value for item in Implementation]},
            "calibration": _section_schema(Calibration),
            "evaluate": _section_schema(Evaluate),
        },
    }


def _parameter(hint: Any, item: Any, kind: str) -> dict[str, Any]:
    result = TypeAdapter(hint).json_schema()
    if item.name == "bits" and kind != "prefill":
        result = {"anyOf": [result, {"const": LOSSLESS_BITS}]}
    if item.default is not MISSING:
        result["default"] = json.loads(json.dumps(item.default, default=list))
    return result


def _section_schema(cls: type[BaseModel]) -> dict[str, Any]:
    return {**cls.model_json_schema(), "additionalProperties": False}
