"""Whatever the text, the parser returns a graph or raises ParseError that points at the place."""

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moecc.ir import ParseError, parse, print_graph, verify
from moecc.testing import graphs

PLACE = re.compile(r"^<text>:(\d+):(\d+)$")


def check_error(error, text):
    """Check that each problem has a line, a column and a caret below that place."""
    assert error.problems
    lines = text.split("\n")
    for problem in error.problems:
        match = PLACE.match(problem.where or "")
        assert match, problem.where
        line, column = int(match[1]), int(match[2])
        assert 1 <= line <= len(lines)
        assert 1 <= column <= len(lines[line - 1]) + 1
        *_, excerpt, caret = problem.message.split("\n")
        assert excerpt.startswith(f"{line:5} | ")
        assert re.fullmatch(r"      \| *\^", caret)
        assert len(caret) <= len(excerpt) + 1


def parse_or_check(text):
    """Return the graph, or check the error and how long it took to find."""
    start = time.perf_counter()
    try:
        return parse(text)
    except ParseError as error:
        assert time.perf_counter() - start < 1
        check_error(error, text)
        return None


@given(st.text(max_size=200))
@example("")
@example("moecc 1")
@example("moecc 1\ngraph g {")
@example("moecc 1\ngraph g {\n")
@example("\x00")
@example("moecc 1\ngraph g {\n  %")
@example("moecc 1\ngraph g {\n  attr a = [\n}\n")
@example("moecc 1\ngraph g {\n  attr a = " + "[" * 100_000 + "\n}\n")
@example("moecc 1\ngraph g {\n  attr a = " + "9" * 5_000 + "\n}\n")
@example("moecc 1\ngraph g {\n  param %w : f32[a=2] = \n}\n")
def test_random_text(text):
    parse_or_check(text)


@given(graphs(max_steps=4), st.data())
def test_mutated_text(graph, data):
    text = print_graph(graph)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        drop = data.draw(st.integers(0, 5))
        put = data.draw(st.text('%@{}()[]=:,#"\\ \nab0-.é\u202e', max_size=3))
        text = text[:at] + put + text[at + drop :]
    again = parse_or_check(text)
    if again is not None and again.output_names:
        verify(again)


def body(*lines):
    head = ("moecc 1", "graph g {", "  input %x : f32[batch=B, embed=4]")
    return "\n".join((*head, *(f"  {line}" for line in lines), "}", ""))


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        (body("%y = silu %z : f32[batch=B]"), 4, 13, "%z is not defined"),
        (body("%y = sulu %x : f32[batch=B]"), 4, 8, "unknown operation 'sulu'"),
        (body("%y = silu %x : f32[batch=B]"), 4, 18, "does not follow from its operands"),
        (body("%y = silu %x, %x : f32[batch=B]"), 4, 8, "silu takes other operands"),
        (body("%y = scale %x {bye=2} : f32[batch=B]"), 4, 8, "scale has no attribute 'bye'"),
        (body("%y = scale %x {by} : f32[batch=B]"), 4, 17, "not an attribute"),
        (body("%y = scale %x {by=1, by=2} : f32[]"), 4, 17, "attribute 'by' is defined twice"),
        (body("%y silu %x : f32[batch=B]"), 4, 6, "expected ="),
        (body("%x = silu %x : f32[batch=B, embed=4]"), 4, 3, "%x is defined twice"),
        (body("%a, %a = route %x : f32[]"), 4, 3, "a node defines one value twice"),
        (body("input %y : f33[batch=B]"), 4, 14, "unknown element type 'f33'"),
        (body("input %y : float32[batch=B]"), 4, 14, "did you mean 'f32'?"),
        (body("input %y : f32[batch=4.5]"), 4, 14, "not a size"),
        (body("input %y : f32[a=2, a=3]"), 4, 14, "two axes have the same name"),
        (body("input %y : f32[a@m=2, b@m=3]"), 4, 14, "a mesh axis is used twice"),
        (body("input %y : f32[slot=ragged(%q)]"), 4, 14, "%q is not defined"),
        (body('param %w : f32[a=2] = source("w" : f32[b=2])'), 4, 23, "has other axes"),
        (body("inptu %y : f32[]"), 4, 3, "unknown statement 'inptu'"),
        (body("output y = %x", "output y = %x"), 5, 10, "output 'y' is defined twice"),
        (body("attr a = {"), 4, 13, "not JSON"),
        ("moecc 2\ngraph g {\n}\n", 1, 7, "format 2 is not supported"),
        ("moeccc 1\n", 1, 1, "expected 'moecc 1' at the start of the text"),
        ("moecc 1\ngraph g {\n}\nmore\n", 4, 1, "text after the graph"),
        ("moecc 1\ngraph g {\n", 3, 1, "the graph has no closing brace"),
        ("moecc 1\ngraph g {\n  $\n}\n", 3, 3, "expected a statement, found '$'"),
    ],
)
def test_the_place_and_the_message(text, line, column, message):
    with pytest.raises(ParseError) as caught:
        parse(text, "model.moe")
    first = caught.value.problems[0]
    assert message in str(first)
    assert first.where == f"model.moe:{line}:{column}"


def test_every_wrong_line_is_reported_and_what_depends_on_it_is_not():
    text = body(
        "%a = sulu %x : f32[batch=B]",
        "%b = silu %a : f32[batch=B]",
        "%c = rulu %x : f32[batch=B]",
        "%d = add %b, %c : f32[batch=B]",
        "output y = %d",
    )
    with pytest.raises(ParseError) as caught:
        parse(text)
    assert [p.where for p in caught.value.problems] == ["<text>:4:8", "<text>:6:8"]


def test_control_characters_do_not_reach_the_terminal():
    with pytest.raises(ParseError) as caught:
        parse(body("%y = silu %x \x1b[31m\u202e : f32[batch=B]"))
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
