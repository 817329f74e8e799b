"""``squeeze inspect``: which layers hurt at which bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("model")
@click.option("--bits", type=options.Numbers(), default="2,3,4", show_default=True, help="Widths.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Also write the bars as a web page.")
@options.seed
@options.loading
@options.quiet
@options.as_json
def command(
    model: str, bits: tuple[int, ...], plot: str | None, quiet: bool, as_json: bool, **settings: Any
) -> None:
    """Measure how much loss each layer of MODEL adds when it alone is squeezed.

    One row per layer, part (weights, keys, values) and width: the increase of the loss over the
    cache on a short window of held-out text, in nats per token.
    """
    from squeeze import api
    from squeeze.cli._output import emit
    from squeeze.cli._progress import progress

    with progress(quiet) as tell:
        found = api.inspect_model(model, bits=bits, progress=tell, **settings)
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
