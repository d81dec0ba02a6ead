"""The oracle: the same data for the same names, and differences that rounding cannot explain."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from moecc.ir import BF16, F32, F64, I32, Builder, Graph, parse, tensor
from moecc.ir.structure import replace_value
from moecc.rewrite.passes import EXACT, Pass, PassResult, Preserves
from moecc.testing import (
    assert_same,
    differences,
    inputs_for,
    laws,
    params_for,
    run_reference,
)
from moecc.weights.arithmetic import Cast, Scale
from moecc.weights.expr import Source
from moecc.weights.movement import Index, Tile


def graph_of(make, **sizes):
    """Return the graph of a function of the builder and an input `x`."""
    graph = Graph()
    x = graph.input("x", tensor(F64, **(sizes or {"batch": "B", "embed": 4})))
    graph.set_output("y", make(Builder(graph), x))
    return graph


GRAPH = graph_of(lambda b, x: b.relu(x))


# --- data


def test_data_depend_on_seed_and_name_alone():
    first = graph_of(lambda b, x: b.relu(x))
    other = graph_of(lambda b, x: b.silu(x))
    for graph in (first, other):
        graph.param("w", tensor(F32, embed=4))
    other.input("z", tensor(F32, batch="B"))
    assert_array_equal(inputs_for(first, 3)["x"], inputs_for(other, 3)["x"])
    assert_array_equal(params_for(first, 3)["w"], params_for(other, 3)["w"])
    assert not np.array_equal(params_for(first, 3)["w"], params_for(first, 4)["w"])


def test_indices_stay_within_all_that_they_index():
    graph = Graph()
    b = Builder(graph)
    ids = graph.input("ids", tensor(I32, batch=50, seq=40))
    graph.input("free", tensor(I32, batch=50, seq=40))
    small = graph.param("small", tensor(F32, vocab=3, embed=2))
    large = graph.param("large", tensor(F32, vocab=9, embed=2))
    b.embedding(large, ids, axis="vocab")
    b.embedding(small, b.rename(ids, axis="seq", to="kv_seq"), axis="vocab")
    found = inputs_for(graph)
    assert set(np.unique(found["ids"])) == {0, 1, 2}
    assert found["free"].max() == 7
    choices = graph.input("choices", tensor(I32, batch=50, choice=2))
    b.assign_slots(choices, tokens="batch", experts=2)
    hot = graph.input("hot", tensor(I32, batch=50))
    b.one_hot(hot, into=(("k", 5),))
    found = inputs_for(graph)
    assert found["choices"].max() == 1
    assert found["hot"].max() == 4


def drawn(weight, seed=0):
    """Return the data of a parameter that is a weight."""
    graph = Graph()
    graph.set_output("w", graph.param("w", weight.type, weight))
    return params_for(graph, seed)["w"]


def test_parameters_with_weights_are_made_of_the_same_sources():
    dense = tensor(BF16, mlp=3, embed=4)
    source = Source("layers.0.up", dense)
    plain, tiled = drawn(source, 5), Tile(source, "expert", 2)
    assert_array_equal(drawn(tiled, 5), [plain, plain])
    assert plain.dtype == np.float64
    assert_array_equal(drawn(Index(tiled, "expert", 1), 5), plain)


def test_weights_are_computed_in_float64_whatever_their_types():
    source = Source("w", tensor(F32, embed=64))
    third = Cast(Scale(source, 1 / 3), BF16)
    assert_array_equal(drawn(third), drawn(source) * (1 / 3))


# --- differences


def test_one_part_in_a_billion_is_seen():
    first = graph_of(lambda b, x: b.softmax(x, axis="embed"))
    for error, wrong in ((1e-9, True), (1e-11, True), (1e-13, False)):
        other = graph_of(lambda b, x, e=error: b.scale(b.softmax(x, axis="embed"), by=1 + e))
        assert bool(differences(first, other)) is wrong


def test_exact_means_every_bit():
    first = graph_of(lambda b, x: b.add(x, b.add(b.square(x), b.tanh(x))))
    other = graph_of(lambda b, x: b.add(b.add(x, b.square(x)), b.tanh(x)))
    assert differences(first, other) == []
    with pytest.raises(AssertionError, match="not equal bit for bit"):
        assert_same(first, other, exact=True, seeds=range(5))
    assert_same(first, first, exact=True)


def test_what_rounding_does_is_no_difference():
    """(x + big) − big loses half of the digits, differently in another order."""

    def lossy(b, x, is_swapped):
        big, y = b.scale(b.exp(x), by=1e8), b.square(x)
        total = b.add(b.add(x, big), y) if is_swapped else b.add(b.add(x, y), big)
        return b.sub(total, big)

    first = graph_of(lambda b, x: lossy(b, x, False))
    other = graph_of(lambda b, x: lossy(b, x, True))
    apart = max(
        np.abs(run_reference(first, seed=s)["y"] - run_reference(other, seed=s)["y"]).max()
        for s in range(5)
    )
    assert apart > 1e-9
    assert_same(first, other, seeds=range(5))
    wrong = graph_of(lambda b, x: b.scale(lossy(b, x, True), by=1.001))
    with pytest.raises(AssertionError):
        assert_same(first, wrong, seeds=range(5))


def test_undefined_before_may_be_anything_after_but_not_the_reverse():
    undefined = graph_of(lambda b, x: b.log(b.neg(b.square(x))))
    fine = graph_of(lambda b, x: b.square(x))
    assert differences(undefined, fine) == []
    assert differences(fine, undefined) != []


def test_infinities_must_agree():
    low = graph_of(lambda b, x: b.mask(x, b.less(x, x)))
    high = graph_of(lambda b, x: b.mask(x, b.less(x, x), fill=float("inf")))
    assert differences(low, low) == []
    assert differences(low, high) != []


def test_other_inputs_or_outputs_are_named():
    other = graph_of(lambda b, x: b.sum(x, axes="embed"))
    (line,) = differences(GRAPH, other)
    outputs = "expected: y : f64[batch=B, embed=4]\n  found: y : f64[batch=B]"
    assert line == f"the outputs differ\n  {outputs}"
    other = graph_of(lambda b, x: b.relu(x), batch="B", embed=5)
    assert [d.split("\n")[0] for d in differences(GRAPH, other)] == [
        "the inputs differ",
        "the outputs differ",
    ]


# --- laws of passes


@dataclass(frozen=True)
class Named(Pass):
    """A pass that does what the test says."""

    name = "named"
    summary = "do what the test says"
    does: Callable
    preserves: Preserves = EXACT
    changed: bool = True

    def apply(self, graph, ctx):
        self.does(graph)
        return PassResult(self.changed)


def scaled(by):
    def does(graph):
        graph.set_output("y", Builder(graph).scale(graph.outputs["y"], by=by))

    return does


def nothing(graph):
    """Leave the graph as it is."""


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Named(nothing), "changed=True, which is not so"),
        (Named(scaled(1.0), changed=False), "changed=False, which is not so"),
        (Named(scaled(2.0)), "the pass promises exact"),
        (Named(scaled(1.001), Preserves("reassociation")), "the pass promises reassociation"),
        (Named(scaled(1.0)), "the pass changes its own result"),
        (Named(lambda g: g.drop_output("y")), "the graph has no output"),
    ],
)
def test_a_broken_promise_is_named_with_the_graph(item, message):
    with pytest.raises(AssertionError) as caught:
        laws.check_pass(item, GRAPH)
    assert message in str(caught.value)
    assert "%v = relu %x" in str(caught.value)


TIED = """moecc 1
graph tied {
  input %x : f64[batch=B, seq=S, embed=3]
  param %router : f64[expert=2, embed=3] = stack(source("r" : f64[embed=3]), source("r" : f64[embed=3]), axis=expert)
  param %up : f64[expert=2, mlp=3, embed=3]
  %logits = contract %x, %router {over=embed} : f64[batch=B, seq=S, expert=2]
  %scores = softmax %logits {axis=expert} : f64[batch=B, seq=S, expert=2]
  %experts, %gates, %slots = expert_choice %scores {tokens=(batch, seq), experts=2, capacity_factor=1.0, minimum=2} : i32[batch=B, seq=S, choice=2], f64[batch=B, seq=S, choice=2], i32[batch=B, seq=S, choice=2]
  %rows = dispatch %x, %experts, %slots : f64[group=1, expert=2, slot=capacity(%slots), embed=3]
  %hidden = contract %rows, %up {over=embed} : f64[group=1, expert=2, slot=capacity(%slots), mlp=3]
  %y = relu %hidden : f64[group=1, expert=2, slot=capacity(%slots), mlp=3]
  %z = relu %x : f64[batch=B, seq=S, embed=3]
  output y = %y
  output z = %z
}
"""  # noqa: E501


SATURATED = (
    TIED.replace('source("r" :', 'source("q" :', 1)
    .replace("%scores = softmax %logits", "%scores = softmax %sharp")
    .replace(
        "  %scores",
        "  %sharp = scale %logits {by=60.0} : f64[batch=B, seq=S, expert=2]\n  %scores",
        1,
    )
)


@pytest.mark.parametrize("text", [TIED, SATURATED])
def test_what_is_chosen_among_equals_may_change_and_nothing_else(text):
    """Rounding decides what experts take that have equal rows, or whose scores are all but 1.

    Many rows of a rectified layer are 0 in one choice and in the next: few draws do not show it.
    """
    before, after, wrong = (parse(text) for _ in range(3))
    softmax = next(n for n in after if n.op.name == "softmax")
    b = Builder(after, before=softmax)
    x = softmax.operands[0]
    replace_value(softmax.result, b.exp(b.sub(x, b.logsumexp(x, axes="expert"))))
    softmax.erase()
    assert_same(before, after, seeds=range(40))
    relu = wrong.outputs["z"].node
    replace_value(relu.result, Builder(wrong, before=relu).gelu(relu.operands[0]))
    relu.erase()
    with pytest.raises(AssertionError, match="output z"):
        assert_same(before, wrong)
