"""`moecc.open` and its model: a conversion in a few lines, and every wrong argument by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moecc
from moecc.errors import UnknownName
from moecc.ir import print_graph
from moecc.rewrite.pipeline import installed
from moecc.types import BF16

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE = GOLDEN / "llama_gqa"


@pytest.fixture
def dense() -> moecc.Model:
    return moecc.open(DENSE)


def test_a_model_is_upcycled_saved_and_verified(dense: moecc.Model, tmp_path: Path) -> None:
    sparse = dense.upcycle(experts=4, top_k=2)
    saved = sparse.save(tmp_path / "sparse", to="mixtral")
    assert saved.facts.family == "mixtral"
    assert saved.verify(against=DENSE).passed
    assert sparse.verify(against=dense).passed
    assert saved.params().keys() == moecc.open(str(tmp_path / "sparse")).params().keys()


def test_nothing_is_rewritten_in_place(dense: moecc.Model) -> None:
    before = print_graph(dense.graph)
    first, second = (dense.upcycle(experts=4, top_k=2) for _ in range(2))
    assert print_graph(first.graph) == print_graph(second.graph) != before
    assert print_graph(dense.graph) == before
    prepared = [first.prepare("mixtral", check=False).size_bytes for _ in range(2)]
    assert prepared[0] == prepared[1]
    assert print_graph(dense.graph) == before


def test_pipelines_are_text_or_passes_or_several(dense: moecc.Model) -> None:
    text = dense.apply("upcycle{experts=4 top-k=2},canonicalize")
    made = installed().get("upcycle")(experts=4, top_k=2)
    mixed = dense.apply([made, "canonicalize"])
    steps = dense.upcycle(experts=4, top_k=2).apply("canonicalize")
    assert print_graph(text.graph) == print_graph(mixed.graph) == print_graph(steps.graph)
    assert str(text.pipeline) == str(steps.pipeline)
    assert text.preserves.kind == steps.preserves.kind == "reassociation"
    assert len(steps.remarks) == 3


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", BF16, BF16.numpy])
def test_element_types_have_several_names(dense: moecc.Model, dtype: object) -> None:
    name = next(iter(dense.graph.params))
    assert dense.params(dtype=dtype)[name].dtype == BF16.numpy


def test_a_function_is_what_a_run_computes(dense: moecc.Model) -> None:
    pytest.importorskip("jax")
    sparse = dense.upcycle(experts=4, top_k=2)
    tokens = {"tokens": np.arange(6, dtype=np.int32).reshape(1, 6)}
    found = sparse.function()(dict(sparse.params()), tokens)["logits"]
    expected = sparse.run(tokens)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_plan_is_text_and_a_picture() -> None:
    model = moecc.open("preset:smollm2-135m").upcycle(experts=8, top_k=2)
    plan = model.plan("gpu:h100:8", mesh="fsdp=4,expert=2", batch_tokens=32768)
    assert plan.best["mesh"] == {"fsdp": 4, "expert": 2}
    assert "preset:smollm2-135m on gpu:h100:8: 8 devices" in str(plan)
    assert plan._repr_html_().startswith("<pre>")


def test_a_notebook_shows_a_model(dense: moecc.Model) -> None:
    sparse = dense.upcycle(experts=4, top_k=2)
    assert "family llama" in repr(dense)
    assert "4 experts, top-2" in repr(sparse)
    assert "<th>pipeline</th><td>upcycle{experts=4}</td>" in sparse._repr_html_()
    assert "<script" not in moecc.open(_named("<script>"))._repr_html_()


def _named(name: str) -> moecc.Model:
    model = moecc.open(DENSE)
    model.opened.name = name
    return model


def test_a_missing_parameter_is_a_key_error_too(dense: moecc.Model) -> None:
    with pytest.raises(UnknownName):
        dense.params()["lm_heat"]
    assert dense.params().get("lm_heat") is None
