"""Jaxprs as the versions of jax have them: their parts, and the evaluation of some equations.

What jax calls an equation, a variable and a jaxpr has no public type, so they are `Any` here; this
module alone knows how versions differ, and calls what has no annotations (pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Jaxpr = Any
Equation = Any
Atom = Any
Aval = Any
Tracer = Any
AnyArray = Any
"""An array, of jax or NumPy, or the tracer of one."""

CALLS = frozenset(("jit", "pjit", "closed_call", "core_call"))
"""Primitives whose jaxpr stands for itself, called."""


def trace(function: Callable[..., Any], avals: Sequence[Aval]) -> tuple[Jaxpr, Any]:
    """Return the jaxpr of `function`, whose arguments are arrays, and the shapes of its result."""
    return jax.make_jaxpr(function, return_shape=True)(*avals)


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """Return a jaxpr with variables for its constants, and these."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()))


def shape_of(shape: Sequence[int], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Return an array without its elements."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def is_literal(atom: Atom) -> bool:
    """Return whether `atom` is a value written into its equation."""
    return isinstance(atom, core.Literal)


def float_bits(dtype: Any) -> tuple[int, int]:
    """Return the bits of the fraction and of the exponent of a floating-point type."""
    found = jnp.finfo(dtype)
    return int(found.nmant), int(found.nexp)


def callee(equation: Equation) -> Jaxpr | None:
    """Return the jaxpr of a plain call; None for every other equation."""
    if equation.primitive.name not in CALLS:
        return None
    return equation.params.get("jaxpr") or equation.params.get("call_jaxpr")


def inner_jaxprs(equation: Equation) -> list[Jaxpr]:
    """Return the jaxprs among the parameters of an equation."""
    found = []
    for value in equation.params.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        found += [part for part in parts if hasattr(part, "eqns") or hasattr(part, "jaxpr")]
    return found


def contains(jaxpr: Jaxpr, primitive: str, seen: dict[int, bool] | None = None) -> bool:
    """Return whether an equation of `primitive` is in a jaxpr, at any depth."""
    memo = {} if seen is None else seen
    inner, _ = opened(jaxpr)
    key = id(inner)
    if key not in memo:
        memo[key] = any(
            e.primitive.name == primitive
            or any(contains(sub, primitive, memo) for sub in inner_jaxprs(e))
            for e in inner.eqns
        )
    return memo[key]


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many operands of a ``scan`` are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()
    return len(consts), len(carried)


def evaluate(
    equations: Sequence[Equation],
    given: Mapping[Any, Tracer],
    wanted: Sequence[Any],
    like: Jaxpr,
) -> list[Tracer]:
    """Evaluate `equations` of the jaxpr `like` as they are; return what is `wanted` of them.

    Args:
      equations: in order.
      given: values of the variables that they use and do not define, by variable.
      wanted: variables that they define.
      like: the jaxpr that they are of.
    """
    effects = frozenset().union(*(e.effects for e in equations))
    part = like.replace(
        constvars=[],
        invars=list(given),
        outvars=list(wanted),
        eqns=list(equations),
        effects=effects,
        debug_info=like.debug_info.with_unknown_names(),
    )
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*given.values()))
