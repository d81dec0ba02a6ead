"""A plan as a picture: memory of a device by kind, time by part; an SVG without a library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from xml.sax.saxutils import escape

from moecc.plan.report_types import PartReport, Report
from moecc.plan.search import seconds_text

WIDTH, LEFT, RIGHT, ROW = 920, 250, 110, 26

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


def chart(data: Report) -> str:
    """Return an SVG of a plan.

    Args:
      data: what `moecc.plan.report.plan_json` returned.
    """
    memory = list(_memory(data))
    parts = shown_parts(data)
    times = list(_times(data, parts))
    height = 188 + ROW * len(parts) + 40
    body = [
        _text(16, 28, f"{data['model']} on {data['machine']['name']}", size=17, weight="bold"),
        _text(16, 50, subtitle(data), size=12),
        _text(16, 84, "memory of a device", weight="bold"),
        *memory,
        _text(16, 176, "time of a step by part", weight="bold"),
        *times,
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def subtitle(data: Report) -> str:
    """Return a plan in a line: mesh, ways, time, utilisation."""
    best = data["best"]
    mesh = ", ".join(f"{n} {s}" for n, s in best["mesh"].items()) or "one device"
    return (
        f"{mesh}; experts via {best['via']}; remat {best['remat']}: "
        f"{seconds_text(best['seconds'])} a step, {best['mfu']:.1%} of the peak"
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    weight: str = "normal",
    anchor: str = "start",
) -> str:
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


def _memory(data: Report) -> Iterator[str]:
    best, usable = data["best"], data["machine"]["usable_bytes"]
    kinds = best["memory_bytes"]
    room = WIDTH - LEFT - RIGHT
    scale = room / max(usable, best["total_bytes"])
    yield _text(16, 110, f"{best['total_bytes'] / 1e9:.2f} GB of {usable / 1e9:.2f} GB")
    yield from _stack(96, scale, kinds.items())
    limit = LEFT + usable * scale
    yield (
        f'<line x1="{limit:.1f}" y1="90" x2="{limit:.1f}" y2="{90 + ROW}" stroke="#222" '
        'stroke-dasharray="3 2"/>'
    )
    shown = [(k, f"{k} {b / 1e9:.2f} GB") for k, b in kinds.items() if b >= 5e6]
    yield from _legend(136, shown)


def _legend(y: float, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    x = 16.0
    for kind, words in entries:
        yield (
            f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="11" height="11" fill="{COLOURS[kind]}"/>'
        )
        yield _text(x + 16, y, words, size=12)
        x += 36 + 7.2 * len(words)


def shown_parts(data: Report) -> list[PartReport]:
    """Return the parts that take at least a five-hundredth of a step."""
    best = data["best"]
    return [p for p in best["parts"] if p["seconds"]["total"] >= best["seconds"] * 2e-3]


def _times(data: Report, parts: list[PartReport]) -> Iterator[str]:
    best = data["best"]
    scale = (WIDTH - LEFT - RIGHT) / max(p["seconds"]["total"] for p in best["parts"])
    y = 188.0
    for part in parts:
        times = part["seconds"]
        times_ = (
            ("compute and memory", times["local"]),
            ("parameters in transit", max(0.0, times["hidden"] - times["local"])),
            ("waiting for data", times["waiting"]),
        )
        count = f" ({part['count']})" if part["count"] > 1 else ""
        yield _text(16, y + 14, f"{part['name']}{count}", size=12)
        yield from _stack(y, scale, times_)
        end = LEFT + times["total"] * scale
        words = f"{seconds_text(times['total'])}, {part['bound']}"
        yield _text(end + 6, y + 14, words, size=11)
        y += ROW
    yield from _legend(y + 22, [(k, k) for k in list(COLOURS)[-3:]])
