"""``squeeze inspect``: which layers hurt at which bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("model")
@click.option("--bits", type=options.Numbers(), default="2,3,4", show_default=True, help="Widths.")
@click.option("--parts", default="weights,keys,values", show_default=True, help="Names, a,b,c.")
@click.option(
    "--mean-bits",
    type=click.FloatRange(0, 16, min_open=True),
    help="Bound of the recommended kv_cache; by default halfway between the widths.",
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Also write the bars as a web page.")
@options.seed
@options.loading
@options.quiet
@options.as_json
def command(
    model: str,
    bits: tuple[int, ...],
    parts: str,
    plot: str | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure how much loss each layer of MODEL adds when it alone is squeezed.

    One row per layer, part (weights, keys, values) and width: the increase of the loss over the
    cache, in nats per token; of keys and values also the divergence from the dense model. Layers
    that stand out are named, and the kv_cache section is printed that an allocation under
    --mean-bits chooses, with what it measured beside the best uniform choice.
    """
    from squeeze import api
    from squeeze.cli._output import emit
    from squeeze.cli._progress import progress

    with progress(quiet) as tell:
        names = [part.strip() for part in parts.split(",")]
        found = api.inspect_model(model, bits=bits, parts=names, progress=tell, **settings)
    if plot:
        _write_plot(model, found.to_dict(), Path(plot))
    emit(found.to_dict(), found.table() + (f"\nPlot in {plot}" if plot else ""), as_json)


def _write_plot(model: str, found: dict[str, Any], path: Path) -> None:
    from html import escape

    from squeeze.report_html import document, sensitivity_charts

    title = f"{model}: sensitivity per layer"
    charts = sensitivity_charts(found["rows"])
    body = f"<h1>{escape(title)}</h1><section>{charts}</section>"
    path.write_text(document(title, body), encoding="utf-8")
