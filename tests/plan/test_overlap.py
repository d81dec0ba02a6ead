"""What a plan says of overlap: parameters of layers beside products, where compilers do so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from moecc.model.open import open_model
from moecc.plan.collectives import Collective
from moecc.plan.machines import parse_machine
from moecc.plan.overlap import overlap
from moecc.plan.step import StepConfig, Strategy, plan_mesh
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import make_batch, workload
from moecc.sharding.layout import Layout

MODEL = Path(__file__).parents[1] / "golden" / "mixtral_gqa"
LAYERS = 2


def planned(machine: str, chunks: int = 1, via: str = "capacity", train: bool = True) -> Estimate:
    graph = open_model(str(MODEL)).graph
    work = workload(graph, make_batch(graph, 8, 4096, (64,), 1))
    layout = Layout(plan_mesh("fsdp=4,expert=2"), work.experts)
    estimator = Estimator(work, parse_machine(machine), StepConfig("train" if train else "forward"))
    return estimator.estimate(Strategy(layout, via, "index", "full", chunks=chunks))


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
    found = overlap(estimate, asked)
    for op, row in estimate.collectives.items():
        assert sum(found[op].values()) == pytest.approx(row["tensor_bytes"])
    for op in ("all_gather", "reduce_scatter"):
        assert (found[op]["overlapped_bytes"] > 0) is does
        # The embedding and the head are outside of the loop over layers.
        assert found[op]["exposed_bytes"] > 0
    assert found["all_to_all"]["overlapped_bytes"] == 0 < found["all_to_all"]["exposed_bytes"]


def gathers(estimate: Estimate) -> dict[str, list[Collective]]:
    """Return the gathers of parameters of each part, in order."""
    return {
        part.name: [t for t in part.collectives if t.op == "all_gather" and not t.waits]
        for part in estimate.parts
    }


def exposed(estimate: Estimate, op: str) -> float:
    return overlap(estimate, True)[op]["exposed_bytes"]


def moved(transfers: Iterable[Collective], layers: int = 1) -> float:
    return layers * sum(t.tensor_bytes * t.times for t in transfers)


def of_ring(estimate: Estimate, op: str) -> list[Collective]:
    """Return what a ring does with tokens."""
    (part,) = (p for p in estimate.parts if p.name == "layers.ffn")
    return [t for t in part.collectives if t.op == op and t.waits]


def test_on_a_tpu_a_ring_waits_for_tokens_and_not_for_gradients_of_its_sums() -> None:
    estimate = planned("tpu:v5p:2x2x2", via="ring")
    of = gathers(estimate)
    tokens, gradients = of_ring(estimate, "all_gather")
    assert (tokens.times, tokens.leaves_work) == (2, False), "forward and again"
    assert (gradients.times, gradients.leaves_work) == (1, True)
    # Forward, those of kernels behind the first, and the layer's first; again, what attention
    # reads, as experts' gathers and that of the gradients take its products.
    query, key, value, output = of["layers.attention"]
    _, _, *experts = of["layers.ffn"]
    either = moved([key, *experts, query, key, value, output], LAYERS) / 2
    whole = moved([*of["embed"], *of["head"]]) + moved([tokens], LAYERS)
    assert exposed(estimate, "all_gather") == pytest.approx(whole + either)


def test_on_a_gpu_chunks_are_exchanged_beside_the_products_of_others() -> None:
    one, three = planned("gpu:h100:8"), planned("gpu:h100:8", chunks=3)
    assert exposed(three, "all_to_all") == pytest.approx(exposed(one, "all_to_all") / 3)
    one, three = planned("tpu:v5p:2x2x2"), planned("tpu:v5p:2x2x2", chunks=3)
    assert exposed(three, "all_to_all") == pytest.approx(exposed(one, "all_to_all"))
