"""Bits against quality: every result a point, and the line of those that no other one beats.

Two axes: the rise of a perplexity over the dense model's, in percent on a logarithmic axis, where
fewer is better; and a share between 0 and 1, where more is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from squeeze.report_charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Frame,
    Point,
    axes,
    label,
    svg,
    ticks,
)

FLOOR_PERCENT = 0.01  # where the logarithmic axis begins; less, or a gain, is drawn there
RADIUS, LETTER, LINE = 5, 6.7, 14  # of a mark, and of a label's letters, in pixels
Box = tuple[float, float, float, float]


def rise_chart(points: Sequence[Point], x_label: str, y_label: str, size: tuple[int, int]) -> str:
    """Plot rises in percent, logarithmically; the lower left corner is the best."""
    placed = [Point(p.label, p.x, math.log10(max(p.y, FLOOR_PERCENT)), p.style) for p in points]
    first = round(math.log10(FLOOR_PERCENT))
    last = max(first + 2, math.ceil(max(point.y for point in placed)))
    y_ticks = [float(power) for power in range(first, last + 1)]
    names = [f"{10.0**power:g}%" for power in y_ticks]
    names[0] = f"≤ {names[0]}"
    titles = [f"{p.label}: {p.x:.4g} bits, {p.y:+.3g}%" for p in points]
    return _chart(placed, titles, x_label, y_label, size, y_ticks, names, frontier(points))


def share_chart(points: Sequence[Point], x_label: str, y_label: str, size: tuple[int, int]) -> str:
    """Plot shares between 0 and 1; the upper left corner is the best."""
    y_ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    names = [f"{value:g}" for value in y_ticks]
    titles = [f"{p.label}: {p.x:.4g} bits, {p.y:.3g}" for p in points]
    best = frontier(points, higher_is_better=True)
    return _chart(points, titles, x_label, y_label, size, y_ticks, names, best)


def frontier(points: Sequence[Point], higher_is_better: bool = False) -> list[int]:
    """Return the indices of the points that no other beats in bits and quality, by rising bits.

    Of equal points the first is kept.
    """
    sign = -1.0 if higher_is_better else 1.0
    best, kept = math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i].x, sign * points[i].y)):
        if sign * points[index].y < best:
            best = sign * points[index].y
            kept.append(index)
    return kept


def _chart(
    points: Sequence[Point],
    titles: Sequence[str],
    x_label: str,
    y_label: str,
    size: tuple[int, int],
    y_ticks: Sequence[float],
    y_names: Sequence[str],
    best: Sequence[int],
) -> str:
    """Draw axes, the line through the best points, marks, and labels where there is room."""
    x_ticks = ticks(0, max(point.x for point in points) * 1.08, 8)
    frame = Frame(*size, (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    parts = [axes(frame, x_ticks, y_ticks, x_label, y_label, y_names=y_names)]
    steps = [(frame.x(points[i].x), frame.y(points[i].y)) for i in best]
    turns = "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:])
    parts.append(f'<path class="front" d="M{steps[0][0]:.1f} {steps[0][1]:.1f}{turns}"/>')
    for point, title in zip(points, titles, strict=True):
        place = f'cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y):.1f}" r="{RADIUS}"'
        parts.append(
            f'<circle class="{point.style}" {place}><title>{escape(title)}</title></circle>'
        )
    parts += _labels(frame, points, [box for pair in pairwise(steps) for box in _step(*pair)])
    return svg(frame.width, frame.height, parts, f"{y_label} against {x_label}")


def _step(first: tuple[float, float], second: tuple[float, float]) -> list[Box]:
    """Return what one step of the line covers: across, then up or down."""
    (left, y), (right, end) = first, second
    return [(left, y - 1, right, y + 1), (right - 1, min(y, end), right + 1, max(y, end))]


def _labels(frame: Frame, points: Sequence[Point], taken: Sequence[Box]) -> list[str]:
    """Write every point's label at the place around it that covers least of what is there."""
    marks = [(frame.x(p.x), frame.y(p.y)) for p in points]
    taken = [*taken, *((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in marks)]
    parts = []
    for point, (x, y) in zip(points, marks, strict=True):
        width = LETTER * len(point.label)
        choices = [(_box(x, y, dx, dy, width), dx, dy) for dx, dy in _places()]
        costs = [_cost(box, taken, frame) + 0.02 * math.hypot(dx, dy) for box, dx, dy in choices]
        box, dx, dy = choices[costs.index(min(costs))]
        taken.append(box)
        if math.hypot(dx, dy) > 3 * RADIUS:
            end = (box[0] if dx > 0 else box[2] if dx < 0 else (box[0] + box[2]) / 2, y + dy)
            parts.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{end[0]:.1f} {end[1]:.1f}"/>')
        parts.append(label((box[0] + box[2]) / 2, box[3] - 4, point.label, "middle", "small"))
    return parts


def _places() -> list[tuple[float, float]]:
    """Offsets of a label from its mark: beside, above and below, near ones first."""
    near = [(9.0, 0.0), (-9.0, 0.0), (0.0, -14.0), (0.0, 14.0)]
    rings = [
        (math.cos(turn * math.pi / 8) * radius * 1.4, math.sin(turn * math.pi / 8) * radius)
        for radius in (13.0, 26.0, 40.0, 56.0)
        for turn in range(16)
    ]
    return near + [(dx if abs(dx) > 1e-9 else 0.0, dy) for dx, dy in rings]


def _box(x: float, y: float, dx: float, dy: float, width: float) -> Box:
    """Return left, top, right and bottom of a label that stands off a mark."""
    left = x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2
    return left, y + dy - LINE / 2, left + width, y + dy + LINE / 2


def _cost(box: Box, taken: Sequence[Box], frame: Frame) -> float:
    """Sum the square pixels that a label would cover of others, or outside of the plot."""
    left, top, right, bottom = box
    inside = _overlap(box, (LEFT, TOP - LINE, frame.width - RIGHT, frame.height - BOTTOM))
    outside = (right - left) * (bottom - top) - inside
    return 10 * outside + sum(_overlap(box, other) for other in taken)


def _overlap(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)
