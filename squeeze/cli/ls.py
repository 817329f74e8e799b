"""``squeeze ls``: the methods and the shipped recipes."""

from __future__ import annotations

from typing import Any

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("kind", required=False)
@options.as_json
def command(kind: str | None, as_json: bool) -> None:
    """List methods with idea, parameters and source; KIND narrows it to one kind or 'recipes'."""
    from squeeze import registry
    from squeeze.cli._output import emit
    from squeeze.errors import RecipeError, nearest

    known = [*registry.KINDS, "recipes"]
    if kind is not None and kind not in known:
        remedy = nearest(kind, known) or "Leave it out to see all"
        raise RecipeError("KIND", f"unknown kind {kind!r}", ", ".join(known), remedy)
    kinds = known if kind is None else [kind]
    found = {name: _recipes() if name == "recipes" else _methods(name) for name in kinds}
    emit(found, "\n\n".join(_list(name, rows) for name, rows in found.items()), as_json)


def _methods(kind: str) -> list[dict[str, Any]]:
    """Describe every method of a kind; parameters as name -> allowed values and default."""
    from squeeze import registry

    rows = []
    for name in registry.names(kind):
        info = registry.info(kind, name)
        source = {"source": info.source, "year": info.year}
        rows.append({"name": name, "idea": info.idea, "parameters": parameters(info.cls), **source})
    return rows


def parameters(cls: type) -> dict[str, str]:
    """Say for every field of a method what it may be, and its default."""
    import typing
    from dataclasses import MISSING, fields

    from squeeze.recipe_parse import describe

    hints = typing.get_type_hints(cls, include_extras=True)
    parameters = {}
    for item in fields(cls):
        if item.init:
            default = "" if item.default is MISSING else f"; default {item.default}".lower()
            parameters[item.name] = describe(hints[item.name]) + default
    return parameters


def _recipes() -> list[dict[str, Any]]:
    """Describe the shipped recipes by the comment that starts each file."""
    from squeeze.recipe import shipped

    rows = []
    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        rows.append({"name": name, "idea": first.lstrip("# ") if first.startswith("#") else ""})
    return rows


def _list(kind: str, rows: list[dict[str, Any]]) -> str:
    """Lay out one kind: a line of idea per method, its parameters and source indented below."""
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size().columns, 100)
    indent = max((len(row["name"]) for row in rows), default=0) + 4
    lines = [kind]
    for row in rows:
        first = f"  {row['name']}".ljust(indent)
        idea = row["idea"].replace("``", "")
        lines.append(
            textwrap.fill(idea, width, initial_indent=first, subsequent_indent=" " * indent)
        )
        lines += [
            f"{'':{indent}}{name}: {text}" for name, text in row.get("parameters", {}).items()
        ]
        if "source" in row:
            lines.append(f"{'':{indent}}{row['year']}, {row['source']}")
    return "\n".join(lines)
