"""Key projections whose bias dwarfs what their weights contribute, and how RoPE swings it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from squeeze.model_info import AttentionInfo

# A bias this many times larger than the median layer's, or than what the layer's weights make of
# an input of unit mean square, decides the range of every key.
HUGE_BIAS = 8.0
# Range of 128 values drawn from a Gaussian, in standard deviations.
SPAN = 5.2
PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "c_attn")


@dataclass(frozen=True)
class KeyBias:
    """A huge bias of one layer's keys, which have ``C = H_kv * D`` channels.

    Attributes:
        layer: Index of the layer.
        projection: Name of the linear layer that has it.
        norm: Of the bias.
        usual: Median norm of all layers.
        weight_norm: Of what the weights make of an input of unit mean square.
        radii: Largest magnitude that RoPE gives the bias in each channel.
        angles: Radians that each channel turns from a token to the next; 0 without RoPE.
        deviations: Of each channel, what the weights make of such an input.
    """

    layer: int
    projection: str
    norm: float
    usual: float
    weight_norm: float
    radii: tuple[float, ...]
    angles: tuple[float, ...]
    deviations: tuple[float, ...]

    def lost_bits(self, tokens: int | None) -> float:
        """Count the bits that uniform codes lose to the bias: log2 of the growth of their steps.

        Within ``t`` tokens a channel that turns by ``a`` swings through at most
        ``2 r sin(min(a t, pi) / 2)``.

        Args:
            tokens: Of one channel under one scale, which then covers that swing; ``None`` where
                channels share a scale, which then covers the largest radius, both signs.
        """
        own = SPAN * math.hypot(*self.deviations)
        if tokens is None:
            swing = 2 * max(self.radii) * math.sqrt(len(self.radii))
            return math.log2(1 + swing / own)
        grown = [
            2 * radius * math.sin(min(angle * tokens, math.pi) / 2) + SPAN * deviation
            for radius, angle, deviation in zip(
                self.radii, self.angles, self.deviations, strict=True
            )
        ]
        return math.log2(math.hypot(*grown) / own)


def find_huge(model: nn.Module, attention: Iterable[AttentionInfo]) -> tuple[KeyBias, ...] | None:
    """Find the layers whose keys have a huge bias; ``None`` where weights are not at hand.

    Such keys all lie far from zero, and formats that share a scale over channels, rotate, or keep
    only a direction lose what tells them apart; so do scales per channel where RoPE turns the bias
    within the tokens of a group.

    Args:
        model: On the meta device, biases have no values.
        attention: Its layers.
    Source: https://github.com/ggml-org/llama.cpp/issues/21385: norms of 605 and 921 in the first
        and the last layer of Qwen2.5-7B, about 22 in the median layer.
    """
    parts = {}
    for item in attention:
        projection = key_projection(model, item)
        if projection is not None:
            name, weight, bias = projection
            if bias.is_meta or weight.is_meta:
                return None
            parts[item] = (name, weight.float(), bias.float())
    norms = {item: (_norm(bias), _norm(weight)) for item, (_, weight, bias) in parts.items()}
    usual = median(bias for bias, _ in norms.values()) if norms else 0.0
    huge = [
        item
        for item, (own, made) in norms.items()
        if own > HUGE_BIAS * made or (own > HUGE_BIAS * usual and own > made)
    ]
    return tuple(_measured(model, item, usual, parts[item]) for item in huge)


def key_projection(model: nn.Module, item: AttentionInfo) -> tuple[str, Tensor, Tensor] | None:
    """Return the name, the weight ``[C, in]`` and the bias ``[C]`` that make a layer's keys.

    ``None`` without a bias, and where the weight is stored in another form than a matrix.
    """
    module = model.get_submodule(item.module)
    for name in PROJECTIONS:
        projection: Any = getattr(module, name, None)
        weight, bias = (getattr(projection, part, None) for part in ("weight", "bias"))
        if isinstance(weight, Tensor) and isinstance(bias, Tensor):
            rows = _key_rows(name, item)
            # GPT-2 stores [in, out].
            stored = weight.detach().T if name == "c_attn" else weight.detach()
            return name, stored[rows], bias.detach()[rows]
    return None


def _key_rows(name: str, item: AttentionInfo) -> slice | Tensor:
    """Say which outputs of a projection are keys, heads one after another."""
    keys = item.kv_heads * item.head_dim
    if name == "k_proj":
        return slice(None)
    if name == "query_key_value":  # query, key and value of a head side by side
        heads = torch.arange(item.kv_heads)[:, None] * 3 * item.head_dim
        return (heads + torch.arange(item.head_dim, 2 * item.head_dim)).flatten()
    first = item.query_heads * item.head_dim
    return slice(first, first + keys)


def _measured(
    model: nn.Module, item: AttentionInfo, usual: float, parts: tuple[str, Tensor, Tensor]
) -> KeyBias:
    name, weight, bias = parts
    heads = bias.cpu().unflatten(0, (item.kv_heads, item.head_dim))
    angles, radii = torch.zeros(item.head_dim), heads.abs()
    frequencies = rope_frequencies(model, item.module)
    if frequencies is not None:
        # Channels i and i + n turn together; those from 2 n on stay.
        count = len(frequencies)
        angles[: 2 * count] = frequencies.repeat(2)
        pairs = torch.hypot(heads[:, :count], heads[:, count : 2 * count])
        radii = torch.cat([pairs, pairs, radii[:, 2 * count :]], -1)
    return KeyBias(
        item.layer,
        name,
        _norm(bias),
        usual,
        _norm(weight),
        tuple(radii.flatten().tolist()),
        tuple(angles.repeat(item.kv_heads).tolist()),
        tuple(torch.linalg.vector_norm(weight, dim=1).tolist()),
    )


def rope_frequencies(model: nn.Module, module: str) -> Tensor | None:
    """Return the radians per token of a full-attention layer's channel pairs, or ``None``.

    The rotary embedding is a direct child of one of the modules around the layer.
    """
    parents = module.split(".")
    while parents:
        parents.pop()
        rotary = getattr(model.get_submodule(".".join(parents)), "rotary_emb", None)
        for name in ("full_attention_inv_freq", "inv_freq"):
            frequencies = getattr(rotary, name, None)
            if isinstance(frequencies, Tensor):
                return frequencies.detach().float().cpu()
    return None


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item()
