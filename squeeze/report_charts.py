"""Plots of a report as SVG text: scatter, bars and heat map, each a pure function of numbers.

Colours come from the style sheet of the page by class (``dense``, ``squeezed``, ``s0`` to ``s3``),
so a plot follows the page into dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 80, 18, 28, 46  # room for labels and axis names, in pixels
SERIES = 4  # shades that the style sheet has for series of bars


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot: its label, place, and the class that colours it."""

    label: str
    x: float
    y: float
    style: str


@dataclass(frozen=True)
class Frame:
    """The plotting area: pixel size, and the data ranges its axes show."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Map a value to a pixel column."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Map a value to a pixel row."""
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    size: tuple[int, int],
    y_limit: float = math.inf,
) -> str:
    """Draw labelled points and a line from the first to each other one; the x axis starts at 0.

    Args:
        points: At least one.
        x_label: Name of the x axis, with its unit.
        y_label: Name of the y axis, with its unit.
        size: Width and height in pixels.
        y_limit: Largest value that the y axis may show.
    """
    x_ticks = ticks(0, max(point.x for point in points) * 1.15)
    values = [point.y for point in points]
    margin = max((max(values) - min(values)) * 0.6, max(map(abs, values)) * 0.03, 1e-6)
    y_ticks = ticks(max(0.0, min(values) - margin), min(max(values) + margin, y_limit))
    frame = Frame(*size, (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    parts = [axes(frame, x_ticks, y_ticks, x_label, y_label)]
    start = points[0]
    for point in points[1:]:
        x, y = frame.x(start.x), frame.y(start.y)
        path = f"M{x:.1f} {y:.1f}L{frame.x(point.x):.1f} {frame.y(point.y):.1f}"
        parts.append(f'<path class="link" d="{path}"/>')
    middle = sum(values) / len(values)
    parts += [_mark(frame, point, point.y >= middle) for point in points]
    return svg(frame.width, frame.height, parts, f"{y_label} against {x_label}")


def bars(
    series: Mapping[str, Sequence[float]], x_label: str, y_label: str, size: tuple[int, int]
) -> str:
    """Draw groups of bars, one group per index and one bar per series, with a shared zero line."""
    every = [value for values in series.values() for value in values]
    y_ticks = ticks(min(0.0, *every), max(0.0, *every))
    count = max(len(values) for values in series.values())
    frame = Frame(*size, (-0.5, count - 0.5), (y_ticks[0], y_ticks[-1]))
    step = max(1, math.ceil(count / 20))
    parts = [axes(frame, list(range(0, count, step)), y_ticks, x_label, y_label, grid_x=False)]
    slot = (frame.x(1) - frame.x(0)) * 0.76 / len(series)
    for k, (name, values) in enumerate(series.items()):
        for i, value in enumerate(values):
            x = frame.x(i) + (k - len(series) / 2) * slot
            top, bottom = sorted((frame.y(value), frame.y(0)))
            parts.append(
                f'<rect class="s{k % SERIES}" x="{x:.1f}" y="{top:.1f}" width="{slot * 0.9:.1f}" '
                f'height="{max(bottom - top, 0.5):.1f}"><title>{escape(name)}, {i}: {value:.4g}'
                "</title></rect>"
            )
    zero = frame.y(0)
    parts.append(f'<path class="zero" d="M{LEFT} {zero:.1f}H{frame.width - RIGHT}"/>')
    return svg(frame.width, frame.height, parts, f"{y_label} by {x_label}")


def heat_map(rows: Sequence[Sequence[float]], x_label: str, y_label: str, width: int) -> str:
    """Draw values between 0 and 1 as a grid of shaded cells, the value inside where it fits."""
    columns = max(len(row) for row in rows)
    cell = min(64.0, (width - LEFT - RIGHT) / columns)
    tall = min(30.0, max(10.0, cell * 0.55))
    height = int(tall * len(rows) + BOTTOM + TOP)
    parts = []
    for i, row in enumerate(rows):
        y = TOP + i * tall
        if i % math.ceil(len(rows) / 40) == 0:
            parts.append(label(LEFT - 8, y + tall / 2 + 4, str(i), "end"))
        for j, value in enumerate(row):
            parts.append(_cell(LEFT + j * cell, y, cell, tall, value, f"layer {i}, head {j}"))
    base = TOP + len(rows) * tall
    for j in range(0, columns, math.ceil(columns / 32)):
        parts.append(label(LEFT + (j + 0.5) * cell, base + 16, str(j), "middle"))
    parts.append(label(LEFT + columns * cell / 2, base + 36, x_label, "middle", "name"))
    parts.append(_sideways(16, TOP + len(rows) * tall / 2, y_label))
    return svg(int(LEFT + columns * cell + RIGHT), height, parts, f"by {y_label} and {x_label}")


def legend(names: Iterable[tuple[str, str]]) -> str:
    """Name the colours: pairs of class and text."""
    keys = [f'<span><i class="{style}"></i>{escape(text)}</span>' for style, text in names]
    return f'<p class="legend">{"".join(keys)}</p>'


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Choose round numbers that cover ``low`` to ``high``, about ``wanted`` of them."""
    high = high if high > low else low + 1.0
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def axes(
    frame: Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    grid_x: bool = True,
    y_names: Sequence[str] | None = None,
) -> str:
    """Draw grid lines, tick labels (``y_names`` where given) and the names of both axes."""
    base, right = frame.height - BOTTOM, frame.width - RIGHT
    parts = []
    for value in x_ticks:
        x = frame.x(value)
        if grid_x:
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{base}"/>')
        parts.append(label(x, base + 17, f"{value:g}", "middle"))
    for value, name in zip(y_ticks, y_names or [f"{v:g}" for v in y_ticks], strict=True):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(label(LEFT - 8, y + 4, name, "end"))
    parts.append(label((LEFT + right) / 2, frame.height - 8, x_label, "middle", "name"))
    parts.append(_sideways(14, (TOP + base) / 2, y_label))
    return "".join(parts)


def _mark(frame: Frame, point: Point, label_above: bool) -> str:
    """Draw one point with its label on the side that has room."""
    x, y = frame.x(point.x), frame.y(point.y)
    side, anchor = (-11, "end") if x > frame.width * 0.7 else (11, "start")
    name = label(x + side, y - 9 if label_above else y + 18, point.label, anchor, "label")
    title = f"<title>{escape(point.label)}: {point.x:.4g}, {point.y:.4g}</title>"
    return f'<circle class="{point.style}" cx="{x:.1f}" cy="{y:.1f}" r="6">{title}</circle>{name}'


def _cell(x: float, y: float, width: float, height: float, value: float, name: str) -> str:
    """Draw one shaded cell."""
    share = min(max(value, 0.0), 1.0)
    box = (
        f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
        f'height="{height - 1:.1f}" fill-opacity="{0.06 + 0.94 * share:.3f}">'
        f"<title>{name}: {value:.3f}</title></rect>"
    )
    if width < 34 or height < 14:
        return box
    style = "over" if share > 0.5 else "under"
    return box + label(x + width / 2, y + height / 2 + 4, f"{value:.2f}", "middle", style)


def label(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    """Write one line of text at a pixel."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def _sideways(x: float, y: float, text: str) -> str:
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle"'
    return f'<text class="name" {place}>{escape(text)}</text>'


def svg(width: int, height: int, parts: Iterable[str], name: str) -> str:
    """Join the parts of a picture; ``name`` is what a screen reader says."""
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {box} role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
