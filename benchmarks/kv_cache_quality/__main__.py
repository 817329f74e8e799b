"""Quality of every way to store the KV cache, by bits, in one table.

Run from the repository root::

    python -m benchmarks.kv_cache_quality --jobs 16
    python -m benchmarks.kv_cache_quality --rows dense,kv4,hqq4 --lengths 2048
    python -m benchmarks.kv_cache_quality --merge first.json second.json

A cell is one row at one length: perplexity of the validation books and retrieval of facts, both in
decode mode, and what the cache holds. Cells run in ``--jobs`` processes. Each goes to the file of
results as it comes, beside those of earlier runs under the same conditions, so rows may be measured
one after another; ``--fresh`` starts over. A cell that cannot run is stored with its reason, and
the exit code is 1 then. The table and the picture in ``docs/kv_cache.md`` are written from the file
when it is the one in ``benchmarks/results``; ``--rows ""`` does only that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.kv_cache_quality import page, results
from benchmarks.kv_cache_quality.measure import Settings, measure
from benchmarks.kv_cache_quality.rows import Row, discover
from squeeze.errors import SqueezeError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kv_cache_quality.json"
LENGTHS = (2048, 8192, 32768)


def main() -> int:
    """Measure or merge, write the results and the page; return 1 when a cell could not run."""
    options = _options()
    try:
        result = _merged(options.merge) if options.merge else _measured(options)
    except SqueezeError as error:
        print(error, file=sys.stderr)
        return 2
    results.write(result, options.output)
    if options.output.resolve() == RESULTS:
        page.write(result, ROOT / "docs")
    print(page.table(result))
    failed = page.failures(result)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    text = str(__doc__)
    parser = argparse.ArgumentParser(description=text.split("\n", 1)[0])
    parser.add_argument("--rows", help="names with commas between; by default every row")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--model", default="reference", help="folder or hub name")
    parser.add_argument("--windows", type=int, default=16, help="windows of text per cell")
    parser.add_argument("--facts", type=int, default=100, help="facts to retrieve per cell")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one")
    parser.add_argument("--dtype", help="by default the checkpoint's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--fresh", action="store_true", help="drop what the file holds")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing; join these files")
    return parser.parse_args()


def _merged(paths: list[Path]) -> dict[str, Any]:
    """Join files of results, later ones over earlier ones."""
    result = results.read(paths[0])
    for path in paths[1:]:
        result = results.merge(result, results.read(path), str(path))
    return result


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen cells, longest first, and write every one as it comes."""
    output: Path = options.output
    rows = choose(options.rows)
    if not rows:
        return results.read(output)
    settings = Settings(
        options.model, options.device, options.dtype, options.windows, options.facts
    )
    result = results.empty(results.conditions(settings))
    if output.is_file() and not options.fresh:
        result = results.merge(results.read(output), result, str(output))
    cells = [(row, length) for length in sorted(options.lengths, reverse=True) for row in rows]
    done = run_cells(cells, settings, options.jobs, measure)
    for number, (row, length, cell) in enumerate(done, start=1):
        results.put(result, row, length, cell)
        results.write(result, output)
        print(f"{number}/{len(cells)} {page.line(result, row.name, length)}", flush=True)
    return result


def choose(names: str | None) -> list[Row]:
    """Return the rows named, or every row.

    Raises:
        RecipeError: there is no such row.
    """
    return results.choose(names, discover())


def run_cells(
    cells: list[tuple[Row, int]],
    settings: Settings,
    jobs: int,
    measure: Callable[[Row, int, Settings, int], dict[str, Any]],
) -> Iterator[tuple[Row, int, dict[str, Any] | BaseException]]:
    """Measure each cell in a process of its own; yield it, or the error that ended it.

    A fault on a GPU ruins the process that met it, so none measures a second cell.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)

    def alone(row: Row, length: int) -> dict[str, Any]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(measure, row, length, settings, threads).result()

    with ThreadPoolExecutor(jobs) as pool:
        waiting: dict[Future[dict[str, Any]], tuple[Row, int]] = {
            pool.submit(alone, row, length): (row, length) for row, length in cells
        }
        for future in as_completed(waiting):
            error = future.exception()
            yield *waiting[future], future.result() if error is None else error


if __name__ == "__main__":
    sys.exit(main())
