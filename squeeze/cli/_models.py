"""Opening what a user named on the command line: a squeezed folder or a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def is_squeezed(name: str) -> bool:
    """Whether the name is a folder that squeeze wrote."""
    from squeeze.export import MANIFEST

    return (Path(name) / MANIFEST).is_file()


def open_model(
    name: str, device: str | None, dtype: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Load a squeezed folder, verified, or a dense model, with its tokenizer."""
    from squeeze import api
    from squeeze.cli._progress import no_loading_bars
    from squeeze.loading import load_model
    from squeeze.plan import resolve_device

    with no_loading_bars():
        if is_squeezed(name):
            return api.load(name, device=device, dtype=dtype), api.load_tokenizer(name)
        device = resolve_device(device)
        model = load_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return model, api.load_tokenizer(name, trust_remote_code)


def dense_source(
    directory: str, given: str | None, trust_remote_code: bool
) -> tuple[str | None, str | None]:
    """Find the dense model that a squeezed folder came from.

    Args:
        directory: What is measured.
        given: ``--dense``, which wins.
        trust_remote_code: Passed to transformers.

    Returns:
        Its name, or ``None``; and one sentence saying why there is none, or ``None``.
    """
    from squeeze.errors import CheckpointError
    from squeeze.export import read_manifest
    from squeeze.model_info import load_config

    if given:
        return given, None
    if not is_squeezed(directory):
        return None, None
    source = read_manifest(Path(directory)).get("source")
    if not source:
        return None, f"{directory} names no dense model; one column only. Give it by --dense."
    try:
        load_config(source, trust_remote_code)
    except CheckpointError as error:
        return None, f"The dense model cannot be had, so there is one column only. {error}"
    return source, None
