"""Charts as inline SVG, written by hand: no script, no library, colours from the page's style sheet.

Owns axes, scales, ticks and the frame of a chart. Names stand above their rows and a legend below its lines, each in a
line of its own, so that no label meets another. `m0kit.cli.page` sets the colours, so that a chart follows light and
dark mode. All text is escaped.

    svg = lines({"tiny": [(0, 1e-6), (1, 2e-6)]}, "layer", "difference", log_y=True)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from m0kit.cli.page import LIGHT, text
from m0kit.files import writing

# Narrow, so that the letters can be read where a phone shrinks it.
WIDTH: Final = 480
LEFT: Final = 64  # room for tick labels
RIGHT: Final = 20
TOP: Final = 30  # room for the name of the upward axis
BOTTOM: Final = 44
_ROW: Final = 46  # a name and what is drawn below it
_LEGEND: Final = 20
_SIDE: Final = WIDTH - LEFT - RIGHT  # of the plotting area
_MOST: Final = 1.5  # of a limit: what is shown of shares
_LETTERS: Final = 30  # of a name that shares its line with a figure, in the larger letters of a phone


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot: `label` is shown on hovering, `style` is one of pass, near, fail, each with a form of its own."""

    x: float
    y: float
    label: str
    style: str = "pass"


@dataclass(frozen=True, slots=True)
class Bar:
    """A row: its figure as a number and as it is read, the limit it should not pass, parts of a mean, its interval."""

    name: str
    value: float | None
    shown: str
    limit: float | None = None
    parts: Mapping[str, float] | None = None
    interval: tuple[float, float] | None = None


def shares(rows: Mapping[str, Sequence[Mark]], x_label: str) -> str:
    """One row of dots per name on a shared axis from nothing to one and a half times the limit.

    Only `x` of a mark counts, 1 being the limit. What is beyond the axis, or no number, sits on its right edge.
    """
    height = TOP + _ROW * max(1, len(rows)) + BOTTOM
    x = scale(0, _MOST, 16, WIDTH - RIGHT)
    parts = [tick_x(x(v), height - BOTTOM, f"{100 * v:.0f} %") for v in ticks(0, _MOST)]
    parts.append(_limit(x(1), TOP, height - BOTTOM))
    parts.append(f'<text x="{x(1):.1f}" y="{TOP - 8}" text-anchor="middle">limit</text>')
    for i, (name, marks) in enumerate(rows.items()):
        y = TOP + _ROW * i + 33
        parts.append(_row(name, "", y))
        # Dots at one place are pulled apart a little, in a fixed pattern, so that their number shows.
        parts += [_dot(x(mark.x), y + (n % 5 - 2) * 3, mark) for n, mark in enumerate(marks)]
    return svg(height, parts, x_label, "", f"{x_label} by row")


def bars(rows: Sequence[Bar], x_label: str, least: float = 0) -> str:
    """Bars from zero on one axis, which is `least` long at least: what is small beside that looks small."""
    height = TOP + _ROW * max(1, len(rows)) + BOTTOM
    drawn = [value for row in rows for value in (*(row.parts or {}).values(), *(row.interval or ()))]
    found = [*drawn, *(v for row in rows for v in (row.value, row.limit) if v is not None and math.isfinite(v))]
    low, high = min(found, default=0), max(found, default=0)
    low, high = min(low, 0), max(high, 0, min(low, 0) + least) or 1.0
    high += (high - low) / 40  # so that what ends there is seen to end
    x = scale(low, high, 16, WIDTH - RIGHT)
    parts = [tick_x(x(v), height - BOTTOM, f"{v:,g}".replace("-", "−")) for v in ticks(low, high)]
    parts.append(f'<line x1="{x(0):.1f}" y1="{TOP}" x2="{x(0):.1f}" y2="{height - BOTTOM}" stroke="var(--ink)"/>')
    for i, row in enumerate(rows):
        y = TOP + _ROW * i + 33
        parts.append(_row(row.name, row.shown, y))
        if row.value is not None and math.isfinite(row.value):
            start, end = sorted((x(0), x(row.value)))
            parts.append(
                f'<rect x="{start:.1f}" y="{y - 6}" width="{end - start:.1f}" height="12" fill="var(--series-0)">'
                f"<title>{text(f'{row.name}: {row.shown}')}</title></rect>"
            )
        parts += [
            f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="var(--paper)" stroke="var(--ink)">'
            f"<title>{text(f'{name}: {value:.4g}')}</title></circle>"
            for name, value in (row.parts or {}).items()
        ]
        if row.interval:
            low, high = map(x, row.interval)
            ends = ((low, -7), (low, 7), (low, 0), (high, 0), (high, -7), (high, 7))
            path = " ".join(f"{at:.1f},{y + down}" for at, down in ends)
            parts.append(f'<polyline points="{path}" fill="none" stroke="var(--ink)" stroke-width="2"/>')
        if row.limit is not None:
            parts.append(_limit(x(row.limit), y - 11, y + 11))
    return svg(height, parts, x_label, "", x_label)


