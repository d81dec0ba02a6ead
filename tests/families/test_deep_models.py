"""What `moecc inspect` says of deep models, which it reads of a few of their layers."""

import sys
from dataclasses import replace

import pytest
from moecc_passes.roll_layers import RollLayersPass

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.jobs import inspect
from moecc.jobs.inspect import deep_inspection, inspection
from moecc.model.open import OpenedModel
from moecc.plan.workload import make_batch, workload
from moecc.rewrite.passes import Context
from moecc.support.process import gc_paused

from .small_config import golden_config

DEPTH = 35


@pytest.fixture(autouse=True)
def many_layers(monkeypatch):
    monkeypatch.setattr(inspect, "MANY_LAYERS", 32)


def deep_config(name):
    stated = golden_config(name)
    layers = {"num_hidden_layers": DEPTH, "num_layers": DEPTH, "num_decoder_layers": DEPTH + 2}
    stated |= {key: depth for key, depth in layers.items() if key in stated}
    if "layer_types" in stated:
        stated["layer_types"] = (stated["layer_types"] * DEPTH)[:DEPTH]
    return parse_config(stated)


@pytest.mark.parametrize(
    "name", ["mixtral_gqa", "gemma3_local", "glm4_moe_dense_first", "t5_gated_untied"]
)
def test_a_deep_model_is_inspected_as_if_all_its_layers_were_built(name):
    config = deep_config(name)
    assert deep_inspection(config, "deep") == inspection(OpenedModel(build(config), "deep"))


@pytest.mark.parametrize("dense", [(0, 1, 20), (34,)])
def test_a_model_with_another_layer_far_down_is_built(dense):
    config = replace(deep_config("qwen2_moe_plain"), mlp_only_layers=dense)
    assert deep_inspection(config, "deep") is None


def lines_run(function):
    """Return how many lines of moecc run, which no load of the machine changes.

    No garbage is collected meanwhile: what runs as other tests' objects are freed is not counted.
    """
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    with gc_paused():
        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(before)
    return count


def of_depth(layers):
    return build(parse_config(golden_config("llama_gqa", num_hidden_layers=layers)))


@pytest.mark.parametrize("task", ["plan", "roll"])
def test_each_layer_takes_as_much_work_as_the_one_before(task):
    def lines(layers):
        graph = of_depth(layers)
        if task == "roll":
            return lines_run(lambda: RollLayersPass().apply(graph, Context()))
        batch = make_batch(graph, 1, 64, (8,))
        return lines_run(lambda: workload(graph, batch))

    lines(10)  # The first graph of a process fills caches of types, and compares fewer of them.
    few, more, most = lines(40), lines(100), lines(160)
    assert most - more < 1.01 * (more - few)
