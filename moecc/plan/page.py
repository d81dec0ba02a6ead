"""A plan as a page: memory against the limit, time by part, what else fits, and why it loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moecc.plan.chart import COLOURS, shown_parts, subtitle
from moecc.plan.report import batch_text
from moecc.plan.report_types import PartReport, Report, SummaryReport
from moecc.plan.search import seconds_text
from moecc.support.page import figure_html, page, require_figures, table
from moecc.support.text import count_text, size_text

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Scatter

_GB = 1e9
_GREY = "#888"
_BELOW = {"orientation": "h", "y": -0.25, "traceorder": "normal"}


def plan_page(data: Report, searched: Sequence[SummaryReport], pipeline: str = "") -> str:
    """Return the page of a plan.

    Args:
      data: what `moecc.plan.report.plan_json` returned.
      searched: all strategies that fit, fastest first.
      pipeline: the passes that the model went through before.

    Raises:
      MachineError: plotly is missing.
    """
    require_figures()
    title = f"{data['model']} on {data['machine']['name']}"
    body = [
        f"<p>{subtitle(data)}</p>", _facts(data, pipeline), "<h2>Memory of a device</h2>",
        _memory(data), "<h2>Time of a step</h2>", _times(data), "<h2>Collectives</h2>",
        _collectives(data), "<h2>What else fits</h2>", _search(data, searched), _others(data),
    ]  # fmt: skip
    return page(title, body)


def _facts(data: Report, pipeline: str) -> str:
    machine, best = data["machine"], data["best"]
    rows = [
        ("pipeline", pipeline or "none"),
        ("step", f"{data['step']}, {data['dtype']}, parameters {data['weight_dtype']}"
                 + (f", {data['optimizer']}" if data["optimizer"] else "")),
        ("batch", batch_text(data["batch"])),
        ("parameters", count_text(data["parameters"])),
        ("devices", f"{machine['devices']:,}"),
        ("rules", ", ".join(best["rules"])),
        ("dense weights, dispatch", f"{best['dense_weights']}, {best['dispatch']}"),
        ("FLOPs of a device", count_text(best["flops"])),
    ]  # fmt: skip
    if not data["experts"]:
        rows[-2] = ("dense weights", best["dense_weights"])
    return table(("", ""), rows)


def _memory(data: Report) -> str:
    from plotly import graph_objects

    best, limit = data["best"], data["machine"]["usable_bytes"]
    bars = [
        _bar([""], [size / _GB], kind, [f"{kind}: {size_text(size)}"])
        for kind, size in best["memory_bytes"].items()
        if size
    ]
    figure = graph_objects.Figure(bars)
    figure.update_layout(barmode="stack", legend=_BELOW | {"y": -0.8})
    figure.add_vline(x=limit / _GB, line_dash="dash", line_color=_GREY)
    figure.update_yaxes(visible=False)
    used = size_text(best["total_bytes"])
    title = f"{used} of {size_text(limit)} (dashed line)"
    return figure_html(figure, title, 240, "GB")


def _times(data: Report) -> str:
    from plotly import graph_objects

    parts = shown_parts(data)
    names = [f"{p['name']} × {p['count']}" if p["count"] > 1 else p["name"] for p in parts]
    bars = [
        _bar(names, [value * 1e3 for value in values], kind,
             [_says(part, kind, value) for part, value in zip(parts, values, strict=True)])
        for kind, values in _kinds(parts)
    ]  # fmt: skip
    figure = graph_objects.Figure(bars)
    figure.update_layout(barmode="stack", legend=_BELOW | {"y": -0.45})
    figure.update_yaxes(autorange="reversed", automargin=True)
    best = data["best"]
    title = f"{seconds_text(best['seconds'])}, {best['mfu']:.1%} of the peak"
    return figure_html(figure, title, 200 + 26 * len(parts), "ms")


def _kinds(parts: Sequence[PartReport]) -> Iterator[tuple[str, list[float]]]:
    seconds = [part["seconds"] for part in parts]
    yield "compute and memory", [s["local"] for s in seconds]
    yield "parameters in transit", [max(0.0, s["hidden"] - s["local"]) for s in seconds]
    yield "waiting for data", [s["waiting"] for s in seconds]


def _says(part: PartReport, kind: str, seconds: float) -> str:
    return f"{part['name']}, {kind}: {seconds_text(seconds)}; bound by {part['bound']}"


def _bar(names: Sequence[str], values: Sequence[float], kind: str, texts: Sequence[str]) -> Bar:
    from plotly import graph_objects

    return graph_objects.Bar(
        y=names, x=values, name=kind, orientation="h", marker_color=COLOURS[kind],
        hovertext=texts, hoverinfo="text",
    )  # fmt: skip


def _collectives(data: Report) -> str:
    found = data["best"]["collectives"]
    if not found:
        return "<p>None: every device works alone.</p>"
    columns = sorted({key for one in found.values() for key in one})
    rows = [
        [op, *(_quantity(key, one.get(key, 0.0)) for key in columns)] for op, one in found.items()
    ]
    heads = ["", *(key.removesuffix("_bytes").replace("_", " ") for key in columns)]
    return table(heads, rows, range(1, len(heads)))


def _quantity(key: str, value: float) -> str:
    if key.endswith("bytes"):
        return size_text(value)
    return seconds_text(value) if key.endswith("seconds") else f"{value:g}"


def _search(data: Report, searched: Sequence[SummaryReport]) -> str:
    from plotly import graph_objects

    vias = dict.fromkeys(one["via"] for one in searched)
    routed = data["experts"] > 0
    clouds = [_cloud(via, [one for one in searched if one["via"] == via], routed) for via in vias]
    best = data["best"]
    star = graph_objects.Scatter(
        x=[best["total_bytes"] / _GB], y=[best["seconds"] * 1e3], mode="markers", name="the plan",
        marker={"symbol": "star", "size": 16, "color": "#d62728"},
        hovertext=[_strategy(best, routed)], hoverinfo="text",
    )  # fmt: skip
    figure = graph_objects.Figure([*clouds, star])
    figure.update_yaxes(title="ms a step", type="log")
    figure.add_vline(x=data["machine"]["usable_bytes"] / _GB, line_dash="dash", line_color=_GREY)
    figure.update_layout(legend=_BELOW)
    title = f"{data['fitting']:,} of {data['tried']:,} strategies fit"
    return figure_html(figure, title, 420, "GB of a device")


def _cloud(via: str, some: Sequence[SummaryReport], routed: bool) -> Scatter:
    from plotly import graph_objects

    return graph_objects.Scatter(
        x=[one["total_bytes"] / _GB for one in some], y=[one["seconds"] * 1e3 for one in some],
        mode="markers", name=f"experts via {via}" if routed else "others",
        marker={"size": 6, "opacity": 0.85},
        hovertext=[_strategy(one, routed) for one in some], hoverinfo="text",
    )  # fmt: skip


def _strategy(one: SummaryReport, routed: bool) -> str:
    mesh = ", ".join(f"{name} {size}" for name, size in one["mesh"].items()) or "one device"
    way = f"; via {one['via']}" if routed else ""
    return (
        f"{mesh}{way}; remat {one['remat']}; dense weights {one['dense_weights']}: "
        f"{seconds_text(one['seconds'])}, {size_text(one['total_bytes'])}"
    )


def _others(data: Report) -> str:
    if not data["others"]:
        return ""
    ways = [(one["via"],) if data["experts"] else () for one in data["others"]]
    rows = [
        (", ".join(f"{n} {s}" for n, s in one["mesh"].items()), *way, one["remat"],
         seconds_text(one["seconds"]), size_text(one["total_bytes"]), one["why_slower"])
        for one, way in zip(data["others"], ways, strict=True)
    ]  # fmt: skip
    heads = ["the next best", "remat", "a step", "memory", "why it is slower"]
    if data["experts"]:
        heads.insert(1, "via")
    return table(heads, rows, (len(heads) - 3, len(heads) - 2))
