"""Which linear layers leave small inputs out while the model decodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from squeeze.errors import RecipeError, UnsupportedError
from squeeze.matching import matches
from squeeze.model_info import ModelInfo
from squeeze.plan_table import fold
from squeeze.recipe import Recipe
from squeeze.recipe_values import ActivationRule


@dataclass(frozen=True)
class ActivationPlan:
    """What happens to the inputs of one linear layer.

    Attributes:
        module: Dotted name of the layer.
        method: Chooses its thresholds.
        implementation: What computes the layer in decode.
        inputs: Number of its input channels.
        skips: Whether columns of dead channels are not read; a packed weight's are.
    """

    module: str
    method: dict[str, Any]
    implementation: str
    inputs: int
    skips: bool


def activation_rows(
    recipe: Recipe, info: ModelInfo, weights: Sequence[Any], implementation: str
) -> Iterable[ActivationPlan]:
    """List the layers whose inputs a recipe makes sparse.

    Raises:
        UnsupportedError: the model keeps no keys and values, so nothing says what decode is; or a
            layer's inputs are scaled for its packed weight.
        RecipeError: targets that match nothing.
    """
    if not recipe.activations:
        return
    if not info.attention:
        raise UnsupportedError(
            f"{recipe.origin}: activations",
            f"a {info.model_type!r} model has no attention cache that tells decode from prefill",
            "models with attention",
            "Remove activations from the recipe",
        )
    chosen: dict[str, ActivationRule] = {}
    for i, rule in enumerate(recipe.activations):
        hit = [n for n in info.linears if matches(n, rule.targets) and not matches(n, rule.ignore)]
        if not hit:
            raise RecipeError(
                f"{recipe.origin}: activations.{i}.targets",
                f"{list(rule.targets)} matches no linear layer of this {info.model_type} model",
                ", ".join(fold(list(info.linears))[:12]) or "nothing here is an nn.Linear",
                "Name modules or parts of their names",
            )
        chosen |= dict.fromkeys(hit, rule)
    packed = {row.module: row for row in weights}
    for name, rule in chosen.items():
        row = packed.get(name)
        if row is not None and row.producer:
            raise UnsupportedError(
                f"{recipe.origin}: activations",
                f"the inputs of {name} are scaled for its packed weight",
                "weight methods that leave inputs as they are",
                "Set scaling: none, or leave this layer out of activations",
            )
        yield ActivationPlan(
            module=name,
            method=rule.method.to_dict(),
            implementation=implementation if row is None else row.implementation,
            inputs=info.linears[name][1],
            skips=row is None and implementation == "triton",
        )
