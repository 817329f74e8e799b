"""The page ``docs/prefill.md``: its generated parts."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.kv_cache_quality.page import MISSING, Result, conditions_of, failures, rise
from benchmarks.kv_cache_quality.rows import DENSE
from scripts.readme import replace
from squeeze import registry
from squeeze.cli.ls import parameters

PAGE = "prefill.md"


def write(result: Result, docs: Path) -> None:
    """Renew the page's generated parts."""
    path = docs / PAGE
    text = replace(path.read_text(encoding="utf-8"), "policies", policies())
    path.write_text(replace(text, "table", table(result)), encoding="utf-8")


def policies() -> str:
    """Describe every prefill policy of the registry as Markdown."""
    lines = ["| method | what it reads | parameters | source |", "|---|---|---|---|"]
    for name in registry.names("prefill"):
        info = registry.info("prefill", name)
        idea = info.idea.replace("``", "`").replace("|", "\\|")
        allowed = "<br>".join(f"`{k}`: {v}" for k, v in parameters(info.cls).items())
        lines.append(f"| `{name}` | {idea} | {allowed} | [{info.year}]({info.source}) |")
    return "\n".join(lines) + "\n"


def table(result: Result) -> str:
    """Lay out every row by name, dense first, conditions and failures underneath."""
    lengths = sorted({int(n) for row in result["rows"].values() for n in row["cells"]})
    heads = ["prefill"]
    for length in lengths:
        heads += [f"density, {length}", "recall, median and least", "cosine, least"]
        heads += ["perplexity", "needle, prefill", "needle, decode"]
    timed = sorted({int(n) for row in result["rows"].values() for n in row.get("speed", {})})
    for length in timed:
        heads += [f"index, ms at {length}", "kernel, ms", "its density", "index, MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    names = sorted(result["rows"], key=lambda name: (result["rows"][name]["kind"] != DENSE, name))
    for name in names:
        row = result["rows"][name]
        cells = [name if row["kind"] == DENSE else f"`{name}`"]
        for length in lengths:
            cells += _quality(result, name, length)
        for length in timed:
            found = row.get("speed", {}).get(str(length), {})
            for key in ("index_ms", "kernel_ms", "density", "index_mib"):
                digits = 3 if key == "density" else 1
                cells.append(f"{found[key]:.{digits}f}" if key in found else MISSING)
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- {line}" for line in failures(result)]
    foot = [conditions_of(result), *(["", *failed] if failed else [])]
    return "\n".join([*lines, "", *foot]) + "\n"


def line(result: Result, name: str, length: int) -> str:
    """Say what one cell measured, for the one who waits."""
    cell = result["rows"][name]["cells"][str(length)]
    if "error" in cell:
        return f"{name} {length}: {cell['error']}"
    return f"{name} {length}: {' | '.join(_quality(result, name, length))} {cell['seconds']} s"


def mean(rows: list[list[float]]) -> float:
    """Average over layers and heads."""
    return statistics.fmean(value for row in rows for value in row)


def _quality(result: Result, name: str, length: int) -> list[str]:
    """Return density, recall, cosine, perplexity and both needles of one cell."""
    row: Any = result["rows"][name]
    cell = row["cells"].get(str(length))
    if cell is None or "error" in cell:
        return [MISSING] * 6
    recall = sorted(value for heads in cell.get("recall", []) for value in heads)
    cosines = [value for heads in cell.get("cosine", []) for value in heads]
    found = None if row["kind"] == DENSE else rise(result, name, length)
    perplexity = f"{cell['books_perplexity']['value']:.3f}"
    return [
        f"{mean(cell['density']):.3f}",
        f"{statistics.median(recall):.3f}, {recall[0]:.3f}" if recall else MISSING,
        f"{min(cosines):.4f}" if cosines else MISSING,
        perplexity if found is None else f"{found[0]:+.2f} ± {found[1]:.2f}%",
        f"{cell['needle']['value']:.2f}",
        f"{cell['needle_decode']['value']:.2f}",
    ]
