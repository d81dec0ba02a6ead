"""Rules for arithmetic on constants, in float64 as the reference does it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import copysign, isfinite

from moecc.ir.builder import Builder
from moecc.ir.graph import Node, Value
from moecc.rewrite import Match, P, Rule

# Only operations that IEEE 754 rounds correctly: their result is the same everywhere.
_BINARY: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "maximum": max,
    "minimum": min,
}


def _folded(node: Node) -> float:
    values = [v.node.attrs["value"] for v in node.operands if v.node is not None]
    if node.op.name == "neg":
        return -float(values[0])
    if node.op.name == "scale":
        return float(values[0] * node.attrs["by"])
    return float(_BINARY[node.op.name](values[0], values[1]))


def _is_foldable(match: Match) -> str | None:
    if not match.root.result.type.dtype.is_float:
        return "whole numbers may overflow"
    value = _folded(match.root)
    # An attribute cannot be −0.
    if isfinite(value) and (value != 0 or copysign(1, value) > 0):
        return None
    return f"the result would be {value}"


def _fold(match: Match, b: Builder) -> Value:
    root = match.root
    return b.constant(value=_folded(root), dtype=root.result.type.dtype.name)


def _is_float(match: Match) -> str | None:
    type = match.root.result.type
    return None if type.dtype.is_float else f"%{match.root.result.name} is {type}"


def _scale(match: Match, b: Builder) -> Value:
    return b.scale(match.value("x"), by=match.attr("value"))


_constant = P.constant()

RULES = (
    Rule(
        "fold-constants",
        P.op(("neg", "scale"), _constant) | P.op(_BINARY, _constant, _constant),
        _fold,
        _is_foldable,
    ),
    # x · c is a scale, which says more.
    Rule(
        "mul-by-constant", P.mul(P.any("x"), P.constant(value=P.attr("value"))), _scale, _is_float
    ),
)
