"""Editing a graph: what is refused, and what is kept in step."""

import pytest

from moecc.errors import InputError
from moecc.ir import F32, Builder, Graph, tensor, verify


def chain():
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F32, batch="B"))
    graph.set_output("y", b.silu(b.relu(x, name="r"), name="s"))
    return graph, b


def test_a_used_node_is_not_erased():
    graph, _ = chain()
    with pytest.raises(ValueError, match="still has users"):
        graph.value("r").node.erase()
    verify(graph)


def test_a_used_parameter_is_not_erased():
    graph, b = chain()
    w = graph.param("w", tensor(F32, batch="B"))
    y = b.mul(graph.value("s"), w)
    with pytest.raises(ValueError, match="still has users"):
        graph.erase_param("w")
    y.node.erase()
    graph.erase_param("w")
    assert "w" not in graph
    verify(graph)


def test_names_are_unique_and_fresh_ones_count_up():
    graph, b = chain()
    with pytest.raises(InputError, match="%r is defined twice"):
        graph.input("r", tensor(F32, batch="B"))
    with pytest.raises(InputError, match="%r is defined twice"):
        graph.rename(graph.value("s"), "r")
    assert [b.relu(graph.value("x"), name="r").name for _ in range(3)] == ["r1", "r2", "r3"]
    assert b.relu(graph.value("x"), name="r12").name == "r12"
    assert b.relu(graph.value("x"), name="r12").name == "r4"
    verify(graph)


def test_a_failed_rename_changes_nothing():
    graph, _ = chain()
    with pytest.raises(InputError):
        graph.rename(graph.value("s"), "no name")
    assert graph.value("s").name == "s"
    verify(graph)


def test_replacing_a_value_reaches_operands_and_outputs():
    graph, b = chain()
    r, x = graph.value("r"), graph.inputs["x"]
    twice = b.add(r, r)
    graph.set_output("r", r)
    r.replace_by(x)
    assert twice.node.operands == [x, x]
    assert graph.outputs["r"] is x
    assert r.users == {}
    verify(graph)


def test_a_node_that_is_replaced_is_erased():
    graph, _ = chain()
    node = graph.value("r").node
    node.replace_by(graph.inputs["x"])
    assert not node.alive
    assert "r" not in graph
    verify(graph)


def test_the_only_user_uses_once_and_is_no_output():
    graph, b = chain()
    r, s = graph.value("r"), graph.value("s")
    assert r.only_user is s.node
    assert s.only_user is None
    b.add(s, s)
    assert graph.inputs["x"].only_user is r.node
    b.mul(r, r)
    assert r.only_user is None
