"""The routing that families and passes share."""

from __future__ import annotations

import pytest

from moecc.errors import InputError
from moecc.ir import F32, Builder, Graph, tensor, verify
from moecc.ir.moe import emit_routing, emit_shared_gate


def start(**router: int) -> tuple[Graph, Builder, tuple]:
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B", seq="S", embed=8))
    return graph, Builder(graph, loc="layers.0.ffn"), (x, graph.param("r", tensor(F32, **router)))


def test_the_operations_stand_in_order_around_the_experts() -> None:
    graph, b, (x, router) = start(expert=4, embed=8)
    rows, finish = emit_routing(b, x, router, experts=4, top_k=2)
    assert str(rows.type) == "f32[group=1, expert=4, slot=ragged(%slots), embed=8]"
    y = finish(b.silu(rows))
    assert y.type == x.type
    graph.set_output("y", y)
    verify(graph)
    assert [n.op.name for n in graph] == [
        "contract", "route", "assign_slots", "dispatch", "silu", "combine",
    ]  # fmt: skip
    assert {n.loc for n in graph} == {"layers.0.ffn"}


def test_conventions_and_placement_are_passed_on() -> None:
    graph, b, (x, router) = start(embed=8, expert=4)
    rows, _ = emit_routing(
        b, x, router, experts=4, top_k=1, gates="sigmoid", scale=2.5,
        slots="capacity", capacity_factor=1.5, groups=2, order="token",
    )  # fmt: skip
    route, slots = (
        next(n for n in graph if n.op.name == name) for name in ("route", "assign_slots")
    )
    assert (route.attrs["gates"], route.attrs["scale"]) == ("sigmoid", 2.5)
    assert slots.attrs["capacity_factor"] == 1.5
    assert slots.attrs["order"] == "token"
    assert str(rows.type) == "f32[group=2, expert=4, slot=capacity(%slots), embed=8]"


@pytest.mark.parametrize("axes", [{"expert": 5, "embed": 8}, {"head": 4, "embed": 8}])
def test_a_router_of_another_size_is_refused(axes: dict[str, int]) -> None:
    _, b, (x, router) = start(**axes)
    with pytest.raises(InputError, match="one row per expert"):
        emit_routing(b, x, router, experts=4, top_k=2)


def test_the_gate_of_a_shared_expert_multiplies_tokens() -> None:
    graph, b, (x, gate) = start(embed=8)
    y = emit_shared_gate(b, x, gate, x)
    graph.set_output("y", y)
    verify(graph)
    assert y.type == x.type
    assert [n.op.name for n in graph] == ["contract", "sigmoid", "mul"]
