"""The page ``docs/kv_cache.md``: its generated parts, and the picture beside it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.kv_cache_quality.catalogue import formats, recipes
from benchmarks.kv_cache_quality.rows import DENSE, RECIPE, TRANSFORMERS, discover
from scripts.readme import replace
from squeeze.report_charts import Point
from squeeze.report_html import COLOURS, MARKS
from squeeze.report_pareto import rise_chart, share_chart

PAGE, PICTURE = "kv_cache.md", "kv_cache.svg"
PLOT = (516, 340)
STYLES = {RECIPE: "squeezed", TRANSFORMERS: "s2"}
TITLES = {RECIPE: "recipes of squeeze", TRANSFORMERS: "QuantizedCache of transformers"}
FONT = "svg text { font-family: system-ui, sans-serif; }"
MISSING = "-"
Result = Mapping[str, Any]


def write(result: Result, docs: Path) -> None:
    """Renew the page's generated parts and its picture."""
    text = (docs / PAGE).read_text(encoding="utf-8")
    parts = {"formats": formats(), "recipes": recipes(), "table": table(result)}
    for name, content in {**parts, "missing": missing(result)}.items():
        text = replace(text, name, content)
    (docs / PAGE).write_text(text, encoding="utf-8")
    (docs / PICTURE).write_text(picture(result), encoding="utf-8")


