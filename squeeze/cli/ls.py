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
    from squeeze.cli._output import emit, print_table
    from squeeze.errors import RecipeError, nearest

    known = [*registry.KINDS, "recipes"]
    if kind is not None and kind not in known:
        remedy = nearest(kind, known) or "Leave it out to see all"
        raise RecipeError("KIND", f"unknown kind {kind!r}", ", ".join(known), remedy)
    kinds = known if kind is None else [kind]
    found = {name: _recipes() if name == "recipes" else _methods(name) for name in kinds}
    if as_json:
        emit(found, "", as_json)
        return
    for name, rows in found.items():
        columns = list(rows[0]) if rows else ["name"]
        print_table(name, columns, [[_cell(value) for value in row.values()] for row in rows])


def _methods(kind: str) -> list[dict[str, Any]]:
    """Describe every method of a kind; parameters as name -> allowed values and default."""
    import typing
    from dataclasses import MISSING, fields

    from squeeze import registry
    from squeeze.recipe import describe

    rows = []
    for name in registry.names(kind):
        info = registry.info(kind, name)
        hints = typing.get_type_hints(info.cls, include_extras=True)
        parameters = {
            item.name: describe(hints[item.name])
            + ("" if item.default is MISSING else f"; default {item.default}")
            for item in fields(info.cls)
            if item.init
        }
        source = {"source": info.source, "year": info.year}
        rows.append({"name": name, "idea": info.idea, "parameters": parameters, **source})
    return rows


def _recipes() -> list[dict[str, Any]]:
    """Describe the shipped recipes by the comment that starts each file."""
    from squeeze.recipe import shipped

    rows = []
    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        rows.append({"name": name, "idea": first.lstrip("# ") if first.startswith("#") else ""})
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {text}" for name, text in value.items())
    return str(value)
