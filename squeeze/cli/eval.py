"""``squeeze eval``: tasks on one model, or on a squeezed one beside the dense."""

from __future__ import annotations

from typing import Any

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("model")
@click.option("--recipe", help="Squeeze MODEL by this recipe first, in memory.")
@options.dense
@click.option("--tasks", default="books_perplexity,needle", show_default=True, help="Names, a,b,c.")
@click.option("--mode", type=click.Choice(["decode", "prefill"]), default="decode")
@click.option("--limit", type=click.IntRange(1), help="Windows, facts or documents per task.")
@click.option("--length", type=click.IntRange(2), default=2048, show_default=True, help="Tokens.")
@options.seed
@options.overrides
@options.loading
@options.quiet
@options.as_json
def command(
    model: str,
    recipe: str | None,
    dense: str | None,
    tasks: str,
    mode: str,
    limit: int | None,
    length: int,
    seed: int | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Evaluate MODEL: a squeezed folder, a dense folder or hub name, or 'reference'.

    Mode 'decode' scores over the packed cache; mode 'prefill' scores one forward, where a method
    that changes only cached tokens looks lossless. Tasks are ours or, with the eval extra, any of
    lm-eval's. Processes that 'accelerate launch' or torchrun starts split the requests.
    """
    from squeeze import api, processes
    from squeeze.cli._models import dense_source, is_squeezed, open_model
    from squeeze.cli._output import emit, note
    from squeeze.cli._progress import progress

    loading["device"] = processes.join(loading["device"])
    settings: dict[str, Any] = {"tasks": [task.strip() for task in tasks.split(",")], "mode": mode}
    settings |= {"limit": limit, "length": length, "seed": seed or 0}
    source: str | None = dense or model
    if not recipe:
        source, reason = dense_source(model, dense, loading["trust_remote_code"])
        if reason:
            note(reason)
    results = {}
    with progress(quiet) as tell:
        settings["progress"] = tell
        if source:
            results["dense"] = api.evaluate(*open_model(source, **loading), **settings)
        if recipe:
            changed = {"overrides": list(overrides), "seed": seed, "progress": tell, **loading}
            made = api.run(recipe, model, evaluate=False, **changed)
            results["squeezed"] = api.evaluate(made.model, made.tokenizer, **settings)
        else:
            name = "squeezed" if is_squeezed(model) else "model"
            results[name] = api.evaluate(*open_model(model, **loading), **settings)
    if processes.rank() == 0:
        emit(results, _table(results), as_json)


def _table(results: dict[str, Any]) -> str:
    """Lay out task values, their conditions in a column."""
    from squeeze.measurement import Measurement, tabulate

    columns = [(name, Measurement.from_results([result])) for name, result in results.items()]
    return tabulate(columns, {})
