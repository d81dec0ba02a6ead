"""Plans and sweeps as pages: memory against the limit, time by part, the strategies that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moecc.plan.report import batch_text, unit_of
from moecc.plan.search import seconds_text
from moecc.plan.sweeps import (
    AXES,
    FRONTIER,
    MARK,
    SWEPT,
    UNSAID,
    point_cells,
    sweep_title,
    value_text,
    values_of,
)
from moecc.support.lazy import graph_objects
from moecc.support.page import drawing, render_page, require_figures
from moecc.support.text import count_text, size_text
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Scatter

COLOURS = {
    "parameters": "#4c72b0",
    "gradients": "#55a868",
    "copies": "#da8bc3",
    "optimizer": "#8172b3",
    "activations": "#dd8452",
    "buffers": "#ccb974",
    "inputs": "#64b5cd",
    "compute and memory": "#4c72b0",
    "waiting for data": "#c44e52",
}

SHOWN_SHARE = 2e-3
"""The share of a step below which a part is not drawn."""

_GB = 1e9
_GREY = "#888"
_BELOW = {"orientation": "h", "y": -0.25, "traceorder": "normal"}


def plan_page(data: JsonDict, searched: Sequence[JsonDict], pipeline: str = "") -> str:
    """Return the page of a plan.

    Args:
      data: what `moecc.plan.report.plan_json` returned.
      searched: all strategies that fit, fastest first.
      pipeline: the passes that the model went through before.

    Raises:
      MachineError: plotly is missing.
    """
    require_figures()
    return render_page(
        "plan.html", f"{data['model']} on {data['machine']['name']}", figures=True,
        subtitle=_subtitle(data), facts=_facts(data, pipeline), memory=_memory(data),
        times=_times(data), search=_search(data, searched), collectives=_collectives(data),
        others=_others(data),
    )  # fmt: skip


def _collectives(data: JsonDict) -> list[list[str]]:
    """Return the heads and rows of the table of collectives, empty without any."""
    collectives = data["best"]["collectives"]
    if not collectives:
        return []
    columns = sorted({key for amounts in collectives.values() for key in amounts})
    heads = ["", *(key.removesuffix("_bytes").replace("_", " ") for key in columns)]
    rows = (
        [op, *(_quantity(key, amounts.get(key, 0.0)) for key in columns)]
        for op, amounts in collectives.items()
    )
    return [heads, *rows]


def _others(data: JsonDict) -> list[list[str]]:
    """Return the heads and rows of the table of slower strategies, empty without any."""
    heads = ["the next best", "via", "remat", "a step", "memory", "why it is slower"]
    rows = [
        [", ".join(f"{n} {s}" for n, s in plan["mesh"].items()), plan["via"], plan["remat"],
         seconds_text(plan["seconds"]), size_text(plan["total_bytes"]), plan["why_slower"]]
        for plan in data["others"]
    ]  # fmt: skip
    lines = [heads, *rows] if rows else []
    return lines if data["experts"] else [[*line[:1], *line[2:]] for line in lines]


def _subtitle(data: JsonDict) -> str:
    best = data["best"]
    mesh = ", ".join(f"{n} {s}" for n, s in best["mesh"].items()) or "one device"
    way = f"; experts via {best['via']}" if data["experts"] else ""
    return (
        f"{mesh}{way}; remat {best['remat']}: "
        f"{seconds_text(best['seconds'])} a step, {best['mfu']:.1%} of the peak"
    )


def _facts(data: JsonDict, pipeline: str) -> list[tuple[str, str]]:
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
    return rows


def _memory(data: JsonDict) -> JsonDict:
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
    return drawing(figure, title, 240, "GB")


def _times(data: JsonDict) -> JsonDict:
    best = data["best"]
    parts = [p for p in best["parts"] if p["seconds"]["total"] >= best["seconds"] * SHOWN_SHARE]
    names = [f"{p['name']} × {p['count']}" if p["count"] > 1 else p["name"] for p in parts]
    bars = [
        _bar(names, [value * 1e3 for value in values], kind,
             [_says(part, kind, value) for part, value in zip(parts, values, strict=True)])
        for kind, values in _kinds(parts)
    ]  # fmt: skip
    figure = graph_objects.Figure(bars)
    figure.update_layout(barmode="stack", legend=_BELOW | {"y": -0.45})
    figure.update_yaxes(autorange="reversed", automargin=True)
    title = f"{seconds_text(best['seconds'])}, {best['mfu']:.1%} of the peak"
    return drawing(figure, title, 200 + 26 * len(parts), "ms")


def _kinds(parts: Sequence[JsonDict]) -> Iterator[tuple[str, list[float]]]:
    seconds = [part["seconds"] for part in parts]
    yield "compute and memory", [s["local"] for s in seconds]
    yield "waiting for data", [s["waiting"] for s in seconds]


def _says(part: JsonDict, kind: str, seconds: float) -> str:
    return f"{part['name']}, {kind}: {seconds_text(seconds)}; bound by {part['bound']}"


def _bar(names: Sequence[str], values: Sequence[float], kind: str, texts: Sequence[str]) -> Bar:
    return graph_objects.Bar(
        y=names, x=values, name=kind, orientation="h", marker_color=COLOURS[kind],
        hovertext=texts, hoverinfo="text",
    )  # fmt: skip


def _quantity(key: str, value: float) -> str:
    if key.endswith("bytes"):
        return size_text(value)
    return seconds_text(value) if key.endswith("seconds") else f"{value:g}"


def _search(data: JsonDict, searched: Sequence[JsonDict]) -> JsonDict:
    vias = dict.fromkeys(plan["via"] for plan in searched)
    routed = data["experts"] > 0
    clouds = [
        _cloud(via, [plan for plan in searched if plan["via"] == via], routed) for via in vias
    ]
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
    return drawing(figure, title, 420, "GB of a device")


def _cloud(via: str, some: Sequence[JsonDict], routed: bool) -> Scatter:
    return graph_objects.Scatter(
        x=[plan["total_bytes"] / _GB for plan in some], y=[plan["seconds"] * 1e3 for plan in some],
        mode="markers", name=f"experts via {via}" if routed else "others",
        marker={"size": 6, "opacity": 0.85},
        hovertext=[_strategy(plan, routed) for plan in some], hoverinfo="text",
    )  # fmt: skip


def _strategy(plan: JsonDict, routed: bool) -> str:
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items()) or "one device"
    way = f"; via {plan['via']}" if routed else ""
    return (
        f"{mesh}{way}; remat {plan['remat']}; dense weights {plan['dense_weights']}: "
        f"{seconds_text(plan['seconds'])}, {size_text(plan['total_bytes'])}"
    )


def sweep_page(data: JsonDict, pipeline: str = "") -> str:
    """Return the page of a sweep: times of the models, and a table.

    Args:
      data: what `moecc.plan.sweeps.sweep_json` returned.
      pipeline: the passes that the models went through before.

    Raises:
      MachineError: plotly is missing.
    """
    require_figures()
    device_batch = data["batch"]["tokens"] / data["machine"]["devices"]
    planned = [point for point in data["points"] if point["best"] is not None]
    return render_page(
        "sweep.html", sweep_title(data), figures=True, pipeline=pipeline, mark=MARK,
        frontier=FRONTIER, times=_sweep_times(data),
        heads=(
            "experts", "top-k", "capacity factor", "parameters", "active", "a step",
            f"{unit_of(data['batch'])}s/s a device", "of the peak", "GB", "plan", "",
        ),
        rows=[(*point_cells(p, device_batch), MARK * p["frontier"]) for p in planned],
        problems=[(*values_of(p), p["problem"]) for p in data["points"] if p["best"] is None],
    )  # fmt: skip


def _sweep_times(data: JsonDict) -> JsonDict:
    """Return the times along the first axis with several values, a line for equal others."""
    names = [name for name in SWEPT if len(data["axes"].get(name, ())) > 1]
    axis = SWEPT.index(names[0] if names else next(iter(data["axes"])))
    lines: dict[str, list[tuple[str, JsonDict, JsonDict]]] = {}
    for point in data["points"]:
        if point["best"] is not None:
            texts = list(values_of(point))
            value = texts[axis]
            texts[axis] = UNSAID
            lines.setdefault(_settings(texts), []).append((value, point["best"], point))
    figure = graph_objects.Figure([_sweep_line(name, points) for name, points in lines.items()])
    order = [value_text(value) for value in data["axes"][SWEPT[axis]]]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    figure.update_yaxes(title="ms a step", rangemode="tozero")
    figure.update_layout(legend=_BELOW)
    return drawing(figure, "Time of a step", 420, AXES[axis])


def _sweep_line(name: str, points: Sequence[tuple[str, JsonDict, JsonDict]]) -> Scatter:
    symbols = ["circle" if point["frontier"] else "circle-open" for _, _, point in points]
    return graph_objects.Scatter(
        x=[value for value, _, _ in points], y=[best["seconds"] * 1e3 for _, best, _ in points],
        name=name, mode="lines+markers", showlegend=True, hoverinfo="text",
        marker={"size": 9, "line": {"width": 1.5}, "symbol": symbols},
        hovertext=[
            f"{_settings(values_of(point))}: {seconds_text(best['seconds'])}"
            for _, best, point in points
        ],
    )  # fmt: skip


def _settings(values: Sequence[str]) -> str:
    said = (f"{a} {v}" for a, v in zip(AXES, values, strict=True) if v != UNSAID)
    return ", ".join(said)
