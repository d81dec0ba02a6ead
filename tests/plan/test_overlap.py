"""What a plan says of overlap: parameters of layers beside products, where compilers do so."""

import json
from pathlib import Path

import pytest
from tiers import few

from moecc.model.open import open_model
from moecc.plan.machines import parse_machine
from moecc.plan.schedule import Task, hide
from moecc.plan.step import StepConfig, Strategy, plan_mesh
from moecc.plan.time import Estimator
from moecc.plan.workload import make_batch, workload
from moecc.sharding.layout import Layout
from tests.proof.exposed import BOUND, predicted

MODEL = Path(__file__).parents[1] / "golden" / "mixtral_gqa"


def planned(machine, chunks=1, via="capacity", train=True, asked=True):
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
def test_parameters_of_layers_are_beside_products_where_compilers_do_so(machine, asked, does):
    estimate = planned(machine, asked=asked)
    found = estimate.overlap
    for op, row in estimate.collectives.items():
        assert sum(found[op].values()) == pytest.approx(row["tensor_bytes"])
    for op in ("all_gather", "reduce_scatter"):
        assert (found[op]["overlapped_bytes"] > 0) is does
        # The embedding and the head are outside of the loop over layers.
        assert found[op]["exposed_bytes"] > 0
    assert found["all_to_all"]["overlapped_bytes"] == 0 < found["all_to_all"]["exposed_bytes"]


RECORD = json.loads((Path(__file__).parents[2] / "docs/proofs/exposed.json").read_text())


@pytest.mark.parametrize(
    "name",
    few(
        ["mixtral-h100-16", "llama-v5p-16-none", "llama-h100-8", "llama-h100-64",
         "llama-8x-h100-16"], 2,
    ),
)  # fmt: skip
def test_exposed_bytes_are_those_of_the_compiled_program(name):
    row = RECORD["programs"][name]
    exposed = predicted(row)["exposed_bytes"]
    assert exposed == pytest.approx(row["predicted"]["exposed_bytes"], rel=1e-3)
    assert exposed == pytest.approx(row["compiled"]["exposed_bytes"], rel=BOUND)


def test_a_collective_is_hidden_by_what_computes_between_its_start_and_its_end():
    # From the end: the reduction runs beside the last product, then its place is free, and the
    # gather runs beside the product before the one that reads it.
    gather = Task(latency=2.0, moves=(0,))
    first = Task(cost=3.0, seconds=3.0)
    reader = Task(cost=3.0, seconds=3.0, waits_for=[first, gather])
    reduction = Task(latency=2.0, moves=(1,))
    hidings = hide([gather, reduction, first, reader])
    assert hidings == {gather: (True, 3.0), reduction: (True, 3.0)}
    # Nothing is beside the gather of what the first product reads.
    first.waits_for = [gather]
    reader.waits_for = [first]
    assert hide([gather, first, reader]) == {gather: (False, 0.0)}
