"""The graphs of a step take the inputs that batches give."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.ir import Graph
from moecc.ir.structure import clone
from moecc.model.open import open_model
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.steps.recipes import eval_graph, train_graph
from moecc.train.data.batches import open_batches
from moecc.train.data.model_facts import ModelFacts
from moecc.train.recipe import Corpus, DataSection, ModelSection, Objective, Recipe, RunSection
from moecc.train.tokens.make import Making, make_tokens

GOLDEN = Path(__file__).parent.parent / "golden"


def imported(name: str, passes: str) -> Graph:
    with open_model(str(GOLDEN / name)) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse(passes))
    return graph


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("name", "objective"), [("llama_gqa", Objective.CAUSAL), ("t5_gated_untied", Objective.SPANS)]
)
def test_steps_take_what_batches_give(
    tmp_path: Path, name: str, objective: Objective, packing: bool
) -> None:
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
        assert ("positions" in inputs) == (packing and name == "llama_gqa")
        for value in made.inputs.values():
            assert value.type.dtype.kind == "key" or batch[value.name].ndim == value.type.rank
