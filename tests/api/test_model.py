"""`moecc.open` and its model: a conversion in a few lines, and every wrong argument by name."""

from pathlib import Path

import numpy as np
import pytest

import moecc
from moecc.ir import print_graph

DENSE = Path(__file__).parents[1] / "golden" / "llama_gqa"


@pytest.fixture
def dense():
    return moecc.open(DENSE)


@pytest.fixture
def sparse(dense):
    return dense.upcycle(experts=4, top_k=2)


def test_a_model_is_upcycled_saved_and_verified(sparse, tmp_path):
    saved = sparse.save(tmp_path / "sparse", to="mixtral")
    assert saved.facts.family == "mixtral"
    assert saved.verify(against=DENSE).passed
    assert saved.params().keys() == moecc.open(str(tmp_path / "sparse")).params().keys()


def test_nothing_is_rewritten_in_place(dense):
    before = print_graph(dense.graph)
    first, second = (dense.upcycle(experts=4, top_k=2) for _ in range(2))
    assert print_graph(first.graph) == print_graph(second.graph) != before
    assert print_graph(dense.graph) == before
    prepared = [first.prepare("mixtral", check=False).size_bytes for _ in range(2)]
    assert prepared[0] == prepared[1]
    assert print_graph(dense.graph) == before


def test_options_that_are_rarely_intended_are_remarked(dense):
    remarks = dense.upcycle(experts=4, top_k=1).remarks
    assert any("option top-k: the gate of one expert" in remark for remark in remarks)


def test_a_function_is_what_a_run_computes(sparse):
    jax = pytest.importorskip("jax")
    tokens = {"tokens": np.arange(6, dtype=np.int32).reshape(1, 6)}
    found = jax.jit(sparse.function())(dict(sparse.params()), tokens)["logits"]
    expected = sparse.run(tokens)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
