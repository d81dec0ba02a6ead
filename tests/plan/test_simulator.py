"""The plan's bytes are those that the reference counts when it runs a graph device by device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family_configs import read_config

from moecc.families import build
from moecc.ir import Graph, clone
from moecc.ir.devices import Run, simulate
from moecc.plan.machines import parse_machine
from moecc.plan.search import check_layout
from moecc.plan.step import StepConfig, Strategy, plan_mesh
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import Batch, length_variables, workload
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.layout import Layout
from moecc.testing import inputs_for, params_for, sizes_for


def rows_sent(counts: list[list[float]], row_bytes: float) -> list[float]:
    """Return the bytes that each device sends, of rows for each device, itself included."""
    return [row_bytes * (sum(row) - row[i]) for i, row in enumerate(counts)]


GOLDEN = Path(__file__).parents[1] / "golden"

SEQUENCES, TOKENS = 8, 6


def run(graph: Graph, pipeline: str) -> None:
    run_pipeline(graph, Pipeline.parse(pipeline), context=Context())


def planned(graph: Graph, mesh: str, rules: str, via: str, sliced: bool = False) -> Estimate:
    lengths = tuple((name, TOKENS) for name in length_variables(graph))
    work = workload(graph, Batch(SEQUENCES, lengths))
    names = tuple(rules.split(","))
    layout = Layout.ruled(plan_mesh(mesh, names), work.experts, names)
    check_layout(layout, work)
    machine = parse_machine(f"cpu:{layout.mesh.devices}")
    setting = StepConfig("forward", dtype="f32")
    return Estimator(work, machine, setting).estimate(
        Strategy(layout, via, "index", "none", sliced)
    )


def simulated(graph: Graph, mesh: str, rules: str, way: str = "") -> Run:
    chosen = f"expert-parallel{{{way}}}," if way else ""
    run(graph, f"annotate-sharding{{mesh={mesh} rules={rules}}},{chosen}lower-collectives")
    sizes = dict.fromkeys(sizes_for(graph, 0), TOKENS) | {"B": SEQUENCES}
    return simulate(graph, params_for(graph, 1, sizes), inputs_for(graph, 1, sizes))


CAPACITY = "specialize{mode=train capacity-factor=2.0 groups=4}"


@pytest.mark.parametrize(
    ("case", "before", "mesh", "rules", "via", "way"),
    [
        ("llama_gqa", "", "data:4,model:2", "tensor-parallel", "local", ""),
        ("mixtral_gqa", CAPACITY, "data:4", "st-moe", "capacity", ""),
        ("mixtral_gqa", CAPACITY, "data:4,model:2", "st-moe", "capacity", "via=capacity"),
        (
            "mixtral_gqa",
            CAPACITY,
            "data:4,model:2",
            "st-moe",
            "capacity",
            "via=capacity slice=model",
        ),
        (
            "mixtral_gqa",
            CAPACITY,
            "far:2,near:2",
            "expert-hierarchical",
            "hierarchical",
            "via=hierarchical",
        ),
        (
            "mixtral_gqa",
            CAPACITY,
            "outer:2,inner:2,model:2",
            "st-moe-outer",
            "capacity",
            "via=capacity",
        ),
        ("mixtral_gqa", CAPACITY, "data:4,model:2", "st-moe", "ring", "via=ring"),
        ("mixtral_gqa", "", "data:4", "st-moe", "ring", "via=ring"),
        ("qwen2_moe_plain", CAPACITY, "data:2,expert:2", "expert-parallel", "capacity", ""),
        (
            "qwen2_moe_plain",
            "",
            "data:2,expert:2",
            "expert-replicated",
            "replicated",
            "via=replicated",
        ),
    ],
)
def test_collectives_send_what_the_plan_says(
    case: str, before: str, mesh: str, rules: str, via: str, way: str
) -> None:
    graph = build(read_config(GOLDEN / case))
    if before:
        run(graph, before)
    expected = planned(clone(graph), mesh, rules, via, "slice" in way)
    found = simulated(graph, mesh, rules, way)
    assert found.sent_bytes
    assert found.sent_bytes == {
        op: pytest.approx(row["sent_bytes"]) for op, row in expected.collectives.items()
    }


def test_parameters_are_gathered_as_the_plan_says() -> None:
    graph = build(read_config(GOLDEN / "llama_gqa"))
    rules = "data-parallel,fsdp"
    expected = planned(clone(graph), "data=2,fsdp=4", rules, "local").collectives
    found = simulated(graph, "data:2,fsdp:4", rules).sent_bytes
    assert found == {op: row["sent_bytes"] for op, row in expected.items()}
    assert found.keys() == {"all_gather", "all_to_all"}, "of the table, what is looked up is sent"


def test_ragged_rows_are_counted_from_the_choices() -> None:
    graph = build(read_config(GOLDEN / "mixtral_gqa"))
    run(graph, "trace-routing")
    found = simulated(graph, "data:4", "st-moe")
    there, back = [t for t in found.traffic if "layers.0" in t.where]
    experts = found.outputs["trace.layers.0.ffn.experts"].reshape(4, -1)
    counts = np.stack([np.bincount(chosen, minlength=4) for chosen in experts])
    row_bytes = 4 * 16
    assert list(there.sent_bytes) == rows_sent(counts.tolist(), row_bytes)
    assert list(back.sent_bytes) == rows_sent(counts.T.tolist(), row_bytes)
    # The plan has the mean of them: an expert for each device, as many rows to each.
    expected = planned(build(read_config(GOLDEN / "mixtral_gqa")), "data=4", "st-moe", "ragged")
    layers = len([t for t in found.traffic if t.op == "ragged_all_to_all"]) // 2
    even = np.full((4, 4), experts.size / 16).tolist()
    assert expected.collectives["ragged_all_to_all"]["sent_bytes"] == pytest.approx(
        2 * layers * rows_sent(even, row_bytes)[0]
    )
