"""Quality of every prefill policy by its shipped recipe, in one table.

Run from the repository root::

    python -m benchmarks.prefill_quality --jobs 13
    python -m benchmarks.prefill_quality --rows dense,antidiagonal --lengths 8192
    python -m benchmarks.prefill_quality --rows antidiagonal --set attention.mean_density=0.2

A cell is one row at one length: perplexity of the last tokens of the validation books and retrieval
of facts in prefill mode, retrieval in decode mode, density, recall and cosine by head. Each cell
runs in a process of its own, ``--jobs`` at a time, the rows in the order of ``--rows``; afterwards,
on a GPU, index and kernel of every row are timed alone, on random queries and keys. Each goes to
the file of results as it comes; ``--fresh`` starts over. With ``--set`` rows get the change's name
too, so that settings stand beside one another. The tables in ``docs/prefill.md`` are written from
the file when it is the one in ``benchmarks/results``; ``--rows ""`` does only that.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kv_cache_quality import results
from benchmarks.kv_cache_quality.__main__ import run_cells
from benchmarks.kv_cache_quality.measure import Settings
from benchmarks.kv_cache_quality.rows import DENSE, RECIPE, Row
from benchmarks.prefill_quality import page
from benchmarks.prefill_quality.measure import measure, speed
from squeeze import recipe
from squeeze.errors import RecipeError, SqueezeError, nearest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "prefill_quality.json"
LENGTHS = (8192, 32768)
MIN_LENGTH = 1024


def main() -> int:
    """Measure, write the results and the page; return 1 when a cell could not run."""
    options = _options()
    try:
        result = _measured(options)
    except SqueezeError as error:
        print(error, file=sys.stderr)
        return 2
    results.write(result, options.output)
    if options.output.resolve() == RESULTS:
        page.write(result, ROOT / "docs")
    print(page.table(result))
    return 1 if page.failures(result) else 0


def discover() -> dict[str, Row]:
    """Return every row by name, dense first; recipes are those that change only prefill."""
    rows = [Row("dense", DENSE, {})]
    for name in recipe.shipped():
        made = recipe.load(name)
        if made.attention and not (made.weights or made.kv_cache):
            # Eight bits act at every length of the table, where dense attention is faster too.
            least = [f"attention.quantize_min_length={MIN_LENGTH}"]
            asked = recipe.load(name, least if made.attention.quantize else [])
            rows.append(Row(name, RECIPE, asked.to_dict()))
    return {row.name: row for row in rows}


def choose(names: str | None, changes: list[str]) -> list[Row]:
    """Return the rows named, or every row, with changes to their recipes.

    Raises:
        RecipeError: there is no such row, or a recipe cannot take a change.
    """
    known = discover()
    wanted = list(known) if names is None else [name for name in names.split(",") if name]
    rows = []
    for name in wanted:
        if name not in known:
            raise RecipeError(
                "--rows", f"unknown row {name!r}", ", ".join(known), nearest(name, known)
            )
        row = known[name]
        if changes and row.kind == RECIPE:
            made = recipe.load(dict(row.settings), changes)
            row = replace(row, name=f"{name} {' '.join(changes)}", settings=made.to_dict())
        rows.append(row)
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", help="names with commas between; by default every row")
    parser.add_argument("--set", action="append", default=[], help="change of the recipes, a=b")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--model", default="reference", help="folder or hub name")
    parser.add_argument("--windows", type=int, default=16, help="windows of text per cell")
    parser.add_argument("--facts", type=int, default=100, help="facts to retrieve per cell")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one")
    parser.add_argument("--dtype", help="by default the checkpoint's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the machine")
    parser.add_argument("--speed", type=int, nargs="*", default=[32768], help="tokens; GPU only")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--fresh", action="store_true", help="drop what the file holds")
    return parser.parse_args()


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen cells, row by row, then speed, and write each as it comes."""
    output: Path = options.output
    rows = choose(options.rows, options.set)
    if not rows:
        return results.read(output)
    settings = Settings(
        options.model, options.device, options.dtype, options.windows, options.facts
    )
    result = results.empty({**results.conditions(settings), "mode": "prefill"})
    if output.is_file() and not options.fresh:
        result = results.merge(results.read(output), result, str(output))
    cells = [(row, length) for row in rows for length in sorted(options.lengths, reverse=True)]
    done = run_cells(cells, settings, options.jobs, measure)
    for number, (row, length, cell) in enumerate(done, start=1):
        results.put(result, row, length, cell)
        results.write(result, output)
        print(f"{number}/{len(cells)} {page.line(result, row.name, length)}", flush=True)
    if torch.cuda.is_available() and options.device != "cpu":
        for row in rows:
            found = {str(length): speed(row, length) for length in options.speed}
            result["rows"][row.name].setdefault("speed", {}).update(found)
    return result


if __name__ == "__main__":
    sys.exit(main())
