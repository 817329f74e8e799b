"""A report as one self-contained HTML page: tables with conditions, plots in SVG, no scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import yaml

from squeeze.measurement import KV_CONDITION, LENGTH, Measurement, metrics, ratio
from squeeze.plan import Plan
from squeeze.report_charts import SERIES, Point, bars, heat_map, legend, scatter

if TYPE_CHECKING:
    from squeeze.report import Report

KV_TOKENS = 8192  # length at which the cache is counted beside the weights

COLOURS = """
:root { color-scheme: light dark;
  --page: #f6f7f8; --card: #fff; --ink: #1c2026; --soft: #626b77; --line: #e3e6ea;
  --accent: #1f6feb; --on-accent: #fff; --dense: #8a93a0; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1b1f25; --ink: #e4e7eb; --soft: #98a1ad; --line: #2d333b;
  --accent: #6ea8fe; --on-accent: #10141a; --dense: #808a97; } }
"""
MARKS = """
svg text { fill: var(--ink); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--soft); }
svg .name { fill: var(--soft); font-size: 12.5px; }
svg .label { font-size: 13px; font-weight: 600; }
svg .grid { stroke: var(--line); }
svg .zero { stroke: var(--soft); }
svg .link { stroke: var(--soft); stroke-dasharray: 3 4; }
svg .heat { fill: var(--accent); }
svg .over { fill: var(--on-accent); }
.dense { fill: var(--dense); background: var(--dense); }
.squeezed { fill: var(--accent); background: var(--accent); }
.s0 { --c: hsl(213 75% 42%); } .s1 { --c: hsl(203 68% 60%); }
.s2 { --c: hsl(32 80% 55%); } .s3 { --c: hsl(150 40% 45%); }
.s0, .s1, .s2, .s3 { fill: var(--c); background: var(--c); }
svg .small { font-size: 11.5px; paint-order: stroke; stroke: var(--card); stroke-width: 2.5px; }
svg .front { fill: none; stroke: var(--soft); stroke-width: 1.5; }
svg .lead { stroke: var(--soft); stroke-width: .7; }
"""
LAYOUT = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 0 0 2px; }
p { margin: 0 0 12px; max-width: 78ch; }
.soft, .legend { color: var(--soft); }
.soft { font-size: 13.5px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 22px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 18px; }
.tile b { display: block; font-size: 27px; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-size: 13px; font-weight: 600; color: var(--soft); }
td.number, th.number { text-align: right; white-space: nowrap; }
td.where { color: var(--soft); font-size: 13.5px; }
tr:last-child td { border-bottom: 0; }
pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 8px 0 0;
  overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; }
svg { max-width: 100%; height: auto; display: block; }
.legend { font-size: 13px; margin: 6px 0; }
.legend span { margin-right: 18px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 6px; }
@media (max-width: 820px) { .tiles { grid-template-columns: 1fr 1fr; }
  .pair { grid-template-columns: 1fr; } }
"""
STYLE = COLOURS + LAYOUT + MARKS


def page(report: Report) -> str:
    """Return the whole page as text; sections without data are left out."""
    title = f"{report.model}, squeezed"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_conditions(report))}</p>',
        _tiles(report),
        _quality(report),
        _measurements(report),
        _density(report),
        _sensitivity(report.sensitivity),
        _plan(report),
        _details("Recipe", yaml.safe_dump(dict(report.recipe), sort_keys=False)),
        _details("Environment", yaml.safe_dump(dict(report.environment), sort_keys=False)),
    ]
    return document(title, "\n".join(part for part in parts if part))


