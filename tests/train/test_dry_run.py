"""What a dry run says: counts that are right, and what a plan predicts."""

import json
from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.families.describe import describe, sequence_flops
from moecc.ir.structure import clone
from moecc.jobs.train import dry_run_facts, dry_run_text
from moecc.model.open import open_model
from moecc.plan.machines import parse_machine
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.batches import open_batches
from moecc.train.recipe_text import parse_recipe
from moecc.train.rows import ModelFacts
from moecc.train.tokens.make import Making, make_tokens

GOLDEN = Path(__file__).parent.parent / "golden"

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
def tokens(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "some text " * 64}))
    make_tokens(Making((str(tmp_path / "x.jsonl"),), "bytes"), tmp_path / "x")
    return tmp_path


def told(tokens, name, passes, *sets, machine=""):
    with open_model(str(GOLDEN / name)) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse(passes))
    recipe = parse_recipe(RECIPE, "r", folder=tokens, sets=sets)
    batches = open_batches(recipe.data, ModelFacts("m", 384, tuple(graph.inputs)))
    return dry_run_facts(recipe, graph, batches, parse_machine(machine) if machine else None)


def test_counts_are_those_of_the_model(tokens):
    passes = "upcycle{experts=4 top-k=2}"
    facts = told(tokens, "llama_gqa", passes)
    with open_model(str(GOLDEN / "llama_gqa")) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse(passes))
    expected = describe(graph)
    found = facts["parameters"]
    assert (found["total"], found["active"]) == (
        expected.parameters.total,
        expected.parameters.active,
    )
    assert found["trained"] == found["total"]
    assert found["bytes"] == 4 * found["total"]
    assert found["moment_bytes"] == 8 * found["total"]
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


def test_micro_batches_and_machines_change_the_plan(tokens):
    plain = told(tokens, "llama_gqa", "upcycle{experts=4}")["plan"]
    parts = told(tokens, "llama_gqa", "upcycle{experts=4}", "run.micro_batches=4")["plan"]
    # Parameters are read, and sums of gradients written, for each of them.
    assert plain["step_seconds"] < parts["step_seconds"] < 1.5 * plain["step_seconds"]
    assert parts["memory_bytes"] != plain["memory_bytes"]
    mesh = told(tokens, "llama_gqa", "upcycle{experts=4}", "mesh.mesh=data:2,expert:4")["plan"]
    assert "data=2,expert=4" in mesh["strategy"]
    # The way to the experts that the step takes, not the best one.
    assert "via ring" in mesh["strategy"]
    assert "split" not in mesh["strategy"]
    gpu = told(tokens, "llama_gqa", "upcycle{experts=4}", machine="gpu:h100:8")["plan"]
    assert gpu["machine"] == "gpu:h100:8"
    with pytest.raises(InputError):
        told(tokens, "llama_gqa", "", "mesh.mesh=data:2", machine="gpu:h100:8")
