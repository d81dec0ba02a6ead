"""Sweeps, and the pages of plans and sweeps.

A sweep is one model with other numbers of experts, choices and capacities, each of them planned.

    sweep := axis (' ' axis)*        axis := name '=' value (',' value)*

ST-MoE (Zoph et al. 2022, section 5) weighs quality against step time along these three.  Quality
is not predicted here; what it is known to grow with stands beside the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import inf, isfinite
from typing import TYPE_CHECKING

from moecc.errors import Problem, UsageError, nearest, raise_problems
from moecc.plan.report import batch_text, run_text, step_text, unit_of
from moecc.plan.search import seconds_text
from moecc.plan.step import mesh_text
from moecc.support.lazy import graph_objects
from moecc.support.page import drawing, render_page, require_figures
from moecc.support.text import count_text, size_text
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Scatter

DROPLESS = "dropless"
"""The value of a capacity factor that stands for no bound at all."""

MOST_POINTS = 128
"""Each is a search of its own."""

EXAMPLE = "experts=8,16,32 top-k=1,2 capacity-factor=1.25,2"

Factor = float | str
"""A capacity factor, or `DROPLESS`."""


@dataclass(frozen=True)
class Point:
    """The numbers in which a model of a sweep differs; None for those of the model.

    Attributes:
      experts: of a layer.
      top_k: experts of a token.
      capacity_factor: slots of an expert over its mean load, or `DROPLESS`.
    """

    experts: int | None = None
    top_k: int | None = None
    capacity_factor: Factor | None = None


@dataclass(frozen=True)
class Sweep:
    """The values of each axis; none where it is not swept.

    Attributes:
      experts: of a layer.
      top_k: experts of a token.
      capacity_factor: factors, and `DROPLESS`.
    """

    experts: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()
    capacity_factor: tuple[Factor, ...] = ()

    def points(self) -> Iterator[Point]:
        """Yield every combination, the capacity factor changing first."""
        axes = (self.experts or (None,), self.top_k or (None,), self.capacity_factor or (None,))
        yield from (Point(*values) for values in product(*axes))


SWEPT = tuple(f.name for f in fields(Sweep))
AXES = tuple(name.replace("_", "-") for name in SWEPT)
"""The axes as they are spelled: ``top-k``."""


def parse_sweep(texts: Iterable[str]) -> Sweep:
    """Return the sweep that texts spell, each with one axis or more.

    Raises:
      UsageError: an axis is unknown or stands twice, or a value is not one; all problems at once.
    """
    texts_by_axis: dict[str, str] = {}
    problems: list[Problem] = []
    for item in (word for text in texts for word in text.split()):
        name, _, values = item.partition("=")
        if name not in AXES:
            hint = nearest(name, AXES) or f"axes: {', '.join(AXES)}"
            problems.append(Problem(f"unknown axis {name!r}", "--sweep", EXAMPLE, item, hint))
        elif name in texts_by_axis:
            problems.append(Problem(f"{name} stands twice", "--sweep", found=item))
        else:
            texts_by_axis[name] = values
    raise_problems(problems, UsageError)
    axes = {
        name: [_value(piece) for piece in texts_by_axis[name].split(",")]
        if name in texts_by_axis else [] for name in AXES
    }  # fmt: skip
    return sweep_of(*axes.values())


def _value(text: str) -> Factor:
    """Return the number that a text spells, or the text, which may be `DROPLESS`."""
    if text.isascii() and text.isdecimal() and len(text) < 9:
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def sweep_of(
    experts: Sequence[object], top_k: Sequence[object], capacity_factor: Sequence[object]
) -> Sweep:
    """Return the sweep over these values, which may be anything.

    Raises:
      UsageError: one is no value or stands twice, there is none, or there are too many models; all
        problems at once.
    """
    axes = zip(AXES, (experts, top_k, capacity_factor), strict=True)
    problems = [p for name, values in axes for p in _problems(name, values)]
    raise_problems(problems, UsageError)
    sweep = Sweep(
        tuple(n for n in experts if isinstance(n, int)),
        tuple(n for n in top_k if isinstance(n, int)),
        tuple(f for f in capacity_factor if isinstance(f, (int, float, str))),
    )
    count = sum(1 for _ in sweep.points())
    if sweep == Sweep():
        raise UsageError("nothing is swept", expected=EXAMPLE)
    if count > MOST_POINTS:
        raise UsageError(
            "too many models", where="--sweep", expected=f"at most {MOST_POINTS}", found=str(count)
        )
    return sweep


_EXPECTED = {
    "experts": "whole numbers, 8,16,32",
    "top-k": "whole numbers, 1,2",
    "capacity-factor": f"numbers above 0, or {DROPLESS}: 1.25,2",
}


def _problems(name: str, values: Sequence[object]) -> list[Problem]:
    where = f"--sweep {name}"
    wrong = [
        Problem("not a value", where, _EXPECTED[name], repr(value))
        for value in values
        if not _is_value(name, value)
    ]
    if wrong or len(set(values)) == len(values):
        return wrong
    return [Problem("a value stands twice", where, found=",".join(map(str, values)))]


def _is_value(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return name == "capacity-factor" and value == DROPLESS
    is_number = isinstance(value, int) or name == "capacity-factor"
    return is_number and value > 0 and isfinite(value)


def mark_frontier(points: Iterable[JsonDict]) -> None:
    """Mark the planned points that no other one beats: as much of everything, in less time.

    Of equal ones, which differ in nothing, all are marked.
    """
    planned = [point for point in points if point["best"] is not None]
    figures = [(_gains(point), point["best"]["seconds"]) for point in planned]
    for point, figure in zip(planned, figures, strict=True):
        point["frontier"] = not any(_beats(rival, figure) for rival in figures)


Figures = tuple[tuple[float, ...], float]
"""The numbers that the quality of a model grows with, and the seconds of its step."""


def _gains(point: JsonDict) -> tuple[float, ...]:
    """Return the numbers that quality grows with: experts, choices, and room for them."""
    factor = point["capacity_factor"]
    return point["experts"] or 0, point["top_k"] or 0, inf if factor in (None, DROPLESS) else factor


def _beats(rival: Figures, point: Figures) -> bool:
    as_much = all(a >= b for a, b in zip(rival[0], point[0], strict=True))
    return as_much and rival[1] <= point[1] and rival != point


# A sweep as JSON values, and as a table for people.

SHARED = ("model", "machine", "step", "optimizer", "dtype", "weight_dtype", "batch")
"""The facts of a plan that the models of a sweep have in common."""

SUMMARY = (
    "mesh", "rules", "dense_weights", "via", "dispatch", "remat", "sliced", "exact", "seconds",
    "mfu", "total_bytes",
)  # fmt: skip
"""The figures of a plan that a sweep reports for each model."""

MARK = "*"
FRONTIER = "no other has as many experts, choices and slots, and takes less time"
UNSAID = "-"
"""Of a number that a model does not have."""


def failed_point(point: Point, problem: str) -> JsonDict:
    """Return a point that could not be planned, and why."""
    nothing = dict.fromkeys(("parameters", "active_parameters", "model_flops", "best"))
    return {**asdict(point), **nothing, "frontier": False, "problem": problem}


def planned_point(point: Point, report: JsonDict, active: int) -> JsonDict:
    """Return a point that was planned.

    Args:
      point: the experts, choices and capacity that the model has.
      report: its plan.
      active: its parameters that one token uses.
    """
    return {
        **asdict(point), "parameters": report["parameters"], "active_parameters": active,
        "model_flops": report["model_flops"],
        "best": {name: report["best"][name] for name in SUMMARY},
        "frontier": False, "problem": None,
    }  # fmt: skip


def sweep_json(sweep: Sweep, shared: JsonDict, points: Sequence[JsonDict]) -> JsonDict:
    """Return a sweep as the JSON values that ``docs/cli.md`` lists.

    Args:
      sweep: what was asked.
      shared: the plan of any of its models, for what all have in common.
      points: its models.
    """
    mark_frontier(points)
    return {
        **{name: shared[name] for name in SHARED},
        "axes": {name: list(values) for name, values in asdict(sweep).items() if values},
        "points": list(points),
    }


# --- for people ----------------------------------------------------------------------------


def sweep_text(data: JsonDict) -> str:
    """Return a sweep as a table."""
    batch, machine = data["batch"], data["machine"]
    rows = [
        sweep_title(data),
        f"  batch {batch_text(batch)}",
        f"  {'experts':>7} {'top-k':>5} {'capacity':>8} {'stored':>8} {'active':>8} {'step':>9} "
        f"{unit_of(batch) + 's/s':>9} {'of peak':>7} {'GB':>6}   plan",
    ]
    device = batch["tokens"] / machine["devices"]
    return "\n".join([*rows, *(_row(point, device) for point in data["points"]), *_below(data)])


def sweep_title(data: JsonDict) -> str:
    """Return what was swept, in a line."""
    return f"{data['model']} on {data['machine']['name']}, {step_text(data)}, {data['dtype']}"


def point_cells(point: JsonDict, device_batch: float) -> tuple[str, ...]:
    """Return a planned point as texts: what it differs in, sizes, time, rate, memory, strategy.

    Args:
      point: the point.
      device_batch: the tokens or inputs of a step, by devices.
    """
    best = point["best"]
    assert best is not None, "it was planned"
    mesh = mesh_text({n: s for n, s in best["mesh"].items() if s > 1}) or "one device"
    return (
        *values_of(point), count_text(point["parameters"] or 0),
        count_text(point["active_parameters"] or 0), seconds_text(best["seconds"]),
        f"{device_batch / best['seconds']:,.0f}", f"{best['mfu']:.1%}",
        f"{best['total_bytes'] / 1e9:.1f}", f"{mesh}, {best['via']}, {best['remat']}",
    )  # fmt: skip


def values_of(point: JsonDict) -> tuple[str, str, str]:
    """Return experts, choices and capacity factor of a point, as texts."""
    names = point["experts"], point["top_k"], point["capacity_factor"]
    experts, top_k, factor = map(value_text, names)
    return experts, top_k, factor


def value_text(value: Factor | None) -> str:
    """Return a value of an axis as text."""
    if value is None:
        return UNSAID
    return value if isinstance(value, str) else f"{value:g}"


_WIDTHS = (7, 5, 8, 8, 8, 9, 9, 7, 6)


def _row(point: JsonDict, device_batch: float) -> str:
    if point["best"] is None:
        values = (f"{c:>{w}}" for c, w in zip(values_of(point), _WIDTHS[:3], strict=True))
        return f"  {' '.join(values)}   {point['problem']}"
    *cells, plan = point_cells(point, device_batch)
    shown = " ".join(f"{c:>{w}}" for c, w in zip(cells, _WIDTHS, strict=True))
    return f"  {shown} {MARK if point['frontier'] else ' '} {plan}"


def _below(data: JsonDict) -> Iterator[str]:
    if any(point["frontier"] for point in data["points"]):
        yield f"  {MARK} {FRONTIER}"


# Plans and sweeps as pages: memory against the limit, time by part, the strategies that fit.

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
        others=_others(data), ideas=_ideas(data),
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


def _ideas(data: JsonDict) -> list[list[str]]:
    """Return the heads and rows of the table of what one would try, empty without any."""
    heads = ["what one would try", "a step", "memory", "why", "the command"]
    rows = [
        [": ".join(filter(None, (idea["name"], idea["how"]))),
         "not" if idea["seconds"] is None else seconds_text(idea["seconds"]),
         "" if idea["total_bytes"] is None else size_text(idea["total_bytes"]),
         idea["why"], idea["command"] or idea["options"]]
        for idea in data["explored"]
    ]  # fmt: skip
    return [heads, *rows] if rows else []


def _others(data: JsonDict) -> list[list[str]]:
    """Return the heads and rows of the table of slower strategies, empty without any."""
    heads = ["the next best", "via", "remat", "a step", "memory", "why it is slower"]
    rows = [
        [mesh_text(plan["mesh"]), plan["via"], plan["remat"],
         seconds_text(plan["seconds"]), size_text(plan["total_bytes"]), plan["why_slower"]]
        for plan in data["others"]
    ]  # fmt: skip
    lines = [heads, *rows] if rows else []
    return lines if data["experts"] else [[*line[:1], *line[2:]] for line in lines]


def _subtitle(data: JsonDict) -> str:
    best = data["best"]
    mesh = mesh_text(best["mesh"]) or "one device"
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
    return [*rows, *(("run", text) for text in [run_text(data)] if text)]


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
    unit, scale = _unit(best["seconds"])
    bars = [
        _bar(names, [value * scale for value in values], kind,
             [_says(part, kind, value) for part, value in zip(parts, values, strict=True)])
        for kind, values in _kinds(parts)
    ]  # fmt: skip
    figure = graph_objects.Figure(bars)
    figure.update_layout(barmode="stack", legend=_BELOW | {"y": -0.45})
    figure.update_yaxes(autorange="reversed", automargin=True)
    title = f"{seconds_text(best['seconds'])}, {best['mfu']:.1%} of the peak"
    return drawing(figure, title, 200 + 26 * len(parts), unit)


def _unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a time is drawn, and how many of it a second is."""
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3)


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
    best = data["best"]
    unit, scale = _unit(best["seconds"])
    clouds = [
        _cloud(via, [plan for plan in searched if plan["via"] == via], routed, scale)
        for via in vias
    ]
    star = graph_objects.Scatter(
        x=[best["total_bytes"] / _GB], y=[best["seconds"] * scale], mode="markers", name="the plan",
        marker={"symbol": "star", "size": 16, "color": "#d62728"},
        hovertext=[_strategy(best, routed)], hoverinfo="text",
    )  # fmt: skip
    figure = graph_objects.Figure([*clouds, star])
    figure.update_yaxes(title=f"{unit} a step", type="log")
    figure.add_vline(x=data["machine"]["usable_bytes"] / _GB, line_dash="dash", line_color=_GREY)
    figure.update_layout(legend=_BELOW)
    title = f"{data['fitting']:,} of {data['tried']:,} strategies fit"
    return drawing(figure, title, 420, "GB of a device")


