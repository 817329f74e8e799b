"""From a raw mapping to a ``Recipe``: every key and value checked, every mistake named."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import TypeAdapter, ValidationError

from squeeze import registry
from squeeze.errors import RecipeError, nearest
from squeeze.recipe_values import (
    ALLOCATED_SIDES,
    ALLOCATED_WEIGHTS,
    LOSSLESS_BITS,
    VERSION,
    ActivationRule,
    Attention,
    Calibration,
    Candidates,
    Evaluate,
    KVCache,
    KVSide,
    LayerOverride,
    Method,
    Recipe,
    WeightRule,
)
from squeeze.types import Implementation

FLAGS = {
    "offload": "It keeps packed blocks in CPU memory",
    "guard_biases": "It gives layers with a huge key bias finer formats",
}
# What the attention section holds besides its method.
ATTENTION: dict[str, Any] = {
    "mean_density": Annotated[float, annotated_types.Gt(0), annotated_types.Le(1)],
    "length": Annotated[int, annotated_types.Ge(1024)],
    "quantize": Literal["int8", "float8"],
    "quantize_min_length": Annotated[int, annotated_types.Ge(1)],
    "min_cosine": Annotated[float, annotated_types.Ge(0), annotated_types.Le(1)],
}
CHOICES = {
    "queries": (("float8",), "It rounds the queries that read packed keys"),
    "salience": (
        ("error", "attention", "token_types"),
        "It ranks the tokens that a format may protect",
    ),
}


class Parser:
    """Turn a raw mapping into a ``Recipe``, with errors that name the place."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def error(self, path: str, received: str, allowed: str = "", remedy: str = "") -> RecipeError:
        """Make the error for a place inside the recipe."""
        return RecipeError(
            f"{self.origin}: {path}" if path else self.origin, received, allowed, remedy
        )

    def mapping(self, raw: Any, path: str, known: Sequence[str] | None = None) -> dict[str, Any]:
        """Return ``raw`` if it is a mapping that holds only ``known`` keys."""
        if not isinstance(raw, dict):
            raise self.error(
                path, f"got {raw!r}", "a mapping of keys to values", "Indent the keys under it"
            )
        for key in raw:
            if known is not None and key not in known:
                raise self.error(
                    join(path, key),
                    f"unknown key {key!r}",
                    ", ".join(known),
                    nearest(key, known) or "Remove it",
                )
        return raw

    def recipe(self, raw: dict[str, Any], name: str) -> Recipe:
        """Check a whole recipe."""
        sections = (
            "version",
            "weights",
            "kv_cache",
            "attention",
            "activations",
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
            activations=self.activations(raw.get("activations") or []),
            calibration=self.section(Calibration, raw.get("calibration") or {}, "calibration"),
            evaluate=self.section(Evaluate, raw.get("evaluate") or {}, "evaluate"),
        )

    def section(self, cls: type[Any], raw: Any, path: str) -> Any:
        """Check a section whose fields pydantic knows."""
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
        """Turn pydantic's first complaint into ours."""
        first = failure.errors()[0]
        place = join(path, *first["loc"])
        return self.error(place, f"got {first['input']!r}", allowed_by(first), "Change the value")

    def weights(self, raw: Any) -> tuple[WeightRule, ...]:
        """Check the list of weight rules; one with a bound may stand alone."""
        raw = [raw] if isinstance(raw, dict) and "mean_bits" in raw else raw
        if not isinstance(raw, list):
            raise self.error(
                "weights", f"got {raw!r}", "a list of rules", "Start each rule with '- '"
            )
        rules = []
        for i, rule in enumerate(raw):
            path = f"weights.{i}"
            rule = dict(self.mapping(rule, path))
            scope = self.scope(rule, path)
            bound, listed = rule.pop("mean_bits", None), rule.pop("candidates", None)
            if bound is not None or listed is not None:
                rule = {"method": ALLOCATED_WEIGHTS, **rule}
            method = self.method(rule, "weights", path, ("targets", "ignore", "mean_bits"))
            choice = self.weight_choice(rule, bound, listed, path)
            rules.append(WeightRule(method=method, **scope, **choice))
        bounded = [i for i, rule in enumerate(rules) if rule.mean_bits is not None]
        if len(bounded) > 1:
            raise self.error(
                f"weights.{bounded[1]}.mean_bits",
                "is a second bound",
                "one rule with mean_bits",
                "Let one rule target all modules that share a bound",
            )
        return tuple(rules)

    def scope(self, rule: dict[str, Any], path: str) -> dict[str, Any]:
        """Take ``targets`` and ``ignore`` out of a rule, checked."""
        found = {key: rule.pop(key) for key in ("targets", "ignore") if key in rule}
        for key, value in found.items():
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise self.error(
                    f"{path}.{key}",
                    f"got {value!r}",
                    "a list of module names or parts of them",
                    f"e.g. {key}: [self_attn, mlp]",
                )
        return {key: tuple(value) for key, value in found.items()}

    def activations(self, raw: Any) -> tuple[ActivationRule, ...]:
        """Check the list of activation rules."""
        if not isinstance(raw, list):
            raise self.error(
                "activations", f"got {raw!r}", "a list of rules", "Start each rule with '- '"
            )
        rules = []
        for i, item in enumerate(raw):
            path = f"activations.{i}"
            rule = dict(self.mapping(item, path))
            scope = self.scope(rule, path)
            method = self.method(rule, "activations", path, ("targets", "ignore"))
            rules.append(ActivationRule(method=method, **scope))
        return tuple(rules)

    def weight_choice(
        self, rule: Mapping[str, Any], bound: Any, listed: Any, path: str
    ) -> dict[str, Any]:
        """Check a rule's bound on mean bits and its candidates, absent in most rules."""
        if bound is None and listed is None:
            return {}
        known = isinstance(bound, int | float) and not isinstance(bound, bool)
        if not known or not 0 < bound <= LOSSLESS_BITS:
            raise self.error(
                f"{path}.mean_bits",
                f"got {bound!r}",
                f"a number above 0 and at most {LOSSLESS_BITS}",
                "It bounds the mean effective bits of the targeted weights",
            )
        if listed is None:
            middle = min(max(int(bound), 2), 7)
            listed = [{"bits": width} for width in (middle - 1, middle, middle + 1)]
        if not isinstance(listed, list) or not listed:
            raise self.error(
                f"{path}.candidates",
                f"got {listed!r}",
                "a list of methods or of parameters to change",
                "e.g. [{bits: 2}, {bits: 4}]",
            )
        candidates = tuple(
            self.method(
                merge_side(rule, self.mapping(item, f"{path}.candidates.{i}")),
                "weights",
                f"{path}.candidates.{i}",
                (),
            )
            for i, item in enumerate(listed)
        )
        for i, one in enumerate(candidates):
            if one.lossless:
                raise self.error(
                    f"{path}.candidates.{i}.bits",
                    f"got {LOSSLESS_BITS}",
                    "a method that packs",
                    "Name modules to keep dense under ignore",
                )
        return {"mean_bits": float(bound), "candidates": candidates}

    def kv_cache(self, raw: Any) -> KVCache:
        """Check the cache section, layer overrides merged and checked too."""
        known = list(KVCache.model_fields)
        raw = self.mapping(raw, "kv_cache", known)
        bound = self.mean_bits(raw)
        if bound is not None:
            raw = {**ALLOCATED_SIDES, **raw}
        for side in ("keys", "values"):
            if side not in raw:
                raise self.error(
                    f"kv_cache.{side}",
                    "is missing",
                    "a format",
                    "Add it; {bits: 16} stores it as it is",
                )
        sides: dict[str, Any] = {
            side: self.kv_side(raw[side], side, f"kv_cache.{side}") for side in ("keys", "values")
        }
        counts = {
            key: raw[key]
            for key in ("sink_tokens", "residual_length", "block_length")
            if raw.get(key) is not None
        }
        for key, value in counts.items():
            least = 32 if key == "block_length" else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self.error(
                    f"kv_cache.{key}",
                    f"got {value!r}",
                    f"an integer of at least {least}",
                    "It counts tokens",
                )
        flags = {key: raw[key] for key in FLAGS if raw.get(key) is not None}
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise self.error(f"kv_cache.{key}", f"got {value!r}", "true or false", FLAGS[key])
        choices = {key: raw[key] for key in CHOICES if raw.get(key) is not None}
        for key, value in choices.items():
            allowed, remedy = CHOICES[key]
            if value not in allowed:
                raise self.error(f"kv_cache.{key}", f"got {value!r}", ", ".join(allowed), remedy)
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
        candidates = self.candidates(raw) if bound is not None else None
        return KVCache(
            **sides,
            **counts,
            **flags,
            **choices,
            layers=layers,
            mean_bits=bound,
            candidates=candidates,
        )

    def mean_bits(self, raw: Mapping[str, Any]) -> float | None:
        """Check the bound on mean effective bits, absent in most recipes."""
        value = raw.get("mean_bits")
        if value is None:
            if raw.get("candidates") is not None:
                raise self.error(
                    "kv_cache.candidates",
                    "are given without kv_cache.mean_bits",
                    "both or neither",
                    "Add e.g. mean_bits: 3.0",
                )
            return None
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 < value <= LOSSLESS_BITS:
            raise self.error(
                "kv_cache.mean_bits",
                f"got {value!r}",
                f"a number above 0 and at most {LOSSLESS_BITS}",
                "It bounds the mean effective bits of keys and values",
            )
        return float(value)

    def candidates(self, raw: Mapping[str, Any]) -> Candidates:
        """Check the candidates of both sides; by default the widths of the side's method."""
        given = self.mapping(raw.get("candidates") or {}, "kv_cache.candidates", ("keys", "values"))
        found: dict[str, Any] = {}
        for side in ("keys", "values"):
            path, base = f"kv_cache.candidates.{side}", dict(raw[side])
            listed = given.get(side, [{"bits": width} for width in widths(base)] or [{}])
            if not isinstance(listed, list) or not listed:
                raise self.error(
                    path, f"got {listed!r}", "a list of formats", "e.g. [{bits: 2}, {bits: 4}]"
                )
            found[side] = tuple(
                self.kv_side(
                    merge_side(base, self.mapping(item, f"{path}.{i}")), side, f"{path}.{i}"
                )
                for i, item in enumerate(listed)
            )
        return Candidates(**found)

    def layer(self, raw: Any, base: dict[str, Any], path: str) -> LayerOverride:
        """Check one override against the side it changes."""
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
        """Check the format and transforms of keys or values."""
        raw = dict(self.mapping(raw, path))
        transforms = raw.pop("transforms", None) or []
        if not isinstance(transforms, list):
            raise self.error(
                f"{path}.transforms",
                f"got {transforms!r}",
                "a list of transforms",
                "e.g. transforms: [center]",
            )
        names = [self.transform(entry, side, f"{path}.transforms") for entry in transforms]
        for name in names:
            if names.count(name) > 1:
                raise self.error(
                    f"{path}.transforms",
                    f"{name!r} is named twice",
                    "each transform once",
                    "Remove one of the two",
                )
        method = self.method(raw, "kv", path, ("transforms",))
        return KVSide(method=method, transforms=tuple(transforms))

    def transform(self, entry: Any, side: str, path: str) -> str:
        """Check one transform, a name or a mapping with its parameters; return its name."""
        raw = {"method": entry} if isinstance(entry, str) else self.mapping(entry, path)
        if "method" not in raw:
            raise self.error(
                f"{path}.method",
                "is missing",
                ", ".join(registry.names("transform")),
                "Name a transform",
            )
        made = self.method(raw, "transform", path, ()).build()
        if side not in made.sides:
            raise self.error(
                path,
                f"{raw['method']!r} does not apply to {side}",
                " and ".join(made.sides),
                "Remove it there",
            )
        return str(raw["method"])

    def attention(self, raw: Any) -> Attention:
        """Check the attention section."""
        raw = self.mapping(raw, "attention", list(Attention.model_fields))
        method: Method | None = None
        if raw.get("prefill"):
            prefill = self.mapping(raw["prefill"], "attention.prefill")
            method = self.method(prefill, "prefill", "attention.prefill", ())
        given = {key: raw[key] for key in ATTENTION if raw.get(key) is not None}
        for key, value in given.items():
            self.value(value, ATTENTION[key], f"attention.{key}", "")
        budgets = method is not None and hasattr(registry.get("prefill", method.name), "ladder")
        if "mean_density" in given and not budgets:
            named = (name for name in registry.names("prefill"))
            raise self.error(
                "attention.mean_density",
                f"{method.name!r} has no budget per head" if method else "bounds no prefill method",
                ", ".join(n for n in named if hasattr(registry.get("prefill", n), "ladder")),
                "Remove it, or choose another method" if method else "Add attention.prefill",
            )
        for key in ("quantize_min_length", "min_cosine"):
            if key in given and "quantize" not in given:
                raise self.error(
                    f"attention.{key}",
                    "is given without attention.quantize",
                    "both or neither",
                    "Add e.g. quantize: int8",
                )
        return Attention(prefill=method, **given)

    def method(
        self, raw: dict[str, Any], kind: str, path: str, siblings: tuple[str, ...]
    ) -> Method:
        """Check a method and its parameters against its annotations."""
        raw = dict(raw)
        name = raw.pop("method", None)
        if name is None:
            if raw != {"bits": LOSSLESS_BITS} or kind == "activations":
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
                    join(path, key),
                    f"unknown key {key!r} of method {name!r}",
                    ", ".join(every),
                    nearest(key, every) or "Remove it",
                )
            if not (key == "bits" and value == LOSSLESS_BITS and kind != "prefill"):
                self.value(value, known[key], join(path, key), key)
        for key in required:
            if key not in raw and raw.get("bits") != LOSSLESS_BITS:
                raise self.error(
                    join(path, key),
                    f"is missing for method {name!r}",
                    describe(known[key]),
                    f"Add '{key}:'",
                )
        return Method(kind=kind, name=name, parameters=raw)

    def value(self, value: Any, hint: Any, path: str, key: str) -> None:
        """Check one parameter against its annotation."""
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
                nearest(str(value), choices_of(hint)) or "Change the value",
            ) from failure


