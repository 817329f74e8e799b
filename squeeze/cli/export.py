"""``squeeze export``: a squeezed folder in another format."""

from __future__ import annotations

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("directory")
@click.option("--format", "form", required=True, help="squeeze or compressed-tensors.")
@options.output
@options.overwrite
@options.as_json
def command(directory: str, form: str, output: str | None, overwrite: bool, as_json: bool) -> None:
    """Write the squeezed model in DIRECTORY in another format, by default to DIRECTORY-FORMAT."""
    from squeeze import api
    from squeeze.cli._output import emit

    target = api.export(directory, form, output, overwrite=overwrite)
    emit({"format": form, "output": str(target)}, f"Written to {target}", as_json)
