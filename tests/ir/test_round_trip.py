"""Text and graph say the same: parse(print(g)) == g, whatever the names, places and attributes."""

import copy
import math
import pickle
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.ir import (
    DTYPES,
    F32,
    Axis,
    Builder,
    Graph,
    TensorType,
    equal,
    parse,
    print_graph,
    tensor,
)
from moecc.testing import graphs, laws
from tests.train.tiny import golden_graph

FIRST = string.ascii_letters + string.digits + "_"
VALUE_NAMES = st.builds(
    str.__add__, st.sampled_from(FIRST), st.text(FIRST + ".-", max_size=8)
) | st.sampled_from(
    ["0", "model.layers.0.mlp.up_proj.weight", "a-b", "x.", "_", "1e5", "inf", "by"]
)
WORDS = st.text(string.ascii_letters + string.digits + "._/{}:%=()[]\"'é→", min_size=1, max_size=12)
ORIGINS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_./\-]{0,10}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
IDENTIFIERS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


@st.composite
def decorated(draw):
    """Draw a graph with names, places, origins and attributes of every kind."""
    graph = draw(graphs(dead=True))
    graph.name = draw(ORIGINS)
    graph.attrs = draw(st.dictionaries(IDENTIFIERS, JSON, max_size=3))
    values = [*graph.params.values(), *(v for n in graph for v in n.results)]
    for value in values[: draw(st.integers(0, 4))]:
        name = draw(VALUE_NAMES)
        if name not in graph:
            graph.rename(value, name)
    for node in list(graph)[: draw(st.integers(0, 3))]:
        node.loc, node.origin = draw(WORDS | st.just("")), draw(ORIGINS | st.just(""))
    for value in list(graph.params.values())[:1]:
        value.loc = draw(WORDS | st.just(""))
    return graph


@given(graphs())
def test_random_graphs_are_valid_and_round_trip(graph):
    laws.check_graph(graph)


@given(decorated())
def test_names_places_and_attributes_round_trip(graph):
    laws.check_graph(graph)
    again = parse(print_graph(graph))
    assert [(n.loc, n.origin) for n in again] == [(n.loc, n.origin) for n in graph]
    assert [p.loc for p in again.params.values()] == [p.loc for p in graph.params.values()]
    assert again.attrs == graph.attrs
    assert again.name == graph.name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
@pytest.mark.parametrize("passes", ["upcycle{experts=4}", "roll-layers"])
def test_copies_and_pickles_have_the_text(copied, passes):
    graph = golden_graph("llama_gqa", passes)
    assert print_graph(copied(graph)) == print_graph(graph)


@given(graphs(), st.sampled_from(["\n", "  ", "\t", "# remark\n", "\r\n"]))
def test_white_space_and_comments_between_lines_say_nothing(graph, filler):
    lines = print_graph(graph).splitlines()
    assert equal(parse(f"\n{filler}".join(lines)), graph)


SIZES = st.integers(0, 10**15) | IDENTIFIERS


@st.composite
def types(draw):
    names = draw(st.lists(IDENTIFIERS, max_size=4, unique=True))
    meshes = draw(st.lists(IDENTIFIERS, max_size=4, unique=True))
    axes = []
    for name in names:
        count = draw(st.integers(0, len(meshes)))
        axes.append(Axis(name, draw(SIZES), tuple(meshes[:count])))
        meshes = meshes[count:]
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return TensorType(DTYPES[dtype], tuple(axes), tuple(meshes))


@given(types())
def test_shardings_round_trip_in_a_graph(type):
    meshes = [*(m for a in type.axes for m in a.mesh), *type.unreduced]
    graph = Graph(attrs={"mesh": dict.fromkeys(meshes, 1)} if meshes else {})
    graph.set_output("y", Builder(graph).stop_gradient(graph.input("x", type)))
    laws.check_round_trip(graph)
    assert parse(print_graph(graph)).outputs["y"].type == type


@given(st.floats(allow_nan=False))
@example(math.inf)
@example(-math.inf)
@example(-0.0)
@example(5e-324)
@example(1.7976931348623157e308)
def test_every_float_attribute_round_trips(value):
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F32, batch="B"))
    graph.set_output("y", b.scale(x, by=value))
    laws.check_round_trip(graph)
    (node,) = parse(print_graph(graph))
    assert node.attrs["by"] == value


@pytest.mark.parametrize("name", ["é", "a b", "a-b", "", "1a", "a\n"])
def test_an_axis_name_that_the_text_cannot_say_is_refused(name):
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B", embed=4))
    with pytest.raises(InputError):
        Builder(graph).rename(x, axis="embed", to=name)


@pytest.mark.parametrize(
    "type",
    [
        TensorType(F32, (Axis("é", 4),)),
        tensor(F32, batch="B-1"),
        tensor(F32, batch=""),
        tensor(F32, batch=-1),
        tensor(F32, batch=10**18),
        TensorType(F32, (Axis("a", 2), Axis("a", 2))),
        TensorType(F32, (Axis("a", 2, ("x",)), Axis("b", 2, ("x",)))),
        TensorType(F32, (Axis("a", 2, ("x*y",)),)),
        TensorType(F32, (), ("a b",)),
    ],
    ids=str,
)
def test_a_type_that_the_text_cannot_say_is_refused(type):
    with pytest.raises(InputError, match="the type cannot be printed"):
        Graph().input("x", type)
    with pytest.raises(InputError, match="the type cannot be printed"):
        Graph().param("x", type)


def test_attributes_equal_to_their_defaults_are_not_printed():
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B", expert=4))
    graph.set_output("y", Builder(graph).route(x, top_k=2, gates="renormalised")[1])
    line = next(s for s in print_graph(graph).splitlines() if "route" in s)
    assert "{top_k=2}" in line
