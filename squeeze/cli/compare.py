"""``squeeze compare``: reports side by side."""

from __future__ import annotations

from pathlib import Path

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("first", type=click.Path())
@click.argument("others", type=click.Path(), nargs=-1, required=True)
@click.option("--html", type=click.Path(dir_okay=False), help="Page to write, with plots.")
@options.as_json
def command(first: str, others: tuple[str, ...], html: str | None, as_json: bool) -> None:
    """Set report.json files (or their folders) side by side, with the ratio last / first.

    Conditions that differ between the runs are named underneath. The page that --html writes plots
    quality against bits and draws the line of those reports that no other one beats.
    """
    from squeeze.cli._output import emit, note
    from squeeze.report import Report, compare
    from squeeze.report_comparison import page

    paths = (first, *others)
    comparison = compare(*map(Report.load, paths), names=_names(paths))
    if html:
        Path(html).write_text(page(comparison), encoding="utf-8")
        note(f"wrote {html}")
    emit(comparison.to_dict(), comparison.table(), as_json)


def _names(paths: tuple[str, ...]) -> list[str]:
    """Name each report by its folder, numbered where two have the same name."""
    found = [Path(path).absolute() for path in paths]
    names = [path.parent.name if path.suffix == ".json" else path.name for path in found]
    return [
        name if names.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(names, start=1)
    ]
