"""The driver: fixpoint, order, what new nodes are called, and what stops it."""

import re
from collections import Counter

import pytest
from hypothesis import given

from moecc.errors import InputError
from moecc.ir import F32, Builder, Graph, tensor, verify
from moecc.rewrite import P, RewriteLimitError, Rule, find, rewrite
from moecc.testing import graphs, laws

X = P.any("x")


def operand(match, b):
    return match.value("x")


DOUBLE_NEG = Rule("double-neg", P.neg(P.neg(X)), operand)


def start(loc="here"):
    """Return a builder of a new graph, and its input."""
    graph = Graph()
    return Builder(graph, loc=loc), graph.input("x", tensor(F32, batch="B"))


def chain(*ops, loc="here"):
    b, value = start(loc)
    for name in ops:
        value = b.node(name, value).result
    b.graph.set_output("y", value)
    return b.graph


def ops(graph):
    return [n.op.name for n in graph]


def apply(graph, *rules):
    """Rewrite `graph` by rules of the pass ``t``, which leave it valid."""
    result = rewrite(graph, rules, origin="t")
    verify(graph)
    return result


def test_a_pattern_deep_above_a_change_is_tried_again():
    graph = chain("silu", "neg", "neg", "tanh", "exp", "log")
    deep = Rule("deep", P.log(P.exp(P.tanh(P.silu(X)))), lambda m, b: b.square(m.value("x")))
    apply(graph, deep, DOUBLE_NEG)
    assert ops(graph) == ["square"]


def test_losing_a_user_lets_only_used_here_match():
    b, x = start()
    shared = b.tanh(x)
    b.graph.set_output("first", b.exp(shared))
    b.graph.set_output("second", b.neg(b.neg(b.square(shared))))
    alone = Rule("alone", P.exp(P.tanh(X).only_used_here()), lambda m, b: b.log(m.value("x")))
    square = Rule("square", P.neg(P.neg(P.square(...))), lambda m, b: b.relu(x))
    apply(b.graph, alone, square)
    assert ops(b.graph) == ["log", "relu"]


def test_new_nodes_say_where_they_come_from_and_keep_the_name():
    graph = chain("silu", "neg", loc="layers.2.ffn")
    name = graph.outputs["y"].name
    apply(graph, Rule("two", P.neg(X), lambda m, b: b.scale(b.exp(m.value("x")), by=2.0)))
    assert graph.outputs["y"].name == name
    assert [n.origin for n in graph] == ["", "t/two", "t/two"]
    assert {n.loc for n in graph} == {"layers.2.ffn"}


def test_what_build_makes_and_does_not_return_is_erased():
    def wasteful(match, b):
        b.exp(b.exp(match.value("x")))
        return match.value("x")

    graph = chain("neg")
    apply(graph, Rule("wasteful", P.neg(X), wasteful))
    assert len(graph) == 0


def test_dead_nodes_stay_as_they_are():
    graph = chain("silu")
    b = Builder(graph)
    b.neg(b.neg(graph.inputs["x"]))
    minus = Rule("minus", P.neg(X), lambda m, b: b.scale(m.value("x"), by=-1.0))
    assert apply(graph, DOUBLE_NEG, minus).rewrites == 1
    assert ops(graph) == ["silu", "scale", "neg"]


def test_check_refuses_with_a_reason():
    rule = Rule("never", P.neg(P.neg(X)), operand, lambda m: f"%{m.value('x').name} is dear")
    result = apply(chain("neg", "neg"), rule)
    assert result.rewrites == 0
    (miss,) = result.near_misses
    assert (miss.reason, miss.score) == ("%x is dear", 3)


FAULTS = {
    "node": (lambda m, b: b.node("exp", m.value("x")), None, "returns a Node, expected a Value"),
    "nothing": (lambda m, b: None, None, "t/r returns a NoneType, expected a Value"),
    "capture": (lambda m, b: m.value("y"), None, "t/r at %v = neg @here: unknown capture 'y'"),
    "attribute": (
        lambda m, b: b.scale(m.value("x"), of=2),
        None,
        "%v = neg @here: scale has no",
    ),
    "check": (operand, lambda m: False, "the check of r returns a bool, expected a reason or None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_rule_does_wrong_is_named(fault):
    build, check, words = FAULTS[fault]
    rule = Rule("r", P.neg(X), build, *([check] if check else []))
    with pytest.raises((InputError, ValueError, TypeError), match=re.escape(words)):
        apply(chain("neg"), rule)


def test_rules_that_undo_each_other_are_stopped_and_named():
    there = Rule("there", P.silu(X), lambda m, b: b.gelu(m.value("x")))
    back = Rule("back", P.gelu(X), lambda m, b: b.silu(m.value("x")))
    graph = chain("silu", "tanh", "silu")
    with pytest.raises(RewriteLimitError) as caught:
        rewrite(graph, [there, back], origin="loopy")
    text = str(caught.value)
    assert "loopy/there" in text
    assert "loopy/back" in text
    assert "of 3 nodes" in text
    assert isinstance(caught.value, InputError)


def test_a_rule_that_feeds_itself_is_named_with_its_node():
    graph = chain("silu", loc="layers.2.ffn")
    again = Rule("again", P.silu(X), lambda m, b: b.silu(b.neg(m.value("x"))))
    with pytest.raises(RewriteLimitError) as caught:
        rewrite(graph, [again], origin="loopy", limit=5)
    (problem,) = caught.value.problems
    built = next(node for node in graph if node.op.name == "silu").result.name
    assert problem.where == "layers.2.ffn"
    assert problem.found == (
        f"loopy/again matches %{built} = silu @layers.2.ffn by loopy/again, which it built itself"
    )


def test_a_result_that_nothing_uses_is_replaced_too():
    graph = Graph()
    b = Builder(graph)
    positions = b.positions(graph.input("x", tensor(F32, seq="S")), axis="seq")
    cos, _ = b.rope(positions, axis="dim", size=4)
    graph.set_output("cos", cos)

    def parts(match, b):
        first, second = (b.rope(match.value("x"), axis="dim", size=4, theta=t) for t in (2.0, 3.0))
        return first[0], second[1]

    apply(graph, Rule("r", P.rope(X, theta=10000.0), parts))
    assert [n.attrs.get("theta") for n in graph] == [None, 2.0]
    assert graph.outputs["cos"].name == cos.name


def test_find_takes_several_rules_in_one_walk():
    graph = chain("neg", "neg", "exp", "neg")
    either = Rule("either", P.neg(P.exp(X)) | P.neg(X), operand)
    exp = Rule("exp", P.exp(X), operand)
    rules = (DOUBLE_NEG, either, exp)
    together = [match.root for match in find(graph, *rules)]
    apart = [match.root for rule in rules for match in find(graph, rule)]
    first, second, third, last = graph
    assert together == [first, second, second, third, last]
    assert Counter(together) == Counter(apart)


@given(graph=graphs())
def test_a_correct_rewrite_is_correct_everywhere(graph):
    rules = [
        DOUBLE_NEG,
        # a + b = b − (−a), where the types allow it.
        Rule(
            "add-to-sub",
            P.add(P.any("a"), P.any("b")),
            lambda m, b: b.sub(m.value("b"), b.neg(m.value("a"))),
            lambda m: None if m.value("a").type == m.value("b").type else "types differ",
        ),
    ]
    laws.check_rewrite(lambda g: rewrite(g, rules, origin="t"), graph)
