"""Exchanging values, and the types that follow."""

import pytest

from moecc.errors import InputError
from moecc.ir import BF16, F32, Builder, Graph, infer_again, replace_value, tensor, verify


def test_types_that_refer_to_a_value_follow_it():
    graph = Graph()
    b = Builder(graph)
    logits = graph.input("logits", tensor(F32, batch="B", expert=4))
    x = graph.input("x", tensor(F32, batch="B", embed=8))
    experts, gates = b.route(logits, top_k=2)
    first, second = (b.assign_slots(experts, tokens="batch", experts=4, name=n) for n in ("p", "q"))
    rows = b.silu(b.neg(b.dispatch(x, experts, second)))
    graph.set_output("y", b.combine(rows, experts, second, gates))
    graph.set_output("rows", rows)
    replace_value(second, first)
    second.node.erase()
    verify(graph)
    assert [extent.value for extent in rows.type.extents] == [first]
    assert str(rows.type["slot"]) == "slot=ragged(%p)"


def test_types_follow_operands_and_attributes():
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F32, batch="B"))
    y = graph.input("y", tensor(BF16, batch="B"))
    value = x
    for _ in range(5):
        value = b.silu(b.neg(value))
    graph.set_output("z", value)
    replace_value(x, y)
    verify(graph)
    assert value.type is y.type
    cast = b.cast(value, dtype="f32")
    graph.set_output("z", b.neg(cast))
    cast.node.attrs["dtype"] = "f16"
    infer_again(graph, [cast.node])
    verify(graph)
    assert graph.outputs["z"].type.dtype.name == "f16"


def test_what_does_not_follow_is_refused():
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F32, batch="B"))
    negated = b.neg(x)
    total = b.add(negated, x)
    graph.set_output("y", b.add(total, total))
    other = graph.input("other", tensor(F32, seq="S"))
    with pytest.raises(InputError, match="no operand has all axes"):
        replace_value(negated, other)
