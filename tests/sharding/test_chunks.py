"""Chunks: cut, exchanged in turn, joined."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sharding_cases import layer

from moecc.errors import InputError, UsageError
from moecc.ir import F32, Builder, Graph, tensor, verify
from moecc.rewrite.pipeline import Pipeline
from moecc.testing import run_reference

from .meshes import model, run


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_joined_chunks_are_the_whole(parts, of, each):
    graph = Graph()
    x = graph.input("x", tensor(F32, a=2, b=parts * of * each))
    b = Builder(graph)
    chunks = [b.chunk(x, axis="b", at=i, of=of, parts=parts) for i in range(of)]
    graph.set_output("y", b.join(*chunks, axis="b", parts=parts))
    graph.set_output("first", chunks[0])
    verify(graph)
    data = np.arange(2.0 * parts * of * each).reshape(2, -1)
    found = run_reference(graph, params={}, inputs={"x": data})
    assert np.array_equal(found["y"], data)
    runs = data.reshape(2, parts, of * each)
    assert np.array_equal(found["first"], runs[:, :, :each].reshape(2, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": 2}, "there is no such chunk"),
        ({"of": 3}, "cannot be cut into these chunks"),
        ({"parts": 0}, "there is no such chunk"),
        ({"axis": "a"}, "cannot be cut into these chunks"),
    ],
)
def test_chunks_that_are_not_there(changes, message):
    graph = Graph()
    x = graph.input("x", tensor(F32, a="N", b=4))
    attrs = {"axis": "b", "at": 0, "of": 2, "parts": 1}
    with pytest.raises(InputError, match=message):
        Builder(graph).chunk(x, **attrs | changes)


def test_joined_chunks_have_one_type():
    graph = Graph()
    x, y = (graph.input(f"x{size}", tensor(F32, a="N", b=size)) for size in (4, 8))
    with pytest.raises(InputError, match="must have one type"):
        Builder(graph).join(x, y, axis="b", parts=2)


def test_what_has_no_chunks():
    laid = "annotate-sharding{mesh=data:8 rules=st-moe}"
    with pytest.raises(InputError, match="of a device have no such chunks") as caught:
        run(layer("capacity"), f"{laid},expert-parallel{{via=capacity chunks=3}}")
    assert caught.value.problems[0].hint == "specialize{groups=24} first"
    with pytest.raises(UsageError, match="of a fixed number are exchanged in chunks"):
        Pipeline.parse("expert-parallel{via=ring chunks=2}")
    laid = "annotate-sharding{mesh=far:2,near:4 rules=expert-hierarchical}"
    with pytest.raises(InputError, match="no equal chunks"):
        run(layer("ragged"), f"{laid},expert-parallel{{via=hierarchical chunks=2}}")
    seen = model("mixtral_gqa")
    run(seen, "specialize{mode=train capacity-factor=2.0 groups=8}")
    seen.set_output("inner", next(n.result for n in seen if n.op.name == "silu"))
    run(seen, "annotate-sharding{mesh=data:4 rules=st-moe}")
    with pytest.raises(InputError, match="something else looks at"):
        run(seen, "expert-parallel{via=capacity chunks=2}")
