"""From one placement to another by collectives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import F32, Axis, Graph, TensorType
from moecc.ir.mesh import Mesh, set_mesh
from moecc.ir.ops.collectives import parse_sharding
from moecc.sharding.collectives import steps

MESHES = ("a", "b", "c")


def laid(text, unreduced=()):
    placement = parse_sharding(text)
    axes = tuple(Axis(n, 8, placement.get(n, ())) for n in "xyz")
    return TensorType(F32, axes, unreduced)


@st.composite
def types(draw, sums=False):
    left, axes = draw(st.permutations(MESHES)), []
    for name in "xyz":
        count = draw(st.integers(0, len(left)))
        axes.append(Axis(name, 8, tuple(left[:count])))
        left = left[count:]
    count = draw(st.integers(0, len(left))) if sums else 0
    return TensorType(F32, tuple(axes), tuple(left[:count]))


@given(types(sums=True), types())
def test_steps_lead_there(source, target):
    graph = Graph()
    set_mesh(graph, Mesh(tuple((m, 2) for m in MESHES)))
    value = graph.input("v", source)
    for op, attrs in steps(source, target):
        value = graph.append(op, [value], attrs).result
    assert value.type == target


STEPS = {
    ("x@a", (), "x@a"): [],
    ("x@a", (), ""): ["all_gather x a"],
    ("x@a*b", (), ""): ["all_gather x a*b"],
    ("", (), "x@a,y@b"): ["shard x a", "shard y b"],
    ("x@a", (), "y@a"): ["all_to_all a"],
    ("x@a*b", (), "y@a*b"): ["all_to_all a*b"],
    ("x@a*b", (), "y@b*a"): ["all_to_all b", "all_to_all a"],
    ("x@a*b", (), "x@a,y@b"): ["all_to_all b"],
    ("x@a", ("b",), "x@a"): ["all_reduce b"],
    ("x@a", ("b",), "x@a*b"): ["reduce_scatter x b"],
    ("", ("a", "b"), "x@a*b"): ["reduce_scatter x a*b"],
    ("x@a", ("b",), "y@a"): ["all_reduce b", "all_to_all a"],
    ("x@a", (), "y@b"): ["shard y b", "all_gather x a"],
}


@pytest.mark.parametrize(("source", "sums", "target"), STEPS)
def test_the_steps_that_send_least(source, sums, target):
    found = [
        " ".join([op, *([attrs["axis"]] if "axis" in attrs else []), "*".join(attrs["mesh"])])
        for op, attrs in steps(laid(source, sums), laid(target))
    ]
    assert found == STEPS[source, sums, target]
