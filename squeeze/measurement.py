"""One model's numbers, and how numbers of several models are laid out beside one another."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.table import Table

KV_CONDITION = "allocated at 8192 tokens, batch 1"
LENGTH = 2048  # tokens at which the headline numbers are taken, in decode mode


@dataclass(frozen=True)
class Measurement:
    """One model's numbers; ``None`` stands for what was not measured.

    Attributes:
        books_perplexity: Perplexity at 2048 tokens, decode mode.
        needle: Share of facts retrieved at 2048 tokens, decode mode, 0 to 1.
        by_length: Decode mode: length in tokens -> task -> value.
        by_mode: Mode -> length in tokens -> task -> value.
        counts: Mode -> length in tokens -> task -> windows or facts behind the value.
        weight_bytes: Bytes of all parameters and buffers.
        kv_bytes_per_token: Allocated cache bytes per token at 8192 tokens and batch 1.
        prefill_seconds: Time to the first token.
        decode_ms_per_token: Milliseconds of one decode step.
        linear_bytes: Bytes of the linear layers that the recipe targets.
        peak_memory_bytes: Largest device memory in use; ``None`` on a CPU.
    """

    books_perplexity: float | None = None
    needle: float | None = None
    by_length: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    by_mode: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    weight_bytes: int | None = None
    kv_bytes_per_token: float | None = None
    prefill_seconds: float | None = None
    decode_ms_per_token: float | None = None
    linear_bytes: int | None = None
    peak_memory_bytes: int | None = None

    @classmethod
    def from_results(
        cls, results: Iterable[Mapping[str, Mapping[str, Any]]], **sizes: Any
    ) -> Measurement:
        """Sort the dictionaries that ``evaluate`` returned by mode and length.

        Args:
            results: One per call of ``evaluate``: task -> ``{"value", "mode", "length", ...}``.
            sizes: The other fields, as measured.
        """
        by_mode: dict[str, dict[str, dict[str, float]]] = {}
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for result in results:
            for task, row in result.items():
                for table, key in ((by_mode, "value"), (counts, "count")):
                    lengths = table.setdefault(row["mode"], {})
                    lengths.setdefault(str(row["length"]), {})[task] = row[key]
        by_length = by_mode.get("decode", {})
        headline = by_length.get(str(LENGTH), {})
        return cls(
            books_perplexity=headline.get("books_perplexity"),
            needle=headline.get("needle"),
            by_length=by_length,
            by_mode=by_mode,
            counts=counts,
            **sizes,
        )


@dataclass(frozen=True)
class Metric:
    """One comparable number: its name with unit, its conditions, where it is, how it prints."""

    name: str
    condition: str
    value: Callable[[Measurement], float | None]
    spec: str

    def cell(self, side: Measurement) -> str:
        """Print one side's value, or nothing where it was not measured."""
        value = self.value(side)
        return "" if value is None else format(value, self.spec)


def metrics(sides: Iterable[Measurement], conditions: Mapping[str, Any]) -> list[Metric]:
    """List the rows of a table of measurements: what at least one of them has a value for."""
    sides = list(sides)
    cells = {
        (task, mode, int(length)): side.counts.get(mode, {}).get(length, {}).get(task)
        for side in sides
        for mode, lengths in side.by_mode.items()
        for length, tasks in lengths.items()
        for task in tasks
    }
    rows = [_task_metric(*cell, count) for cell, count in sorted(cells.items(), key=itemgetter(0))]
    tokens = conditions.get("speed_tokens")
    speed = f"{tokens} tokens, batch 1" if tokens else "batch 1"
    rows += [
        Metric("weights, MB", "all parameters", lambda m: _scaled(m.weight_bytes), ".2f"),
        Metric("linear layers, MB", "targeted ones", lambda m: _scaled(m.linear_bytes), ".2f"),
        Metric("KV, bytes per token", KV_CONDITION, lambda m: m.kv_bytes_per_token, ".1f"),
        Metric("prefill, s", speed, lambda m: m.prefill_seconds, ".3f"),
        Metric("decode, ms per token", speed, lambda m: m.decode_ms_per_token, ".2f"),
        Metric("peak memory, MB", speed, lambda m: _scaled(m.peak_memory_bytes), ".1f"),
    ]
    return [row for row in rows if any(row.value(side) is not None for side in sides)]


def tabulate(columns: Iterable[tuple[str, Measurement]], conditions: Mapping[str, Any]) -> str:
    """Lay out measurements side by side; the last column divides the last by the first."""
    columns = list(columns)
    table = Table("", "conditions", *(name for name, _ in columns), "ratio")
    for column in table.columns[2:]:
        column.justify = "right"
    for metric in metrics((side for _, side in columns), conditions):
        values = [metric.value(side) for _, side in columns]
        cells = [metric.cell(side) for _, side in columns]
        table.add_row(metric.name, metric.condition, *cells, ratio(values))
    return render(table)


def ratio(values: list[float | None]) -> str:
    """Print last over first, or nothing where that has no meaning."""
    first, last = values[0], values[-1]
    return f"{last / first:.3f}" if first and last is not None else ""


def render(table: Table, width: int = 100) -> str:
    """Turn a rich table into plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined,no-any-return]


def _task_metric(task: str, mode: str, length: int, count: int | None) -> Metric:
    """Return the metric of one task at one length in one mode."""
    unit = {"books_perplexity": "window", "needle": "fact"}.get(task, "sample")
    condition = f"{mode}, {length} tokens"
    if count:
        condition += f", {count} {unit}{'s' * (count > 1)}"

    def value(side: Measurement) -> float | None:
        return side.by_mode.get(mode, {}).get(str(length), {}).get(task)

    return Metric(task.replace("_", " "), condition, value, ".3f")


def _scaled(value: float | None) -> float | None:
    """Turn bytes into megabytes."""
    return None if value is None else value / 1e6
