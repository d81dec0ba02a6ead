"""What the names of formulas are in JAX (`moecc.ir.formula`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moecc.ir.formula import Formula
from moecc_backends.xla.trace.dtypes import accumulator

Term = Any
"""An array, or a number that takes the type of the array beside it."""


def evaluate(formula: Formula, x: jax.Array) -> jax.Array:
    """Return a formula of each element of `x`, in the type of `x`."""
    functions = {**FUNCTIONS, "narrow": lambda v: v.astype(x.dtype)}
    made: Term = formula.evaluate(functions, x)
    return jnp.asarray(made, x.dtype)


def _where(condition: jax.Array, a: Term, b: Term) -> jax.Array:
    first, second = _alike(a, b)
    return jnp.where(condition, first, second)


def _alike(*terms: Term) -> list[Any]:
    """Return numbers as the type of the arrays among them, which they must not widen."""
    dtype = next((x.dtype for x in terms if isinstance(x, jax.Array)), None)
    return [x if isinstance(x, jax.Array) else jnp.asarray(x, dtype) for x in terms]


def _of_all(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *terms: function(*_alike(*terms))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "neg": jnp.negative,
    "abs": jnp.abs,
    "sign": jnp.sign,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "tanh": jnp.tanh,
    "asinh": jnp.arcsinh,
    "acosh": jnp.arccosh,
    "atanh": jnp.arctanh,
    "sigmoid": lax.logistic,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "cbrt": jnp.cbrt,
    "square": jnp.square,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "stop_gradient": lax.stop_gradient,
    "wide": lambda x: x.astype(accumulator(x.dtype)),
    "add": _of_all(jnp.add),
    "sub": _of_all(jnp.subtract),
    "mul": _of_all(jnp.multiply),
    "div": _of_all(jnp.divide),
    "pow": lambda x, y: lax.integer_pow(x, int(y)) if _is_whole(y) else jnp.power(*_alike(x, y)),
    "maximum": _of_all(jnp.maximum),
    "minimum": _of_all(jnp.minimum),
    "atan2": _of_all(jnp.arctan2),
    "logaddexp": _of_all(jnp.logaddexp),
    "clamp": lambda low, x, high: lax.clamp(*_alike(low, x, high)),
    "less": _of_all(jnp.less),
    "less_equal": _of_all(jnp.less_equal),
    "greater": _of_all(jnp.greater),
    "greater_equal": _of_all(jnp.greater_equal),
    "equal": _of_all(jnp.equal),
    "not_equal": _of_all(jnp.not_equal),
    "and": jnp.logical_and,
    "or": jnp.logical_or,
    "xor": jnp.logical_xor,
    "not": jnp.logical_not,
    "where": _where,
}
"""By name; ``narrow`` depends on the operand."""


def _is_whole(power: Term) -> bool:
    return isinstance(power, float) and power == int(power) and abs(power) < 64
