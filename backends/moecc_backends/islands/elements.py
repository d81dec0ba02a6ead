"""Which equations work element by element, and what formulas call them."""

from __future__ import annotations

import numpy as np

from moecc.ir.formula import FUNCTIONS
from moecc_backends.islands.jaxprs import Equation, Jaxpr, callee, opened
from moecc_backends.islands.structural import STRUCTURAL
from moecc_backends.reference.elementwise import FORMULAS

_SAME_NAME = FUNCTIONS.keys() - {
    "sigmoid", "maximum", "minimum", "less", "less_equal", "greater", "greater_equal", "equal",
    "not_equal", "relu", "relu6", "logaddexp", "where", "round", "wide", "narrow",
}  # fmt: skip
"""Functions that formulas call as jax calls its primitives."""

_RENAMED = {
    "logistic": "sigmoid",
    "max": "maximum",
    "min": "minimum",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "eq": "equal",
    "ne": "not_equal",
    "add_any": "add",
    "integer_pow": "pow",
}

_TO_EVEN = 1
"""What rounds as formulas do, of jax's ways to round."""

LINEAR = frozenset(("add", "sub", "neg", "wide", "narrow", "stop_gradient"))
"""Functions that are linear in all operands together."""


def function_of(equation: Equation) -> str | None:
    """Return what formulas call the function of an equation, or None if it has no name there."""
    name = str(equation.primitive.name)
    if name in _SAME_NAME:
        return name
    if name == "round" and int(equation.params["rounding_method"]) == _TO_EVEN:
        return "round"
    if name == "select_n":
        return "where" if len(equation.invars) == 3 else None
    return _RENAMED.get(name)


def is_elementwise(equation: Equation) -> bool:
    """Return whether an equation works element by element, or only on shapes."""
    called = callee(equation)
    if called is not None:
        return all(map(is_elementwise, opened(called)[0].eqns))
    known = function_of(equation) is not None or equation.primitive.name in STRUCTURAL
    return known or equation.primitive.name == "custom_jvp_call"


def is_elementwise_call(jaxpr: Jaxpr) -> bool:
    """Return whether every equation of a jaxpr works so."""
    return all(map(is_elementwise, opened(jaxpr)[0].eqns))


def folded(function: str, numbers: tuple[float, ...]) -> float:
    """Return a function of formulas of numbers."""
    with np.errstate(all="ignore"):
        return float(FORMULAS[function](*numbers))
