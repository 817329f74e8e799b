"""The file of results: conditions, and cells by row and length; parts of a table merge into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.kv_cache_quality.measure import MODE, SEED, Settings
from benchmarks.kv_cache_quality.rows import Row
from squeeze import atomic, reference
from squeeze.environment import environment
from squeeze.errors import CheckpointError, RecipeError, nearest
from squeeze.model_info import describe
from squeeze.plan import resolve_device


def choose(names: str | None, known: Mapping[str, Row]) -> list[Row]:
    """Return the rows named, with commas between, or every row.

    Raises:
        RecipeError: there is no such row.
    """
    wanted = list(known) if names is None else [name for name in names.split(",") if name]
    for name in wanted:
        if name not in known:
            allowed = ", ".join(known)
            raise RecipeError("--rows", f"unknown row {name!r}", allowed, nearest(name, known))
    return [known[name] for name in wanted]


def conditions(settings: Settings) -> dict[str, Any]:
    """Collect everything that all cells of one table have in common."""
    books = json.dumps(reference.validation_books(), sort_keys=True).encode()
    where = environment()
    return {
        "model": settings.model,
        "text": f"validation books, sha256 {hashlib.sha256(books).hexdigest()[:12]}",
        "mode": MODE,
        "windows": settings.windows,
        "facts": settings.facts,
        "seed": SEED,
        "dtype": describe(settings.model, dtype=settings.dtype).dtype,
        "device": resolve_device(settings.device),
        "hardware": where["hardware"],
        "versions": where["versions"],
    }


def empty(shared: Mapping[str, Any]) -> dict[str, Any]:
    """Start a table without rows."""
    return {"conditions": dict(shared), "rows": {}}


def put(
    result: dict[str, Any], row: Row, length: int, cell: Mapping[str, Any] | BaseException
) -> None:
    """Store one cell, or the reason why there is none."""
    entry = result["rows"].setdefault(row.name, {"kind": row.kind, "settings": {}, "cells": {}})
    if entry["settings"] != row.settings:
        entry |= {"settings": dict(row.settings), "cells": {}}
    if isinstance(cell, BaseException):
        first_line = str(cell).strip().split("\n", 1)[0]
        cell = {"error": f"{type(cell).__name__}: {first_line}"}
    entry["cells"][str(length)] = dict(cell)


def merge(first: Mapping[str, Any], second: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Lay the cells of ``second`` over those of ``first``.

    Raises:
        CheckpointError: they were measured under different conditions.
    """
    ours, theirs = first["conditions"], second["conditions"]
    changed = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
    if changed:
        received = "; ".join(f"{k} is {theirs.get(k)} beside {ours.get(k)}" for k in changed)
        remedy = "Measure all rows anew with --fresh, or write to another --output"
        raise CheckpointError(place, received, "rows measured under equal conditions", remedy)
    merged: dict[str, Any] = {"conditions": dict(ours), "rows": {}}
    for source in (first, second):
        for name, entry in source["rows"].items():
            before = merged["rows"].get(name)
            same = before is not None and before["settings"] == entry["settings"]
            cells = {**(before["cells"] if same else {}), **entry["cells"]}
            merged["rows"][name] = {**entry, "cells": cells}
    return merged


def read(path: Path) -> dict[str, Any]:
    """Read a file of results.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    if not path.is_file():
        raise CheckpointError(str(path), "no such file", "a file that this command wrote")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(path), f"not JSON ({error})", "a file of results") from error
    return found


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a file of results in one step."""
    atomic.write_text(path, json.dumps(result, indent=1) + "\n")
