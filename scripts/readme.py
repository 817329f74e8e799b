"""Write the generated parts of the documentation: method lists, and the table of results.

Run it from anywhere in the checkout::

    python scripts/readme.py                              methods, from the registry
    python scripts/readme.py --report out/report.json     and the results of a run
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squeeze import registry
from squeeze.measurement import KV_CONDITION, metrics, ratio
from squeeze.report import Report

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CATALOGUE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "benchmarks" / "results"
TITLES = {
    "kv": "KV-cache formats",
    "transform": "Exact transforms of keys and values",
    "weights": "Weights",
    "prefill": "Sparse prefill",
    "activations": "Sparse activations",
}


def main() -> None:
    """Write the README's generated parts and the catalogue of methods."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--report", type=Path, help="report.json of the run to show")
    options = parser.parse_args()
    readme = replace(README.read_text(encoding="utf-8"), "methods", methods())
    for name, (op, written) in MEASURED.items():
        found = json.loads((RESULTS / f"{op}.json").read_text(encoding="utf-8"))
        readme = replace(readme, name, written(found))
    if options.report:
        readme = replace(readme, "results", results(Report.load(options.report)))
    README.write_text(readme, encoding="utf-8")
    CATALOGUE.write_text(catalogue(), encoding="utf-8")


def replace(text: str, name: str, content: str) -> str:
    """Put ``content`` between the markers of one generated part."""
    before, opening, rest = text.partition(f"<!-- {name}: ")
    command, closing, rest = rest.partition("-->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert opening and closing and end, f"the markers of {name} are lost"
    return f"{before}{opening}{command}{closing}{content}{end}{after}"


def speed(result: Mapping[str, Any]) -> str:
    """Lay out measured decode attention, a column per shape, conditions underneath."""
    rows = result["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    heads = ["bits", *(shape.split(",")[0] for shape in shapes)]
    lines = ["| cache | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
    for name in dict.fromkeys(row["implementation"] for row in rows):
        own = [row for row in rows if row["implementation"] == name]
        cells = [f"{row['median_us']:.1f} ({row['speedup']:.2f}x)" for row in own]
        bits = own[0].get("effective_bits", 16.0)
        lines.append(f"| {name.removeprefix('squeeze ')} | {bits:.2f} | {' | '.join(cells)} |")
    conditions = f"batch x tokens, {shapes[0].split(', ', 1)[1]}"
    return "\n".join([*lines, "", f"{place(result)}, {conditions}."]) + "\n"


def steps(result: Mapping[str, Any]) -> str:
    """Lay out measured decode steps, a line per shape: dense ones, ours, and the peak of memory."""
    ways = ("eager", "compiled", "squeezed")
    lines = [
        "| batch x tokens | eager | compiled | squeezed | peak of dense | squeezed |",
        "|---" + "|---:" * 5 + "|",
    ]
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        own = {row["implementation"]: row for row in result["rows"] if row["shape"] == shape}
        eager, compiled, ours = (own[way]["step_ms"] for way in ways)
        dense, peak = own["eager"]["peak_gb"], own["squeezed"]["peak_gb"]
        lines.append(
            f"| {shape.replace('x', ' x ')} | {eager:.1f} | {compiled:.1f} "
            f"| {ours:.2f} ({min(eager, compiled) / ours:.1f}x) "
            f"| {dense:.1f} | {peak:.1f} ({peak / dense:.2f}) |"
        )
    layers = result["rows"][0]["layers"]
    conditions = (
        f"a random Llama of {layers} layers in the shape of one of 8B parameters, weights in "
        "palettes of 4 bits and the cache of `kv4`, medians of a call of the model and an argmax"
    )
    return "\n".join([*lines, "", f"{place(result)}, {conditions}."]) + "\n"


def agreement(result: Mapping[str, Any]) -> str:
    """Say how often steps choose the reference's token."""
    steps = result["rows"][0]["steps"]
    shares = [
        f"{row['argmax_equal']:.1%} of them in {row['dtype']} (the reference itself in "
        f"{row['dtype']}: {row['reference_equal']:.1%}), and in "
        f"{row['decided_equal']:.0%} of the {row['decided']} where rounding cannot decide"
        for row in result["rows"]
    ]
    return (
        f"Over {steps} steps of the embedded model, the tokens given, the likeliest next token is "
        f"that of the reference in float32 in {'; in '.join(shares)}: "
        "`python -m benchmarks.run step_agreement`.\n"
    )


def prefill(result: Mapping[str, Any]) -> str:
    """Lay out the measured prefill of a whole model, a line per length, a column per policy."""
    names = list(dict.fromkeys(row["implementation"] for row in result["rows"]))
    lines = ["| tokens | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for length in dict.fromkeys(row["length"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["length"] == length]
        (dense,) = (row["seconds"] for row in own if row["baseline"])
        cells = [
            f"{row['seconds']:.2f}"
            + ("" if row["baseline"] else f" ({dense / row['seconds']:.2f}x)")
            for row in own
        ]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    conditions = (
        "one prompt of random tokens, a random Llama of 32 layers in the shape of one of 8B "
        "parameters, bfloat16, policies by their defaults"
    )
    return "\n".join([*lines, "", f"{place(result)}, {conditions}."]) + "\n"


def place(result: Mapping[str, Any]) -> str:
    """Say where a result was measured."""
    where = result["versions"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "cuda"))
    return f"{result['hardware']['gpu']}, {versions}"


def encoding(result: Mapping[str, Any]) -> str:
    """Say what packing costs: the most per cent of the attention it serves, over every format."""
    measured = [row for row in result["rows"] if "percent" in row]
    most = {
        mode: max(
            (row for row in measured if row["shape"].startswith(mode)),
            key=lambda row: row["percent"],
        )
        for mode in ("decode", "prefill")
    }
    name = {mode: row["implementation"].removeprefix("squeeze ") for mode, row in most.items()}
    served = most["decode"]["shape"].split(", ")[0].removeprefix("decode ")
    return (
        f"Packing costs at most {most['decode']['percent']:.1f}% of the attention of the decode "
        f"steps it serves ({name['decode']}, {served}) and {most['prefill']['percent']:.1f}% of "
        f"the attention of a prompt of 32768 tokens ({name['prefill']}); every format: "
        "`python -m benchmarks.run kv_encode`.\n"
    )


# Generated parts of the README that lay out a result of ``benchmarks``.
MEASURED = {
    "speed": ("decode_attention", speed),
    "steps": ("decode_step", steps),
    "agreement": ("step_agreement", agreement),
    "prefill": ("prefill_speed", prefill),
    "encoding": ("kv_encode", encoding),
}


def methods() -> str:
    """List every method with its source, one line per kind."""
    lines = []
    for kind, title in TITLES.items():
        found = [registry.info(kind, name) for name in registry.names(kind)]
        links = ", ".join(f"[{i.name}]({i.source})" for i in found)
        lines.append(f"- {title}: {links}")
    return "\n".join(lines) + "\n"


def catalogue() -> str:
    """Lay out every method with its idea, year and source as a page of the documentation."""
    parts = ["# Methods", "", "Generated from the registry by `python scripts/readme.py`."]
    for kind, title in TITLES.items():
        parts += ["", f"## {title}", "", "| method | idea | source |", "|---|---|---|"]
        for name in registry.names(kind):
            info = registry.info(kind, name)
            idea = info.idea.replace("``", "`")
            parts.append(f"| `{name}` | {idea} | [{info.year}]({info.source}) |")
    return "\n".join(parts) + "\n"


def results(report: Report) -> str:
    """Lay out a report as a Markdown table, conditions in its head and in a line below."""
    sides = (report.dense, report.squeezed)
    lines = ["| " + " | ".join(("measure", "conditions", "dense", "squeezed", "ratio")) + " |"]
    lines.append("|---|---|---:|---:|---:|")
    for metric in metrics(sides, report.conditions):
        values = [metric.value(side) for side in sides]
        headline = metric.condition.startswith("decode, 2048") or metric.condition == KV_CONDITION
        if headline or metric.name.startswith(("weights", "prefill", "decode")):
            cells = [metric.name, metric.condition, *(metric.cell(s) for s in sides), ratio(values)]
            lines.append("| " + " | ".join(cells) + " |")
    where = report.footnote().replace("\n", " ")
    return "\n".join([*lines, "", f"Model `{report.model}`; {where}."]) + "\n"


if __name__ == "__main__":
    main()
