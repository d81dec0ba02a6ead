"""The recipes that are shipped, as steps for machines that are not here."""

from __future__ import annotations

import json

import pytest

from moecc.model.open import open_model
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.steps.recipes import train_graph
from moecc.train.recipe_text import load_recipe
from moecc.train.state import canonical

from .chain import ROOT
from .recipes import CASES, HEAD, row

PROOF = ROOT / "docs" / "proofs" / "recipes.jsonl"


def test_every_recipe_is_compiled_for_both_machines() -> None:
    shipped = {path.stem for path in (ROOT / "moecc" / "presets" / "recipes").glob("*.toml")}
    for end in ("-v5p", "-h100"):
        assert {case.recipe for name, case in CASES.items() if name.endswith(end)} == shipped


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_case_has_the_graph_of_a_step(name: str) -> None:
    recipe = load_recipe(f"recipe:{CASES[name].recipe}", CASES[name].values)
    with open_model(recipe.model.source, config_alone=True) as model:
        graph = model.graph
    run_pipeline(graph, Pipeline.parse(recipe.model.pipeline))
    step = train_graph(canonical(graph).graph, recipe)
    assert "logits" in step.output_names
    assert "segments" in step.inputs


def test_the_page_has_the_rows_of_the_proof() -> None:
    page = (ROOT / "docs" / "compiling.md").read_text("utf-8")
    lines = [json.loads(line) for line in PROOF.read_text("utf-8").splitlines()]
    assert "\n".join([*HEAD, *map(row, lines)]) in page
