"""Several reports as one self-contained HTML page: bits against quality, and all their numbers."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from squeeze.measurement import metrics, ratio
from squeeze.report_charts import Point
from squeeze.report_html import document
from squeeze.report_pareto import rise_chart, share_chart

if TYPE_CHECKING:
    from squeeze.report import Comparison, Report

DENSE_BITS = 16.0
SIZE = (516, 340)
# Part of the model -> its stored bits in a report.
PARTS: dict[str, Callable[[Report], float]] = {
    "KV cache": lambda r: (r.effective_bits["keys"] + r.effective_bits["values"]) / 2,
    "weights": lambda r: r.effective_bits["weights"],
}


def page(comparison: Comparison) -> str:
    """Return the whole page as text; a plot is left out where fewer than two reports have it."""
    title = "Reports compared"
    plots = [_plots(comparison, part) for part in PARTS]
    return document(title, "\n".join([f"<h1>{title}</h1>", *filter(None, plots), _all(comparison)]))


def _plots(comparison: Comparison, part: str) -> str:
    """Plot quality against the bits of one part of the model, a row of plots per length."""
    lengths = sorted({int(n) for report in comparison.reports for n in report.squeezed.by_length})
    charts = [chart for length in lengths for chart in _pair(comparison, part, str(length))]
    if not charts:
        return ""
    note = (
        f"Stored bits per value of the {part}, scales and tables included. The line joins the "
        "reports that no other beats in both. Reports may differ in other parts too: see below."
    )
    body = f'<p class="soft">{note}</p><div class="pair">{"".join(charts)}</div>'
    return f"<section><h2>Bits of the {part} against quality</h2>{body}</section>"


def _pair(comparison: Comparison, part: str, length: str) -> list[str]:
    """Plot perplexity and retrieval at one length, where two reports or more have them."""
    rises, shares = [], []
    for name, report in zip(comparison.names, comparison.reports, strict=True):
        bits = PARTS[part](report)
        dense = report.dense.by_length.get(length, {}).get("books_perplexity")
        found = report.squeezed.by_length.get(length, {})
        if bits >= DENSE_BITS:
            continue
        if dense and "books_perplexity" in found:
            rise = 100 * (found["books_perplexity"] / dense - 1)
            rises.append(Point(name, bits, rise, "squeezed"))
        if "needle" in found:
            shares.append(Point(name, bits, found["needle"], "squeezed"))
    x_label, where = f"bits per value of the {part}", f"{length} tokens, decode"
    charts = []
    if len(rises) > 1:
        charts.append(rise_chart(rises, x_label, f"perplexity rise, {where}", SIZE))
    if len(shares) > 1:
        charts.append(share_chart(shares, x_label, f"facts retrieved, {where}", SIZE))
    return charts


def _all(comparison: Comparison) -> str:
    """Lay out every number with its conditions, and the conditions that differ."""
    sides = [report.squeezed for report in comparison.reports]
    heads = "".join(f'<th class="number">{escape(n)}</th>' for n in (*comparison.names, "ratio"))
    rows = [f"<tr><th>measure</th><th>conditions</th>{heads}</tr>"]
    for metric in metrics(sides, {}):
        cells = [metric.cell(side) for side in sides]
        cells.append(ratio([metric.value(side) for side in sides]))
        numbers = "".join(f'<td class="number">{cell or "&ndash;"}</td>' for cell in cells)
        where = f'<td class="where">{metric.condition}</td>'
        rows.append(f"<tr><td>{metric.name}</td>{where}{numbers}</tr>")
    differing = [
        f"{key}: {' | '.join(map(str, values))}" for key, values in comparison.differences.items()
    ]
    note = "Conditions that differ: " + ("; ".join(differing) or "none") + "."
    table = f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    heading = "<h2>Measurements of the squeezed models</h2>"
    return f'<section>{heading}<p class="soft">{escape(note)}</p>{table}</section>'
