"""What a run measured: quality, bytes and speed of the squeezed model beside the dense one.

A report is a value: frozen, printable, comparable, and ``report.json`` is it. Numbers that have
no meaning without their conditions keep them in ``conditions``.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeeze import atomic
from squeeze.errors import CheckpointError, nearest
from squeeze.measurement import Measurement, metrics, tabulate
from squeeze.report_html import page

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """The result of one run, as stored in ``report.json``.

    Attributes:
        model: Name or path of the dense model.
        recipe: The recipe as a mapping, overrides applied.
        environment: Versions, hardware and commit; see ``environment``.
        dense: The dense model's numbers.
        squeezed: The same numbers of the squeezed model, measured in the same process.
        effective_bits: ``weights``, ``keys``, ``values``: stored bits per value.
        density: Computed query-key pairs over causal pairs in prefill, mean over heads and layers.
        plan: The plan that was executed, as a mapping.
        density_by_head: Layers x heads, or ``None``.
        sensitivity: Rows ``{"layer", "bits", "part", "loss_increase"}`` (nats per token).
        conditions: Under which the numbers hold: device, dtype, seed; ``speed_tokens``, the
            prompt length of both times; anything else worth a line.
        format_version: Of this layout.
    """

    model: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    dense: Measurement
    squeezed: Measurement
    effective_bits: Mapping[str, float]
    density: float
    plan: Mapping[str, Any]
    density_by_head: list[list[float]] | None = None
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return exactly what ``report.json`` holds: tuples inside become lists."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], place: str = "report") -> Report:
        """Build a report from ``to_dict``'s output.

        Raises:
            CheckpointError: a newer format version, or a missing or unknown field.
        """
        version = data.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            remedy = "Read it with the squeeze version that wrote it"
            raise CheckpointError(
                place, f"format_version {version!r}", f"1 to {FORMAT_VERSION}", remedy
            )
        _check_fields(cls, data, place)
        sides = {}
        for side in ("dense", "squeezed"):
            _check_fields(Measurement, data[side], f"{place}: {side}")
            sides[side] = Measurement(**data[side])
        return cls(**{**data, **sides})

    def save(self, folder: str | Path) -> None:
        """Write ``report.json`` and ``report.html`` into ``folder``, each in one step."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / "report.json", json.dumps(self.to_dict(), indent=1) + "\n")
        atomic.write_text(folder / "report.html", page(self))

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a ``report.json``, or the one in the folder ``path``.

        Raises:
            CheckpointError: no such file, not JSON, or not a report of this version.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(str(path), "no such file", "a report.json or its folder")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(str(path), f"not JSON ({error})", "a report.json") from error
        if not isinstance(data, dict):
            raise CheckpointError(str(path), f"a {type(data).__name__}", "a report.json")
        return cls.from_dict(data, str(path))

    def table(self) -> str:
        """Lay out dense beside squeezed as text, conditions underneath."""
        columns = (("dense", self.dense), ("squeezed", self.squeezed))
        return f"{self.model}\n{tabulate(columns, self.conditions)}\n{self.footnote()}"

    def footnote(self) -> str:
        """Say in one paragraph under which conditions the numbers hold."""
        bits = ", ".join(f"{name} {value:.2f}" for name, value in self.effective_bits.items())
        kept = [f"effective bits: {bits}", f"prefill density: {self.density:.3f}"]
        kept += [f"{key}: {value}" for key, value in self.conditions.items()]
        machine = self.environment.get("hardware", {})
        kept += [f"{key}: {value}" for key, value in machine.items() if value]
        return textwrap.fill("; ".join(kept), 100)


@dataclass(frozen=True)
class Comparison:
    """Reports beside one another, squeezed side by squeezed side.

    Attributes:
        reports: At least two; the first is the one that others are compared with.
        names: One short name for each.
        differences: Conditions that differ, name -> every report's value: the numbers of two runs
            are only comparable in what does not depend on them.
    """

    reports: tuple[Report, ...]
    names: tuple[str, ...]
    differences: Mapping[str, tuple[Any, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return metric -> a value for each report, plus what differs in the conditions."""
        sides = [report.squeezed for report in self.reports]
        rows = {
            f"{m.name} ({m.condition})": [m.value(side) for side in sides]
            for m in metrics(sides, {})
        }
        return {"metrics": rows, "differences": {k: list(v) for k, v in self.differences.items()}}

    def table(self) -> str:
        """Lay out the squeezed models side by side, differing conditions underneath."""
        columns = zip(self.names, (report.squeezed for report in self.reports), strict=True)
        rows = [f"{key}: {' | '.join(map(str, v))}" for key, v in self.differences.items()]
        text = tabulate(columns, {})
        return "\n".join([text, *(["Conditions that differ:", *rows] if rows else [])])


def compare(*reports: Report, names: Sequence[str] = ("first", "second")) -> Comparison:
    """Set the squeezed sides of reports beside one another and name differing conditions."""
    flat = [_conditions(report) for report in reports]
    keys = dict.fromkeys(key for conditions in flat for key in conditions)
    values = {key: tuple(conditions.get(key) for conditions in flat) for key in keys}
    differing = {key: v for key, v in values.items() if any(x != v[0] for x in v)}
    return Comparison(reports, tuple(names), differing)


def _check_fields(cls: type, data: Mapping[str, Any], place: str) -> None:
    """Refuse a mapping whose keys are not the fields of the dataclass ``cls``."""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        remedy = nearest(unknown[0], fields)
        raise CheckpointError(place, f"unknown field {unknown[0]!r}", ", ".join(fields), remedy)
    missing = dataclasses.MISSING
    required = [n for n, f in fields.items() if f.default is missing is f.default_factory]
    absent = [name for name in required if name not in data]
    if absent:
        raise CheckpointError(place, f"field {absent[0]!r} is missing", "", "Run again")


def _conditions(report: Report) -> dict[str, Any]:
    """Flatten what the numbers of a report depend on."""
    versions = report.environment.get("versions", {})
    hardware = report.environment.get("hardware", {})
    return {"model": report.model, **report.conditions, **hardware, **versions}
