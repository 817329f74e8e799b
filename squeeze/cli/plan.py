"""``squeeze plan``: the dry run."""

from __future__ import annotations

from typing import Any

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("recipe")
@options.model
@click.option("--context", type=click.IntRange(1), default=8192, show_default=True, help="Tokens.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@click.option(
    "--tp-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that share the model by tensor parallelism; refuses what cannot be split.",
)
@options.loading
@options.overrides
@options.as_json
def command(recipe: str, as_json: bool, **settings: Any) -> None:
    """Show what RECIPE would do to which modules, saving how many bytes. Loads no weights."""
    from squeeze import api
    from squeeze.cli._output import emit

    plan = api.plan(recipe, **settings)
    emit(plan.to_dict(), plan.table(), as_json)
