"""The routing that families and passes share."""

import pytest

from moecc.errors import InputError
from moecc.ir import F32, Builder, Graph, tensor, verify
from moecc.ir.moe import emit_routing, emit_shared_gate


def start(**router):
    """Return a builder, tokens and a router."""
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B", seq="S", embed=8))
    return Builder(graph, loc="layers.0.ffn"), x, graph.param("r", tensor(F32, **router))


@pytest.mark.parametrize("axes", [{"expert": 5, "embed": 8}, {"head": 4, "embed": 8}])
def test_a_router_of_another_size_is_refused(axes):
    with pytest.raises(InputError, match="one row per expert"):
        emit_routing(*start(**axes), experts=4, top_k=2)


def test_the_gate_of_a_shared_expert_multiplies_tokens():
    b, x, gate = start(embed=8)
    y = emit_shared_gate(b, x, gate, x)
    b.graph.set_output("y", y)
    verify(b.graph)
    assert y.type == x.type
    assert [n.op.name for n in b.graph] == ["contract", "sigmoid", "mul"]
