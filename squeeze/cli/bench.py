"""``squeeze bench``: speed and memory, dense beside squeezed, in one process."""

from __future__ import annotations

from typing import Any

import click

from squeeze.cli import _options as options

ROWS = (
    ("time to first token, s", "prefill_seconds", 1.0, ".3f"),
    ("decode, ms per token", "decode_ms_per_token", 1.0, ".2f"),
    ("  of it weights, %", "weights_share", 100.0, ".0f"),
    ("  of it attention, %", "attention_share", 100.0, ".0f"),
    ("  of it other kernels, %", "other_share", 100.0, ".0f"),
    ("  of it launching, %", "launch_share", 100.0, ".0f"),
    ("KV cache, MB", "kv_bytes", 1e-6, ".2f"),
    ("weights, MB", "weight_bytes", 1e-6, ".2f"),
    ("peak memory, MB", "peak_bytes", 1e-6, ".1f"),
)


@options.command()
@click.argument("directory")
@options.dense
@click.option(
    "--context", type=options.Numbers(), default="2048", show_default=True, help="Tokens."
)
@click.option("--batch", type=options.Numbers(), default="1", show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="To decode.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@options.loading
@options.quiet
@options.as_json
def command(
    directory: str,
    dense: str | None,
    context: tuple[int, ...],
    batch: tuple[int, ...],
    tokens: int,
    repeats: int,
    quiet: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Time prefill and decoding of the model in DIRECTORY beside the dense model it came from.

    --context and --batch take lists (2048,8192). Medians after one warm-up round; peak memory is
    known on CUDA only.
    """
    from squeeze.cli._models import dense_source, open_model
    from squeeze.cli._output import emit, note
    from squeeze.cli._progress import progress
    from squeeze.environment import environment

    source, reason = dense_source(directory, dense, loading["trust_remote_code"])
    if reason:
        note(reason)
    names = {"dense": source, "squeezed": directory}
    shapes = [(length, rows) for length in context for rows in batch]
    results: list[dict[str, Any]] = []
    with progress(quiet) as tell:
        for column, name in names.items():
            if name is None:
                continue
            model, _ = open_model(name, **loading)
            for done, shape in enumerate(shapes):
                results.append({"model": column, **_measure(model, shape, tokens, repeats)})
                if tell:
                    tell(f"bench {column}", done + 1, len(shapes))
            del model
    data = {**environment(), "results": results}
    emit(data, _tables(shapes, results, data["hardware"]), as_json)


def _measure(model: Any, shape: tuple[int, int], tokens: int, repeats: int) -> dict[str, Any]:
    from squeeze.evaluation.latency import latency
    from squeeze.evaluation.memory import weight_bytes

    counts = {"prompt_tokens": shape[0], "batch_size": shape[1], "decode_tokens": tokens}
    measured = latency(model, repeats=repeats, **counts)
    return {**measured, "weight_bytes": weight_bytes(model)}


def _tables(shapes: list[tuple[int, int]], results: list[dict[str, Any]], hardware: Any) -> str:
    """Lay out one table per shape, its conditions in the title."""
    from rich.table import Table

    from squeeze.measurement import ratio, render

    texts = []
    for length, rows in shapes:
        here = [r for r in results if (r["prompt_tokens"], r["batch_size"]) == (length, rows)]
        where = hardware["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}"
        title = f"{length} tokens, batch {rows}, {here[0]['dtype']}, {where}"
        table = Table("", *(r["model"] for r in here), "ratio", title=title, title_justify="left")
        for name, key, factor, spec in ROWS:
            values = [None if r[key] is None else r[key] * factor for r in here]
            if any(value is not None for value in values):
                cells = ["" if value is None else format(value, spec) for value in values]
                table.add_row(name, *cells, ratio(values) if len(values) > 1 else "")
        texts.append(render(table))
    return "\n".join(texts)
