"""The operation table: whatever the operands and attributes, a refusal or a type that holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.ir import (
    DTYPES,
    F32,
    I32,
    OPS,
    PRED,
    Axis,
    Builder,
    Graph,
    TensorType,
    tensor,
    verify,
)
from moecc.ir.operation import REQUIRED
from moecc.testing import laws, run_reference
from moecc.types import Extent

AXES = ("a", "b", "expert", "slot", "group")
SIZES = st.sampled_from([2, 1, 4, "N"])
KINDS = st.sampled_from(["f32", "i32", "pred", "bf16", "key"])


@st.composite
def types(draw):
    names = draw(st.lists(st.sampled_from(AXES[:3]), max_size=3, unique=True))
    dtype = DTYPES[draw(KINDS)]
    return TensorType(dtype, tuple(Axis(n, draw(SIZES)) for n in names))


NAMES = st.sampled_from([*AXES[:3], "new"])
ATTRS = {
    "int": st.integers(-1, 5),
    "float": st.sampled_from([1.0, 0.0, -1.5, float("inf"), 0.5, 1e-6]),
    "bool": st.booleans(),
    "axis": NAMES,
    "axes": st.lists(NAMES, max_size=2).map(tuple),
    "numbers": st.lists(st.floats(0.5, 2), max_size=2).map(tuple),
    "sizes": st.lists(st.tuples(NAMES, st.sampled_from([1, 2, 4, "N"])), max_size=2).map(tuple),
    "str": st.sampled_from(["f32", "i32", "pred", "key", "nothing"]),
    "words": st.just(()),
    "region": st.deferred(lambda: bodies()),
}


@st.composite
def bodies(draw):
    """Draw a body that returns what it is given, or all but the last of it."""
    body = Graph("body")
    given = draw(st.lists(types(), min_size=1, max_size=3))
    for number, type in enumerate(given):
        value = body.input(f"x{number}", type)
        if draw(st.booleans()):
            value = Builder(body).stop_gradient(value)
        body.set_output(f"y{number}", value)
    return body


@st.composite
def attributes(draw, entry):
    found = {}
    for name, spec in entry.attrs.items():
        if spec.default is REQUIRED or draw(st.booleans()):
            choices = st.sampled_from(spec.choices) if spec.choices else ATTRS[spec.kind]
            if spec.kind == "words":
                choices = st.lists(choices, max_size=3, unique=True).map(tuple)
            found[name] = draw(choices)
    return found


def routed(graph):
    """Add inputs with one shared set of axes, and slots to `graph`, so that routing is reached."""
    b = Builder(graph)
    x = graph.input("tokens", tensor(F32, a=4, b=2))
    choices = graph.input("choices", tensor(I32, a=4, choice=2))
    graph.input("gates", tensor(F32, a=4, choice=2))
    slots = b.assign_slots(choices, tokens="a", experts=2)
    rows = b.dispatch(x, choices, slots)
    bounded = b.assign_slots(choices, tokens="a", experts=2, slots="capacity", capacity_factor=1.0)
    b.dispatch(x, choices, bounded)
    b.less(rows, rows)


DATA_DEPENDENT = (
    "an index is outside the table",
    "the groups do not divide the tokens",
    "a region of JAX is computed by its function alone",
)
"""What no type can tell."""


@settings(max_examples=200)
@given(st.data())
def test_any_operands_are_refused_or_understood(data):
    # Collectives lay values on a mesh; one of one device divides everything.
    graph = Graph(attrs={"mesh": dict.fromkeys((*AXES, "new"), 1)})
    entry = OPS[data.draw(st.sampled_from(sorted(OPS)), label="operation")]
    for number in range(data.draw(st.integers(1, 3))):
        graph.input(f"x{number}", data.draw(types()))
    if data.draw(st.booleans(), label="routed"):
        routed(graph)
    values = [*graph.inputs.values(), *(v for n in graph for v in n.results)]
    attrs = data.draw(attributes(entry), label="attributes")
    more = data.draw(st.integers(0, 1)) if entry.variadic else 0
    words = attrs.get("using", attrs.get("given", "x" * more))
    count = len(entry.operands) + len(words)
    operands = data.draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
    try:
        node = graph.append(entry, operands, attrs)
    except InputError:
        return
    for number, value in enumerate(node.results):
        graph.set_output(f"y{number}", value)
    verify(graph)
    laws.check_round_trip(graph)
    try:
        found = run_reference(graph)
    except InputError as error:
        if error.problems[0].message in DATA_DEPENDENT:
            return
        raise
    for value, array in zip(node.results, found.values(), strict=True):
        assert array.ndim == value.type.rank
        for axis, size in zip(value.type.axes, array.shape, strict=True):
            assert isinstance(axis.size, str | Extent) or axis.size == size


@pytest.mark.parametrize("name", sorted(OPS))
def test_each_operation_checks_its_operands_and_attributes(name):
    entry = OPS[name]
    graph = Graph()
    x = graph.input("x", tensor(F32, a=2))
    wrong_count = len(entry.operands) + (-1 if entry.variadic else 1)
    with pytest.raises(InputError, match=f"{name} takes other operands"):
        graph.append(name, [x] * wrong_count)
    with pytest.raises(InputError, match=f"{name} has no attribute 'nonsense'"):
        entry.complete({"nonsense": 1})
    for attr, spec in entry.attrs.items():
        wrong = 0.5 if spec.kind == "int" else 7 if spec.kind != "float" else "seven"
        with pytest.raises(InputError, match=f"attribute '{attr}' of {name} is wrong"):
            entry.complete({attr: wrong})


def test_pred_has_no_arithmetic_but_selects():
    graph = Graph()
    keep = graph.input("keep", tensor(PRED, a=2))
    b = Builder(graph)
    with pytest.raises(InputError, match="arithmetic needs numbers"):
        b.add(keep, keep)
    assert b.select(keep, keep, keep).type.dtype == PRED


def test_a_policy_takes_uniform_numbers_or_none():
    graph = Graph()
    x = graph.input("x", tensor(F32, a=4, choice=2))
    for operands, policy in (([x], "random"), ([x, x], "all"), ([x, x, x], "random")):
        with pytest.raises(InputError, match="takes uniform numbers exactly with policy=random"):
            graph.append("keep_choices", operands, {"policy": policy})
