"""What values do not show: gradients, stored weights, devices; and what is no difference."""

import pytest
from moecc_passes.roll_layers import RollLayersPass

from moecc.ir import BF16, F32, Builder, Graph, clone, parse, tensor
from moecc.rewrite.passes import Context
from moecc.testing import differences
from moecc.weights.arithmetic import Cast, Scale
from moecc.weights.expr import Source

# --- gradients


def of(make):
    """Return the graph of a function of a builder, an input and a parameter."""
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B", embed=4))
    w = graph.param("w", tensor(F32, embed=4))
    graph.set_output("y", make(Builder(graph), x, w))
    return graph


def test_a_gradient_that_no_longer_flows_is_a_difference():
    free = of(lambda b, x, w: b.mul(x, b.square(w)))
    stopped = of(lambda b, x, w: b.mul(x, b.stop_gradient(b.square(w))))
    for pair in ((free, stopped), (stopped, free)):
        (line,) = differences(*pair)
        assert line.startswith("the gradient differs: with the results of stop_gradient held")
        assert "output y[" in line
    assert differences(stopped, stopped) == []


def test_where_a_gradient_is_stopped_does_not_matter_if_none_passes():
    late = of(lambda b, x, w: b.mul(x, b.stop_gradient(b.scale(w, by=3.0))))
    early = of(lambda b, x, w: b.mul(x, b.scale(b.stop_gradient(w), by=3.0)))
    twice = of(lambda b, x, w: b.mul(x, b.stop_gradient(b.scale(b.stop_gradient(w), by=3.0))))
    assert differences(late, early) == differences(early, twice) == []


def test_the_straight_through_estimator_is_not_what_it_estimates():
    """x + sg(f(x) − x) has the values of f and the gradient of x."""
    plain = of(lambda b, x, w: b.add(b.tanh(x), w))
    through = of(lambda b, x, w: b.add(b.add(x, b.stop_gradient(b.sub(b.tanh(x), x))), w))
    assert "the gradient differs" in differences(plain, through)[0]


def test_a_gradient_that_is_stopped_in_repeated_layers_counts():
    def layers(stops):
        graph = Graph()
        h = graph.input("x", tensor(F32, batch="B", embed=4))
        for number in range(3):
            w = graph.param(f"layers.{number}.w", tensor(F32, embed=4), loc=f"layers.{number}")
            b = Builder(graph, loc=f"layers.{number}")
            w = b.stop_gradient(w) if stops else w
            h = b.tanh(b.mul(h, w))
        graph.set_output("y", h)
        return graph

    for stops in (False, True):
        rolled = layers(stops)
        assert RollLayersPass().apply(rolled, Context()).changed
        assert differences(layers(stops), rolled) == []
        assert "the gradient differs" in differences(layers(not stops), rolled)[0]


# --- weights as they are stored


def weighted(weight):
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B", embed=64))
    w = graph.param("w", weight.type.with_dtype(F32), weight)
    graph.set_output("y", Builder(graph).contract(x, w, over="embed"))
    return graph


SOURCE = Source("w", tensor(F32, mlp=3, embed=64))


@pytest.mark.parametrize("exact", [True, False])
def test_weights_rounded_on_the_way_are_a_difference(exact):
    rounded = Cast(Cast(SOURCE, BF16), F32)
    lines = differences(weighted(SOURCE), weighted(rounded), exact=exact)
    assert all(line.startswith("with weights as they are stored, output y") for line in lines)
    assert lines


def test_what_float32_rounds_is_a_difference_after_exact_alone():
    # In float64, as the oracle computes, the two factors give 1.
    nothing = Scale(Scale(SOURCE, 3.0), 1 / 3)
    assert differences(weighted(SOURCE), weighted(nothing)) == []
    assert differences(weighted(SOURCE), weighted(nothing), exact=True)


# --- meshes

LAID = """moecc 1
graph g {
  attr mesh = {"a": 2, "b": 2}
  input %x : f32[batch@a=B, embed=8]
  param %w : f32[mlp=4, embed@b=8]
  %g = all_gather %w {axis=embed, mesh=b} : f32[mlp=4, embed=8]
  %h = contract %x, %g {over=embed} : f32[batch@a=B, mlp=4]
  output y = %h
}
"""


def test_inputs_and_outputs_lie_where_they_did():
    laid = parse(LAID)
    whole = clone(laid)
    whole.set_output("y", Builder(whole).all_gather(whole.value("h"), axis="batch", mesh="a"))
    (line,) = differences(laid, whole)
    assert line == (
        "output y is sharded in another way\n  expected: [batch@a, mlp]\n  found: [batch, mlp]"
    )
    assert differences(laid, clone(laid)) == []
