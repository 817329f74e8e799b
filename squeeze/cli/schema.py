"""``squeeze schema``: the recipe's JSON schema."""

from __future__ import annotations

import json

import click

from squeeze.cli import _options as options


@options.command()
@click.option("--json", "as_json", is_flag=True, help="The schema is JSON either way.")
def command(as_json: bool) -> None:
    """Print the JSON schema of recipes, for completion and checks in an editor."""
    from squeeze import recipe

    click.echo(json.dumps(recipe.schema(), indent=1))
