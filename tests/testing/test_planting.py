"""Planting: what a pattern describes is there, whatever it describes; and nothing else is lost."""

import pytest
from moecc_passes.cleanup import AXIS_RULES as AXES
from moecc_passes.cleanup import ELEMENTWISE_RULES as ELEMENTWISE

from moecc.ir import verify
from moecc.rewrite import P, Rule, find
from moecc.testing import random_graph

_x = P.any("x")

PATTERNS = {
    "a block": P.contract(
        P.mul(
            P.silu(P.contract(_x, P.param("g"), over="embed")).only_used_here(),
            P.contract(_x, P.param("u"), over="embed"),
        ),
        P.param("d"),
        over="mlp",
    ),
    "rows in slots": P.combine(
        P.contract(P.any("r"), P.param("w")), P.any("e"), P.any("p"), P.any("g")
    ),
    "slots": P.assign_slots(P.op("route", ...), ...),
    "rotary tables, the second result": P.rotate(
        _x, P.rope(P.positions(P.any())), P.rope(P.any()).result(1)
    ),
    "a number in a predicate": P.scale(P.add(P.any(), P.param("b")), by=lambda v: v == 0.625),
    "attributes that must agree": P.rename(
        P.rename(_x, axis=P.attr("a"), to=P.attr("b")), axis=P.attr("b"), to=P.attr("a")
    ),
    "the same value twice": P.sub(_x, _x),
    "one of two": P.neg(P.relu(_x) | P.square(_x)),
}


def matches(rule, planted, seeds):
    """Return the first match of a rule in each valid graph where something is planted."""
    drawn = [random_graph(seed, like=[planted]) for seed in range(seeds)]
    for graph in drawn:
        verify(graph)
    return [match for graph in drawn if (match := next(find(graph, rule), None))]


@pytest.mark.parametrize("name", PATTERNS)
def test_what_a_pattern_describes_is_there(name):
    rule = Rule(name, PATTERNS[name], build=lambda m, b: m.root.result)
    assert len(matches(rule, PATTERNS[name], 12)) >= 7


@pytest.mark.parametrize("rule", [*AXES, *ELEMENTWISE], ids=lambda r: r.name)
def test_what_a_rule_accepts_is_there(rule):
    """The rule's check included: axes that are split as they were merged, say."""
    assert len(matches(rule, rule, 25)) >= 3


def test_values_inside_are_at_times_used_elsewhere_and_at_times_returned():
    pattern = P.scale(P.contract(_x, P.param("w")), by=P.attr("by"))
    rule = Rule("inside", pattern, build=lambda m, b: m.root.result)
    inside = [match.root.operands[0] for match in matches(rule, pattern, 150)]
    returned = [v for v in inside if v.is_output]
    shared = [v for v in inside if len(v.users) > 1 and not v.is_output]
    assert len(inside) > 135
    assert 7 < len(returned) < 90
    assert shared
