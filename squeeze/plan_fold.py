"""Key scales that go into the weights: which models take them, and whose heads share them."""

from __future__ import annotations

from typing import Any

from squeeze.errors import RecipeError, UnsupportedError
from squeeze.model_info import ModelInfo
from squeeze.recipe import KVSide, Recipe
from squeeze.recipe_values import build_transform

# Architectures whose queries and keys come out of linear layers of their own, and are turned whole,
# channel i with i + D / 2.
FOLDABLE = frozenset(
    [
        "gemma2",
        "gpt_oss",
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen3",
        "qwen3_moe",
    ]
)
# Of these, where a norm with one weight for all heads lies between them and RoPE.
NORMED = frozenset({"qwen3", "qwen3_moe"})


def settle_folds(recipe: Recipe, keys: KVSide, info: ModelInfo) -> KVSide:
    """Return a side's keys with what the model asks of a transform that folds into its weights.

    Raises:
        RecipeError: the transform is not the first one, has no pairs, or stands beside
            ``mean_bits``, which measures packed copies of the dense model's caches.
        UnsupportedError: the model cannot take it.
    """
    transforms: list[str | dict[str, Any]] = []
    for index, entry in enumerate(keys.transforms):
        made = build_transform(entry)[1]
        if getattr(made, "fold", False):
            assert isinstance(entry, dict)
            _check(recipe, made, index, info)
            entry = {**entry, "shared": True} if info.model_type in NORMED else entry
        transforms.append(entry)
    return keys.model_copy(update={"transforms": tuple(transforms)})


def _check(recipe: Recipe, made: Any, index: int, info: ModelInfo) -> None:
    place = f"{recipe.origin}: kv_cache.keys.transforms.{made.info.name}.fold"
    assert recipe.kv_cache is not None
    wrong = [
        (not made.pairs, "scales single channels, which RoPE mixes", "pairs: true"),
        (index > 0, "comes after another transform", "the first of the transforms"),
        (recipe.kv_cache.mean_bits is not None, "stands beside kv_cache.mean_bits", "one of both"),
    ]
    for applies, received, allowed in wrong:
        if applies:
            raise RecipeError(place, received, allowed, "Set fold: false, or change the recipe")
    if info.model_type not in FOLDABLE:
        raise UnsupportedError(
            place,
            f"a {info.model_type!r} model cannot take it: queries and keys do not come out of "
            "q_proj and k_proj, or of norms whose weight multiplies them, into a RoPE that turns "
            "all channels",
            ", ".join(sorted(FOLDABLE)),
            "Set fold: false: the scales then act at run time, with the same effect",
        )
