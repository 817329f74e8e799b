"""The weights' side of a plan with a bound on mean bits: what is tied, and what uniform means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from squeeze.errors import RecipeError
from squeeze.recipe_values import Recipe, WeightRule

BITS_TOLERANCE = 1e-9
# Statistics that tell what an error of a weight does to the end of the model, best first.
PREDICTORS = ("guided_hessian", "fisher")
# Layers that runtimes fuse into one product, which needs one width.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))

Row = TypeVar("Row", bound=Any)


@dataclass(frozen=True)
class WeightAllocation:
    """A bound on the mean effective bits of some weights, and what was chosen under it.

    Attributes:
        mean_bits: The bound, over all modules of ``groups``.
        groups: Names of modules that share a method.
        candidates: Methods with their parameters, as in ``WeightPlan.method``.
        chosen: ``"mix"`` (methods differ between groups), ``"uniform"``, or empty before
            calibration: the plan then holds the widest uniform choice.
        measured: Held-out divergence from the dense model, nats per token, of ``"mix"`` and of
            ``"uniform"``; empty where it was not measured.
    """

    mean_bits: float
    groups: tuple[tuple[str, ...], ...]
    candidates: tuple[dict[str, Any], ...]
    chosen: str = ""
    measured: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightAllocation:
        """Rebuild it from ``asdict``'s data, or from the same after JSON."""
        groups = tuple(tuple(group) for group in data["groups"])
        return cls(**{**data, "groups": groups, "candidates": tuple(data["candidates"])})


def bound_of(recipe: Recipe, chosen: Mapping[str, WeightRule]) -> WeightAllocation | None:
    """Return what is to be allocated, before anything is measured; ``None`` without a bound."""
    rule = next((rule for rule in recipe.weights if rule.mean_bits is not None), None)
    names = [name for name, own in chosen.items() if own is rule]
    if rule is None or rule.mean_bits is None or not names:
        return None
    candidates = tuple(one.to_dict() for one in rule.candidates)
    return WeightAllocation(rule.mean_bits, tied(names), candidates)


def tied(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Group modules that runtimes fuse, in order of appearance."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        first = next((group[0] for group in FUSED if last in group), last)
        groups.setdefault((path, first), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def uniform_rows(
    rows: Sequence[Row],
    allocation: WeightAllocation,
    repack: Callable[[Row, Mapping[str, Any]], Row],
    origin: str,
) -> tuple[Row, ...]:
    """Give all open modules the widest candidate under the bound.

    Args:
        rows: ``WeightPlan`` of every packed module.
        allocation: Says which are open.
        repack: Returns a row with another method, sizes counted again.
        origin: Of the recipe.

    Raises:
        RecipeError: no candidate fits under the bound.
    """
    found = []
    for candidate in allocation.candidates:
        made = with_methods(rows, allocation, [candidate] * len(allocation.groups), repack)
        found.append((mean_bits(made, allocation), made))
    fitting = [x for x in found if x[0] <= allocation.mean_bits + BITS_TOLERANCE]
    if not fitting:
        least = min(bits for bits, _ in found)
        raise RecipeError(
            f"{origin}: weights.mean_bits",
            f"{allocation.mean_bits} is under what the narrowest candidate needs",
            f"at least {least:.3f} effective bits here",
            "Raise it, or add narrower candidates",
        )
    return max(fitting, key=lambda x: x[0])[1]


def with_methods(
    rows: Sequence[Row],
    allocation: WeightAllocation,
    methods: Sequence[Mapping[str, Any]],
    repack: Callable[[Row, Mapping[str, Any]], Row],
) -> tuple[Row, ...]:
    """Give each group its method; rows outside all groups stay as they are."""
    named = {
        name: method
        for group, method in zip(allocation.groups, methods, strict=True)
        for name in group
    }
    return tuple(repack(row, named[row.module]) if row.module in named else row for row in rows)


def mean_bits(rows: Iterable[Any], allocation: WeightAllocation) -> float:
    """Return the mean effective bits of the open modules."""
    open_names = {name for group in allocation.groups for name in group}
    rows = [row for row in rows if row.module in open_names]
    return 8 * sum(row.bytes_after for row in rows) / sum(row.values for row in rows)
