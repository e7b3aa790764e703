"""Charts as inline SVG, written by hand: no script, no library, colours from the page's style sheet.

Owns drawing. The page sets the CSS variables --ink, --faint, --grid, --pass, --near, --fail and --series-0 to
--series-5, so that a chart follows light and dark mode. All text is escaped.

    svg = lines({"tiny": [(0, 1e-6), (1, 2e-6)]}, "layer", "difference", log_y=True)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

_WIDTH: Final = 760
_LEFT: Final = 110  # room for row names and tick labels
_RIGHT: Final = 20
_TOP: Final = 14
_BOTTOM: Final = 44
# For a file by itself, which no page gives its colours.
_LIGHT: Final = {"ink": "#1d2430", "faint": "#5b6472", "grid": "#d9dee6", "series-0": "#2f6fd0", "series-1": "#c4641a",
                 "series-2": "#2b8a57"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot: `label` is shown on hovering, `style` is one of pass, near, fail."""

    x: float
    y: float
    label: str
    style: str = "pass"


def strips(rows: Mapping[str, Sequence[Mark]], x_label: str, low: float, high: float, limit: float) -> str:
    """One row of dots per name on a shared logarithmic axis, with a line at `limit`.

    Only `x` of a mark counts. Values outside low to high (zero, infinity) sit on the edges.
    """
    height = _TOP + 30 * max(1, len(rows)) + _BOTTOM
    x = _scale(low, high, _LEFT, _WIDTH - _RIGHT, log=True)
    bottom = height - _BOTTOM
    parts = [
        _tick_x(x(10.0**e), bottom, _power(e))
        for e in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    ]
    parts.append(
        f'<line x1="{x(limit):.1f}" y1="{_TOP}" x2="{x(limit):.1f}" y2="{bottom}" stroke="var(--fail)" '
        'stroke-dasharray="4 3"/>'
    )
    for i, (name, marks) in enumerate(rows.items()):
        y = _TOP + 30 * i + 15
        parts.append(
            f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="var(--grid)"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
        )
        # Dots at one place are pulled apart a little, in a fixed pattern, so that their number shows.
        parts += [_dot(x(mark.x), y + (n % 5 - 2) * 3, mark) for n, mark in enumerate(marks)]
    return _svg(height, parts, x_label, "", f"{x_label} by stage")


def scatter(marks: Sequence[Mark], x_label: str, y_label: str) -> str:
    """Dots in the unit square with its diagonal, for scores against scores."""
    height = 420
    x, y = _scale(0, 1, _LEFT, _WIDTH - _RIGHT), _scale(0, 1, height - _BOTTOM, _TOP)
    parts = []
    for tick in range(6):
        parts += [
            _tick_x(x(tick / 5), height - _BOTTOM, f"{tick / 5:g}"),
            _tick_y(y(tick / 5), f"{tick / 5:g}"),
        ]
    parts.append(
        f'<line x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(1):.1f}" y2="{y(1):.1f}" stroke="var(--faint)" '
        'stroke-dasharray="4 3"/>'
    )
    parts += [_dot(x(mark.x), y(mark.y), mark) for mark in marks]
    return _svg(height, parts, x_label, y_label, f"{y_label} against {x_label}")


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, log_y: bool = False) -> str:
    """Named lines through (x, y) points, with a legend; on a log axis values of 0 sit on the lower edge."""
    points = [p for line in series.values() for p in line]
    xs, ys = [p[0] for p in points] or [0.0, 1.0], [p[1] for p in points] or [0.0, 1.0]
    height = 320 + 18 * len(series)
    bottom = 320 - _BOTTOM
    x = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    parts = [_tick_x(x(v), bottom, f"{v:g}") for v in _ticks(min(xs), max(xs))]
    if log_y:
        positive = [v for v in ys if v > 0 and math.isfinite(v)] or [1.0]
        first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        last = max(last, first + 1)
        y = _scale(10.0**first, 10.0**last, bottom, _TOP, log=True)
        parts += [_tick_y(y(10.0**e), _power(e)) for e in range(first, last + 1)]
    else:
        top = max(*ys, 0.0) or 1.0
        y = _scale(min(*ys, 0.0), top, bottom, _TOP)
        parts += [_tick_y(y(v), f"{v:g}") for v in _ticks(min(*ys, 0.0), top)]
    for i, (name, line) in enumerate(series.items()):
        color = f"var(--series-{i % 6})"
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in line)
        at = 320 + 18 * i
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
            f'<line x1="{_LEFT}" y1="{at}" x2="{_LEFT + 24}" y2="{at}" stroke="{color}" stroke-width="2"/>'
            f'<text x="{_LEFT + 32}" y="{at + 4}">{escape(name)}</text>'
        )
    return _svg(height, parts, x_label, y_label, f"{y_label} by {x_label}", label_at=320 - 8)


def write_plot(path: Path, charts: Iterable[str]) -> None:
    """Charts one below the other in one self-contained SVG file."""
    style = f"font:13px sans-serif;fill:{_LIGHT['ink']}"
    parts, top = [], 0
    for chart in charts:
        for name, colour in _LIGHT.items():  # written out: few viewers of SVG files know variables
            chart = chart.replace(f"var(--{name})", colour)
        head, _, rest = chart.partition(">")
        _, _, width, height = (int(float(v)) for v in head.split('viewBox="')[1].split('"')[0].split())
        parts.append(f'<svg y="{top}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">{rest}')
        top += height + 20
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {top}" style="{style}">'
        f'<rect width="760" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n',
        "utf-8",
    )


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    """Value to pixel, clamped to the ends. A single value sits in the middle."""

    def place(value: float) -> float:
        if math.isnan(value):
            value = high
        value = min(max(value, low), high)
        if high == low:
            return (start + end) / 2
        if log:
            return start + (end - start) * math.log(value / low) / math.log(high / low)
        return start + (end - start) * (value - low) / (high - low)

    return place


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round values from low to high."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 9)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _power(exponent: int) -> str:
    """A power of ten as people read it: 1 and 10 plainly, the others as 10 with a raised exponent."""
    if exponent in (0, 1):
        return str(10**exponent)
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _tick_x(at: float, bottom: float, text: str) -> str:
    return (
        f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}" stroke="var(--grid)"/>'
        f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>'
    )


def _tick_y(at: float, text: str) -> str:
    return (
        f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" stroke="var(--grid)"/>'
        f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _dot(x: float, y: float, mark: Mark) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--{mark.style})" fill-opacity="0.65">'
        f"<title>{escape(mark.label)}</title></circle>"
    )


def _svg(
    height: int, parts: Sequence[str], x_label: str, y_label: str, title: str, label_at: float | None = None
) -> str:
    at = height - 8 if label_at is None else label_at
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    labels = f'<text x="{middle:.0f}" y="{at}" text-anchor="middle">{escape(x_label)}</text>'
    if y_label:
        labels += (
            f'<text x="14" y="{at / 2:.0f}" text-anchor="middle" transform="rotate(-90 14 {at / 2:.0f})">'
            f"{escape(y_label)}</text>"
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{''.join(parts)}{labels}</svg>"
    )
