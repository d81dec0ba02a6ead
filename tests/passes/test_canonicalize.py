"""Each rule of ``canonicalize``: what it does, and what it leaves alone."""

import pytest
from hypothesis import given
from moecc_passes.cleanup import CanonicalizePass, order_operands

from moecc.ir import F32, I32, Builder, Graph, clone, equal, print_graph, tensor
from moecc.rewrite.passes import Context
from moecc.testing import graphs

X = tensor(F32, batch="B", embed=12)


def graph_of(make):
    graph = Graph()
    b = Builder(graph, loc="here")
    graph.set_output("y", make(b, graph.input("x", X)))
    return graph


def canonical(graph):
    return CanonicalizePass().apply(graph, Context())


def unchanged(b, x):
    return x


def heads(b, x):
    return b.split(x, axis="embed", into=(("head", 3), ("dim", 4)))


def part(b, x, start, stop, axis="embed"):
    return b.slice(x, axis=axis, start=start, stop=stop)


CASES = {
    "double-neg": (lambda b, x: b.neg(b.neg(x)), unchanged),
    "scale-by-one": (lambda b, x: b.scale(x, by=1.0), unchanged),
    "scale-by-minus-one": (lambda b, x: b.scale(x, by=-1.0), lambda b, x: b.neg(x)),
    "scale-of-scale": (
        lambda b, x: b.scale(b.scale(b.scale(x, by=2.0), by=3.0), by=4.0),
        lambda b, x: b.scale(x, by=24.0),
    ),
    "scale-and-neg": (
        lambda b, x: b.neg(b.scale(b.neg(b.scale(x, by=3.0)), by=5.0)),
        lambda b, x: b.scale(x, by=15.0),
    ),
    "cast-to-same": (lambda b, x: b.cast(x, dtype="f32"), unchanged),
    "stop-gradient-twice": (
        lambda b, x: b.stop_gradient(b.stop_gradient(x)),
        lambda b, x: b.stop_gradient(x),
    ),
    "rename-to-itself": (lambda b, x: b.rename(x, axis="embed", to="embed"), unchanged),
    "rename-chain": (
        lambda b, x: b.rename(b.rename(x, axis="embed", to="mlp"), axis="mlp", to="wide"),
        lambda b, x: b.rename(x, axis="embed", to="wide"),
    ),
    "merge-of-split": (
        lambda b, x: b.merge(heads(b, x), axes=("head", "dim"), into="wide"),
        lambda b, x: b.rename(x, axis="embed", to="wide"),
    ),
    "split-of-merge": (
        lambda b, x: heads(b, b.merge(b.exp(heads(b, x)), axes=("head", "dim"), into="embed")),
        lambda b, x: b.exp(heads(b, x)),
    ),
    "slice-of-all": (lambda b, x: part(b, x, 0, 12), unchanged),
    "slice-of-slice": (
        lambda b, x: part(b, part(b, x, 2, 10), 1, 4),
        lambda b, x: part(b, x, 3, 6),
    ),
    "broadcast-to-same": (lambda b, x: b.broadcast(x, b.exp(x)), unchanged),
    "reduce-nothing": (lambda b, x: b.sum(b.mean(x, axes=()), axes=()), unchanged),
    "fold-constants": (
        lambda b, x: b.add(
            x,
            b.maximum(
                b.mul(b.constant(value=3.0), b.neg(b.constant(value=-2.0))),
                b.scale(b.constant(value=0.5), by=9.0),
            ),
        ),
        lambda b, x: b.add(x, b.constant(value=6.0)),
    ),
    "mul-by-constant": (
        lambda b, x: b.mul(b.constant(value=3.0), x),
        lambda b, x: b.scale(x, by=3.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    before, after = CASES[name]
    graph, expected = graph_of(before), graph_of(after)
    result = canonical(graph)
    assert result.rules[name].hits
    order_operands(expected)
    # What is not needed any more, as an operand of broadcast, is for dce.
    for node in graph.walk_back():
        if node.is_dead:
            node.erase()
    assert equal(graph, expected), print_graph(graph)
    assert all(not n.origin or n.origin.startswith("canonicalize/") for n in graph)


LEFT = {
    "another type": lambda b, x: b.cast(x, dtype="f64"),
    "part of an axis": lambda b, x: part(b, x, 0, 11),
    "slices of two axes": lambda b, x: part(b, part(b, heads(b, x), 0, 2, "head"), 0, 2, "dim"),
    "other parts": lambda b, x: b.merge(heads(b, x), axes=("dim", "head"), into="embed"),
    "overflow": lambda b, x: b.scale(b.scale(x, by=1e200), by=1e200),
    "underflow": lambda b, x: b.scale(b.scale(x, by=1e-200), by=1e-200),
    "not finite": lambda b, x: b.add(x, b.add(b.constant(value=1e308), b.constant(value=1e308))),
    "a sum over something": lambda b, x: b.sum(x, axes="embed"),
    "minus zero": lambda b, x: b.neg(b.scale(x, by=0.0)),
    "minus zero constant": lambda b, x: b.add(x, b.neg(b.constant(value=0.0))),
    "plus zero": lambda b, x: b.add(x, b.constant(value=0.0)),
    "rename of another axis": lambda b, x: b.rename(
        b.rename(x, axis="embed", to="mlp"), axis="batch", to="tokens"
    ),
    "broadcast": lambda b, x: b.broadcast(b.sum(x, axes="embed"), x),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    graph = graph_of(LEFT[name])
    before = clone(graph)
    order_operands(before)
    canonical(graph)
    assert equal(graph, before), print_graph(graph)


def test_whole_numbers_are_not_folded():
    graph = Graph()
    b = Builder(graph)
    ids = graph.input("ids", tensor(I32, batch="B"))
    two = b.constant(value=2.0, dtype="i32")
    graph.set_output("y", b.add(ids, b.mul(two, two)))
    assert "fold-constants" not in canonical(graph).stats


def test_the_promise_is_exact_where_no_scale_was_merged():
    done = canonical(graph_of(CASES["double-neg"][0]))
    assert done.preserves.kind == "exact"
    assert canonical(graph_of(CASES["scale-of-scale"][0])).preserves is None


def glu(swapped, names):
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", X)
    gate, up = (
        b.contract(x, graph.param(name, tensor(F32, mlp=5, embed=12)), over="embed")
        for name in names
    )
    graph.set_output("y", b.mul(up, b.silu(gate)) if swapped else b.mul(b.silu(gate), up))
    return graph


def operands_of_product(graph):
    return [value.node.op.name for value in graph.outputs["y"].node.operands]


def test_the_order_of_operands_depends_on_how_they_are_made():
    graph, swapped = glu(False, ("gate", "up")), glu(True, ("a", "b"))
    assert order_operands(graph) + order_operands(swapped) == 1
    assert operands_of_product(graph) == operands_of_product(swapped)
    assert order_operands(graph) == order_operands(swapped) == 0


def test_operands_that_settle_the_order_of_axes_stay():
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F32, batch="B", embed=4))
    y = graph.input("y", tensor(F32, embed=4, batch="B"))
    graph.set_output("first", b.add(x, y))
    graph.set_output("second", b.add(y, x))
    assert order_operands(graph) == 0


@given(graph=graphs())
def test_order_does_not_depend_on_names(graph):
    canonical(graph)
    renamed = clone(graph)
    values = [value for node in renamed for value in node.results]
    for number, value in enumerate(values):
        renamed.rename(value, f"renamed.{number}")
    assert order_operands(renamed) == 0
