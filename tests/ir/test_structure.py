"""Equality and hash of graphs: up to the names of values, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import (
    BF16,
    F32,
    OPS,
    Axis,
    Builder,
    Graph,
    TensorType,
    clone,
    equal,
    fingerprint,
    parse,
    print_graph,
)
from moecc.testing import graphs, random_graph


def alike(a, b):
    """Return whether two graphs are equal, and check that their hashes say the same."""
    assert equal(a, b) == equal(b, a) == (fingerprint(a) == fingerprint(b))
    return equal(a, b)


def shuffled_names(graph):
    """Return a copy whose results have other names."""
    copy = clone(graph)
    values = [v for n in copy for v in n.results]
    for i, value in enumerate(values):
        copy.rename(value, f"tmp.{i}")
    for i, value in enumerate(reversed(values)):
        copy.rename(value, copy.fresh(f"{i}"))
    return copy


@given(graphs(dead=True))
def test_names_of_results_and_places_do_not_count(graph):
    other = shuffled_names(graph)
    for node in other:
        node.loc, node.origin = "elsewhere", "other/rule"
    assert alike(graph, other)
    assert equal(parse(print_graph(other)), graph)


@given(graphs(), graphs())
def test_the_hash_tells_graphs_apart_as_equality_does(a, b):
    alike(a, b)


def changed_attribute(node):
    for name, spec in node.op.attrs.items():
        if spec.kind == "float":
            # Adding to the −∞ of a mask would change nothing.
            node.attrs[name] = 0.75 if node.attrs[name] == 0.5 else 0.5
            return True
        others = [c for c in spec.choices if c != node.attrs[name]]
        if others:
            node.attrs[name] = others[0]
            return True
    return False


def changed_operation(node):
    swap = {"relu": "silu", "silu": "relu", "add": "sub", "mul": "add", "mean": "sum"}
    if node.op.name not in swap:
        return False
    node.op = OPS[swap[node.op.name]]
    return True


def exchanged_operands(node):
    if len(node.operands) < 2 or node.operands[0] is node.operands[1]:
        return False
    a, b = node.operands[:2]
    node.set_operand(0, b)
    node.set_operand(1, a)
    return True


@given(graphs(), st.data())
def test_any_other_change_counts(graph, data):
    nodes = list(graph)
    if not nodes:
        return
    other = clone(graph)
    index = data.draw(st.integers(0, len(nodes) - 1), label="node")
    change = data.draw(
        st.sampled_from([changed_attribute, changed_operation, exchanged_operands]), label="change"
    )
    if change(list(other)[index]):
        assert not alike(graph, other)


def small(attr=1, input="x", param="w", output="y", dtype=F32, mesh=()):
    """Return a small graph, one thing of which may be another."""
    graph = Graph("g", {"layers": attr})
    batch, embed = Axis("batch", "B"), Axis("embed", 4, mesh)
    x = graph.input(input, TensorType(dtype, (batch, embed)))
    w = graph.param(param, TensorType(dtype, (embed,)))
    graph.set_output(output, Builder(graph).mul(x, w))
    return graph


@pytest.mark.parametrize(
    "change",
    [
        {"attr": 2},
        {"input": "z"},
        {"param": "z"},
        {"output": "z"},
        {"dtype": BF16},
        {"mesh": ("model",)},
    ],
    ids=str,
)
def test_names_of_inputs_parameters_and_outputs_count(change):
    assert alike(small(), small())
    assert not alike(small(), small(**change))


def test_extents_are_compared_up_to_renaming():
    text = (
        "moecc 1\ngraph g {\n"
        "  input %x : f32[batch=B, embed=4]\n"
        "  input %e : i32[batch=B, choice=2]\n"
        "  %p = assign_slots %e {tokens=batch, experts=3} : i32[batch=B, choice=2]\n"
        "  %q = assign_slots %e {tokens=batch, experts=3} : i32[batch=B, choice=2]\n"
        "  %r = dispatch %x, %e, %p : f32[group=1, expert=3, slot=ragged(%p), embed=4]\n"
        "  output y = %r\n}\n"
    )
    graph = parse(text)
    renamed = parse(text.replace("%p", "%slots").replace("%q", "%p"))
    other = parse(text.replace("%x, %e, %p", "%x, %e, %q").replace("ragged(%p)", "ragged(%q)"))
    assert alike(graph, renamed)
    assert not alike(graph, other)


def test_a_copy_refers_to_its_own_values():
    graph = random_graph(0)
    copy = clone(graph)
    mine = {v for n in copy for v in n.results} | {*copy.inputs.values(), *copy.params.values()}
    assert all(v in mine for n in copy for v in n.operands)
    assert all(extent.value in mine for v in mine for extent in v.type.extents)
