"""``squeeze compare``: two reports side by side."""

from __future__ import annotations

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@options.as_json
def command(first: str, second: str, as_json: bool) -> None:
    """Set two report.json files (or their folders) side by side, with the ratio second / first.

    Conditions that differ between the two runs are named underneath.
    """
    from squeeze.cli._output import emit
    from squeeze.report import Report, compare

    comparison = compare(Report.load(first), Report.load(second))
    emit(comparison.to_dict(), comparison.table(), as_json)
