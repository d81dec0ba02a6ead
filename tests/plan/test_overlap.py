"""What a plan says of overlap: parameters of layers beside products, where compilers do so."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.model.open import open_model
from moecc.plan.machines import parse_machine
from moecc.plan.step import StepConfig, Strategy, plan_mesh
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import make_batch, workload
from moecc.sharding.layout import Layout

MODEL = Path(__file__).parents[1] / "golden" / "mixtral_gqa"


def planned(
    machine: str, chunks: int = 1, via: str = "capacity", train: bool = True, asked: bool = True
) -> Estimate:
    graph = open_model(str(MODEL)).graph
    work = workload(graph, make_batch(graph, 8, 4096, (64,), 1))
    layout = Layout(plan_mesh("fsdp=4,expert=2"), work.experts)
    estimator = Estimator(
        work, parse_machine(machine), StepConfig("train" if train else "forward", overlap=asked)
    )
    return estimator.estimate(Strategy(layout, via, "index", "full", chunks=chunks))


@pytest.mark.parametrize(
    ("machine", "asked", "does"),
    [
        ("tpu:v5p:2x2x2", True, True), ("tpu:v5p:2x2x2", False, False),
        ("tpu:v6e:2x4", True, False), ("cpu:8", True, False), ("gpu:a100:8", False, False),
    ],
)  # fmt: skip
def test_parameters_of_layers_are_beside_products_where_compilers_do_so(
    machine: str, asked: bool, does: bool
) -> None:
    estimate = planned(machine, asked=asked)
    found = estimate.overlap
    for op, row in estimate.collectives.items():
        assert sum(found[op].values()) == pytest.approx(row["tensor_bytes"])
    for op in ("all_gather", "reduce_scatter"):
        assert (found[op]["overlapped_bytes"] > 0) is does
        # The embedding and the head are outside of the loop over layers.
        assert found[op]["exposed_bytes"] > 0
    assert found["all_to_all"]["overlapped_bytes"] == 0 < found["all_to_all"]["exposed_bytes"]
