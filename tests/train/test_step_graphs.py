"""The graphs of a step take the inputs that batches give."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moecc_backends.reference import ReferenceBackend

from moecc.errors import InputError
from moecc.ir import parse
from moecc.ir.structure import clone, equal
from moecc.ir.unroll import unrolled
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing.data import params_for
from moecc.train.batches import open_batches
from moecc.train.graphs import eval_graph, eval_passes, train_graph, train_passes, training_remarks
from moecc.train.recipe import (
    Corpus,
    DataSection,
    ModelSection,
    Objective,
    Recipe,
    RoutingSection,
    RunSection,
)
from moecc.train.rows import ModelFacts
from moecc.train.tokens.make import Making, make_tokens

GOLDEN = Path(__file__).parent.parent / "golden"


def imported(name, passes):
    with open_model(str(GOLDEN / name)) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse(passes))
    return graph


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("llama_gqa", Objective.CAUSAL),
        ("t5_gated_untied", Objective.SPANS),
        ("bert_gelu", Objective.MASKED),
    ],
)
def test_steps_take_what_batches_give(tmp_path, name, objective, packing):
    (tmp_path / "x.txt").write_text("some text " * 40)
    make_tokens(Making((str(tmp_path / "x.txt"),), "bytes"), tmp_path / "x")
    data = DataSection((Corpus(str(tmp_path / "x")),), objective=objective, batch=4, seq=32,
                       packing=packing)  # fmt: skip
    recipe = Recipe(ModelSection("m"), data, RunSection(1))
    graph = imported(name, "upcycle{experts=4 top-k=2}")
    for made in (train_graph(graph, recipe), eval_graph(graph, recipe)):
        kinds = {n: v.type.dtype.kind for n, v in made.inputs.items()}
        inputs = tuple(n for n, kind in kinds.items() if kind != "key")
        batch = open_batches(data, ModelFacts(name, 384, inputs)).batch(0)
        assert set(batch) == {*inputs, "targets"}
        assert "segments" in inputs
        assert ("positions" in inputs) == (packing and name != "t5_gated_untied")
        assert "logits" in made.output_names
        assert "hidden" not in made.output_names
        for value in made.inputs.values():
            assert value.type.dtype.kind == "key" or batch[value.name].ndim == value.type.rank


@pytest.mark.parametrize(
    ("name", "objective", "told"),
    [
        ("llama_gqa", Objective.MASKED, "a decoder alone has no objective masked"),
        ("bert_gelu", Objective.CAUSAL, "an encoder alone has no objective causal"),
    ],
)
def test_objectives_that_a_model_cannot_learn_are_rejected(name, objective, told):
    data = DataSection((Corpus("x"),), objective=objective, batch=4, seq=32)
    recipe = Recipe(ModelSection("m"), data, RunSection(1))
    with pytest.raises(InputError, match=told):
        train_graph(imported(name, "upcycle{experts=4 top-k=2}"), recipe)


def test_a_tied_head_is_the_embedding():
    graph = imported("bert_gelu", "dce")
    tied = clone(graph)
    run_pipeline(tied, Pipeline.parse("tie-head"))
    params, inputs = params_for(graph, 1), {"tokens": np.array([[1, 2, 3]], np.int32)}
    hidden = ReferenceBackend().compile(graph).run(params, inputs)["hidden"]
    outputs = ReferenceBackend().compile(tied).run(params, inputs)
    table = params["embeddings.word_embeddings.weight"]
    np.testing.assert_allclose(outputs["logits"], hidden @ table.T, rtol=1e-12)
    assert (outputs["hidden"] == hidden).all()
    again = clone(tied)
    run_pipeline(again, Pipeline.parse("tie-head"))
    assert equal(again, tied)
    with pytest.raises(InputError, match="no hidden states"):
        run_pipeline(parse("moecc 1\ngraph g {\n  input %x : f32[a=2]\n  output y = %x\n}\n", "g"),
                     Pipeline.parse("tie-head"))  # fmt: skip


def noisy(**routing):
    data = DataSection((Corpus("x"),), batch=4, seq=32)
    bounded = RoutingSection(capacity_factor=1.25, **routing)
    return Recipe(ModelSection("m"), data, RunSection(1), bounded)


@pytest.mark.parametrize(("key", "layers"), [("jitter", 3), ("dropout", 6), ("expert_dropout", 3)])
def test_training_alone_is_perturbed(key, layers):
    graph = imported("llama_gqa", "upcycle{experts=4 top-k=2}")
    plain, made = train_graph(graph, noisy()), train_graph(graph, noisy(**{key: 0.1}))
    assert "key" not in plain.inputs
    assert sum(node.op.name.startswith("random") for node in unrolled(made)) == layers
    assert equal(eval_graph(graph, noisy(**{key: 0.1})), eval_graph(graph, noisy()))


def test_dropout_in_dropless_experts_names_the_keys_of_the_recipe():
    graph = imported("llama_gqa", "upcycle{experts=4 top-k=2}")
    recipe = noisy(expert_dropout=0.1)
    unbounded = replace(recipe, routing=replace(recipe.routing, capacity_factor=0.0))
    with pytest.raises(InputError, match="numbered") as caught:
        train_graph(graph, unbounded)
    (problem,) = caught.value.problems
    assert problem.where == "routing.expert_dropout"
    assert "routing.capacity_factor" in str(problem.hint)


def test_routers_compute_in_the_type_of_the_run_where_that_is_asked_for():
    graph = imported("llama_gqa", "upcycle{experts=4 top-k=2}")

    def asked(**routing):
        recipe = noisy()
        run = replace(recipe.run, dtype="bfloat16")
        return replace(recipe, run=run, routing=replace(recipe.routing, **routing))

    def precise(made):
        return {
            node.op.name for node in unrolled(made) if node.attrs.get("precision") == "f32"
        }  # fmt: skip

    for of_step in (train_graph, eval_graph):
        plain, low = of_step(graph, asked()), of_step(graph, asked(router_dtype="bfloat16"))
        assert precise(plain) == {"contract", "route"}
        assert precise(low) == set()
    assert equal(train_graph(graph, asked(router_dtype="f32")), train_graph(graph, asked()))


@pytest.mark.parametrize(
    ("remat", "mesh", "weighted"),
    [("none", "", False), ("full", "", True), ("none", "data=2,expert=2", True)],
)
def test_rows_are_weighted_at_their_experts_where_it_spares_something(remat, mesh, weighted):
    graph, recipe = imported("llama_gqa", "upcycle{experts=4 top-k=2}"), noisy()
    run = replace(recipe.run, remat=remat)
    asked = replace(recipe, run=run, mesh=replace(recipe.mesh, mesh=mesh))
    assert ("weight-rows" in str(train_passes(graph, asked))) == weighted
    assert "weight-rows" not in str(eval_passes(graph, asked))


@pytest.mark.parametrize(
    ("mesh", "rules", "told"),
    [
        ("data=3", (), "data does not divide the batch"),
        (
            "model=3", ("tensor-parallel", "sequence-parallel"),
            "model does not divide the sequences",
        ),
    ],
)  # fmt: skip
def test_a_mesh_with_collectives_of_its_own_divides_the_batch(mesh, rules, told):
    graph, recipe = imported("llama_gqa", "cse"), noisy()
    section = replace(recipe.mesh, mesh=mesh, rules=rules)
    plain = replace(recipe, mesh=section, routing=RoutingSection())
    with pytest.raises(InputError, match=f"{told}(?s:.*)a divisor of (4|32) .*\n.*\n.* would"):
        train_graph(graph, plain)
    train_graph(graph, replace(plain, mesh=replace(section, partition="gspmd")))


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("upcycle{experts=4 top-k=2}", False),
        ("upcycle{experts=4 top-k=1 gates=switch}", False),
        ("upcycle{experts=4 top-k=1}", True),
        ("upcycle{experts=4 top-k=2 gates=ones}", True),
    ],
)
def test_routers_without_a_gradient_are_remarked(passes, told):
    remarks = list(training_remarks(imported("llama_gqa", passes), RoutingSection(balance=0.5)))
    assert bool(remarks) == told
    if told:
        assert remarks[0].startswith("layers.0.ffn, layers.1.ffn, layers.2.ffn: the gates")


def test_routing_without_experts_is_remarked():
    dense = imported("llama_gqa", "")
    assert list(training_remarks(dense, RoutingSection())) == []
    (remark,) = training_remarks(dense, RoutingSection(balance=0.5, capacity_factor=1.0))
    assert remark.endswith("routing.capacity_factor, routing.balance had the default")
