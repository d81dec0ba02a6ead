"""Recognising a node by a pattern, where nothing is rewritten."""

from moecc.ir import F32, Builder, Graph, tensor
from moecc.rewrite import P, fits


def graph():
    made = Graph("g")
    x = made.input("x", tensor(F32, batch="B"))
    b = Builder(made)
    made.set_output("y", b.add(b.scale(x, by=2.0), b.neg(x)))
    return made


def test_alternatives_are_tried_in_their_order():
    scale, neg, add = graph()
    either = P.scale(P.any("x"), by=3.0) | P.scale(P.any("x"), by=P.attr("by")) | P.neg(P.any("x"))
    found = fits(either, scale)
    assert found.attr("by") == 2.0
    assert found.root is scale
    negated = fits(either, neg)
    assert negated is not None
    assert "by" not in negated
    assert fits(either, add) is None
