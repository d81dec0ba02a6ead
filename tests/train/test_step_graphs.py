"""The graphs of a step take the inputs that batches give."""

from dataclasses import replace

import numpy as np
import pytest
from moecc_backends.reference import ReferenceBackend

from moecc.cli.main import main
from moecc.errors import InputError
from moecc.ir import clone, equal, parse, print_graph
from moecc.ir.unroll import unrolled
from moecc.jobs.training import open_source
from moecc.model.open import open_model
from moecc.testing.data import params_for
from moecc.train.batches import open_batches
from moecc.train.graphs import eval_graph, eval_passes, train_graph, train_passes, training_remarks
from moecc.train.recipe import (
    Corpus,
    DataSection,
    MeshSection,
    ModelSection,
    Objective,
    ParameterGroup,
    Recipe,
    RoutingSection,
    RunSection,
)
from moecc.train.rows import ModelFacts

from .tiny import GOLDEN, golden_graph, masked_model, piped, tokens_of

UPCYCLE = "upcycle{experts=4 top-k=2}"
RECIPE = Recipe(ModelSection("m"), DataSection((Corpus("x"),), batch=4, seq=32), RunSection(1))


@pytest.fixture
def mixture():
    """A decoder whose feed-forward blocks are four experts."""
    return golden_graph("llama_gqa", UPCYCLE)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("llama_gqa", Objective.CAUSAL),
        ("t5_gated_untied", Objective.SPANS),
        ("bert_gelu", Objective.MASKED),
        ("modernbert_windows", Objective.MASKED),
    ],
)
def test_steps_take_what_batches_give(tmp_path, name, objective, packing):
    corpus = Corpus(str(tokens_of("some text " * 40, tmp_path / "x")))
    data = replace(RECIPE.data, train=(corpus,), objective=objective, packing=packing)
    graph, recipe = golden_graph(name, UPCYCLE), replace(RECIPE, data=data)
    for step in (train_graph(graph, recipe), eval_graph(graph, recipe)):
        inputs = {n: v.type for n, v in step.inputs.items() if v.type.dtype.kind != "key"}
        batch = open_batches(data, ModelFacts(name, 384, tuple(inputs))).batch(0)
        assert set(batch) == {*inputs, "targets"}
        assert "segments" in inputs
        assert ("positions" in inputs) == (packing and name != "t5_gated_untied")
        assert "logits" in step.output_names
        assert "hidden" not in step.output_names
        for input_name, type in inputs.items():
            assert batch[input_name].ndim == type.rank


@pytest.mark.parametrize(
    ("name", "objective", "told"),
    [
        ("llama_gqa", Objective.MASKED, "a decoder alone has no objective masked"),
        ("bert_gelu", Objective.CAUSAL, "an encoder alone has no objective causal"),
    ],
)
def test_objectives_that_a_model_cannot_learn_are_rejected(name, objective, told):
    recipe = replace(RECIPE, data=replace(RECIPE.data, objective=objective))
    with pytest.raises(InputError, match=told):
        train_graph(golden_graph(name, UPCYCLE), recipe)


def test_experts_choose_tokens_behind_windows_to_both_sides():
    graph = golden_graph("modernbert_windows", "upcycle{experts=2 routing=expert-choice}")
    assert sum(node.op.name == "expert_choice" for node in graph) == 4


def test_a_tied_head_is_the_embedding():
    graph = golden_graph("bert_gelu", "dce")
    tied = piped(clone(graph), "tie-head")
    params, inputs = params_for(graph, 1), {"tokens": np.array([[1, 2, 3]], np.int32)}
    hidden = ReferenceBackend().compile(graph).run(params, inputs)["hidden"]
    outputs = ReferenceBackend().compile(tied).run(params, inputs)
    table = params["embeddings.word_embeddings.weight"]
    np.testing.assert_allclose(outputs["logits"], hidden @ table.T, rtol=1e-12)
    assert (outputs["hidden"] == hidden).all()
    assert equal(piped(clone(tied), "tie-head"), tied)
    text = "moecc 1\ngraph g {\n  input %x : f32[a=2]\n  output y = %x\n}\n"
    with pytest.raises(InputError, match="no hidden states"):
        piped(parse(text, "g"), "tie-head")


def test_the_head_of_a_masked_language_model_is_kept(tmp_path):
    with open_model(str(masked_model(tmp_path / "model")), heads=True) as model:
        own = model.graph.outputs["head.logits"]
        tied = piped(model.graph, "tie-head{only=true}")
    assert tied.outputs == {"logits": own}


def test_a_head_that_is_left_out_of_a_run_is_named(tmp_path, capsys):
    tokens_of("some text " * 40, tmp_path / "x")
    (tmp_path / "r.toml").write_text(
        f'model.source = "{masked_model(tmp_path / "model")}"\n'
        'data = {objective = "masked", seq = 32, train = [{tokens = "x"}]}\nrun.steps = 1\n'
    )
    assert (
        main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    )
    error = capsys.readouterr().err
    assert "not trained, and not in the run: cls.predictions.bias, " in error
    assert "logits are made by the embedding (tie-head); the head is trained after" in error


