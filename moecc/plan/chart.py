"""A plan as a picture: memory of a device by kind, time by part; an SVG without a library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from xml.sax.saxutils import escape

from moecc.plan.report_types import PartReport, Report
from moecc.plan.search import seconds_text

WIDTH, LEFT, RIGHT, ROW = 920, 250, 150, 26
LEGEND_COLUMNS = 4
LETTERS = 120
"""How many of the smaller letters are in a line."""

COLOURS = {
    "parameters": "#4c72b0",
    "gradients": "#55a868",
    "copies": "#da8bc3",
    "optimizer": "#8172b3",
    "activations": "#dd8452",
    "buffers": "#ccb974",
    "inputs": "#64b5cd",
    "compute and memory": "#4c72b0",
    "parameters in transit": "#ccb974",
    "waiting for data": "#c44e52",
}


def chart(data: Report, pipeline: str = "") -> str:
    """Return an SVG of a plan.

    Args:
      data: what `moecc.plan.report.plan_json` returned.
      pipeline: the passes that the model went through before.
    """
    parts = shown_parts(data)
    heading = [text_at(16, 28, f"{data['model']} on {data['machine']['name']}", size=17, bold=True)]
    lines = [subtitle(data), *(wrap(f"passes: {pipeline}", LETTERS) if pipeline else [])]
    heading += [text_at(16, 50 + 18 * n, line, size=12) for n, line in enumerate(lines)]
    top = 32 + 18 * len(lines)
    memory, below = _memory(data, top)
    times, height = _times(data, parts, below + 14)
    return picture([*heading, *memory, *times], height)


def picture(drawn: Iterable[str], height: float) -> str:
    """Return an SVG, `WIDTH` wide and on white, of the elements that are drawn."""
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>\n{body}\n</svg>\n'
    )


def subtitle(data: Report) -> str:
    """Return a plan in a line: mesh, ways, time, utilisation."""
    best = data["best"]
    mesh = ", ".join(f"{n} {s}" for n, s in best["mesh"].items()) or "one device"
    way = f"; experts via {best['via']}" if data["experts"] else ""
    return (
        f"{mesh}{way}; remat {best['remat']}: "
        f"{seconds_text(best['seconds'])} a step, {best['mfu']:.1%} of the peak"
    )


def text_at(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    bold: bool = False,
    anchor: str = "start",
) -> str:
    """Return a line of text; `anchor` is what of it is at x: ``start``, ``middle``, ``end``."""
    weight = "bold" if bold else "normal"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="#222">{escape(text)}</text>'
    )


def _bar(x: float, y: float, width: float, kind: str) -> str:
    title = f"<title>{escape(kind)}</title>"
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{ROW - 8}" '
        f'fill="{COLOURS[kind]}">{title}</rect>'
    )


def _stack(y: float, scale: float, sizes: Iterable[tuple[str, float]]) -> Iterator[str]:
    x = float(LEFT)
    for kind, size in sizes:
        if size > 0:
            yield _bar(x, y, size * scale, kind)
            x += size * scale


def _memory(data: Report, top: float) -> tuple[list[str], float]:
    """Return the memory of a device under `top`, and where it ends."""
    best, usable = data["best"], data["machine"]["usable_bytes"]
    kinds = best["memory_bytes"]
    scale = (WIDTH - LEFT - RIGHT) / max(usable, best["total_bytes"])
    limit = LEFT + usable * scale
    shown = [(k, f"{k} {b / 1e9:.2f} GB") for k, b in kinds.items() if b >= 5e6]
    legend, below = _legend(top + 96, shown)
    drawn = [
        text_at(16, top + 34, "memory of a device", bold=True),
        text_at(16, top + 68, f"{best['total_bytes'] / 1e9:.2f} GB"),
        *_stack(top + 54, scale, kinds.items()),
        f'<line x1="{limit:.1f}" y1="{top + 46}" x2="{limit:.1f}" y2="{top + 52 + ROW}" '
        'stroke="#222" stroke-dasharray="3 2"/>',
        text_at(limit, top + 40, f"limit {usable / 1e9:.2f} GB", size=11, anchor="middle"),
        *legend,
    ]
    return drawn, below


def _legend(y: float, entries: Sequence[tuple[str, str]]) -> tuple[list[str], float]:
    """Return what colours mean, four in a row, and where it ends."""
    drawn = []
    for number, (kind, words) in enumerate(entries):
        row, column = divmod(number, LEGEND_COLUMNS)
        x, at = 16 + column * (WIDTH - 32) / LEGEND_COLUMNS, y + 20 * row
        drawn.append(
            f'<rect x="{x:.1f}" y="{at - 10:.1f}" width="11" height="11" fill="{COLOURS[kind]}"/>'
        )
        drawn.append(text_at(x + 16, at, words, size=12))
    return drawn, y + 20 * (len(entries) // LEGEND_COLUMNS)


def shown_parts(data: Report) -> list[PartReport]:
    """Return the parts that take at least a five-hundredth of a step."""
    best = data["best"]
    return [p for p in best["parts"] if p["seconds"]["total"] >= best["seconds"] * 2e-3]


def _times(data: Report, parts: list[PartReport], top: float) -> tuple[list[str], float]:
    """Return the time of a step by part under `top`, and the height of the picture."""
    best = data["best"]
    scale = (WIDTH - LEFT - RIGHT) / max(p["seconds"]["total"] for p in best["parts"])
    drawn, y = [text_at(16, top + 16, "time of a step by part", bold=True)], top + 28
    for part in parts:
        times = part["seconds"]
        stacked = (
            ("compute and memory", times["local"]),
            ("parameters in transit", max(0.0, times["hidden"] - times["local"])),
            ("waiting for data", times["waiting"]),
        )
        count = f" ({part['count']})" if part["count"] > 1 else ""
        words = f"{seconds_text(times['total'])}, {part['bound']}"
        drawn += [
            text_at(16, y + 14, f"{part['name']}{count}", size=12), *_stack(y, scale, stacked),
            text_at(LEFT + times["total"] * scale + 6, y + 14, words, size=11),
        ]  # fmt: skip
        y += ROW
    legend, below = _legend(y + 22, [(k, k) for k in list(COLOURS)[-3:]])
    return [*drawn, *legend], below + 18