def scatter(marks: Sequence[Mark], x_label: str, y_label: str) -> str:
    """Dots in the unit square with its diagonal, for scores against scores."""
    height = TOP + _SIDE + BOTTOM
    x, y = scale(0, 1, LEFT, WIDTH - RIGHT), scale(0, 1, height - BOTTOM, TOP)
    parts = []
    for tick in range(6):
        parts += [tick_x(x(tick / 5), height - BOTTOM, f"{tick / 5:g}"), tick_y(y(tick / 5), f"{tick / 5:g}")]
    parts.append(
        f'<line x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(1):.1f}" y2="{y(1):.1f}" stroke="var(--faint)" '
        'stroke-dasharray="4 3"/>'
    )
    parts += [_dot(x(mark.x), y(mark.y), mark) for mark in marks]
    return svg(height, parts, x_label, y_label, f"{y_label} against {x_label}")


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    limit: float | None = None,
) -> str:
    """Named lines through (x, y) points, with a legend; on a log axis values of 0 sit on the lower edge.

    Zero is in view, or the whole decades of a log axis, and so is a `limit`.
    """
    points = [p for line in series.values() for p in line]
    xs = [p[0] for p in points] or [0.0, 1.0]
    ys = [p[1] for p in points] + ([] if limit is None else [limit]) or [0.0, 1.0]
    bottom = TOP + 240
    x = scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    parts = [tick_x(x(v), bottom, f"{v:,g}") for v in ticks(min(xs), max(xs))]
    if log_y:
        positive = [v for v in ys if v > 0 and math.isfinite(v)] or [1.0]
        first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        last = max(last, first + 1)
        y = scale(10.0**first, 10.0**last, bottom, TOP, log=True)
        parts += [tick_y(y(10.0**e), _power(e)) for e in range(first, last + 1)]
    else:
        top = 1.05 * max(*ys, 0.0) or 1.0
        y = scale(min(*ys, 0.0), top, bottom, TOP)
        parts += [tick_y(y(v), f"{v:,g}") for v in ticks(min(*ys, 0.0), top)]
    legend = bottom + BOTTOM + 12
    names = list(series) if len(series) > 1 else []  # what one line alone is, the axes say
    if limit is not None:
        parts.append(_limit(LEFT, y(limit), y(limit), WIDTH - RIGHT))
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y(limit) + 16:.1f}" text-anchor="end">limit {limit:g}</text>')
    for i, (name, line) in enumerate(series.items()):
        color = f"var(--series-{i % 6})"
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        if names:
            at = legend + _LEGEND * i
            parts.append(
                f'<line x1="{LEFT}" y1="{at}" x2="{LEFT + 24}" y2="{at}" stroke="{color}" stroke-width="2"/>'
                f'<text x="{LEFT + 32}" y="{at + 4}">{text(name)}</text>'
            )
    height = legend + _LEGEND * len(names)
    return svg(height, parts, x_label, y_label, f"{y_label} by {x_label}", bottom=bottom)


def write_plot(path: Path, charts: Iterable[str]) -> None:
    """Charts one below the other in one self-contained SVG file, in the light colours. Raises OutputError."""
    parts, top = [], 0
    for chart in charts:
        for name, colour in LIGHT.items():  # written out: few viewers of SVG files know variables
            chart = chart.replace(f"var(--{name})", colour)
        head, _, rest = chart.partition(">")
        height = head.split('viewBox="')[1].split('"')[0].split()[3]
        parts.append(f'<svg y="{top}" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">{rest}')
        top += int(height) + 20
    whole = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" '
        f'style="font:13px sans-serif;fill:{LIGHT["ink"]}">'
        f'<rect width="{WIDTH}" height="{top}" fill="{LIGHT["paper"]}"/>{"".join(parts)}</svg>\n'
    )
    with writing(path) as file:
        file.write(whole.encode())


def scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
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


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round values from low to high."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 6.5)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def tick_x(at: float, bottom: float, label: str) -> str:
    """An upright line of the grid and what it stands for."""
    return (
        f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}" stroke="var(--grid)"/>'
        f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{text(label)}</text>'
    )


def tick_y(at: float, label: str) -> str:
    """A level line of the grid and what it stands for."""
    return (
        f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="var(--grid)"/>'
        f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text(label)}</text>'
    )


def svg(height: int, parts: Sequence[str], x_label: str, y_label: str, title: str, bottom: float | None = None) -> str:
    """The frame of a chart: the axes' names, below the ticks at `bottom` and above the upward axis."""
    at = (height - BOTTOM if bottom is None else bottom) + 37
    middle = (WIDTH + (LEFT if y_label else 16) - RIGHT) / 2
    labels = f'<text x="{middle:.0f}" y="{at}" text-anchor="middle">{text(x_label)}</text>'
    labels += f'<text x="8" y="14">{text(y_label)}</text>' if y_label else ""
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{text(title)}</title>{''.join(parts)}{labels}</svg>"
    )


def _row(name: str, figure: str, y: float) -> str:
    """A row's name and figure, above its line."""
    short = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
    return (
        f'<line x1="16" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="var(--grid)"/>'
        f'<text x="16" y="{y - 17}">{text(short)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{y - 17}" text-anchor="end">{text(figure)}</text>'
    )


def _limit(x: float, y1: float, y2: float, x2: float | None = None) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{y1:.1f}" x2="{x if x2 is None else x2:.1f}" y2="{y2:.1f}" stroke="var(--fail)" '
        'stroke-width="2" stroke-dasharray="4 3"/>'
    )


def _power(exponent: int) -> str:
    """A power of ten as people read it: 1 and 10 plainly, the others as 10 with a raised exponent."""
    if exponent in (0, 1):
        return str(10**exponent)
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _dot(x: float, y: float, mark: Mark) -> str:
    if mark.style == "pass":
        form = f'circle cx="{x:.1f}" cy="{y:.1f}" r="4"'
    elif mark.style == "near":
        form = f'rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
    else:
        form = f'polygon points="{x:.1f},{y - 6:.1f} {x + 6:.1f},{y + 5:.1f} {x - 6:.1f},{y + 5:.1f}"'
    return (
        f'<{form} fill="var(--{mark.style})" fill-opacity="0.65"><title>{text(mark.label)}</title></{form.split()[0]}>'
    )
