"""Which Mamba mixers run with a forward of ours: those with int8 activations or packed steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from squeeze import registry
from squeeze.errors import UnsupportedError
from squeeze.model_info import MIXERS, ModelInfo


@dataclass(frozen=True)
class MixerPlan:
    """What happens to the activations of one mixer.

    Attributes:
        module: Dotted name of the mixer.
        method: Chooses scales for its activations; ``None`` leaves these alone.
        rotates: Dotted name of the linear layer whose weight holds a rotation of its inputs, or
            ``""``.
    """

    module: str
    method: dict[str, Any] | None
    rotates: str = ""


def mixer_rows(rows: Sequence[Any], info: ModelInfo, origin: str) -> tuple[MixerPlan, ...]:
    """Name the mixers that a plan's weight rows concern.

    Args:
        rows: ``WeightPlan`` of every linear layer that is packed.
        info: The model.
        origin: Of the recipe, for error messages.

    Raises:
        UnsupportedError: a method that takes whole mixers names something else.
    """
    methods = {row.module: row.method for row in rows}
    whole = {name: method for name, method in methods.items() if takes_mixers(method)}
    result = []
    for mixer in info.mixers:
        inside = [name for name in info.linears if name.startswith(f"{mixer}.")]
        method = next((whole.pop(name) for name in inside if name in whole), None)
        if method is not None:
            for name in inside:
                whole.pop(name, None)
                if methods.get(name) != method:
                    raise _refused(origin, method, f"{name} is left out or packed otherwise")
            rotated = f"{mixer}.out_proj" if _build(method).hadamard else ""
            result.append(MixerPlan(mixer, method, rotated))
        elif f"{mixer}.dt_proj" in methods:
            result.append(MixerPlan(mixer, None))
    for name, method in whole.items():
        raise _refused(origin, method, f"{name} is in none of a {info.model_type!r} model")
    return tuple(result)


def takes_mixers(method: dict[str, Any]) -> bool:
    """Whether a weight method also chooses scales for a mixer's activations."""
    return hasattr(registry.get("weights", method["method"]), "mixer_statistics")


def _build(method: dict[str, Any]) -> Any:
    parameters = {key: value for key, value in method.items() if key != "method"}
    return registry.get("weights", method["method"])(**parameters)


def _refused(origin: str, method: dict[str, Any], why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{origin}: weights",
        f"{method['method']!r} takes whole Mamba mixers, and {why}",
        "targets: [mixer], in models with " + " or ".join(MIXERS),
        "Change targets, or choose another method",
    )
