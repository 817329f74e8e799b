"""Quality of every way to store the weights, by bits, in one table.

Run from the repository root::

    python -m benchmarks.weights_quality --jobs 13
    python -m benchmarks.weights_quality --rows dense,weights3,hqq3 --windows 4

A row is a shipped recipe that packs weights and nothing else, or the ``hqq`` library's integers in
groups of 64 (its defaults; it takes no data). Embeddings and ``lm_head`` stay dense in every row.
Perplexity of the validation books is measured in prefill mode and retrieval of facts in decode
mode, whose answers are the same here and come sooner. Each row goes to the file of results as it
comes, beside those of earlier runs under the same conditions; ``--fresh`` starts over. A row that
cannot run is stored with its reason, and the exit code is 1 then. The table in ``docs/weights.md``
is written from the file when it is the one in ``benchmarks/results``; ``--rows ""`` does only that.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module, metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from benchmarks.kv_cache_quality import page, results
from benchmarks.kv_cache_quality.measure import KEPT, SEED, Settings
from benchmarks.kv_cache_quality.rows import Row
from scripts.readme import replace
from squeeze import api, atomic, recipe
from squeeze.environment import commit
from squeeze.errors import DeviceError, SqueezeError
from squeeze.evaluation import TASKS, evaluate
from squeeze.loading import load_model, load_tokenizer
from squeeze.model_info import describe
from squeeze.plan import build_method, resolve_device
from squeeze.types import bytes_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "weights_quality.json"
PAGE = ROOT / "docs" / "weights.md"
LENGTH = 2048
MODES = {"books_perplexity": "prefill", "needle": "decode"}
WIDE = 4096  # outputs and inputs of a layer in a model of 8B parameters
DENSE, RECIPE, LIBRARY = "dense", "recipe", "library"
LIBRARY_BITS, LIBRARY_GROUP, LIBRARY_VERSION = (4, 3, 2), 64, "0.2.8.post1"


def discover() -> dict[str, Row]:
    """Return every row by name; ``quamba``, for models without attention, is not of this table."""
    rows = [Row("dense", DENSE, {})]
    for name in recipe.shipped():
        made = recipe.load(name)
        if made.weights and not made.kv_cache and not made.attention and name != "quamba":
            rows.append(Row(name, RECIPE, made.to_dict()))
    for bits in LIBRARY_BITS:
        rows.append(Row(f"hqq{bits}", LIBRARY, {"nbits": bits, "group_size": LIBRARY_GROUP}))
    return {row.name: row for row in rows}


def measure(row: Row, settings: Settings, threads: int) -> dict[str, Any]:
    """Compress the model as a row says and measure what it keeps.

    Returns:
        ``books_perplexity`` and ``needle``; ``storage``, that is ``effective_bits`` and, for one
        method in all layers, ``wide_bits`` of a layer of 4096 x 4096; ``compress_seconds``, loading
        and calibration included; ``commit``; ``versions`` of what only this row needs.
    """
    torch.set_num_threads(threads)
    disable_progress_bar()
    start = time.monotonic()
    model, tokenizer, storage = compressed(row, settings)
    cell: dict[str, Any] = {"storage": storage}
    cell["compress_seconds"] = round(time.monotonic() - start, 1)
    counts = {"books_perplexity": settings.windows, "needle": settings.facts}
    for task in TASKS:
        options: dict[str, Any] = {"mode": MODES[task], "length": LENGTH, "limit": counts[task]}
        found = evaluate(model, tokenizer, [task], seed=SEED, **options)[task]
        cell[task] = {key: found[key] for key in KEPT if key in found}
    library = {"hqq": metadata.version("hqq")} if row.kind == LIBRARY else {}
    seconds = round(time.monotonic() - start, 1)
    return cell | {"commit": commit(), "versions": library, "seconds": seconds}


def compressed(row: Row, settings: Settings) -> tuple[Any, Any, dict[str, float]]:
    """Return the model with a row's weights, its tokenizer, and the row's ``storage``."""
    device, dtype = resolve_device(settings.device), settings.dtype
    if row.kind == RECIPE:
        made = api.run(
            dict(row.settings), settings.model, evaluate=False, device=device, dtype=dtype
        )
        storage = {"effective_bits": made.plan.effective_bits["weights"]}
        methods = [plan.method for plan in made.plan.weights]
        if all(method == methods[0] for method in methods):
            storage["wide_bits"] = build_method(methods[0]).shape_bits(WIDE, WIDE)
        return made.model, made.tokenizer, storage
    model = load_model(settings.model, device=device, dtype=dtype)
    bits = 8.0 * model.dtype.itemsize
    if row.kind == LIBRARY:
        bits = round_by_library(model, row.settings)
    return model, load_tokenizer(settings.model), {"effective_bits": bits, "wide_bits": bits}


@torch.no_grad()
def round_by_library(model: Any, settings: Mapping[str, Any]) -> float:
    """Give the linear layers the values of ``hqq``'s integers, in place.

    The library's defaults: groups along the input, half-quadratic optimisation of the zero points,
    scales and zero points in float16. Its values are then rounded to the model's dtype.

    Returns:
        Stored bits per weight: codes with their padding, scales, zero points.

    Raises:
        DeviceError: the library is not installed.
    """
    if importlib.util.find_spec("hqq") is None:
        remedy = f"pip install hqq=={LIBRARY_VERSION}"
        raise DeviceError("rows of hqq", "hqq is not installed", remedy=remedy)
    library: Any = import_module("hqq.core.quantize")
    stored = values = 0
    for name in describe(model).linears:
        linear: nn.Linear = model.get_submodule(name)
        copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        copy.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        config = library.BaseQuantizeConfig(**settings, axis=1)
        place = str(linear.weight.device)
        packed = library.HQQLinear(copy, config, compute_dtype=torch.float16, device=place)
        linear.weight.copy_(packed.dequantize())
        tables = {key: packed.meta[key] for key in ("scale", "zero")}
        stored += bytes_of({"codes": packed.W_q, **tables})
        values += linear.weight.numel()
    return 8 * stored / values


def run(rows: list[Row], settings: Settings, jobs: int) -> Iterator[tuple[Row, Any]]:
    """Measure rows in processes of their own; yield each with its cell, or what ended it."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(measure, row, settings, threads): row for row in rows}
        for future in as_completed(waiting):
            yield waiting[future], future.exception() or future.result()


