"""What the attention of each layer does while a prompt is processed, as the plan says it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from squeeze.errors import UnsupportedError
from squeeze.kernels.block_sparse_attention.sage import Quantize
from squeeze.model_info import SINK_LOGITS, AttentionInfo, ModelInfo, require_packable
from squeeze.recipe import Recipe
from squeeze.types import Implementation

PREFILL_CURVES = "prefill_curves"  # of heads, where the recipe bounds their mean density
PREFILL_COSINES = "prefill_cosines"  # of heads, where it asks for eight bits
# What ``block_sparse_attention`` refuses when called is refused when planning.
LARGEST_HEAD = 256  # that the kernel takes
E4M3_CAPABILITY = (8, 9)  # the first that multiplies E4M3


@dataclass(frozen=True)
class PrefillPlan:
    """Which prefill policy one layer follows; ``None`` reads everything (``reason`` says why).

    From ``quantize_min_length`` tokens on, what is read is multiplied in the eight bits that
    ``quantize`` names, or in the model's own where it is ``None``; ``cosine`` is what calibration
    found the worst head's output to keep.
    """

    layer: int
    module: str
    policy: dict[str, Any] | None
    implementation: str
    reason: str = ""
    quantize: Quantize | None = None
    quantize_min_length: int = 0
    cosine: float | None = None

    @property
    def acts(self) -> bool:
        """Whether any call leaves the model's own attention."""
        return self.policy is not None or self.quantize is not None


def prefill_rows(
    recipe: Recipe, info: ModelInfo, implementation: str, device: str
) -> Iterable[PrefillPlan]:
    """Plan the policy and the eight bits of every attention layer; none without either.

    Raises:
        UnsupportedError: this model, or this GPU, cannot take them; the message says why.
    """
    asked = recipe.attention
    if asked is None or (asked.prefill is None and asked.quantize is None):
        return
    if asked.prefill is not None:
        _check_model(info, f"{recipe.origin}: attention.prefill", "prefill")
    if asked.quantize is not None:
        _check_eight_bits(info, f"{recipe.origin}: attention.quantize", implementation, device)
    given = len(asked.prefill.parameters.get("heads", ())) if asked.prefill else 0
    for item in info.attention:
        _check_heads(given, item, f"{recipe.origin}: attention.prefill")
        if item.kind != "full_attention":
            reason = f"{item.kind.replace('_', ' ')} is already local"
            yield PrefillPlan(item.layer, item.module, None, "dense", reason)
            continue
        policy = asked.prefill.to_dict() if asked.prefill else None
        row = PrefillPlan(item.layer, item.module, policy, implementation)
        if asked.quantize is not None:
            least = asked.quantize_min_length
            row = replace(row, quantize=asked.quantize, quantize_min_length=least)
        yield row


def _check_model(info: ModelInfo, section: str, key: str) -> None:
    """Refuse architectures that the sparse kernel does not serve."""
    require_packable(info, section)
    if info.model_type in SINK_LOGITS:
        raise UnsupportedError(
            section,
            f"a {info.model_type!r} model cannot take it: its attention has learned sink "
            "logits, which the sparse kernel does not add",
            "models without sink logits",
            f"Remove attention.{key} from the recipe",
        )


def _check_eight_bits(info: ModelInfo, section: str, implementation: str, device: str) -> None:
    """Refuse models and devices on which the kernel cannot multiply in eight bits."""
    _check_model(info, section, "quantize")
    remedy = "Remove attention.quantize from the recipe"
    if info.softcap is not None:
        raise UnsupportedError(
            section,
            f"a {info.model_type!r} model cannot take it: its attention bounds the scores "
            f"(soft-cap {info.softcap:g}), which eight-bit products do not",
            "models without a soft-cap",
            remedy,
        )
    if all(item.kind != "full_attention" for item in info.attention):
        kinds = ", ".join(sorted({item.kind.replace("_", " ") for item in info.attention}))
        raise UnsupportedError(
            section,
            f"every layer of this {info.model_type!r} model has {kinds}, which is short already",
            "models with layers that read the whole prompt",
            remedy,
        )
    if implementation != Implementation.TRITON.value:
        return
    largest = max(item.head_dim for item in info.attention)
    if largest > LARGEST_HEAD:
        raise UnsupportedError(
            section, f"heads of {largest}", f"heads of at most {LARGEST_HEAD}", remedy
        )
    if device.startswith("cuda"):
        found = torch.cuda.get_device_capability(torch.device(device))
        if found < E4M3_CAPABILITY:
            raise UnsupportedError(
                section,
                f"this GPU has compute capability {found[0]}.{found[1]}, which cannot multiply "
                "E4M3 values",
                "compute capability 8.9 and later",
                f"{remedy}, or set implementation: reference",
            )


def _check_heads(given: int, item: AttentionInfo, section: str) -> None:
    if given not in (0, item.query_heads):
        raise UnsupportedError(
            f"{section}.heads",
            f"{given} budgets for {item.query_heads} query heads",
            "one budget for each query head of a layer",
            "Bound attention.mean_density instead, and calibration finds them",
        )


def prefill_notes(recipe: Recipe) -> Iterable[str]:
    """Say what calibration will settle."""
    asked = recipe.attention
    if asked is not None and asked.mean_density is not None:
        bound = asked.mean_density
        yield f"prefill: calibration gives heads budgets under a mean density of {bound}"
    if asked is not None and asked.quantize is not None:
        yield (
            f"prefill: layers of which a head's output in {asked.quantize} has a cosine under "
            f"{asked.min_cosine:g} on calibration text stay in the model's own precision"
        )


def prefill_statistics(recipe: Recipe) -> set[str]:
    """Name what calibration measures for the attention section."""
    asked, names = recipe.attention, set[str]()
    if asked is not None and asked.prefill is not None:
        names |= set(asked.prefill.build().statistics)
        names |= {PREFILL_CURVES} if asked.mean_density is not None else set()
    if asked is not None and asked.quantize is not None:
        names |= {PREFILL_COSINES}
    return names
