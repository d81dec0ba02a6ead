"""Rules for negations, scales, casts and gradients."""

from __future__ import annotations

from math import isfinite

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.rewrite import Match, P, Rule

_x = P.any("x")


def operand(match: Match, _builder: Builder) -> Value:
    """Build nothing: the root is its operand ``x``."""
    return match.value("x")


def same_type(match: Match) -> str | None:
    """Reject unless the root has the type of ``x``."""
    old, new = match.root.result.type, match.value("x").type
    return None if old == new else f"%{match.root.result.name} is {old}, its operand {new}"


def _product_is_safe(match: Match) -> str | None:
    a, b = match.attr("a"), match.attr("b")
    if isfinite(a * b) and (a * b != 0 or a == 0 or b == 0):
        return None
    return f"the product of {a!r} and {b!r} is out of range"


def _scale_once(match: Match, b: Builder) -> Value:
    return b.scale(match.value("x"), by=match.attr("a") * match.attr("b"))


def _is_not_zero(match: Match) -> str | None:
    # −(x · 0) is −0 where x · 0 is 0, and an attribute cannot be −0.
    return None if match.attr("a") != 0 else "the factor is 0"


def _scale_negated(match: Match, b: Builder) -> Value:
    return b.scale(match.value("x"), by=-match.attr("a"))


def _negate(match: Match, b: Builder) -> Value:
    return b.neg(match.value("x"))


def _stop_once(match: Match, b: Builder) -> Value:
    return match.value("stopped")


RULES = (
    # −(−x) is x.
    Rule("double-neg", P.neg(P.neg(_x)), operand),
    # x · 1 is x, x · (−1) is −x.
    Rule("scale-by-one", P.scale(_x, by=1.0), operand),
    Rule("scale-by-minus-one", P.scale(_x, by=-1.0), _negate),
    # (x · a) · b is x · (ab), up to one rounding.
    Rule(
        "scale-of-scale",
        P.scale(P.scale(_x, by=P.attr("a")), by=P.attr("b")),
        _scale_once,
        _product_is_safe,
        preserves="reassociation",
    ),
    # −(x · a) and (−x) · a are x · (−a).
    Rule(
        "scale-and-neg",
        P.neg(P.scale(_x, by=P.attr("a"))) | P.scale(P.neg(_x), by=P.attr("a")),
        _scale_negated,
        _is_not_zero,
    ),
    Rule("cast-to-same", P.cast(_x), operand, same_type),
    Rule("stop-gradient-twice", P.stop_gradient(P.stop_gradient(_x).named("stopped")), _stop_once),
)
