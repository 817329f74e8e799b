"""Safetensors files of named tensors with facts beside them, written in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from squeeze import atomic
from squeeze.errors import CheckpointError


def flatten(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join two levels of names with a slash."""
    return {f"{s}/{name}": t for s, modules in tensors.items() for name, t in modules.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo ``flatten``."""
    result: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        first, name = key.split("/", 1)
        result.setdefault(first, {})[name] = tensor
    return result


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and facts about them in one step."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic.replacing(path) as draft:
        save_file(contiguous, draft, metadata={"squeeze": json.dumps(dict(about))})


def read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors whose names begin with ``prefix``, and the facts beside them.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("squeeze", "{}"))
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, about
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})") from error


def read_own(path: Path, run: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of work in progress whose fact ``run`` names this run.

    Raises:
        CheckpointError: it is damaged, or another run's.
    """
    tensors, about = read(path)
    if about.get("run") != run:
        raise CheckpointError(
            str(path),
            f"{what} with another model, text or statistics",
            remedy="Remove the file or choose another folder",
        )
    return tensors, about
