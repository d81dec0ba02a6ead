"""Graphs that tests lay on meshes."""

from __future__ import annotations

from pathlib import Path

from family_configs import read_config

from moecc.families import build
from moecc.ir import Graph
from moecc.rewrite.passes import Context, Remark
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import PipelineReport, run_pipeline

GOLDEN = Path(__file__).parents[1] / "golden"


def model(case: str) -> Graph:
    """Return the graph of a golden config."""
    return build(read_config(GOLDEN / case))


def run(graph: Graph, pipeline: str, told: list[Remark] | None = None) -> PipelineReport:
    """Run a pipeline on `graph`, in place; remarks go to `told`."""
    report = run_pipeline(graph, Pipeline.parse(pipeline), context=Context())
    if told is not None:
        told.extend(r for one in report.runs for r in one.remarks)
    return report


def census(graph: Graph) -> dict[str, int]:
    """Return how often each collective stands in `graph`."""
    found = {}
    for node in graph:
        if node.op.places:
            found[node.op.name] = found.get(node.op.name, 0) + 1
    return dict(sorted(found.items()))
