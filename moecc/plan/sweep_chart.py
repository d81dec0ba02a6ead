"""A sweep as a picture: the time of a step over what was swept; an SVG without a library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from xml.sax.saxutils import escape

from moecc.plan.chart import LETTERS, WIDTH, picture, text_at
from moecc.plan.search import seconds_text
from moecc.plan.sweep_report import (
    FRONTIER,
    UNSAID,
    SweepPoint,
    SweepReport,
    sweep_title,
    value_text,
    values_of,
)
from moecc.plan.sweeps import axis_text

LEFT, RIGHT, TOP, HEIGHT = 96, 24, 76, 300
TICKS, COLUMNS = 4, 3

COLOURS = (
    "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd",
    "#ccb974", "#555555",
)  # fmt: skip

AXES = ("experts", "top_k", "capacity_factor")


@dataclass(frozen=True)
class _Field:
    """Where points are drawn.

    Attributes:
      axis: the swept axis that runs along it, of `AXES`.
      values: its values, as texts.
      longest: the seconds that are nearly at the top.
      top: where it begins.
    """

    axis: str
    values: Sequence[str]
    longest: float
    top: float

    def x(self, value: str) -> float:
        """Return where a value of the axis is."""
        width = (WIDTH - LEFT - RIGHT) / len(self.values)
        return LEFT + (self.values.index(value) + 0.5) * width

    def y(self, seconds: float) -> float:
        """Return where a time is."""
        return self.top + HEIGHT * (1 - seconds / (self.longest * 1.08))


def sweep_chart(data: SweepReport, pipeline: str = "") -> str:
    """Return an SVG of a sweep: a line for models that differ in one axis alone.

    A point is filled where no other has as much of everything and takes less time.

    Args:
      data: what `moecc.plan.sweep_report.sweep_json` returned.
      pipeline: the passes that the models went through before.
    """
    lines = wrap(f"passes: {pipeline}", LETTERS) if pipeline else []
    drawn = [text_at(16, 28, sweep_title(data), size=17, bold=True)]
    drawn += [text_at(16, 50 + 16 * n, line, size=12) for n, line in enumerate(lines)]
    axis = _along(data)
    values = [value_text(value) for value in data["axes"][axis]]
    longest = max(p["best"]["seconds"] for p in data["points"] if p["best"] is not None)
    field = _Field(axis, values, longest, TOP + 16 * len(lines))
    series = _series(data, axis)
    drawn += _frame(field)
    for number, points in enumerate(series.values()):
        drawn += _line(points, field, _colour(number))
    legend, below = _legend(list(series), field)
    return picture([*drawn, *legend], below)


def _along(data: SweepReport) -> str:
    """Return the axis that runs along the picture: the first with several values."""
    several = (name for name in AXES if len(data["axes"].get(name, ())) > 1)
    return next(several, next(iter(data["axes"])))


def _series(data: SweepReport, axis: str) -> dict[tuple[str, ...], list[SweepPoint]]:
    """Return the points that were planned, by what they have of the other axes."""
    at = AXES.index(axis)
    found: dict[tuple[str, ...], list[SweepPoint]] = {}
    for point in data["points"]:
        values = values_of(point)
        if point["best"] is not None:
            found.setdefault((*values[:at], *values[at + 1 :]), []).append(point)
    return found


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _frame(field: _Field) -> Iterator[str]:
    """Yield the axes: times on the left, values below."""
    for tick in range(TICKS + 1):
        seconds = field.longest * tick / TICKS
        y, colour = field.y(seconds), "#ddd" if tick else "#222"
        yield (
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{colour}"/>'
        )
        words = seconds_text(seconds) if tick else "0"
        yield text_at(LEFT - 8, y + 4, words, size=11, anchor="end")
    yield text_at(16, field.top - 8, "a step", size=12, bold=True)
    for value in field.values:
        below = field.top + HEIGHT + 18
        yield text_at(field.x(value), below, value, size=12, anchor="middle")
    middle, words = (LEFT + WIDTH - RIGHT) / 2, axis_text(field.axis)
    yield text_at(middle, field.top + HEIGHT + 38, words, size=12, bold=True, anchor="middle")


def _line(points: Sequence[SweepPoint], field: _Field, colour: str) -> Iterator[str]:
    """Yield the points of a series, and the line through them."""
    at = AXES.index(field.axis)
    times = [(p, p["best"]["seconds"]) for p in points if p["best"] is not None]
    places = [(field.x(values_of(p)[at]), field.y(seconds)) for p, seconds in times]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    for (point, seconds), (x, y) in zip(times, places, strict=True):
        fill = colour if point["frontier"] else "white"
        words = ", ".join(_words(AXES, values_of(point)))
        yield (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" '
            f'stroke-width="1.5"><title>{escape(words)}: {seconds_text(seconds)}</title></circle>'
        )


def _words(axes: Sequence[str], values: Sequence[str]) -> Iterator[str]:
    yield from (f"{axis_text(a)} {v}" for a, v in zip(axes, values, strict=True) if v != UNSAID)


def _legend(names: Sequence[tuple[str, ...]], field: _Field) -> tuple[list[str], float]:
    """Return what the colours and the filled points mean, and where that ends."""
    others = [name for name in AXES if name != field.axis]
    drawn, top = [], field.top + HEIGHT + 66
    for number, values in enumerate(names):
        row, column = divmod(number, COLUMNS)
        x, y = 16 + column * (WIDTH - 32) / COLUMNS, top + 20 * row
        drawn.append(f'<circle cx="{x + 6:.1f}" cy="{y - 4:.1f}" r="5" fill="{_colour(number)}"/>')
        drawn.append(text_at(x + 18, y, ", ".join(_words(others, values)), size=12))
    below = top + 20 * ((len(names) - 1) // COLUMNS + 1)
    return [*drawn, text_at(16, below + 4, f"filled: {FRONTIER}", size=12)], below + 24
