"""Documents of a packed row: apart from each other, or refused."""

from dataclasses import replace

import pytest

from moecc.analysis import document_mixtures
from moecc.errors import InputError
from moecc.jobs.evaluate import EvaluationSpec, evaluation_recipe
from moecc.train.graphs import eval_graph
from moecc.train.tokens.folder import open_tokens
from tests.passes.test_pack_segments import GOLDEN, compare, imported

from .tiny import tokens_of

COUNTED = ("switch_drops", "switch_square_v4")
"""Models whose experts take so many tokens of a row, for which its documents compete."""

MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/tokens.npy"))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in COUNTED])
def test_documents_are_kept_apart_or_refused(name, monkeypatch):
    """By what packed documents compute beside documents alone, in every family of texts."""
    graph = imported(name)
    monkeypatch.setattr("moecc_passes.training.document_mixtures", lambda *_, **__: ())
    meet = name == "llama_dynamic" or compare(graph) > 1e-12
    assert any(document_mixtures(graph, 10)) == meet


def test_what_is_refused_is_evaluated_a_document_in_a_row(tmp_path):
    folder, spec = open_tokens(tokens_of("a text", tmp_path / "tokens")), EvaluationSpec(seq=8)
    assert evaluation_recipe(imported("llama_gqa"), folder, spec).data.packing
    graph = imported("lfm2_square")
    recipe = evaluation_recipe(graph, folder, spec)
    assert not recipe.data.packing
    eval_graph(graph, recipe)
    with pytest.raises(InputError, match="documents meet in contract") as error:
        eval_graph(graph, replace(recipe, data=replace(recipe.data, packing=True)))
    assert error.value.problems[0].hint == "data.packing = false"