def _cloud(via: str, some: Sequence[JsonDict], routed: bool, scale: float) -> Scatter:
    return graph_objects.Scatter(
        x=[plan["total_bytes"] / _GB for plan in some],
        y=[plan["seconds"] * scale for plan in some],
        mode="markers", name=f"experts via {via}" if routed else "others",
        marker={"size": 6, "opacity": 0.85},
        hovertext=[_strategy(plan, routed) for plan in some], hoverinfo="text",
    )  # fmt: skip


def _strategy(plan: JsonDict, routed: bool) -> str:
    mesh = mesh_text(plan["mesh"]) or "one device"
    way = f"; via {plan['via']}" if routed else ""
    return (
        f"{mesh}{way}; remat {plan['remat']}; dense weights {plan['dense_weights']}: "
        f"{seconds_text(plan['seconds'])}, {size_text(plan['total_bytes'])}"
    )


def sweep_page(data: JsonDict, pipeline: str) -> str:
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
    every = (best["seconds"] for points in lines.values() for _, best, _ in points)
    unit, scale = _unit(max(every, default=0.0))
    curves = [_sweep_line(name, points, scale) for name, points in lines.items()]
    figure = graph_objects.Figure(curves)
    order = [value_text(value) for value in data["axes"][SWEPT[axis]]]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    figure.update_yaxes(title=f"{unit} a step", rangemode="tozero")
    figure.update_layout(legend=_BELOW)
    return drawing(figure, "Time of a step", 420, AXES[axis])


def _sweep_line(
    name: str, points: Sequence[tuple[str, JsonDict, JsonDict]], scale: float
) -> Scatter:
    symbols = ["circle" if point["frontier"] else "circle-open" for _, _, point in points]
    return graph_objects.Scatter(
        x=[value for value, _, _ in points], y=[best["seconds"] * scale for _, best, _ in points],
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
