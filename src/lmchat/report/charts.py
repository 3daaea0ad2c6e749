"""Line charts as inline SVG, coloured by the style sheet of the page."""

import math
from collections.abc import Mapping
from html import escape

import numpy as np
import numpy.typing as npt

from lmchat.report.runs import Points

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
MAX_POINTS = 300
"""Maximum number of points of a line; longer ones are averaged."""

NUM_COLORS = 6
"""Colours of the style sheet, ``.series0`` …; further series repeat them, dashed."""


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """An SVG element with one line per series, named by tooltips; not all may be empty."""
    lines = {name: _thinned(*points) for name, points in series.items() if len(points[0])}
    x = np.concatenate([points[0] for points in lines.values()])
    y = np.concatenate([points[1] for points in lines.values()])
    x_ticks, y_ticks = ticks(0.0, float(x.max()), 5), ticks(float(y.min()), float(y.max()), 5)
    x_low, x_high = 0.0, max(float(x.max()), 1e-9)
    y_low, y_high = min(y_ticks[0], float(y.min())), max(y_ticks[-1], float(y.max()))

    def across(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in y_ticks
    ]
    parts += [
        f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>'
        for tick in x_ticks
        if tick <= x_high
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for index, name in enumerate(series):
        if name in lines:
            parts.append(_line(name, index, [(across(a), down(b)) for a, b in zip(*lines[name], strict=True)]))
    title = escape(f"{y_label} by {x_label}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"><title>{title}</title>'
        f"{''.join(parts)}</svg>"
    )


def series_class(index: int) -> str:
    """The class of a series in the style sheet."""
    return f"series{index % NUM_COLORS}{' dashed' if index >= NUM_COLORS else ''}"


def _line(name: str, index: int, points: list[tuple[float, float]]) -> str:
    style, title = series_class(index), f"<title>{escape(name)}</title>"
    if len(points) == 1:
        return f'<circle class="{style}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3">{title}</circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{style}" points="{path}">{title}</polyline>'


def _thinned(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Points:
    """Averages neighbours to at most `MAX_POINTS` points; leaves out non-finite values."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that cover ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):
        high = low + (abs(low) if abs(low) > 1e-9 else 1.0)
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A short form: 1,234 or 0.25 or 3.2M or 1.5e+18."""
    magnitude = abs(value)
    if magnitude >= 1e15:
        return f"{value:.2g}"
    for limit, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if magnitude >= limit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"
