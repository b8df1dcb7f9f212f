"""Line charts as inline SVG without scripts or external files; the page sets the colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Final

WIDTH: Final = 760
HEIGHT: Final = 300
LEFT: Final = 52
RIGHT: Final = 16
TOP: Final = 14
BOTTOM: Final = 40

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    css: str
    """CSS class that sets the colour."""
    points: Sequence[Point]
    """(x, y); non-finite points are left out."""
    dots: bool = False
    """Whether the points are marked."""


def line_chart(lines: Sequence[Line], label: str, x_name: str, marked: float | None = None) -> str:
    """Return a chart as SVG, or "" if no line has a finite point.

    Args:
        label: what it shows, for readers that do not see it.
        x_name: what the horizontal axis, which begins at 0, counts.
        marked: place on that axis with a vertical line.
    """
    lines = [replace(line, points=_finite(line.points)) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = ticks(0, max(xs)), ticks(min(0.0, min(ys)), max(ys))
    low, high, longest = y_ticks[0], y_ticks[-1], max(*xs, 1.0)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(point: Point) -> Point:
        x, y = point
        share = (high - y) / (high - low)
        return LEFT + (right - LEFT) * x / longest, TOP + (bottom - TOP) * share

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y in y_ticks:
        _, py = at((0, y))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{py + 4:.1f}">{y:g}</text>')
    for x in x_ticks:
        if x <= longest:
            px, _ = at((x, low))
            parts.append(f'<text class="tick mid" x="{px:.1f}" y="{bottom + 18}">{x:g}</text>')
    parts.append(
        f'<text class="tick mid" x="{(LEFT + right) / 2}" y="{HEIGHT - 4}">{escape(x_name)}</text>'
    )
    if marked is not None and 0 <= marked <= longest:
        px, _ = at((marked, low))
        parts.append(f'<line class="mark" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{bottom}"/>')
    for line in lines:
        places = [at(point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="curve {line.css}" points="{path}"/>')
        if line.dots:
            for (x, y), (at_x, value) in zip(places, line.points, strict=True):
                title = escape(f"{line.name}, {x_name} {at_x:g}: {value:.4g}")
                parts.append(
                    f'<circle class="dot {line.css}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{title}</title></circle>"
                )
    parts.append("</svg>")
    return "".join(parts)


def interval_chart(low: float, value: float, high: float) -> str:
    """Return a value with its interval around a line at zero, as a small SVG that a text beside it
    describes; "" if one is not finite."""
    if not all(map(math.isfinite, (low, value, high))):
        return ""
    half, middle = 54.0, 60.0
    longest = max(abs(low), abs(value), abs(high)) or 1.0
    left, at, right = (middle + half * x / longest for x in (low, value, high))
    return (
        '<svg class="interval" viewBox="0 0 120 14" aria-hidden="true">'
        f'<line class="zero" x1="{middle:g}" x2="{middle:g}" y1="0" y2="14"/>'
        f'<line class="range" x1="{left:.1f}" x2="{right:.1f}" y1="7" y2="7"/>'
        f'<circle class="at" cx="{at:.1f}" cy="7" r="3.5"/></svg>'
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return evenly spaced round numbers from at most ``low`` to at least ``high``."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    magnitude = 10 ** math.floor(math.log10(span / most))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10, 20) if span / (m * magnitude) <= most)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