def merge_side(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a layer's override over a side; naming another method drops the base's parameters."""
    if override.get("method", base.get("method")) != base.get("method"):
        return dict(override)
    return {**base, **override}


def widths(side: Mapping[str, Any]) -> list[int]:
    """List the widths that the method of a checked side takes, from its annotation."""
    cls = registry.get("kv", side["method"]) if "method" in side else None
    hint = typing.get_type_hints(cls, include_extras=True).get("bits") if cls else None
    return [int(width) for width in choices_of(hint) if width.isdecimal()]


def layer_candidates(
    kv_cache: KVCache, layer: int, layers: int
) -> tuple[tuple[KVSide, ...], tuple[KVSide, ...]]:
    """Return what an allocation may choose for one layer's keys and values.

    Layers that an override names, and all where there is no ``mean_bits``, have no choice.
    """
    named = any(
        layer in [i + layers if i < 0 else i for i in override.match]
        for override in kv_cache.layers
    )
    if named or kv_cache.candidates is None:
        keys, values = layer_sides(kv_cache, layer, layers)
        return (keys,), (values,)
    return kv_cache.candidates.keys, kv_cache.candidates.values


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
    parser = Parser("recipe")
    return (
        parser.kv_side(sides["keys"], "keys", "kv_cache.keys"),
        parser.kv_side(sides["values"], "values", "kv_cache.values"),
    )


def describe(hint: Any) -> str:
    """Say in words which values an annotation allows."""
    choices = choices_of(hint)
    if choices:
        return ", ".join(choices)
    if typing.get_origin(hint) is Annotated:
        base, *wrapped = typing.get_args(hint)
        # A pydantic Field carries its bounds one level down.
        marks = [mark for item in wrapped for mark in getattr(item, "metadata", [item])]
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
    if typing.get_origin(hint) is tuple:
        return f"a list, each {describe(typing.get_args(hint)[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, str(hint))


def choices_of(hint: Any) -> list[str]:
    """List the choices of a ``Literal``, or nothing."""
    if typing.get_origin(hint) is Annotated:
        return choices_of(typing.get_args(hint)[0])
    return [str(v) for v in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []


def allowed_by(error: Any) -> str:
    """Say in words what a pydantic error would have allowed."""
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


def join(*parts: Any) -> str:
    """Join the parts of a path with dots, leaving out empty ones."""
    return ".".join(str(part) for part in parts if part not in ("", None))
