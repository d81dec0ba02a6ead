"""``--check``: promises are kept or named, and graphs are reduced faithfully."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

from moecc.errors import CheckError, InputError
from moecc.ir import F32, Builder, Graph, clone, print_graph, tensor, verify
from moecc.jobs.checks import PassProofs, broken_promise, check_pipeline, reduced
from moecc.rewrite.passes import EXACT, Pass, PassResult, Preserves
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing.oracle import measure
from moecc.weights.arithmetic import Scale
from moecc.weights.expr import Source
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


# What is checked is the graph that the passes really made.


@dataclass(frozen=True)
class ScaleWeightPass(Pass):
    """Scale a weight: where it is long, or at the first call alone."""

    name: ClassVar[str] = "scale-weight"
    summary: ClassVar[str] = "scale a weight at times"
    preserves = Preserves("reassociation")
    above: int = 0
    calls: ClassVar[list[int]] = []

    def apply(self, graph, ctx):
        """Break the promise on the first graph alone."""
        w = graph.params["w"]
        is_wrong = w.type["embed"].size > self.above if self.above else not self.calls
        self.calls.append(1)
        w.weight = Scale(w.weight, 1.5 if is_wrong else 1.0)
        return PassResult(changed=True)


def check_emitted(graph, item):
    """Check a pass as ``opt --check`` does: on the graph that it made."""
    pipeline, proofs = Pipeline((item,)), PassProofs()
    run_pipeline(graph, pipeline, instruments=[proofs])
    return check_pipeline(proofs.source, pipeline, proofs=proofs.proofs)


@pytest.mark.parametrize(
    ("embed", "above", "message"),
    [
        (64, 24, r"the pass broke its promise.*y differs by .*part at %y = contract @mlp"),
        (64, 0, r"the pass broke its promise.*y differs by .*part at %y = contract @mlp"),
        (4_000_000, 24, r"%y = contract @mlp: the promise is proved at small sizes, not at those"),
        (4_000_000, 0, r"%y = contract @mlp: the promise is proved at small sizes, not at those"),
    ],
)
def test_a_pass_that_is_right_on_a_second_small_graph_alone(embed, above, message):
    b, x = start(embed)
    type = tensor(F32, embed=embed)
    w = b.graph.param("w", type)
    w.weight = Source("w", type)
    with b.at("mlp"):
        b.graph.set_output("y", b.contract(x, w, over="embed", name="y"))
    ScaleWeightPass.calls.clear()
    with pytest.raises(CheckError, match=f"(?s){message}") as error:
        check_emitted(b.graph, ScaleWeightPass(above=above))
    assert len(error.value.problems) == 1


@dataclass(frozen=True)
class RewriteFirstPass(Pass):
    """Replace the output by another term."""

    name: ClassVar[str] = "rewrite-first"
    summary: ClassVar[str] = "replace the output"
    preserves = Preserves("reassociation")
    gate: bool = False

    def apply(self, graph, ctx):
        """Take silu for a gate, or a select for the product with an indicator."""
        b, node = Builder(graph), graph.outputs["y"].node
        x = node.operands[-1 if self.gate else 1]
        if self.gate:
            y = b.mul(x, b.sigmoid(x))
        else:
            one = b.broadcast(b.constant(value=1.0, dtype="f32"), x)
            y = b.mul(b.mask(one, node.operands[0], fill=0.0), x)
        graph.set_output("y", y)
        return PassResult(changed=True)


def guarded(function):
    b, x = start(8)
    zero = b.constant(value=0.0, dtype="f32")
    b.graph.set_output("y", b.select(b.less(zero, x), getattr(b, function)(x), zero))
    return b.graph


def test_a_proof_is_of_finite_values():
    (done,) = check_emitted(guarded("exp"), RewriteFirstPass())
    assert str(done).endswith("; proved, if every value is finite")
    assert done.to_json()["assumptions"]
    with pytest.raises(CheckError, match=r"expected 0\.0, found nan"):
        check_emitted(guarded("log"), RewriteFirstPass())


def test_what_is_not_proved_says_so():
    b, x = start(8)
    b.graph.set_output("y", b.silu(x))
    (done,) = check_emitted(b.graph, RewriteFirstPass(gate=True))
    assert re.search("measured .* at small sizes only, not proved: the graphs part at %", str(done))
    assert done.to_json()["gap"] == done.gap
