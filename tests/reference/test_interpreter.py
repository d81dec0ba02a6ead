"""The interpreter: what it asks of arrays, what it returns, and what lies beyond ragged extents."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_backends.reference import ReferenceBackend

from moecc.backend import get_backend
from moecc.errors import InputError
from moecc.ir import BF16, F32, I32, OPS, PRED, Builder, Graph, OpDef, tensor
from moecc.testing import graphs, inputs_for, params_for, run_reference, sizes_for
from moecc.testing.data import shape_of


def mixture():
    """Return a mixture of three experts whose rows, activations and result are outputs."""
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F32, batch="B", embed=4))
    router = graph.param("router", tensor(F32, expert=3, embed=4))
    up = graph.param("up", tensor(F32, expert=3, mlp=5, embed=4))
    down = graph.param("down", tensor(F32, expert=3, embed=4, mlp=5))
    experts, gates = b.route(b.contract(x, router, over="embed"), top_k=2)
    slots = b.assign_slots(experts, tokens="batch", experts=3)
    rows = b.dispatch(x, experts, slots)
    hidden = b.silu(b.contract(rows, up, over="embed"))
    y = b.combine(b.contract(hidden, down, over="mlp"), experts, slots, gates)
    for name, value in {"rows": rows, "hidden": hidden, "experts": experts, "y": y}.items():
        graph.set_output(name, value)
    return graph


def test_it_computes_in_float64_whatever_is_asked():
    graph = Graph()
    x = graph.input("x", tensor(BF16, a=2))
    graph.set_output("y", Builder(graph).scale(x, by=1 / 3))
    program = get_backend("reference").compile(graph, dtype=BF16)
    found = program.run({}, {"x": np.array([1, 3], ml_dtypes.bfloat16)})["y"]
    assert found.dtype == np.float64
    assert found.tolist() == [1 / 3, 3 * (1 / 3)]


def test_all_that_is_wrong_with_the_arrays_is_reported_at_once():
    graph = Graph()
    b = Builder(graph)
    ids = graph.input("ids", tensor(I32, batch="B", seq="S"))
    mask = graph.input("mask", tensor(PRED, batch="B", seq="S"))
    w = graph.param("w", tensor(F32, vocab=7, embed=2))
    v = graph.param("v", tensor(F32, embed=2))
    y = b.mul(b.embedding(w, ids, axis="vocab"), v)
    graph.set_output("y", b.mask(y, mask))
    arrays = {"ids": np.zeros((2, 3)), "mask": np.ones((2, 4), bool)}
    with pytest.raises(InputError) as caught:
        get_backend("reference").compile(graph).run({"W": 1, "v": np.ones((2, 2))}, arrays)
    assert [(p.where, p.message, p.expected, p.found) for p in caught.value.problems] == [
        (
            "input %ids",
            "the array has elements of another kind",
            "i32[batch=B, seq=S]",
            "float64[2, 3]",
        ),
        ("input %mask", "the size S is 3 in input %ids", "pred[batch=B, seq=S]", "bool[2, 4]"),
        ("param %w", "the array is missing", "f32[vocab=7, embed=2]", None),
        ("param %v", "the array has another number of axes", "f32[embed=2]", "float64[2, 2]"),
    ]


def test_an_operation_without_a_meaning_is_refused_before_running():
    graph = Graph()
    x = graph.input("x", tensor(F32, a=2))
    strange = OpDef("strange", "Nobody knows.", ("x",), lambda o, _a: (o[0].type,))
    graph.set_output("y", graph.append(strange, [x], loc="layers.0").results[0])
    with pytest.raises(InputError, match="no meaning for this operation") as caught:
        get_backend("reference").compile(graph)
    assert caught.value.problems[0].where == "%v = strange @layers.0"


def test_beyond_ragged_extents_there_is_nothing():
    graph = mixture()
    found = run_reference(graph, seed=3)
    counts = np.bincount(found["experts"].ravel(), minlength=3)
    assert found["rows"].shape[2] == counts.max()
    for expert, count in enumerate(counts):
        for name in ("rows", "hidden"):
            assert np.isfinite(found[name][0, expert, :count]).all()
            assert np.isnan(found[name][0, expert, count:]).all()
    assert np.isfinite(found["y"]).all()


def test_what_is_broadcast_along_a_ragged_axis_ends_with_it():
    graph = mixture()
    b = Builder(graph)
    rows = graph.outputs["rows"]
    one = b.constant(value=1.0)
    made = {
        "ones": b.broadcast(one, rows),
        "sum": b.maximum(b.mask(rows, b.less(rows, rows), fill=7.0), one),
        "hot": b.one_hot(b.cast(rows, dtype="i32"), into=(("new", 2),)),
    }
    for name, value in made.items():
        graph.set_output(name, value)
    found = run_reference(graph, seed=3)
    beyond = np.isnan(found["rows"][..., 0])
    assert beyond.any()
    for name in made:
        nothing = np.isnan(found[name])
        assert nothing[beyond].all()
        assert not nothing[~beyond].any()


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("sum", {"axes": "slot"}),
        ("softmax", {"axis": "slot"}),
        ("contract", {"over": "slot"}),
        ("merge", {"axes": ("slot", "embed"), "into": "all"}),
        ("positions", {"axis": "slot"}),
        ("sum", {"axes": "expert"}),
        ("slice", {"axis": "expert", "start": 0, "stop": 1}),
        ("rename", {"axis": "group", "to": "other"}),
        ("route", {"top_k": 1}),
    ],
)
def test_mixing_the_rows_of_a_ragged_axis_is_a_type_error(op, attrs):
    graph = mixture()
    operands = [graph.outputs["rows"]] * len(OPS[op].operands)
    with pytest.raises(InputError, match="slot"):
        Builder(graph).node(op, *operands, **attrs)


@given(graphs(dead=True), st.integers(0, 3))
def test_every_array_has_the_axes_and_sizes_of_its_type(graph, seed):
    sizes = sizes_for(graph, seed)
    program, seen = ReferenceBackend().compile(graph), {}
    arrays = params_for(graph, seed, sizes), inputs_for(graph, seed, sizes)
    for value, array in program.trace(*arrays):
        seen[value] = array
        assert array.axes == value.type.names
        assert array.dtype == value.type.dtype
        kinds = {"float": "f", "int": "i", "bool": "b", "key": "u"}
        assert array.data.dtype.kind == kinds[value.type.dtype.kind]
        if not value.type.extents:
            assert array.data.shape == shape_of(value.type, sizes)
        for extent in value.type.extents:
            assignment = seen[extent.value].assignment
            counted = len(assignment.extents) if extent.kind == "groups" else assignment.slots
            assert {array.size(a.name) for a in value.type if a.size == extent} == {counted}
    assert set(seen) >= {v for n in graph for v in n.results} | set(graph.outputs.values())
