"""Which decoder layers a recorded step runs fused: those of classes that are spelled out here.

A class is known by its module and name, and so is everything in it; whatever is missing, one too
many, wrapped or hooked keeps the layer as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

# Module of transformers -> prefix of its classes, and whether heads are normalised. All of them
# normalise by the root mean square before attention and before a gated MLP, and rotate channels
# d and d + D / 2 of whole heads.
FAMILIES = {
    "transformers.models.llama.modeling_llama": ("Llama", False),
    "transformers.models.mistral.modeling_mistral": ("Mistral", False),
    "transformers.models.qwen2.modeling_qwen2": ("Qwen2", False),
    "transformers.models.qwen3.modeling_qwen3": ("Qwen3", True),
}
LINEAR = (
    "torch.nn.modules.linear.Linear",
    "squeeze.linear.ClusteredLinear",
    "squeeze.linear.IntegerLinear",
)
SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
STATE = "self_attn.squeeze"  # there after the swap
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refusal(layer: nn.Module) -> str | None:
    """Say why a decoder layer runs as it is, ``None`` if a step can run it fused."""
    kind = type(layer)
    prefix, normalises = FAMILIES.get(kind.__module__, ("", False))
    if not prefix or kind.__name__ != f"{prefix}DecoderLayer":
        return f"{kind.__name__} is none of the classes that are spelled out"
    found = {name: module for name, module in layer.named_modules() if name}
    own = kind.__module__ + "." + prefix
    return _unexpected(found, _expected(own, normalises)) or _wrapped(layer, found) or _odd(layer)


def _expected(own: str, normalises: bool) -> dict[str, tuple[str, ...]]:
    """Name the classes that may stand at every place in a layer."""
    norm = (f"{own}RMSNorm",)
    expected = {
        "self_attn": (f"{own}Attention",),
        "mlp": (f"{own}MLP",),
        "mlp.act_fn": SILU,
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        STATE: ("squeeze.attention.LayerState",),
    }
    expected |= {f"self_attn.{name}_proj": LINEAR for name in "qkvo"}
    expected |= {f"mlp.{name}_proj": LINEAR for name in ("gate", "up", "down")}
    if normalises:
        expected |= {f"self_attn.{name}_norm": norm for name in "qk"}
    return expected


def _unexpected(
    found: Mapping[str, nn.Module], expected: Mapping[str, tuple[str, ...]]
) -> str | None:
    """Say which module of a layer is missing, one too many, or of another class."""
    for name in sorted({*expected, *found}):
        kinds, module = expected.get(name, ()), found.get(name)
        if module is None and name == STATE:
            continue
        seen = "" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
        if seen not in kinds:
            allowed = " or ".join(kind.rpartition(".")[2] for kind in kinds)
            return f"{name} is {seen or 'missing'}, not {allowed or 'expected'}"
    return None


def _wrapped(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    """Say what is called where a module inside the layer is."""
    for name, module in (("the layer", layer), *found.items()):
        if "forward" in vars(module):
            return f"{name} has a forward of its own"
        hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
        # The layer's own run all the same, and those of transformers collect what is asked for.
        if name in found and not all(map(_collects, hooks)):
            return f"{name} has hooks"
    return None


def _odd(layer: Any) -> str | None:
    """Say which setting of a layer of known modules is not known."""
    attention = layer.self_attn
    norms = [m for m in layer.modules() if type(m).__name__.endswith("RMSNorm")]
    if len({norm.weight.dtype for norm in norms}) > 1:
        return "its norms are of several dtypes"
    heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if len({norm.variance_epsilon for norm in heads if norm is not None}) > 1:
        return "queries and keys are normalised differently"
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    if getattr(owner, "sliding_window", None) is not None:
        return "its attention has a window"
    angles = getattr(attention.config, "rope_parameters", None) or {}
    if (angles.get("partial_rotary_factor") or 1.0) != 1.0:
        return "it rotates a part of the channels"
    return None


def _collects(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")
