"""Plans of models that passes made: with losses, with soft mixtures."""

from math import prod
from pathlib import Path

import pytest

from moecc.analysis import parameter_groups
from moecc.jobs.plan import plan_step
from moecc.model.open import open_model
from moecc.plan.step import StepConfig
from moecc.train.graphs import run_passes

GOLDEN = Path(__file__).parent.parent / "golden"


def made(name, passes):
    with open_model(str(GOLDEN / name)) as model:
        graph = model.graph
    run_passes(graph, passes)
    return graph


def plan(name, passes, machine="cpu:4", **options):
    return plan_step(made(name, passes), name, machine, StepConfig(**options))[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_frozen_parameters_have_neither_gradients_nor_moments(optimizer):
    given = {"sequence": "16", "batch_tokens": 64, "mesh": "data=2", "optimizer": optimizer}
    whole, some = (
        plan("llama_gqa", passes, "cpu:2", **given) for passes in ("", "freeze{groups=attention}")
    )
    graph = made("llama_gqa", "")
    groups = parameter_groups(graph)
    frozen = [v.type for name, v in graph.params.items() if "attention" in groups[name]]
    count = sum(prod(int(str(size)) for size in type.sizes) for type in frozen)
    before, after = (x["best"]["memory_bytes"] for x in (whole, some))
    assert before["gradients"] - after["gradients"] == 2 * count
    # Of matrices as small as these Adafactor keeps whole moments, but one.
    moments = {"adamw": 2, "adafactor": 1}[optimizer]
    assert before["optimizer"] - after["optimizer"] == 4 * moments * count
    assert before["parameters"] == after["parameters"]
    sent = (x["best"]["collectives"]["all_reduce"]["tensor_bytes"] for x in (whole, some))
    assert next(sent) - next(sent) == 2 * count
