"""Plans of models that passes made: with losses, with soft mixtures."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest

from moecc.analysis import parameter_groups
from moecc.ir.graph import Graph
from moecc.jobs.plan import plan_step
from moecc.model.open import open_model
from moecc.plan.step import StepConfig
from moecc.support.untyped import JsonDict
from moecc.train.graphs import run_passes

GOLDEN = Path(__file__).parent.parent / "golden"


def made(name: str, passes: str) -> Graph:
    with open_model(str(GOLDEN / name)) as model:
        graph = model.graph
    run_passes(graph, passes)
    return graph


def plan(name: str, passes: str, machine: str = "cpu:4", **options: Any) -> JsonDict:
    return plan_step(made(name, passes), name, machine, StepConfig(**options))[0]


def test_slots_of_a_soft_mixture_are_a_fixed_number_an_expert() -> None:
    """Products by hand: of logits, of rows, of the experts on 4 rows, and of what tokens get."""
    soft, dense = (
        plan("bert_gelu", p, "cpu:1", step="forward", sequence="16", batch_tokens=64)
        for p in ("upcycle{experts=4 routing=soft}", "")
    )
    layers, tokens, rows, embed, mlp = 2, 64, 4 * 4, 18, 28
    of_slots, of_each = 3 * tokens * 4 * embed, 2 * embed * mlp
    more = layers * (of_slots + (rows - tokens) * of_each)
    assert soft["model_flops"] - dense["model_flops"] == 2 * more


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_frozen_parameters_have_neither_gradients_nor_moments(optimizer: str) -> None:
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


def test_the_gradient_of_a_frozen_matrix_is_not_computed() -> None:
    whole, some, none = (
        plan("llama_gqa", p, "cpu:1", sequence="16", batch_tokens=64, step=step)
        for p, step in (("", "train"), ("freeze{groups=attention}", "train"), ("", "forward"))
    )
    graph = made("llama_gqa", "")
    projected = sum(
        prod(int(str(size)) for size in v.type.sizes)
        for name, v in graph.params.items()
        if "attention" in parameter_groups(graph)[name]
    )
    assert whole["model_flops"] == 3 * none["model_flops"]
    assert whole["model_flops"] - some["model_flops"] == 2 * 64 * projected
