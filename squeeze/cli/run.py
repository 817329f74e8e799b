"""``squeeze run``: the whole flow."""

from __future__ import annotations

from typing import Any

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("recipe")
@options.model
@options.output
@options.overwrite
@options.loading
@options.seed
@options.overrides
@click.option("--evaluate/--no-evaluate", default=True, help="Measure dense and squeezed.")
@options.quiet
@options.as_json
def command(recipe: str, quiet: bool, as_json: bool, **settings: Any) -> None:
    """Squeeze a model by RECIPE: a shipped name (see 'squeeze ls recipes') or a YAML file.

    Plans, calibrates, compresses, evaluates dense and squeezed, and with --output writes a
    checkpoint, report.json and report.html. A killed run resumes where it was.
    """
    from squeeze import api, processes
    from squeeze.cli._output import emit
    from squeeze.cli._progress import progress

    settings["device"] = processes.join(settings["device"])
    with progress(quiet) as tell:
        result = api.run(recipe, progress=tell, **settings)
    output, report = settings["output"], result.report
    data = {
        "output": output,
        "effective_bits": dict(result.plan.effective_bits),
        "plan": result.plan.to_dict(),
        "report": report.to_dict() if report else None,
    }
    text = report.table() if report else result.plan.table()
    emit(data, text + (f"\nWritten to {output}" if output else ""), as_json)
