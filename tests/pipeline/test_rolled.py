"""Every pass on a graph that repeats its layers: it works, or says how to go on."""

import pytest
from moecc_passes import REGISTRY

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import clone, equal, verify
from moecc.ir.unroll import is_rolled
from moecc.jobs.checks import check_pipeline
from moecc.presets import preset_config
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pass, run_pipeline
from moecc.testing import assert_same

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 4, "vocab_size": 32,
}  # fmt: skip

WORKING = ("canonicalize", "cse", "dce", "freeze{groups=attention}")


def dense():
    return build(parse_config({**preset_config("smollm2-135m"), **SMALL}))


def then(graph, text):
    return run_pipeline(graph, Pipeline.parse(text))


def rolled(before="upcycle{experts=4 layers=every:2},add-losses"):
    graph = dense()
    then(graph, f"{before},roll-layers" if before else "roll-layers")
    return graph


MESH = {"lower-collectives", "strip-sharding"}
"""They take a rolled graph that lies on a mesh: see the tests of sharding."""

TAKEN = {"roll-layers", "unroll-layers", *MESH, *(text.partition("{")[0] for text in WORKING)}


@pytest.mark.parametrize("name", sorted({*REGISTRY} - TAKEN))
def test_a_pass_that_works_layer_by_layer_says_so(name):
    graph = rolled()
    before = clone(graph)
    # Before a pass has seen the graph, so without its options.
    item = object.__new__(installed().get(name))
    with pytest.raises(InputError, match="works layer by layer") as caught:
        run_pass(graph, item, Context())
    assert caught.value.problems[0].where == name
    assert "unroll-layers" in str(caught.value.problems[0].hint)
    assert equal(graph, before)


@pytest.mark.parametrize("text", WORKING)
def test_other_passes_work(text):
    graph = rolled()
    before = clone(graph)
    then(graph, text)
    assert is_rolled(graph)
    assert_same(before, graph, exact=True)


@pytest.mark.parametrize("text", ["roll-layers", "roll-layers,unroll-layers"])
def test_promises_are_checked(text):
    graph = dense()
    then(graph, "upcycle{experts=4}")
    assert [c.measured for c in check_pipeline(graph, Pipeline.parse(text))] == [0.0] * (
        text.count(",") + 1
    )


def test_what_a_pass_sees_of_another_depth():
    """A stack that only in part repeats stays valid when the rest of it is rewritten."""
    graph = dense()
    then(graph, "upcycle{experts=4 layers=0},roll-layers,canonicalize,cse,dce")
    verify(graph)
    assert [n.attrs["over"] for n in graph if n.body is not None] == [(("layer", 3),)]


def test_a_rolled_graph_is_reduced_for_a_check():
    graph = build(parse_config({**preset_config("smollm2-135m"), "num_hidden_layers": 4}))
    then(graph, "roll-layers")
    (found,) = check_pipeline(graph, Pipeline.parse("unroll-layers"))
    assert found.measured == 0.0
