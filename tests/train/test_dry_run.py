"""What a dry run says: counts that are right, and what a plan predicts."""

from dataclasses import replace

import pytest

from moecc.errors import InputError
from moecc.families.describe import describe, sequence_flops
from moecc.jobs.train import dry_run_facts, dry_run_text
from moecc.plan.machines import parse_machine
from moecc.train.batches import open_batches, run_remarks
from moecc.train.recipe_text import parse_recipe
from moecc.train.rows import ModelFacts

from .tiny import golden_graph, tokens_of

RECIPE = """
[model]
source = "m"
[data]
train = [{tokens = "x"}, {tokens = "x", weight = 3.0, name = "again"}]
batch = 8
seq = 32
[run]
steps = 100
"""


@pytest.fixture
def facts_of(tmp_path):
    """Return a function that makes the facts of a dry run of a graph."""
    tokens_of("some text " * 64, tmp_path / "x")

    def facts(graph, *settings, machine=None):
        recipe = parse_recipe(RECIPE, "r", folder=tmp_path, sets=settings)
        batches = open_batches(recipe.data, ModelFacts("m", 384, tuple(graph.inputs)))
        return dry_run_facts(recipe, graph, batches, machine and parse_machine(machine))

    return facts


def test_counts_are_those_of_the_model(facts_of):
    graph = golden_graph("llama_gqa", "upcycle{experts=4 top-k=2}")
    expected = describe(graph).parameters
    facts = facts_of(graph)
    total = facts["parameters"]["total"]
    assert facts["parameters"] == {
        "total": expected.total, "active": expected.active, "trained": total, "bytes": 4 * total,
        "moment_bytes": 8 * total,
    }  # fmt: skip
    assert facts["data"]["tokens"] == 100 * 8 * 32
    # 640 bytes and an end are 21 rows of 32.
    assert facts["data"]["epochs"] == {"x": 200 / 21, "again": 600 / 21}
    counted = sequence_flops(graph, {"S": 32})
    assert facts["flops"]["forward_per_token"] == counted.per_token
    assert facts["flops"]["run"] == 3 * counted.executed * 100 * 8
    text = dry_run_text(facts)
    assert "28.57 epochs of again" in text
    assert "pack-segments{documents=several},specialize{mode=train" in text
    assert "cpu:1: data=1, grouped, remat none" in text


def test_text_that_is_read_too_often_or_held_out_as_well_is_remarked(tmp_path):
    tokens_of("some text " * 64, tmp_path / "x")
    recipe = parse_recipe(RECIPE, "r", folder=tmp_path, sets=["run.steps=21"])
    recipe = replace(recipe, data=replace(recipe.data, evaluate=recipe.data.train[1:]))
    batches = open_batches(recipe.data, ModelFacts("m", 384, ("tokens",)))
    # 168 rows: 42 and 126, of 21.
    assert list(run_remarks(batches, recipe)) == [
        "again: data.evaluate has the tokens of data.train, on which the run trains",
        "again is read 6.0 times: text that is repeated more than 4 times is worth less than new "
        "text",
    ]


def test_groups_have_their_rates(facts_of):
    """The rate that results of the factor, and when it begins."""
    groups = (
        "[{match='router', rate_factor=0.1, from_step=2}, {match='norm', freeze=true}, {match='*'}]"
    )
    graph = golden_graph("llama_gqa", "upcycle{experts=4 top-k=2}")
    facts = facts_of(graph, f"optimizer.groups={groups}", "optimizer.rate=3e-4")
    assert [f"{group['rate']:g}" for group in facts["groups"]] == ["3e-05", "0", "0.0003"]
    text = dry_run_text(facts)
    assert "group        router: a rate of at most 3e-05 from step 2" in text
    assert "group        norm: frozen" in text


def test_micro_batches_and_machines_change_the_plan(facts_of):
    graph = golden_graph("llama_gqa", "upcycle{experts=4}")
    plain = facts_of(graph)["plan"]
    parts = facts_of(graph, "run.micro_batches=4")["plan"]
    # Parameters are read, and sums of gradients written, for each of them.
    assert plain["step_seconds"] < parts["step_seconds"] < 1.5 * plain["step_seconds"]
    assert parts["memory_bytes"] != plain["memory_bytes"]
    strategy = facts_of(graph, "mesh.mesh=data:2,expert:4")["plan"]["strategy"]
    assert "data=2,expert=4" in strategy
    # The way to the experts that the step takes, not the best one.
    assert "via ring" in strategy
    assert "split" not in strategy
    on_gpus = facts_of(graph, "run.dtype=bf16", machine="gpu:h100:8")
    assert on_gpus["plan"]["machine"] == "gpu:h100:8"
    assert "not cudnn: it takes no query segments" in dry_run_text(on_gpus)
    with pytest.raises(InputError):
        facts_of(golden_graph("llama_gqa"), "mesh.mesh=data:2", machine="gpu:h100:8")
