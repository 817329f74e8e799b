"""Finer formats for layers whose key bias would cost a cache its bits."""

from __future__ import annotations

from squeeze.key_biases import KeyBias
from squeeze.model_info import ModelInfo
from squeeze.plan_table import ranges
from squeeze.recipe import KVCache, KVSide, Method, layer_sides
from squeeze.recipe_parse import widths
from squeeze.recipe_values import LOSSLESS_BITS

# Bits that a bias must cost the keys. Random models lost as much as without a bias at 0.1 bits, and
# 1.6 times as much at 0.8.
LEAST_LOSS = 0.5
# A bias that swings makes attention follow positions, nearly one token at a time, and then errors
# of values no longer average out: with exact keys random models lost 3 to 12 times as much as
# without the bias, and with two more bits of the values in those layers less than without.
VALUE_BITS = 2.0
SWING_TOKENS = 128


def finer_sides(
    kv_cache: KVCache, layer: int, info: ModelInfo
) -> tuple[KVSide, KVSide, float] | None:
    """Return a layer's keys and values where its key bias asks for finer ones, else ``None``.

    The keys get the least width of their method that makes up for the bits that the bias costs,
    or 16 bits; where RoPE swings the bias, the values get likewise two bits more. What
    ``kv_cache.layers`` names stays as it is.

    Returns:
        Keys, values, and the bits that the bias costs the recipe's keys.
    """
    bias = next((b for b in info.key_biases or () if b.layer == layer), None)
    if bias is None or not kv_cache.guard_biases or kv_cache.mean_bits is not None:
        return None
    overrides = [o for o in kv_cache.layers if layer in [i % max(info.layers, 1) for i in o.match]]
    keys, values = layer_sides(kv_cache, layer, info.layers)
    if keys.method.lossless or any(o.keys for o in overrides):
        return None
    lost = bias.lost_bits(shared_tokens(keys))
    if lost < LEAST_LOSS:
        return None
    head_dim = next(item.head_dim for item in info.attention if item.layer == layer)
    keys = finer(keys, side_width(keys, head_dim) + lost, head_dim)
    swings = bias.lost_bits(SWING_TOKENS) >= LEAST_LOSS
    if swings and not any(o.values for o in overrides):
        values = finer(values, side_width(values, head_dim) + VALUE_BITS, head_dim)
    return keys, values, lost


def shared_tokens(keys: KVSide) -> int | None:
    """Count the tokens of one channel under one scale; ``None`` where channels share scales."""
    made = keys.method.build()
    if getattr(made, "granularity", "channel") == "channel":
        tokens: int | None = getattr(made, "group_size", None)
        return tokens
    return None


def side_width(side: KVSide, head_dim: int) -> float:
    """Count a side's stored bits per value."""
    made = side.method.build()
    return LOSSLESS_BITS if made is None else float(made.bits_per_value(head_dim))


def finer(side: KVSide, bits: float, head_dim: int) -> KVSide:
    """Return a side with the least width of its method that stores ``bits`` per value, or 16."""
    for width in sorted(widths(side.to_dict())):
        method = side.method
        wider = Method(
            kind=method.kind, name=method.name, parameters={**method.parameters, "bits": width}
        )
        made = KVSide(method=wider, transforms=side.transforms)
        if side_width(made, head_dim) >= bits:
            return made
    lossless = Method(kind="kv", name=side.method.name, parameters={"bits": LOSSLESS_BITS})
    return KVSide(method=lossless)


def notes(kv_cache: KVCache | None, info: ModelInfo) -> list[str]:
    """Say which layers have finer formats than the recipe names, and why."""
    if kv_cache is None or not kv_cache.guard_biases or kv_cache.mean_bits is not None:
        return []
    if info.key_biases is None:
        return [
            "KV cache: keys have a bias here; layers where it is huge and would cost the keys bits "
            "get finer formats once the weights are read (kv_cache.guard_biases)"
        ]
    biases = {bias.layer: bias for bias in info.key_biases}
    said: dict[str, list[tuple[KeyBias, float]]] = {}
    for item in info.attention:
        made = finer_sides(kv_cache, item.layer, info)
        if made is not None and item.kind == "full_attention":
            before = layer_sides(kv_cache, item.layer, info.layers)
            changes = [
                f"{side} have {side_width(after, item.head_dim):g} effective bits instead of "
                f"{side_width(old, item.head_dim):g}"
                for side, after, old in zip(("keys", "values"), made[:2], before, strict=True)
                if after != old
            ]
            found = (biases[item.layer], made[2])
            said.setdefault(" and ".join(changes), []).append(found)
    return [
        f"KV cache of layers {ranges([bias.layer for bias, _ in found])}: {changes}, because "
        f"{_why(found)}; kv_cache.guard_biases: false turns this off"
        for changes, found in said.items()
    ]


def _why(found: list[tuple[KeyBias, float]]) -> str:
    norms = ", ".join(f"{bias.norm:.0f}" for bias, _ in found)
    costs = ", ".join(f"{lost:.1f}" for _, lost in found)
    first = found[0][0]
    return (
        f"the {first.projection} bias has norm {norms} (median of all layers {first.usual:.0f}) "
        f"and would cost keys {costs} bits"
    )