def test_a_head_that_masked_tokens_do_not_train_is_named(tmp_path):
    with open_model(str(GOLDEN / "bert_square"), heads=True) as model:
        (tmp_path / "m.moe").write_text(print_graph(model.graph))
    data = replace(RECIPE.data, objective=Objective.MASKED)
    recipe = replace(RECIPE, model=ModelSection(str(tmp_path / "m.moe")), data=data)
    with open_source(recipe) as source:
        (remark,) = source.remarks
    assert remark.startswith("masked tokens do not train the head: pooler.dense.weight, ")


def bounded(**routing):
    return replace(RECIPE, routing=RoutingSection(capacity_factor=1.25, **routing))


@pytest.mark.parametrize(("key", "layers"), [("jitter", 3), ("dropout", 6), ("expert_dropout", 3)])
def test_training_alone_is_perturbed(mixture, key, layers):
    plain, noisy = bounded(), bounded(**{key: 0.1})
    assert "key" not in train_graph(mixture, plain).inputs
    nodes = unrolled(train_graph(mixture, noisy))
    assert sum(node.op.name.startswith("random") for node in nodes) == layers
    assert equal(eval_graph(mixture, noisy), eval_graph(mixture, plain))


def test_dropout_in_dropless_experts_names_the_keys_of_the_recipe(mixture):
    recipe = replace(RECIPE, routing=RoutingSection(expert_dropout=0.1))
    with pytest.raises(InputError, match="numbered") as caught:
        train_graph(mixture, recipe)
    (problem,) = caught.value.problems
    assert problem.where == "routing.expert_dropout"
    assert "routing.capacity_factor" in str(problem.hint)


def test_routers_compute_in_the_type_of_the_run_where_that_is_asked_for(mixture):
    def asked(**routing):
        return replace(bounded(**routing), run=RunSection(1, dtype="bfloat16"))

    def precise(graph):
        nodes = unrolled(graph)
        return {node.op.name for node in nodes if node.attrs.get("precision") == "f32"}

    for of_step in (train_graph, eval_graph):
        assert precise(of_step(mixture, asked())) == {"contract", "route"}
        assert precise(of_step(mixture, asked(router_dtype="bfloat16"))) == set()
    assert equal(train_graph(mixture, asked(router_dtype="f32")), train_graph(mixture, asked()))


@pytest.mark.parametrize(
    ("remat", "mesh", "weighted"),
    [("none", "", False), ("full", "", True), ("none", "data=2,expert=2", True)],
)
def test_rows_are_weighted_at_their_experts_where_it_spares_something(
    mixture, remat, mesh, weighted
):
    recipe = replace(bounded(), run=RunSection(1, remat=remat), mesh=MeshSection(mesh))
    assert ("weight-rows" in str(train_passes(mixture, recipe))) == weighted
    assert "weight-rows" not in str(eval_passes(mixture, recipe))


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
    graph = golden_graph("llama_gqa", "cse")
    recipe = replace(RECIPE, mesh=MeshSection(mesh, rules))
    with pytest.raises(InputError, match=f"{told}(?s:.*)a divisor of (4|32) .*\n.*\n.* would"):
        train_graph(graph, recipe)
    train_graph(graph, replace(recipe, mesh=MeshSection(mesh, rules, partition="gspmd")))


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (UPCYCLE, False),
        ("upcycle{experts=4 top-k=1 gates=switch}", False),
        ("upcycle{experts=4 top-k=1}", True),
        ("upcycle{experts=4 top-k=2 gates=ones}", True),
    ],
)
def test_routers_without_a_gradient_are_remarked(passes, told):
    graph = golden_graph("llama_gqa", passes)
    remarks = list(training_remarks(graph, replace(RECIPE, routing=RoutingSection(balance=0.5))))
    assert bool(remarks) == told
    if told:
        assert remarks[0].startswith("layers.0.ffn, layers.1.ffn, layers.2.ffn: the gates")


def test_routing_without_experts_is_remarked():
    dense = golden_graph("llama_gqa")
    assert list(training_remarks(dense, RECIPE)) == []
    routing = RoutingSection(balance=0.5, capacity_factor=1.0)
    (remark,) = training_remarks(dense, replace(RECIPE, routing=routing))
    assert remark.endswith("routing.capacity_factor, routing.balance had the default")


def test_a_factor_that_may_be_meant_as_a_rate_is_remarked():
    """A usual factor is not."""
    groups = (ParameterGroup("router", rate_factor=0.1), ParameterGroup("*", rate_factor=1e-5))
    optimizer = replace(RECIPE.optimizer, rate=1e-3, groups=groups)
    (remark,) = training_remarks(golden_graph("llama_gqa"), replace(RECIPE, optimizer=optimizer))
    assert remark == (
        "optimizer.groups.1.rate_factor = 1e-05 times optimizer.rate is at most 1e-08 for *; "
        "a rate of 1e-05 is rate_factor = 0.01"
    )


def test_a_type_whose_range_is_small_is_remarked():
    graph = golden_graph("llama_gqa")
    half, brain = (replace(RECIPE, run=replace(RECIPE.run, dtype=t)) for t in ("f16", "bf16"))
    assert [text[:15] for text in training_remarks(graph, half)] == ["run.dtype = f16"]
    assert list(training_remarks(graph, brain)) == []
