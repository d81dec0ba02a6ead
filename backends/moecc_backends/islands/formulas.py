"""Formulas of blocks: which functions of elements are activations by name, and which are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp

from moecc.ir.formula import Call, Formula
from moecc_backends.islands.dag import Apply, Axes, Input, Misfit, Node, Sym
from moecc_backends.islands.jaxprs import (
    AnyArray,
    Jaxpr,
    evaluate,
    is_literal,
    opened,
    shape_of,
    trace,
)
from moecc_backends.islands.scopes import Scope, Step, Val, fill
from moecc_backends.islands.symbols import Custom, Symbols
from moecc_backends.xla.trace.typed_jax import Function

CUSTOM: dict[str, Function] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "logaddexp": jnp.logaddexp,
}
"""Functions of jax with a derivative of their own, which formulas name."""

ACTIVATIONS: dict[str, Callable[[AnyArray], AnyArray]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "exp": jnp.exp,
    "log": jnp.log,
    "square": jnp.square,
    "rsqrt": jax.lax.rsqrt,
}
"""Activations that are operations, as jax has them."""


def formula_of(node: Node, base: Node) -> Formula:
    """Return `node`, a function of the elements of `base`, as a formula."""
    numbers: dict[int, int] = {id(base): 0}
    steps: list[Call] = []

    def number(x: Node | float) -> int | float:
        if isinstance(x, float):
            return x
        if id(x) not in numbers:
            assert isinstance(x, Apply), "a formula is made of functions"
            steps.append(Call(x.function, tuple(map(number, x.operands))))
            numbers[id(x)] = len(steps)
        return numbers[id(x)]

    result = number(node)
    assert isinstance(result, int)
    return Formula(tuple(steps), result)


@lru_cache(maxsize=8)
def activations(dtype: str) -> Mapping[str, str]:
    """Return operations by the formulas that jax's functions have in an element type."""
    found: dict[str, str] = {}
    for name, function in ACTIVATIONS.items():
        jaxpr, _ = trace(function, [shape_of((3,), dtype)])
        base, (made,) = _symbols(jaxpr, custom_function)
        assert isinstance(made.node, Node)
        found[str(formula_of(made.node, base[0]))] = name
    return found


def custom_function(step: Step) -> str | None:
    """Return the name of a function of `CUSTOM` that a step calls, derivative included."""
    atoms = step.equation.invars
    if any(not jnp.issubdtype(a.aval.dtype, jnp.floating) for a in atoms):
        return None
    numbers = tuple(float(a.val) if is_literal(a) else None for a in atoms)
    variables = [a for a in atoms if not is_literal(a)]
    avals = tuple((tuple(a.aval.shape), str(a.aval.dtype)) for a in variables)

    def called(*given: AnyArray) -> AnyArray:
        outs = step.equation.outvars
        values = dict(zip(variables, given, strict=True))
        return evaluate([step.equation], values, outs, step.frame.jaxpr)[0]

    found = _spelled(called, avals)
    if found is None:
        return None
    return next((name for name in CUSTOM if _known(name, numbers, avals) == found), None)


Avals = tuple[tuple[tuple[int, ...], str], ...]


@lru_cache(maxsize=64)
def _known(name: str, numbers: tuple[float | None, ...], avals: Avals) -> tuple[str, ...] | None:
    if (name == "logaddexp") != (len(numbers) == 2):
        return None

    def called(*given: AnyArray) -> AnyArray:
        left = iter(given)
        return CUSTOM[name](*(next(left) if n is None else n for n in numbers))

    return _spelled(called, avals)


def _spelled(function: Function, avals: Avals) -> tuple[str, ...] | None:
    """Return a function and its derivative as text; None where they are no formulas."""
    count = len(avals)

    def with_derivative(*given: AnyArray) -> AnyArray:
        return jax.jvp(function, given[:count], given[count:])

    jaxpr, _ = trace(with_derivative, [shape_of(*a) for a in avals] * 2)
    try:
        inputs, made = _symbols(jaxpr, None)
    except Misfit:
        return None
    names = {id(x): f"x{i}" for i, x in enumerate(inputs)}
    return tuple(_spell(s.node, names) for s in made)


def _spell(x: Node | float, names: dict[int, str]) -> str:
    if isinstance(x, float):
        return repr(x)
    if id(x) not in names:
        assert isinstance(x, Apply)
        names[id(x)] = f"{x.function}({', '.join(_spell(o, names) for o in x.operands)})"
    return names[id(x)]


def _symbols(jaxpr: Jaxpr, custom: Custom | None) -> tuple[list[Input], list[Sym]]:
    """Run a jaxpr of elementwise equations on symbols; return its inputs and results.

    Raises:
      Misfit: it has other equations.
    """
    axes = Axes()
    values = [Val(v.aval) for v in opened(jaxpr)[0].invars]
    scope = Scope(None, None)
    fill(scope, jaxpr, values)
    # Axes are told apart by their places, counted from the last: two may have one size.
    places = [tuple(enumerate(reversed(v.shape)))[::-1] for v in values]
    named = {place: axes.new(place[1]) for one in places for place in one}
    symbols = Symbols(axes, values[0].aval.dtype, custom)
    inputs = [Input(tuple(named[place] for place in one)) for one in places]
    for value, one in zip(values, inputs, strict=True):
        symbols.values[value] = Sym(one, one.axes)
    for step in scope.steps:
        symbols.run(step)
    return inputs, [symbols.read(v) for v in scope.outputs]
