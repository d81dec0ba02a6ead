"""Graphs that repeat a body: text and structure, what the verifier refuses, names with ranges."""

from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.ir import (
    F32,
    Builder,
    Graph,
    ParseError,
    VerifyError,
    clone,
    equal,
    fingerprint,
    parse,
    print_graph,
    tensor,
    verify,
)
from moecc.ir.mesh import set_mesh
from moecc.support.ranges import element, has_range, joined, lengths
from moecc.testing import laws

TEXT = """moecc 1
graph g {
  input %x : f32[batch=B, embed=4]
  param %layers.{0..2}.w : f32[layer=3, embed=4] = full(0.5 : f32[layer=3, embed=4]) @layers.{0..2}.ffn
  param %g : f32[embed=4]
  %y, %s = scan %x, %layers.{0..2}.w, %g {over=(layer=3), carries=1, stacked=1} : f32[batch=B, embed=4], f32[layer=3, batch=B] @layers {
    input %h : f32[batch=B, embed=4]
    input %w : f32[embed=4]
    input %g : f32[embed=4]
    %n = rms_norm %h, %g {axis=embed} : f32[batch=B, embed=4] @layers.{0..2}.ffn
    %a = mul %n, %w : f32[batch=B, embed=4] @layers.{0..2}.ffn
    %o = add %h, %a : f32[batch=B, embed=4] @layers.{0..2}.ffn by test/fold
    %m = mean %o {axes=embed} : f32[batch=B] @layers.{0..2}.ffn
    output h = %o
    output m = %m
  }
  %z = silu %y : f32[batch=B, embed=4]
  output z = %z
  output s = %s
}
"""  # noqa: E501


def body_of(graph):
    (found,) = (node.body for node in graph if node.body is not None)
    return found


def test_the_text_is_the_graph():
    graph = parse(TEXT)
    laws.check_graph(graph)
    assert print_graph(graph) == TEXT
    body = body_of(graph)
    assert [v.name for v in body.inputs.values()] == ["h", "w", "g"]
    assert body.output_names == ["h", "m"]
    assert not set(body) & set(body_of(clone(graph))), "a copy has a body of its own"


