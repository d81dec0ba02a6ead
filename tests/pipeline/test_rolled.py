"""Every pass on a graph that repeats its layers: it works, or says how to go on."""

import pytest
from moecc_passes import REGISTRY

from moecc.errors import InputError
from moecc.ir import clone, equal
from moecc.ir.unroll import is_rolled
from moecc.jobs.checks import check_pipeline
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pass
from moecc.testing import assert_same
from tests.passes.model_graphs import SMALL, apply_passes, preset_graph

WORKING = ("canonicalize", "cse", "dce", "freeze{groups=attention}")


def after(passes, keys=SMALL):
    graph = preset_graph("smollm2-135m", **keys)
    apply_passes(graph, passes)
    return graph


def rolled():
    return after("upcycle{experts=4 layers=every:2},add-losses,roll-layers")


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
    apply_passes(graph, text)
    assert is_rolled(graph)
    assert_same(before, graph, exact=True)


@pytest.mark.parametrize("text", ["roll-layers", "roll-layers,unroll-layers"])
def test_promises_are_checked(text):
    pipeline = Pipeline.parse(text)
    checked = check_pipeline(after("upcycle{experts=4}"), pipeline)
    assert [pass_.measured for pass_ in checked] == [0.0] * len(pipeline)


def test_what_a_pass_sees_of_another_depth():
    """A stack that only in part repeats stays valid when the rest of it is rewritten."""
    graph = after("upcycle{experts=4 layers=0},roll-layers,canonicalize,cse,dce")
    assert [n.attrs["over"] for n in graph if n.body is not None] == [(("layer", 3),)]


def test_a_rolled_graph_is_reduced_for_a_check():
    graph = after("roll-layers", {"num_hidden_layers": 4})
    (checked,) = check_pipeline(graph, Pipeline.parse("unroll-layers"))
    assert checked.measured == 0.0
