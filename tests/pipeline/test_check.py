"""``--check``: promises are kept or named, and graphs are reduced faithfully."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from moecc.errors import CheckError, InputError
from moecc.ir import F32, Builder, Graph, clone, print_graph, tensor, verify
from moecc.jobs.checks import broken_promise, check_pipeline, reduced
from moecc.rewrite.passes import EXACT, Pass, PassResult
from moecc.rewrite.pipeline import Pipeline
from moecc.testing.oracle import measure
from tests.passes.model_graphs import preset_graph

from .samples import REGISTRY, negations


def check(text):
    graph = negations()
    checked = check_pipeline(graph, Pipeline.parse(text, REGISTRY))
    assert print_graph(graph) == print_graph(negations())
    return checked


def test_a_promise_that_is_kept():
    (done,) = check("un-neg")
    assert done.measured == 0
    assert str(done) == "1 un-neg: promised exact; measured relative error 0"


@pytest.mark.parametrize("promise", ["exact", "reassociation"])
def test_a_promise_that_is_broken(promise):
    pipeline = f"un-neg,scale-output{{by=1.0000001 promise={promise}}}"
    with pytest.raises(CheckError, match="pass 2, scale-output: the pass broke its promise") as e:
        check(pipeline)
    assert e.value.exit_code == 3
    assert f"expected: {promise}: times 1" in str(e.value)
    assert "output y[" in str(e.value)
    assert "the graphs part at %" in str(e.value)


def start(embed=64):
    """Return a builder of a new graph, and its input."""
    graph = Graph()
    return Builder(graph), graph.input("x", tensor(F32, batch="B", embed=embed))


@dataclass(frozen=True)
class ThroughPass(Pass):
    """Takes a stop_gradient for the identity that its values show."""

    name: ClassVar[str] = "through"
    summary: ClassVar[str] = "remove every stop_gradient"
    preserves = EXACT

    def apply(self, graph, ctx):
        stops = [n for n in graph if n.op.blocks_gradient]
        for node in stops:
            node.replace_by(node.operands[0])
        return PassResult(bool(stops), len(stops))


def test_a_gradient_that_values_hide_is_part_of_the_promise():
    b, x = start()
    w = b.graph.param("w", tensor(F32, embed=64))
    b.graph.set_output("y", b.mul(x, b.stop_gradient(b.square(w))))
    with pytest.raises(CheckError, match="the gradient differs"):
        check_pipeline(b.graph, Pipeline((ThroughPass(),)))


def test_exact_is_stricter_than_reassociation():
    b, x = start()
    b.graph.set_output("y", b.scale(b.scale(x, by=0.1), by=0.3))
    for text, kind in (("canonicalize{exact}", "exact"), ("canonicalize", "reassociation")):
        (done,) = check_pipeline(b.graph, Pipeline.parse(text))
        assert done.promise.kind == kind


def test_an_approximate_pass_is_measured():
    (done,) = check("scale-output{by=1.25 predicted=0.25}")
    assert done.measured == pytest.approx(0.25)
    assert "predicted relative error 0.25); measured relative error 0.25" in str(done)
    assert measure(negations(), negations(3)) == pytest.approx(2.0)


@dataclass(frozen=True)
class AddOutputPass(Pass):
    """Return the input too."""

    name: ClassVar[str] = "add-output"
    summary: ClassVar[str] = "return the input too"
    preserves = EXACT
    drop: bool = False

    def apply(self, graph, ctx):
        """Add an output, and drop the old one if asked to."""
        graph.set_output("more", graph.inputs["x"])
        if self.drop:
            graph.drop_output("y")
        return PassResult(changed=True)


def test_a_pass_may_add_outputs_but_not_drop_any():
    assert check_pipeline(negations(), Pipeline((AddOutputPass(),)))[0].measured == 0
    with pytest.raises(CheckError, match="the outputs differ"):
        check_pipeline(negations(), Pipeline((AddOutputPass(drop=True),)))


def test_a_rewritten_graph_is_reduced_by_its_sizes():
    graph = preset_graph("smollm2-135m", num_hidden_layers=2, tie_word_embeddings=False)
    b = Builder(graph)
    graph.set_output("logits", b.neg(b.neg(graph.outputs["logits"])))
    small = reduced(graph)
    verify(small)
    assert [n.op.name for n in small] == [n.op.name for n in graph]
    sizes = {s for v in small.params.values() for s in v.type.sizes}
    assert max(sizes) <= 144
    # The parts of the width still make it up: 9 heads of 64 became 9 of a few.
    assert small.params["model.norm.weight"].type["embed"].size % 9 == 0
    assert all(value.weight is not None for value in small.params.values())


def fused(cuts, size):
    b, x = start(embed=512)
    y = b.contract(x, b.graph.param("w", tensor(F32, fused=size, embed=512)), over="embed")
    for first, last in cuts:
        b.graph.set_output(f"from{first}", b.slice(y, axis="fused", start=first, stop=last))
    return b.graph


def test_slices_cut_at_the_same_fractions():
    graph = fused(((0, 400), (400, 500), (500, 600)), 600)
    small = reduced(graph)
    cuts = [(n.attrs["start"], n.attrs["stop"]) for n in small if n.op.name == "slice"]
    unit, beyond = divmod(small.params["w"].type["fused"].size, 6)
    assert beyond == 0
    assert cuts == [(0, 4 * unit), (4 * unit, 5 * unit), (5 * unit, 6 * unit)]
    assert unit < 100


def test_what_stays_large_is_not_reducible():
    # Odd cuts leave a unit of one: the axis keeps its size.
    with pytest.raises(InputError, match="elements are left, and the size 300001 cannot shrink"):
        reduced(fused(((0, 1), (1, 300_001)), 300_001))


@pytest.mark.parametrize(("by", "kept"), [(1.009, True), (1.017, False)])
def test_a_predicted_error_is_a_promise(by, kept):
    pipeline = f"scale-output{{by={by} predicted=0.001}}"
    if kept:
        (done,) = check(pipeline)
        assert done.measured == pytest.approx(by - 1)
        return
    with pytest.raises(CheckError) as error:
        check(pipeline)
    (problem,) = error.value.problems
    assert "at most 10 times 0.001" in problem.expected
    assert "0.017" in problem.found


def test_products_that_lose_their_precision():
    b, x = start(embed=4)
    w = b.graph.param("w", tensor(F32, expert=3, embed=4))
    with b.at("layers.0.ffn"):
        b.graph.set_output("y", b.contract(x, w, over="embed", precision="f32"))
    before, after = b.graph, clone(b.graph)
    next(iter(after)).attrs["precision"] = "default"
    assert broken_promise(EXACT, before, after) == [
        "the products at @layers.0.ffn lost precision=f32"
    ]
    assert broken_promise(EXACT, before, before) == []
