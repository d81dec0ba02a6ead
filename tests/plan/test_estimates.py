"""Laws of an estimate: nothing is lost between devices, more work is never cheaper."""

from dataclasses import replace
from functools import cache
from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples, few

from moecc.families.describe import describe
from moecc.model.open import open_model
from moecc.plan.collectives import LayerRows
from moecc.plan.machines import parse_machine
from moecc.plan.memory import Sharding
from moecc.plan.search import layouts, legal_vias, meshes
from moecc.plan.step import REMATS, StepConfig, Strategy, plan_mesh
from moecc.plan.time import Estimator
from moecc.plan.workload import Batch, make_batch, workload
from moecc.sharding.layout import Layout

MODELS = ("mixtral-8x7b", "st-moe-l", "smollm2-135m", "switch-c")
MACHINES = ("tpu:v5p:2x2x4", "tpu:v4:2x2x2", "tpu:v6e:4x4", "gpu:h100:16")


@cache
def work_of(model, sequences=64):
    graph = open_model(f"preset:{model}").graph
    lengths = (64,) if model in ("mixtral-8x7b", "smollm2-135m") else (64, 32)
    each = sum(lengths)
    return workload(graph, make_batch(graph, 16, sequences * each, lengths))


@cache
def legal_strategies(model):
    """Return all on 16 devices."""
    work, found = work_of(model), []
    for layout in (found for mesh in meshes(16) for found in layouts(mesh, work)):
        for via, remat in product(legal_vias(layout, work), REMATS):
            if (via == "replicated") == layout.replicated:
                found.append(Strategy(layout, via, "index", remat))
    return tuple(found)


def strategies(model):
    # Drawn by number: a counterexample prints short.
    every = legal_strategies(model)
    return st.integers(0, len(every) - 1).map(every.__getitem__)


def estimate(work, strategy, machine, **setting):
    given = StepConfig(**setting)
    return Estimator(work, parse_machine(machine), given).estimate(strategy)


def with_batch(work, model, factor):
    return work_of(model, work.batch.sequences * factor)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_and_flops_are_those_of_the_description(model):
    graph = open_model(f"preset:{model}").graph
    facts = describe(graph)
    lengths = {"S": 512, "T": 114}
    names = list(facts.sequence.lengths)
    batch = Batch(3, tuple((n, lengths[n]) for n in names))
    work = workload(graph, batch)
    assert work.parameters == facts.parameters.total
    counted = sum(p.count * s.flops for p in work.parts for s in p.steps)
    assert counted == pytest.approx(3 * (facts.sequence.weights + facts.sequence.attention))


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=examples(5, 25), deadline=None)
@given(data=st.data())
def test_every_device_has_its_part_of_the_parameters(model, data):
    work = work_of(model)
    layout = data.draw(strategies(model)).layout
    local = Sharding.of(layout, work)
    for weight, _ in work.weights:
        stored, copies = local.stored_sizes(weight), layout.mesh.devices
        for name, size in weight.shape:
            assert size % stored[name] == 0
            copies /= size / stored[name]
        # Parts times devices are whole copies of all elements.
        assert copies == int(copies) >= 1
        assert prod(stored.values()) * layout.mesh.devices == weight.elements * copies
        assert local.stored(weight) <= local.used(weight) <= weight.elements


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=examples(5, 25), deadline=None)
@given(data=st.data())
def test_devices_share_the_flops_of_the_model(model, data):
    work = work_of(model)
    strategy = data.draw(strategies(model))
    found = estimate(work, strategy, "tpu:v5p:2x2x4", step="forward")
    whole = sum(p.count * s.flops for p in work.parts for s in p.steps)
    least = whole * 0.999 / strategy.layout.mesh.devices
    assert found.flops >= least
    if strategy.via not in ("replicated", "capacity") and "model" not in strategy.layout.mesh.names:
        # Nothing is computed twice; what `model` does not divide is, and so are tokens that
        # all devices of the experts have.
        assert found.flops == pytest.approx(least / 0.999, rel=1e-6)


@pytest.mark.parametrize("model", few(MODELS, 3))
@settings(max_examples=examples(4, 25), deadline=None)
@given(data=st.data(), machine=st.sampled_from(MACHINES), factor=st.integers(2, 4))
def test_a_larger_batch_costs_no_less(model, data, machine, factor):
    work = work_of(model)
    strategy = data.draw(strategies(model))
    small = estimate(work, strategy, machine)
    large = estimate(with_batch(work, model, factor), strategy, machine)
    assert large.seconds >= small.seconds * (1 - 1e-9)
    assert large.flops == pytest.approx(factor * small.flops)
    assert large.memory.total >= small.memory.total
    assert large.memory.arguments - large.memory.inputs == pytest.approx(
        small.memory.arguments - small.memory.inputs
    )
    for op, row in small.collectives.items():
        assert large.collectives[op]["sent_bytes"] >= row["sent_bytes"]