def table(result: Result) -> str:
    """Lay out every row by falling bits as Markdown, conditions and failures underneath."""
    lengths = _lengths(result)
    heads = ["cache", "effective bits", f"bytes of dense at {lengths[-1]}"]
    for length in lengths:
        heads += [f"perplexity, {length}", f"needle, {length}"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    names = sorted(result["rows"], key=lambda name: (-(bits(result, name) or 0.0), name))
    for name in names:
        cells = [title(result, name), _bits_cell(result, name), _share_cell(result, name)]
        for length in lengths:
            cells += [perplexity_cell(result, name, length), needle_cell(result, name, length)]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- {line}" for line in failures(result)]
    return "\n".join([*lines, "", conditions_of(result), *(["", *failed] if failed else [])]) + "\n"


def missing(result: Result) -> str:
    """Name the rows that the file of results has no cell of."""
    absent = [f"`{name}`" for name in discover() if name not in result["rows"]]
    return f"Not measured: {', '.join(absent)}.\n" if absent else ""


def failures(result: Result) -> list[str]:
    """Say of every cell that could not be measured why."""
    return [
        f"`{name}` at {length} tokens could not run: {cell['error']}"
        for name, row in result["rows"].items()
        for length, cell in row["cells"].items()
        if "error" in cell
    ]


def line(result: Result, name: str, length: int) -> str:
    """Say what one cell measured, for the one who waits."""
    cell = result["rows"][name]["cells"][str(length)]
    if "error" in cell:
        return f"{name} {length}: {cell['error']}"
    perplexity, needle = cell["books_perplexity"]["value"], cell["needle"]["value"]
    found = f"perplexity {perplexity:.3f}, needle {needle:.2f}"
    return f"{name} {length}: {_bits_cell(result, name)} bits, {found}, {cell['seconds']} s"


def title(result: Result, name: str) -> str:
    """Name a row for a reader who does not know the command line's names."""
    row = result["rows"][name]
    if row["kind"] != TRANSFORMERS:
        return name if row["kind"] == DENSE else f"`{name}`"
    return f"transformers, {row['settings']['backend']}, {row['settings']['nbits']} bits"


def bits(result: Result, name: str) -> float | None:
    """Return the effective bits of a row at its longest measured length."""
    cell = _longest(result, name)
    return cell["storage"]["effective_bits"] if cell else None


def rise(result: Result, name: str, length: int) -> tuple[float, float] | None:
    """Return how far perplexity rose over dense, in percent, and the standard error of that.

    The windows are the same ones, so the error is that of the mean of their differences.
    """
    dense, cell = _cell(result, "dense", length), _cell(result, name, length)
    if dense is None or cell is None:
        return None
    pairs = zip(
        cell["books_perplexity"]["window_nll"], dense["books_perplexity"]["window_nll"], strict=True
    )
    changes = [ours - theirs for ours, theirs in pairs]
    error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    factor = math.exp(statistics.fmean(changes))
    return 100 * (factor - 1), 100 * factor * error


def perplexity_cell(result: Result, name: str, length: int) -> str:
    """Print dense perplexity as it is, and other rows' as the rise over it."""
    cell = _cell(result, name, length)
    if cell is None:
        return MISSING
    found = None if result["rows"][name]["kind"] == DENSE else rise(result, name, length)
    if found is None:
        return f"{cell['books_perplexity']['value']:.3f}"
    digits = 2 if found[0] < 10 else 0
    return f"{found[0]:+.{digits}f} ± {found[1]:.{digits}f}%"


def needle_cell(result: Result, name: str, length: int) -> str:
    """Print the share of facts retrieved."""
    cell = _cell(result, name, length)
    return MISSING if cell is None else f"{cell['needle']['value']:.2f}"


def picture(result: Result) -> str:
    """Draw bits against quality as a file of its own, one line of two plots per length."""
    lengths, (width, height) = _lengths(result), PLOT
    parts = []
    for number, length in enumerate(lengths):
        rises, shares = _points(result, length)
        if not shares:
            continue
        x_label, where = "effective bits per value", f"{length} tokens, decode"
        plots = [share_chart(shares, x_label, f"facts retrieved, {where}", PLOT)]
        if rises:
            plots.insert(0, rise_chart(rises, x_label, f"perplexity rise, {where}", PLOT))
        for column, plot in enumerate(plots):
            place = f"translate({column * width} {24 + number * height})"
            parts.append(f'<g transform="{place}">{plot}</g>')
    for number, (kind, style) in enumerate(STYLES.items()):
        x = 80 + 180 * number
        parts.append(f'<circle class="{style}" cx="{x}" cy="20" r="5"/>')
        parts.append(f'<text x="{x + 11}" y="24">{TITLES[kind]}</text>')
    box = f"0 0 {2 * width} {24 + len(lengths) * height}"
    ground = '<rect width="100%" height="100%" fill="var(--card)"/>'
    style = f"<style>{COLOURS}{MARKS}{FONT}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{2 * width}">'
    return f"{head}{style}{ground}{''.join(parts)}</svg>\n"


def _points(result: Result, length: int) -> tuple[list[Point], list[Point]]:
    """Return the rise of perplexity and the needle of every row but dense, by bits."""
    rises, shares = [], []
    for name, row in result["rows"].items():
        cell = _cell(result, name, length)
        if cell is None or row["kind"] == DENSE:
            continue
        x, style = cell["storage"]["effective_bits"], STYLES[row["kind"]]
        shares.append(Point(name, x, cell["needle"]["value"], style))
        found = rise(result, name, length)
        if found:
            rises.append(Point(name, x, found[0], style))
    return rises, shares


def _bits_cell(result: Result, name: str) -> str:
    found = bits(result, name)
    return MISSING if found is None else f"{found:.2f}"


def _share_cell(result: Result, name: str) -> str:
    cell = _cell(result, name, _lengths(result)[-1])
    if cell is None:
        return MISSING
    return f"{cell['storage']['bytes'] / cell['storage']['dense_bytes']:.1%}"


def _cell(result: Result, name: str, length: int) -> dict[str, Any] | None:
    """Return one cell, or ``None`` where it was not or could not be measured."""
    cell: dict[str, Any] | None = result["rows"].get(name, {"cells": {}})["cells"].get(str(length))
    return None if cell is None or "error" in cell else cell


def _longest(result: Result, name: str) -> dict[str, Any] | None:
    cells = (_cell(result, name, length) for length in reversed(_lengths(result)))
    return next((cell for cell in cells if cell is not None), None)


def _lengths(result: Result) -> list[int]:
    return sorted({int(length) for row in result["rows"].values() for length in row["cells"]})


def conditions_of(result: Result) -> str:
    """Say in one paragraph under which conditions the numbers hold."""
    where = result["conditions"]
    cells = [
        cell
        for name in result["rows"]
        for length in _lengths(result)
        if (cell := _cell(result, name, length))
    ]
    commits = sorted({re.sub("^([0-9a-f]{12})[0-9a-f]*", r"\1", str(c["commit"])) for c in cells})
    versions = where["versions"] | {k: v for cell in cells for k, v in cell["versions"].items()}
    wanted = ("python", "torch", "transformers", "triton", "cuda", "hqq", "optimum-quanto")
    hardware = where["hardware"]
    kept = [
        f"Model `{where['model']}`, {where['dtype']}, on "
        f"{hardware['gpu'] or '{cores} cores of {cpu}'.format(**hardware)}",
        f"{where['mode']} mode; {where['windows']} windows and {where['facts']} facts per length, "
        f"seed {where['seed']}, {where['text']}",
        ", ".join(f"{name} {versions[name]}" for name in wanted if name in versions),
        f"commit {', '.join(commits)}",
    ]
    return "; ".join(kept) + "."
