"""A sweep as JSON values, and as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TypedDict

from moecc.plan.report import batch_text, unit_of
from moecc.plan.report_types import BatchReport, MachineReport, Report, SummaryReport
from moecc.plan.search import seconds_text
from moecc.plan.sweeps import DROPLESS, Factor, Planned, Point, Sweep, frontier
from moecc.support.text import count_text

MARK = "*"
FRONTIER = "no other has as many experts, choices and slots, and takes less time"
UNSAID = "-"
"""Of a number that a model does not have."""


class SweepPoint(TypedDict):
    """A model of a sweep.

    What could not be planned has a problem, and nothing else besides what it was to differ in.
    """

    experts: int | None
    top_k: int | None
    capacity_factor: Factor | None
    parameters: int | None
    active_parameters: int | None
    model_flops: float | None
    best: SummaryReport | None
    frontier: bool
    problem: str | None


class SweepReport(TypedDict):
    """All that ``moecc plan --sweep`` reports."""

    model: str
    machine: MachineReport
    step: str
    optimizer: str | None
    dtype: str
    weight_dtype: str
    batch: BatchReport
    axes: dict[str, list[Factor]]
    points: list[SweepPoint]


def failed_point(point: Point, problem: str) -> SweepPoint:
    """Return a point that could not be planned, and why."""
    return {
        **_values(point), "parameters": None, "active_parameters": None, "model_flops": None,
        "best": None, "frontier": False, "problem": problem,
    }  # fmt: skip


def planned_point(point: Point, report: Report, active: int) -> SweepPoint:
    """Return a point that was planned.

    Args:
      point: the experts, choices and capacity that the model has.
      report: its plan.
      active: its parameters that one token uses.
    """
    best = report["best"]
    summary: SummaryReport = {
        "mesh": best["mesh"], "rules": best["rules"], "dense_weights": best["dense_weights"],
        "via": best["via"], "dispatch": best["dispatch"], "remat": best["remat"],
        "sliced": best["sliced"], "exact": best["exact"], "seconds": best["seconds"],
        "mfu": best["mfu"], "total_bytes": best["total_bytes"],
    }  # fmt: skip
    return {
        **_values(point), "parameters": report["parameters"], "active_parameters": active,
        "model_flops": report["model_flops"], "best": summary, "frontier": False, "problem": None,
    }  # fmt: skip


class _Values(TypedDict):
    experts: int | None
    top_k: int | None
    capacity_factor: Factor | None


def _values(point: Point) -> _Values:
    return {
        "experts": point.experts, "top_k": point.top_k, "capacity_factor": point.capacity_factor,
    }  # fmt: skip


def sweep_json(sweep: Sweep, shared: Report, points: Sequence[SweepPoint]) -> SweepReport:
    """Return a sweep as the JSON values that ``docs/cli.md`` lists.

    Args:
      sweep: what was asked.
      shared: the plan of any of its models, for what all have in common.
      points: its models.
    """
    _mark_frontier(points)
    return {
        "model": shared["model"],
        "machine": shared["machine"],
        "step": shared["step"],
        "optimizer": shared["optimizer"],
        "dtype": shared["dtype"],
        "weight_dtype": shared["weight_dtype"],
        "batch": shared["batch"],
        "axes": {name: list(values) for name, values in asdict(sweep).items() if values},
        "points": list(points),
    }


def _mark_frontier(points: Sequence[SweepPoint]) -> None:
    planned = [(point, found) for point in points if (found := _planned(point)) is not None]
    for (point, _), best in zip(planned, frontier([found for _, found in planned]), strict=True):
        point["frontier"] = best


def _planned(point: SweepPoint) -> Planned | None:
    best = point["best"]
    if best is None:
        return None
    factor = DROPLESS if point["capacity_factor"] is None else point["capacity_factor"]
    return Planned(point["experts"] or 0, point["top_k"] or 0, factor, best["seconds"])


# --- for people ----------------------------------------------------------------------------


def sweep_text(data: SweepReport) -> str:
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


def sweep_title(data: SweepReport) -> str:
    """Return what was swept, in a line."""
    step = f"training with {data['optimizer']}" if data["step"] == "train" else "forward pass"
    return f"{data['model']} on {data['machine']['name']}, {step}, {data['dtype']}"


def point_cells(point: SweepPoint, device_batch: float) -> tuple[str, ...]:
    """Return a planned point as texts: what it differs in, sizes, time, rate, memory, strategy.

    Args:
      point: the point.
      device_batch: the tokens or inputs of a step, by devices.
    """
    best = point["best"]
    assert best is not None, "it was planned"
    mesh = ",".join(f"{n}={s}" for n, s in best["mesh"].items() if s > 1) or "one device"
    return (
        *values_of(point), count_text(point["parameters"] or 0),
        count_text(point["active_parameters"] or 0), seconds_text(best["seconds"]),
        f"{device_batch / best['seconds']:,.0f}", f"{best['mfu']:.1%}",
        f"{best['total_bytes'] / 1e9:.1f}", f"{mesh}, {best['via']}, {best['remat']}",
    )  # fmt: skip


def values_of(point: SweepPoint) -> tuple[str, str, str]:
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


def _row(point: SweepPoint, device_batch: float) -> str:
    if point["best"] is None:
        values = (f"{c:>{w}}" for c, w in zip(values_of(point), _WIDTHS[:3], strict=True))
        return f"  {' '.join(values)}   {point['problem']}"
    *cells, plan = point_cells(point, device_batch)
    shown = " ".join(f"{c:>{w}}" for c, w in zip(cells, _WIDTHS, strict=True))
    return f"  {shown} {MARK if point['frontier'] else ' '} {plan}"


def _below(data: SweepReport) -> Iterator[str]:
    if any(point["frontier"] for point in data["points"]):
        yield f"  {MARK} {FRONTIER}"
