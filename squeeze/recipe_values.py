"""The sections of a recipe as frozen values; ``recipe`` reads them from files."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from squeeze import registry

VERSION = 1
LOSSLESS_BITS = 16
# What a bound on mean bits starts from where the recipe names no format.
ALLOCATED_SIDES: dict[str, dict[str, Any]] = {
    "keys": {"method": "affine", "bits": 4, "granularity": "channel", "group_size": 64},
    "values": {"method": "affine", "bits": 4, "granularity": "token", "group_size": 64},
}
ALLOCATED_WEIGHTS = "lnq"


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


def build_transform(entry: str | dict[str, Any]) -> tuple[str, Any]:
    """Make the object of one entry of ``transforms``; return its name beside it."""
    parameters = {"method": entry} if isinstance(entry, str) else dict(entry)
    name = parameters.pop("method")
    return name, registry.get("transform", name)(**parameters)


class WeightRule(Section):
    """Which modules one weight method applies to; later rules win.

    With ``mean_bits`` modules that runtimes fuse get one of ``candidates`` each, chosen after
    calibration.
    """

    method: Method
    targets: tuple[str, ...] = ("self_attn", "attn", "attention", "mlp", "feed_forward", "mixer")
    ignore: tuple[str, ...] = ("lm_head", "embed")
    mean_bits: float | None = None
    candidates: tuple[Method, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that the recipe file would hold."""
        scope = {"targets": list(self.targets), "ignore": list(self.ignore)}
        if self.mean_bits is None:
            return {**self.method.to_dict(), **scope}
        candidates = [one.to_dict() for one in self.candidates]
        bound = {"mean_bits": self.mean_bits, "candidates": candidates}
        return {**self.method.to_dict(), **scope, **bound}


class ActivationRule(Section):
    """Which linear layers leave small inputs out in decode; later rules win."""

    method: Method
    targets: tuple[str, ...] = ("q_proj", "o_proj", "out_proj", "down_proj", "fc2", "dense")
    ignore: tuple[str, ...] = ("dense_h_to_4h",)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that the recipe file would hold."""
        scope = {"targets": list(self.targets), "ignore": list(self.ignore)}
        return {**self.method.to_dict(), **scope}


class LayerOverride(Section):
    """KV settings of some layers; negative indices count from the end."""

    match: tuple[int, ...]
    keys: dict[str, Any] = Field(default_factory=dict)
    values: dict[str, Any] = Field(default_factory=dict)


class KVSide(Section):
    """Format and transforms of the keys, or of the values.

    A transform is its name, or a mapping of ``method`` and parameters.
    """

    method: Method
    transforms: tuple[str | dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that the recipe file would hold."""
        result = self.method.to_dict()
        return {**result, "transforms": list(self.transforms)} if self.transforms else result


class Candidates(Section):
    """The formats that an allocation under ``mean_bits`` chooses among."""

    keys: tuple[KVSide, ...]
    values: tuple[KVSide, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that the recipe file would hold; no transforms are said as such."""
        return {
            side: [
                {**one.to_dict(), "transforms": list(one.transforms)} for one in getattr(self, side)
            ]
            for side in ("keys", "values")
        }


class KVCache(Section):
    """How the cache stores keys and values, and how many tokens stay exact.

    With ``mean_bits`` each layer's keys and values get one of ``candidates``, chosen after
    calibration; layers that an override names keep what it says. Without ``mean_bits``
    ``guard_biases`` lets the plan give finer formats to layers whose key bias costs many bits.
    ``queries: float8`` rounds the queries that read packed keys. ``salience`` ranks the tokens that
    a format with ``protected`` tokens chooses among.
    """

    keys: KVSide
    values: KVSide
    mean_bits: float | None = None
    candidates: Candidates | None = None
    sink_tokens: int = 4
    residual_length: int = 128
    block_length: int | None = None
    offload: bool = False
    guard_biases: bool = True
    queries: Literal["float8"] | None = None
    salience: Literal["error", "attention", "token_types"] = "error"
    layers: tuple[LayerOverride, ...] = ()


class Attention(Section):
    """Attention while a prompt is processed: what is read of it, and how precisely.

    With ``mean_density`` calibration gives each head of the prefill policy a budget, so that their
    mean density on calibration text of ``length`` tokens stays below it.

    With ``quantize`` prompts of at least ``quantize_min_length`` tokens are multiplied in eight
    bits, those keys that the policy lists or all of them, in the layers of which every head's
    output keeps a cosine of ``min_cosine`` on such text.
    """

    prefill: Method | None = None
    mean_density: float | None = None
    length: int = 8192
    quantize: Literal["int8", "float8"] | None = None
    quantize_min_length: int = 16384
    min_cosine: float = 0.999

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that the recipe file would hold."""
        result: dict[str, Any] = {}
        if self.prefill is not None:
            result["prefill"] = self.prefill.to_dict()
        if self.mean_density is not None:
            result["mean_density"] = self.mean_density
        if self.quantize is not None:
            names = ("quantize", "quantize_min_length", "min_cosine")
            result |= {name: getattr(self, name) for name in names}
        if self.mean_density is not None or self.quantize is not None:
            result["length"] = self.length
        return result


class Calibration(Section):
    """Text that statistics are measured on.

    Behind ``quantized`` inputs each layer's weights make up for what the packed layers before it
    changed; ``dense`` ones are those of the dense model.
    """

    data: str = "books"
    samples: Annotated[int, Field(ge=1)] = 32
    length: Annotated[int, Field(ge=16)] = 512
    seed: int = 0
    inputs: Literal["dense", "quantized"] = "quantized"


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
    activations: tuple[ActivationRule, ...] = ()
    implementation: str = "auto"
    calibration: Calibration = Calibration()
    evaluate: Evaluate = Evaluate()

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that ``load`` reads back to an equal recipe."""
        result: dict[str, Any] = {"version": VERSION}
        if self.weights:
            result["weights"] = [rule.to_dict() for rule in self.weights]
        if self.kv_cache:
            kv = self.kv_cache
            result["kv_cache"] = {
                "keys": kv.keys.to_dict(),
                "values": kv.values.to_dict(),
                "sink_tokens": kv.sink_tokens,
                "residual_length": kv.residual_length,
                "block_length": kv.block_length,
                "layers": [
                    {"match": list(o.match), "keys": o.keys, "values": o.values} for o in kv.layers
                ],
            }
            if kv.offload:
                result["kv_cache"]["offload"] = True
            if kv.queries:
                result["kv_cache"]["queries"] = kv.queries
            if kv.salience != "error":
                result["kv_cache"]["salience"] = kv.salience
            if not kv.guard_biases:
                result["kv_cache"]["guard_biases"] = False
            if kv.mean_bits is not None and kv.candidates is not None:
                bound = {"mean_bits": kv.mean_bits, "candidates": kv.candidates.to_dict()}
                result["kv_cache"] |= bound
        if self.attention and self.attention.to_dict():
            result["attention"] = self.attention.to_dict()
        if self.activations:
            result["activations"] = [rule.to_dict() for rule in self.activations]
        if self.implementation != "auto":
            result["implementation"] = self.implementation
        result["calibration"] = self.calibration.model_dump(mode="json")
        result["evaluate"] = self.evaluate.model_dump(mode="json")
        return result
