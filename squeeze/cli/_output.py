"""Printing of results: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table


def emit(data: Any, text: str, as_json: bool) -> None:
    """Print ``data`` as JSON, or the same result as ``text``."""
    click.echo(json.dumps(data, indent=1) if as_json else text)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as wide as the terminal allows, long cells folded."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def note(text: str) -> None:
    """Say on standard error what a result on standard output cannot."""
    click.echo(text, err=True)