def document(title: str, body: str) -> str:
    """Wrap a body into a page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def sensitivity_charts(rows: Iterable[Mapping[str, Any]]) -> str:
    """Draw one chart per part of the model: loss increase by layer, one bar per width."""
    parts: dict[str, dict[float, dict[int, float]]] = {}
    for row in rows:
        widths = parts.setdefault(str(row["part"]).replace("_", " "), {})
        costs = widths.setdefault(round(float(row["bits"]), 2), {})
        costs[int(row["layer"])] = float(row["loss_increase"])
    return "".join(_sensitivity_chart(part, widths) for part, widths in parts.items())


def _conditions(report: Report) -> str:
    hardware = report.environment.get("hardware", {})
    machine = hardware.get("gpu") or f"{hardware.get('cores')} cores of {hardware.get('cpu')}"
    kept = [f"{key.replace('_', ' ')} {value}" for key, value in report.conditions.items()]
    versions = report.environment.get("versions", {})
    kept += [f"{key} {versions[key]}" for key in ("torch", "transformers") if key in versions]
    commit = report.environment.get("commit")
    return " · ".join([machine, *kept, *([f"commit {commit[:12]}"] if commit else [])])


def _tiles(report: Report) -> str:
    """Show the four numbers a reader came for, each with where it was taken."""
    dense, squeezed = report.dense, report.squeezed
    where = f"at {LENGTH} tokens, decode mode"
    tiles = (
        ("books perplexity", dense.books_perplexity, squeezed.books_perplexity, ".2f", where),
        ("facts retrieved", dense.needle, squeezed.needle, ".1%", where),
        (
            "weight bytes, MB",
            _mega(dense.weight_bytes),
            _mega(squeezed.weight_bytes),
            ".1f",
            "all parameters",
        ),
        (
            "KV bytes per token",
            dense.kv_bytes_per_token,
            squeezed.kv_bytes_per_token,
            ".0f",
            KV_CONDITION,
        ),
    )
    cells = []
    for name, before, after, spec, condition in tiles:
        if before is not None and after is not None:
            change = f"dense {before:{spec}}{_change(name, before, after)}"
            value = f"<span>{name}</span><b>{after:{spec}}</b>"
            cells.append(f'<div class="tile">{value}<span>{change}<br>{condition}</span></div>')
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def _change(name: str, before: float, after: float) -> str:
    """Say how far bytes or perplexity moved."""
    if not before or name == "facts retrieved":
        return ""
    if "bytes" in name and after:
        return f", {before / after:.2f}&times; smaller"
    return f", {after / before - 1:+.1%}"


def _quality(report: Report) -> str:
    """Plot quality against bytes, dense and squeezed."""
    sides = (("dense", report.dense), ("squeezed", report.squeezed))
    charts = [
        _quality_chart(sides, "books_perplexity", "books perplexity (lower is better)"),
        _quality_chart(sides, "needle", "share of facts retrieved", 1.0),
    ]
    if not any(charts):
        return ""
    note = (
        f"Bytes are all weights plus the KV cache of {KV_TOKENS} tokens at batch 1. "
        f"Quality at {LENGTH} tokens in decode mode; its axis does not start at zero."
    )
    return _section("Quality against bytes", note, f'<div class="pair">{"".join(charts)}</div>')


def _quality_chart(
    sides: Sequence[tuple[str, Measurement]], task: str, label: str, limit: float = math.inf
) -> str:
    points = []
    for name, side in sides:
        quality = getattr(side, task)
        if None in (quality, side.weight_bytes, side.kv_bytes_per_token):
            return ""
        total = side.weight_bytes + KV_TOKENS * side.kv_bytes_per_token  # type: ignore[operator]
        points.append(Point(name, total / 1e6, quality, name))
    return scatter(points, "weights + KV cache, MB", label, (516, 320), limit)


def _measurements(report: Report) -> str:
    """Lay out every number with its conditions."""
    sides = (report.dense, report.squeezed)
    rows = []
    for metric in metrics(sides, report.conditions):
        cells = [metric.cell(side) for side in sides]
        cells.append(ratio([metric.value(side) for side in sides]))
        numbers = "".join(f'<td class="number">{cell or "&ndash;"}</td>' for cell in cells)
        rows.append(
            f'<tr><td>{metric.name}</td><td class="where">{metric.condition}</td>{numbers}</tr>'
        )
    heads = "".join(f'<th class="number">{name}</th>' for name in ("dense", "squeezed", "ratio"))
    bits = ", ".join(f"{name} {value:.2f}" for name, value in report.effective_bits.items())
    note = f"Effective bits per value, scales, zero points and codebooks included: {bits}."
    table = f"<table><tr><th>measure</th><th>conditions</th>{heads}</tr>{''.join(rows)}</table>"
    return _section("Measurements", note, f'<div class="scroll">{table}</div>')


def _density(report: Report) -> str:
    if not report.density_by_head:
        return ""
    note = (
        "Share of causal query-key pairs that prefill computed, at tile granularity; "
        f"mean over all layers and heads {report.density:.3f}."
    )
    chart = heat_map(report.density_by_head, "query head", "layer", 1070)
    return _section("Attention density per head", note, chart)


def _sensitivity(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    note = (
        "Loss increase when only this layer is squeezed and every other stays dense, decode mode, "
        "nats per token. Tall bars are the layers to give more bits."
    )
    return _section("Sensitivity per layer", note, sensitivity_charts(rows))


def _sensitivity_chart(part: str, widths: Mapping[float, Mapping[int, float]]) -> str:
    layers = max(max(values) for values in widths.values()) + 1
    series = {
        f"{bits:g} bits": [values.get(layer, 0.0) for layer in range(layers)]
        for bits, values in sorted(widths.items())
    }
    keys = legend((f"s{k % SERIES}", f"{part}, {name}") for k, name in enumerate(series))
    return keys + bars(series, "layer", "loss increase, nats", (1070, 240))


def _plan(report: Report) -> str:
    if not report.plan:
        return ""
    return _details("Plan", Plan.from_dict(dict(report.plan)).table(), is_open=True)


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="soft">{escape(note)}</p>{body}</section>'


def _details(title: str, text: str, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    body = f"<summary>{title}</summary><pre>{escape(text)}</pre>"
    return f"<section><details{state}>{body}</details></section>"


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6