def table(result: Mapping[str, Any]) -> str:
    """Lay out every row by falling bits as Markdown, conditions and failures underneath."""
    heads = "weights", "effective bits", f"at {WIDE} x {WIDE}", "perplexity", "needle", "seconds"
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    names = sorted(result["rows"], key=lambda name: (-(page.bits(result, name) or 0.0), name))
    for name in names:
        row = result["rows"][name]
        cell = row["cells"][str(LENGTH)]
        storage = cell.get("storage", {})
        wide = storage.get("wide_bits")
        bits = f"{storage['effective_bits']:.3f}" if storage else page.MISSING
        quality = [f(result, name, LENGTH) for f in (page.perplexity_cell, page.needle_cell)]
        seconds = cell.get("compress_seconds")
        lines.append(
            f"| {_title(name, row)} | {bits} | {f'{wide:.3f}' if wide else page.MISSING} | "
            f"{quality[0]} | {quality[1]} | {f'{seconds:.0f}' if seconds else page.MISSING} |"
        )
    where = result["conditions"]
    hardware = where["hardware"]["gpu"] or f"{where['hardware']['cores']} CPU cores"
    conditions = (
        f"Model `{where['model']}`, {where['dtype']}, on {hardware}; windows and prompts "
        f"of {LENGTH} tokens, {where['mode']}; {where['windows']} windows, {where['facts']} facts, "
        f"seed {where['seed']}, {where['text']}. Seconds are of loading, calibration and fitting, "
        f"rows measured side by side: {where['jobs']}."
    )
    absent = [f"`{name}`" for name in discover() if name not in result["rows"]]
    failed = [f"- {line}" for line in page.failures(result)]
    if absent:
        failed.insert(0, f"- Not measured: {', '.join(absent)}.")
    return "\n".join([*lines, "", conditions, *(["", *failed] if failed else [])]) + "\n"


def _title(name: str, row: Mapping[str, Any]) -> str:
    if row["kind"] == LIBRARY:
        return f"hqq, {row['settings']['nbits']} bits, groups of {LIBRARY_GROUP}"
    return name if row["kind"] == DENSE else f"`{name}`"


def choose(names: str | None) -> list[Row]:
    """Return the rows named, or every row.

    Raises:
        RecipeError: there is no such row.
    """
    return results.choose(names, discover())


def main() -> int:
    """Measure, write the results and the page; return 1 when a row could not run."""
    options = _options()
    output: Path = options.output
    try:
        result = _measured(options)
    except SqueezeError as error:
        print(error, file=sys.stderr)
        return 2
    text = table(result)
    if output.resolve() == RESULTS:
        atomic.write_text(PAGE, replace(PAGE.read_text(encoding="utf-8"), "quality", text))
    print(text)
    return 1 if page.failures(result) else 0


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    output: Path = options.output
    rows = choose(options.rows)
    if not rows:
        return results.read(output)
    settings = Settings(
        options.model, options.device, options.dtype, options.windows, options.facts
    )
    modes = ", ".join(f"{task} in {mode} mode" for task, mode in MODES.items())
    shared = results.conditions(settings) | {"mode": modes, "jobs": options.jobs}
    result = results.empty(shared)
    if output.is_file() and not options.fresh:
        result = results.merge(results.read(output), result, str(output))
    for number, (row, cell) in enumerate(run(rows, settings, options.jobs), start=1):
        results.put(result, row, LENGTH, cell)
        results.write(result, output)
        seconds = (
            ""
            if isinstance(cell, BaseException)
            else f", compressed in {cell['compress_seconds']} s"
        )
        print(f"{number}/{len(rows)} {page.line(result, row.name, LENGTH)}{seconds}", flush=True)
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", help="names with commas between; by default every row")
    parser.add_argument("--model", default="reference", help="folder or hub name")
    parser.add_argument("--windows", type=int, default=16, help="windows of text per row")
    parser.add_argument("--facts", type=int, default=100, help="facts to retrieve per row")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one")
    parser.add_argument("--dtype", help="by default the checkpoint's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--fresh", action="store_true", help="drop what the file holds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