CHANGES = {
    "an operand of a norm": {"rms_norm %h, %g": "rms_norm %h, %w"},
    "an operand of a product": {"mul %n, %w": "mul %h, %w"},
    "one more output": {
        "output m = %m": "output m = %m\n    output a = %o",
        "%y, %s = ": "%y, %s, %t = ",
        "f32[layer=3, batch=B] @": "f32[layer=3, batch=B], f32[layer=3, batch=B, embed=4] @",
    },
    "an attribute": {"carries=1, stacked=1}": "carries=1, stacked=1, remat=full}"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_body_says_counts(change):
    text = TEXT
    for old, new in CHANGES[change].items():
        text = text.replace(old, new)
    graph, other = parse(TEXT), parse(text)
    verify(other)
    assert not equal(graph, other)
    assert fingerprint(graph) != fingerprint(other)


ERRORS = {
    "a scan within a scan": (
        "    output h = %o\n",
        "    %q = scan %o {over=(layer=2), carries=1} : f32[batch=B, embed=4] {\n"
        "      input %i : f32[batch=B, embed=4]\n      output i = %i\n    }\n    output h = %o\n",
    ),
    "unknown statement 'param'": ("    input %w :", "    param %w :"),
    "the inputs of the body are not its operands": ("input %w : f32[embed=4]", "input %w : f32[]"),
    "a carry leaves the body with another type": ("output h = %o", "output h = %m"),
    "operand 1 is stacked and has no axis layer=2": ("over=(layer=3)", "over=(layer=2)"),
    "a scan runs along one axis of known size": ("over=(layer=3)", "over=(layer=L)"),
    "a scan has carries, then stacked operands": ("stacked=1", "stacked=3"),
    "names are saved under remat=save alone": ("stacked=1", "stacked=1, save=(combine)"),
    "the type of scan does not follow": ("f32[layer=3, batch=B] @layers", "f32[layer=3] @layers"),
    "%nowhere is not defined": ("mul %n, %w", "mul %n, %nowhere"),
    "expected {, found '%z'": (TEXT[TEXT.index(" {\n    input") : TEXT.index("\n  %z")], ""),
}


@pytest.mark.parametrize("message", ERRORS)
def test_a_wrong_text_is_told_with_its_place(message):
    old, new = ERRORS[message]
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    with pytest.raises(ParseError) as caught:
        parse(text)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert str(problem.where).startswith("<text>:")


def test_the_verifier_looks_into_bodies():
    graph = parse(TEXT)
    body = body_of(graph)
    first, second, *_ = body
    first.move_before(next(n for n in body if n.op.name == "add"))
    with pytest.raises(VerifyError, match="used before it is defined") as caught:
        verify(graph)
    where = str(caught.value.problems[0].where)
    assert "scan" in where
    assert second.op.name in where


def test_a_body_is_made_by_hand():
    body = Graph("body")
    h = body.input("h", tensor(F32, batch="B"))
    body.set_output("h", Builder(body).silu(h))
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B"))
    graph.set_output("y", Builder(graph).scan(x, over=(("layer", 4),), carries=1, body=body)[0])
    laws.check_graph(graph)
    with pytest.raises(InputError, match="a graph, in braces after the line"):
        Builder(graph).scan(x, over=(("layer", 4),), carries=1, body="body")


def test_rows_of_experts_do_not_leave_a_body():
    body = Graph("body")
    tokens = body.input("tokens", tensor(F32, batch="B", expert=2))
    b = Builder(body)
    experts, _ = b.route(tokens, top_k=1)
    slots = b.assign_slots(experts, tokens="batch", experts=2)
    rows = b.dispatch(b.sum(tokens, axes="expert"), experts, slots)
    body.set_output("rows", rows)
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B", expert=2))
    with pytest.raises(InputError, match="values with extents cannot enter or leave"):
        Builder(graph).scan(x, over=(("layer", 4),), body=body)


def test_stack_and_index():
    graph = Graph()
    x, y = (graph.input(n, tensor(F32, batch="B", embed=2)) for n in "xy")
    b = Builder(graph)
    stacked = b.stack(x, y, axis="layer")
    assert str(stacked.type) == "f32[layer=2, batch=B, embed=2]"
    assert b.index(stacked, axis="layer", at=1).type == y.type
    for at in (-1, 2):
        with pytest.raises(InputError, match="there is no position"):
            b.index(stacked, axis="layer", at=at)
    with pytest.raises(InputError, match="stacked values must have one type"):
        b.stack(x, stacked, axis="new")
    with pytest.raises(InputError, match="there is an axis 'embed' already"):
        b.stack(x, y, axis="embed")


PIECES = st.lists(
    st.sampled_from(["a", ".", "layers", "e-", "{", "}", "..", "%", "{0..1}"]) | st.integers(0, 30),
    max_size=6,
)


@given(PIECES, st.integers(0, 5), st.integers(-1, 3), st.integers(2, 5))
@example(["layers.", 0, ".ffn"], 0, 1, 3)
@example([1.5], 0, 1, 2)
def test_a_range_stands_for_its_elements(pieces, start, step, count):
    texts = [
        "".join(str(start + p + i * step) if isinstance(p, int) else str(p) for p in pieces)
        for i in range(count)
    ]
    whole = joined(texts)
    if whole is None:
        numbers = any(isinstance(p, int) for p in pieces)
        assert (numbers and step <= 0) or any(map(has_range, texts)) or "-" in "".join(texts) or (
            any(isinstance(a, int) and isinstance(b, int) for a, b in pairwise(pieces))
        )  # fmt: skip
        return
    assume(not any(map(has_range, texts)))
    assert [element(whole, i) for i in range(count)] == texts
    assert lengths(whole) <= {count}


def test_a_body_lies_on_the_mesh_of_its_graph():
    text = TEXT.replace("graph g {\n", 'graph g {\n  attr mesh = {"data": 2}\n')
    text = text.replace("batch=B", "batch@data=B")
    graph = parse(text)
    laws.check_graph(graph)
    assert print_graph(graph) == text
    body_of(graph).attrs["mesh"] = {"data": 4}
    with pytest.raises(VerifyError, match="the body has another mesh"):
        verify(graph)
    set_mesh(graph, None)
    with pytest.raises(VerifyError, match="data"):
        verify(graph)
