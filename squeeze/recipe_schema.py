"""The JSON schema of a recipe file, from the same annotations that the parser checks."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from pydantic import BaseModel, TypeAdapter

from squeeze import registry
from squeeze.recipe_values import LOSSLESS_BITS, VERSION, Calibration, Evaluate
from squeeze.types import Implementation


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
        exact = kind in ("prefill", "activations")
        return {"anyOf": options if exact else [*options, lossless]}

    strings = {"type": "array", "items": {"type": "string"}}
    sides = {}
    for side in ("keys", "values"):
        usable = [
            n for n in registry.names("transform") if side in registry.get("transform", n)().sides
        ]
        entry = {"anyOf": [{"enum": usable}, *(_transform(name) for name in usable)]}
        sides[side] = method("kv", {"transforms": {"type": "array", "items": entry}})
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
    # A candidate is laid over its side, so it may hold any part of it; the parser checks the whole.
    candidates = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            side: {"type": "array", "minItems": 1, "items": {"type": "object"}} for side in sides
        },
    }
    bound = {"type": "number", "exclusiveMinimum": 0, "maximum": LOSSLESS_BITS}
    choice = {
        "mean_bits": bound,
        # A candidate is laid over its rule; the parser checks the whole.
        "candidates": {"type": "array", "minItems": 1, "items": {"type": "object"}},
    }
    rule = method("weights", {"targets": strings, "ignore": strings, **choice})
    rule["anyOf"].append(
        {
            "type": "object",
            "properties": {"targets": strings, "ignore": strings, **choice},
            "required": ["mean_bits"],
            "additionalProperties": False,
        }
    )
    kv = {
        "type": "object",
        "anyOf": [{"required": ["keys", "values"]}, {"required": ["mean_bits"]}],
        "dependentRequired": {"candidates": ["mean_bits"]},
        "additionalProperties": False,
        "properties": {
            **sides,
            "mean_bits": bound,
            "candidates": candidates,
            "sink_tokens": count,
            "residual_length": count,
            "block_length": {"type": ["integer", "null"], "minimum": 32},
            "offload": {"type": "boolean"},
            "guard_biases": {"type": "boolean"},
            "queries": {"enum": ["float8", None]},
            "salience": {"enum": ["error", "attention", "token_types"]},
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
                "anyOf": [
                    {"type": "array", "items": rule},
                    {"allOf": [rule, {"required": ["mean_bits"]}]},
                ]
            },
            "kv_cache": kv,
            "attention": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "prefill": method("prefill", {}),
                    "mean_density": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                    "length": {"type": "integer", "minimum": 1024, "default": 8192},
                    "quantize": {"enum": ["int8", "float8", None]},
                    "quantize_min_length": {"type": "integer", "minimum": 1, "default": 16384},
                    "min_cosine": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.999},
                },
            },
            "activations": {
                "type": "array",
                "items": method("activations", {"targets": strings, "ignore": strings}),
            },
            "implementation": {"enum": [item.value for item in Implementation]},
            "calibration": _section_schema(Calibration),
            "evaluate": _section_schema(Evaluate),
        },
    }


def _transform(name: str) -> dict[str, Any]:
    """Describe a transform with parameters."""
    cls = registry.get("transform", name)
    hints = typing.get_type_hints(cls, include_extras=True)
    parameters = {f.name: _parameter(hints[f.name], f, "transform") for f in fields(cls)}
    return {
        "type": "object",
        "description": registry.info("transform", name).idea,
        "properties": {"method": {"const": name}, **parameters},
        "required": ["method"],
        "additionalProperties": False,
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
