"""What accumulation and a wider reduction change in a plan, and what they must not."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.model.open import open_model
from moecc.plan.machines import parse_machine
from moecc.plan.step import StepConfig, Strategy, plan_mesh
from moecc.plan.time import Estimator
from moecc.plan.workload import make_batch, workload
from moecc.sharding.layout import Layout

MODEL = Path(__file__).parents[1] / "golden" / "mixtral_gqa"
TOKENS = 4096


@cache
def work_of(parts):
    graph = open_model(str(MODEL)).graph
    return workload(graph, make_batch(graph, 8, TOKENS, (64,), parts))


def planned(mesh, config):
    work = work_of(config.micro_batches)
    strategy = Strategy(Layout(plan_mesh(mesh), work.experts), "capacity", "index", "full")
    return Estimator(work, parse_machine("cpu:8"), config).estimate(strategy)


def sent(estimate):
    """Return bytes of full tensors by operation, those of gradients and of tables apart."""
    found = Counter()
    for part in estimate.parts:
        of = " of tables" if part.name in ("embed", "head") else ""
        for t in part.collectives:
            found[f"{t.op} {t.why}{of}"] += round(part.count * t.times * t.tensor_bytes)
    return found


@pytest.mark.parametrize("mesh", ["data=4,expert=2", "fsdp=4,expert=2"])
def test_parts_of_a_batch_do_its_work_and_keep_less(mesh):
    whole, parts = planned(mesh, StepConfig()), planned(mesh, StepConfig(micro_batches=4))
    assert parts.flops == pytest.approx(whole.flops)
    assert parts.model_flops == pytest.approx(whole.model_flops)
    assert parts.memory.activations == pytest.approx(whole.memory.activations / 4)
    assert parts.memory.inputs == pytest.approx(whole.memory.inputs)
    assert parts.memory.gradients == 2 * whole.memory.gradients
    before, after = sent(whole), sent(parts)
    assert after["all_reduce gradients"] == before["all_reduce gradients"] > 0
    for kind in before:
        # Parameters are gathered, and their gradients scattered, for each micro-batch; but on a CPU
        # XLA gathers those that are not of layers once.
        times = 4 if kind.startswith(("all_gather parameters", "reduce_scatter gradients")) else 1
        times = 1 if kind == "all_gather parameters of tables" else times
        assert after[kind] == pytest.approx(times * before[kind], rel=1e-3), kind


def test_parts_hold_whole_sequences():
    with pytest.raises(InputError, match="not whole micro-batches") as caught:
        work_of(3)
    assert "4032 would be" in str(caught.value)
