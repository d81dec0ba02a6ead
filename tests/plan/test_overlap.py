"""What a plan says of overlap: parameters of layers beside products, where compilers do so."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.model.open import open_model
from moecc.plan.batches import make_batch
from moecc.plan.estimate import Estimate, Estimator
from moecc.plan.machines import parse_machine
from moecc.plan.meshes import plan_mesh
from moecc.plan.strategy import StepConfig, Strategy
from moecc.plan.workload import workload
from moecc.sharding.layout import Layout

MODEL = Path(__file__).parents[1] / "golden" / "mixtral_gqa"


def planned(machine: str) -> Estimate:
    graph = open_model(str(MODEL)).graph
    work = workload(graph, make_batch(graph, 8, 4096, (64,), 1))
    layout = Layout(plan_mesh("fsdp=4,expert=2"), work.experts)
    estimator = Estimator(work, parse_machine(machine), StepConfig())
    return estimator.estimate(Strategy(layout, "capacity", "index", "full"))


@pytest.mark.parametrize(
    ("machine", "asked", "does"),
    [
        ("tpu:v5p:2x2x2", True, True), ("tpu:v5p:2x2x2", False, False), ("gpu:h100:8", False, True),
        ("tpu:v6e:2x4", True, False), ("cpu:8", True, False),
    ],
)  # fmt: skip
def test_parameters_of_layers_are_beside_products_where_compilers_do_so(
    machine: str, asked: bool, does: bool
) -> None:
    estimate = planned(machine)
    found = estimate.overlap(asked)
    for op, row in estimate.collectives.items():
        assert sum(found[op].values()) == pytest.approx(row["tensor_bytes"])
    for op in ("all_gather", "reduce_scatter"):
        assert (found[op]["overlapped_bytes"] > 0) is does
        # The embedding and the head are outside of the loop over layers.
        assert found[op]["exposed_bytes"] > 0
    assert found["all_to_all"]["overlapped_bytes"] == 0 < found["all_to_all"]["exposed_bytes"]


@pytest.mark.parametrize("machine", ["tpu:v5p:2x2x2", "gpu:h100:8"])
def test_the_first_gather_of_a_layer_has_no_product_before_it(machine: str) -> None:
    estimate = planned(machine)
    gathers = {
        part.name: [t for t, _ in part.transfers if t.op == "all_gather"] for part in estimate.parts
    }
    (attention,) = (p for p in estimate.parts if p.name == "layers.attention")
    first = min(gathers["layers.attention"], key=lambda t: t.tensor_bytes)
    # Before the loop and behind it, and of each layer one, there and back.
    outside = sum(t.tensor_bytes * t.times for n in ("embed", "head") for t in gathers[n])
    expected = outside + attention.count * first.times * first.tensor_bytes
    assert estimate.overlap(True)["all_gather"]["exposed_bytes"] == pytest.approx(expected)
    assert first.times == 2