def test_a_collective_hides_behind_products_for_as_long_as_memory_makes_them_last():
    # Behind their arithmetic alone, twice the batch of this plan was 2.3 % faster.
    strategy = Strategy(Layout(plan_mesh("data=16"), 8, "split"), "local", "index", "none")
    small, large = (
        estimate(work_of("mixtral-8x7b", count), strategy, "gpu:h100:16") for count in (64, 128)
    )
    assert large.seconds >= small.seconds


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=examples(5, 25), deadline=None)
@given(data=st.data())
def test_rematerialisation_trades_arithmetic_for_activations(model, data):
    work = work_of(model)
    drawn = data.draw(strategies(model))
    none, save, block, full = (
        estimate(work, replace(drawn, remat=r), "tpu:v5p:2x2x4") for r in REMATS
    )
    # Layers that are a loop in a unit of several are computed once more for that.
    most = 5 if any(part.onward for part in work.parts) else 4
    assert none.flops <= save.flops <= full.flops <= none.flops * most / 3
    assert none.flops <= block.flops <= full.flops
    assert ("block" in work.remats) == (block.flops < full.flops)
    assert none.memory.activations >= save.memory.activations >= full.memory.activations
    assert block.memory.activations == full.memory.activations
    assert block.memory.total >= full.memory.total
    assert none.memory.arguments == save.memory.arguments == full.memory.arguments
    assert none.model_flops == full.model_flops


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=examples(6, 15), deadline=None)
@given(data=st.data())
def test_adafactor_keeps_less_than_adamw_and_both_less_than_all_copies(model, data):
    work = work_of(model)
    strategy = data.draw(strategies(model))
    adamw = estimate(work, strategy, "tpu:v5p:2x2x4", optimizer="adamw").memory
    factored = estimate(work, strategy, "tpu:v5p:2x2x4", optimizer="adafactor").memory
    assert adamw.optimizer == pytest.approx(2 * adamw.parameters)
    assert factored.optimizer <= adamw.optimizer / 2
    assert factored.parameters == adamw.parameters
    narrow = estimate(work, strategy, "tpu:v5p:2x2x4", dtype="f32").memory
    assert narrow.activations == pytest.approx(2 * adamw.activations)


def census(model, mesh, via, remat, step):
    work = work_of(model)
    layout = Layout(plan_mesh(mesh), work.experts, "whole", via == "replicated")
    strategy = Strategy(layout, via, "index", remat)
    found = estimate(work, strategy, "tpu:v5p:2x2x4", step=step)
    sparse = next(p for p in found.parts if p.name == "layers.ffn")
    return {
        f"{t.op} {t.why}": t.times for t in sparse.collectives if t.waits and t.axes == ("expert",)
    }


@pytest.mark.parametrize(
    ("via", "remat", "step", "expected"),
    [
        ("capacity", "none", "forward", {"all_to_all rows to experts and back": 2}),
        ("capacity", "none", "train", {"all_to_all rows to experts and back": 4}),
        ("capacity", "full", "train", {"all_to_all rows to experts and back": 6}),
        ("ragged", "full", "train", {"ragged_all_to_all rows to experts and back": 6}),
        (
            "ring", "none", "forward",
            {
                "all_gather tokens to all experts": 1,
                "reduce_scatter sums to their tokens": 1,
            },
        ),
        ("replicated", "none", "forward", {"all_reduce sums of all experts": 1}),
    ],
)  # fmt: skip
def test_the_collectives_of_a_sparse_layer(via, remat, step, expected):
    assert census("mixtral-8x7b", "data=2,expert=8", via, remat, step) == expected


@given(
    top_k=st.integers(1, 8),
    experts=st.sampled_from([8, 16, 64]),
    devices=st.sampled_from([1, 4, 8]),
)
def test_the_worst_case_has_room_for_every_choice(top_k, experts, devices):
    """By trying to send as many choices to one device as there can be."""
    tokens, mine = 4, experts // devices
    rows = LayerRows(tokens, tokens * top_k, devices, top_k, experts, True)
    # Each token of each device chooses as many experts of the first device as it can.
    landed = sum(min(top_k, mine) for _ in range(tokens * devices))
    assert rows.buffer_rows("ragged") == rows.buffer_rows("ring") == landed
    assert rows.buffer_rows("capacity") == 1.25 * rows.rows
