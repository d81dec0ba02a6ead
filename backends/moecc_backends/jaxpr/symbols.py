"""What a block computes, on named axes instead of dimensions: equations run on symbols.

Axes are numbers that are found to be one as equations show it.  Two axes become one only if no
value has both: an embedding times its transpose must not become square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.ir.formula import FUNCTIONS, Formula, FormulaStep
from moecc.ir.ops.elementwise import FORMULAS
from moecc_backends.jaxpr.scopes import (
    IDENTITY,
    REARRANGING,
    STRUCTURAL,
    UNKNOWN,
    Equation,
    JaxprScope,
    Variable,
    fill,
    rearranged,
)
from moecc_backends.jaxpr.views import (
    AnyArray,
    JaxEquation,
    Jaxpr,
    LeafView,
    NotABlock,
    callee,
    evaluate,
    float_bits,
    is_literal,
    opened,
    shape_of,
    trace,
)
from moecc_backends.xla.lower.elementwise import ELEMENTWISE
from moecc_backends.xla.trace.values import Function, is_float

ONE_VALUE = "a block takes one value, so apply the other before it or behind it"
MATRICES = "reshape its weights to matrices"
"""Ways out of reasons."""

# Equations that work element by element, and what formulas call them.

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

LINEAR = frozenset(("add", "sub", "neg", "wide", "narrow", "stop_gradient"))
"""Functions that are linear in all operands together."""


def function_of(eqn: JaxEquation) -> str | None:
    """Return what formulas call the function of an equation, or None if it has no name there."""
    name = str(eqn.primitive.name)
    if name == "round":
        # Formulas round to even, which is number 1 of jax's ways to round.
        return name if int(eqn.params["rounding_method"]) == 1 else None
    if name == "select_n":
        return "where" if len(eqn.invars) == 3 else None
    return name if name in _SAME_NAME else _RENAMED.get(name)


def is_elementwise(eqn: JaxEquation) -> bool:
    """Return whether an equation works element by element, or only on shapes."""
    called, name = callee(eqn), eqn.primitive.name
    if called is not None:
        return all(map(is_elementwise, opened(called)[0].eqns))
    return function_of(eqn) is not None or name in STRUCTURAL or name == "custom_jvp_call"


# Terms: what is computed.


@dataclass(frozen=True, eq=False)
class Term:
    """A value of a block; compared by identity.

    Attributes:
      axes: its axes; `Axes.find` says which of them are one.
    """

    axes: frozenset[int]


@dataclass(frozen=True, eq=False)
class InputTerm(Term):
    """The input of the block, or of a formula."""


@dataclass(frozen=True, eq=False)
class WeightTerm(Term):
    """A view of a leaf, with the number of each axis of the view by its name."""

    view: LeafView
    numbers: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class ProductTerm(Term):
    """A contraction with a weight over one axis."""

    x: Term
    weight: WeightTerm
    over: int


@dataclass(frozen=True, eq=False)
class FunctionTerm(Term):
    """A function of formulas, element by element; numbers stand for themselves."""

    function: str
    operands: tuple[Term | float, ...]


def weight_term(view: LeafView, numbers: Mapping[str, int]) -> WeightTerm:
    """Return a view of a leaf as a term."""
    return WeightTerm(frozenset(numbers.values()), view, numbers)


def function_term(function: str, *operands: Term | float) -> FunctionTerm:
    """Return a function of terms and numbers."""
    axes = frozenset[int]().union(*(x.axes for x in operands if isinstance(x, Term)))
    return FunctionTerm(axes, function, operands)


@dataclass(frozen=True)
class Symbol:
    """An array of the program: a term, and which dimension is which axis; of numbers, none."""

    term: Term | float
    dims: tuple[int | None, ...] = ()


@dataclass
class Axes:
    """Axes as numbers, of which some turn out to be one."""

    sizes: list[int] = field(default_factory=list)
    _first: list[int] = field(default_factory=list)
    _values: list[frozenset[int]] = field(default_factory=list)

    def new(self, size: int) -> int:
        """Return a new axis."""
        self.sizes.append(size)
        self._first.append(len(self._first))
        return len(self._first) - 1

    def find(self, axis: int) -> int:
        """Return the number that stands for an axis and all that are one with it."""
        while self._first[axis] != axis:
            axis = self._first[axis]
        return axis

    def find_all(self, dims: Sequence[int | None]) -> list[int]:
        """Return the numbers that stand for the axes among `dims`, in order."""
        return [self.find(axis) for axis in dims if axis is not None]

    def note(self, axes: Iterable[int]) -> None:
        """Note that a value has all of `axes`, which are therefore different."""
        self._values.append(frozenset(axes))

    def unite(self, a: int, b: int) -> int:
        """Make two axes one.

        Raises:
          NotABlock: a value has both, or they differ in size.
        """
        a, b = self.find(a), self.find(b)
        if a == b:
            return a
        if self.sizes[a] != self.sizes[b]:
            raise NotABlock(f"an axis has the sizes {self.sizes[a]} and {self.sizes[b]}")
        for axes in self._values:
            if {a, b} <= {self.find(n) for n in axes}:
                raise NotABlock("two axes of one value would have to be the same")
        self._first[max(a, b)] = min(a, b)
        return min(a, b)

    def of(self, term: Term) -> frozenset[int]:
        """Return the axes of a term, each as the number that stands for it."""
        return frozenset(map(self.find, term.axes))

    def product(self, x: Term, weight: WeightTerm, over: int) -> ProductTerm:
        """Return a contraction over an axis."""
        axes = self.of(x) | self.of(weight)
        return ProductTerm(axes - {self.find(over)}, x, weight, over)


NameCustom = Callable[[Equation], str | None]
"""Names the function with a derivative of its own that an equation calls, where it has a name."""


class Symbols:
    """Runs equations on symbols.

    Args:
      axes: the axes so far.
      dtype: the type that the block computes in.
      name_custom: names functions with derivatives of their own; None runs what they call instead.
    """

    def __init__(self, axes: Axes, dtype: Any, name_custom: NameCustom | None) -> None:
        self.axes = axes
        self.values: dict[Variable, Symbol] = {}
        self._dtype = jnp.dtype(dtype)
        self._name_custom = name_custom

    def read(self, variable: Variable) -> Symbol:
        """Return the symbol of a variable.

        Raises:
          NotABlock: it is neither of the block, nor a weight, nor a number.
        """
        symbol = self.values.get(variable) or self.values.get(variable.same)
        if symbol is not None:
            return symbol
        if variable.view is not None:
            symbol = self._weight(variable.view)
        elif variable.const is not UNKNOWN:
            data = np.asarray(variable.const)
            if data.size != 1:
                raise NotABlock("it takes an array of constants: make it a parameter")
            if not (jnp.issubdtype(data.dtype, jnp.number) or data.dtype == bool):
                raise NotABlock("it takes a constant that is no number")
            symbol = Symbol(float(data.reshape(()).astype(np.float64)))
        elif variable.equation is None or not all(map(_is_constant, variable.equation.inputs)):
            raise NotABlock(f"it takes another value from outside: {ONE_VALUE}")
        else:
            self.run(variable.equation)
            symbol = self.values[variable]
        self.values[variable] = symbol
        return symbol

    def _weight(self, view: LeafView) -> Symbol:
        """Return a weight, unless it is rounded to less than the block computes in."""
        needed = list(map(min, float_bits(self._dtype), float_bits(view.leaf.dtype.numpy)))
        for dtype in view.casts:
            if any(bits < n for bits, n in zip(float_bits(dtype), needed, strict=True)):
                raise NotABlock(
                    f"its weight {view.leaf.name} is rounded to {dtype} first: a block has leaves "
                    f"as they are; cast its input to {dtype}, too, or the leaf"
                )
        numbers = {name: self.axes.new(size) for name, size in view.sizes}
        self.axes.note(numbers.values())
        dims = tuple(n if n is None else numbers[n] for n in view.dims)
        return Symbol(weight_term(view, numbers), dims)

    def run(self, equation: Equation) -> None:
        """Find the symbols of what `equation` defines.

        Raises:
          NotABlock: it is no equation of a block.
        """
        if equation.outputs and equation.outputs[0].view is not None:
            return
        is_custom = equation.name == "custom_jvp_call"
        if callee(equation.eqn) is not None or (is_custom and self._name_custom is None):
            inside = equation.inner()
            for operand, variable in zip(equation.inputs, inside.inputs, strict=True):
                self.values[variable] = self.read(operand)
            for inner in inside.equations:
                self.run(inner)
            symbols = [self.read(variable) for variable in inside.outputs]
        else:
            symbols = self._evaluate(equation)
        self.values.update(zip(equation.outputs, symbols, strict=True))

    def _evaluate(self, equation: Equation) -> list[Symbol]:
        name = equation.name
        if name in IDENTITY:
            return [self.read(equation.inputs[0])]
        if name == "convert_element_type":
            return [self._converted(equation)]
        if name == "dot_general":
            return [self._product(equation)]
        if name in REARRANGING:
            x = self.read(equation.inputs[0])
            if isinstance(x.term, float):
                return [x for _ in equation.outputs]
            results = rearranged(self, x.term, x.dims, equation)
            return [Symbol(term, tuple(dims)) for term, dims in results]
        if name == "custom_jvp_call" and self._name_custom is not None:
            function = self._name_custom(equation)
            if function is None:
                raise NotABlock("a function with a gradient of its own is inside")
        else:
            function = function_of(equation.eqn)
        if function is None:
            raise NotABlock(f"`{name}` inside it does not work element by element")
        return [self._function(function, equation)]

    def _function(self, function: str, equation: Equation) -> Symbol:
        """Return a function of the operands of an equation, element by element."""
        symbols = [self.read(v) for v in equation.inputs]
        for dtype in (v.aval.dtype for v in equation.inputs if v.const is UNKNOWN):
            if not is_float(dtype) and dtype != np.dtype(bool):
                raise NotABlock(f"values of the type {dtype} are inside")
        if function == "where":
            # `select_n` has the value where the condition is false first.
            symbols = [symbols[0], symbols[2], symbols[1]]
        operands = [s.term for s in symbols]
        if equation.name == "integer_pow":
            operands.append(float(equation.params["y"]))
        numbers = [x for x in operands if isinstance(x, float)]
        if len(numbers) == len(operands):
            with np.errstate(all="ignore"):
                return Symbol(float(FORMULAS[function](*numbers)))
        dims: list[int | None] = [None] * max(len(s.dims) for s in symbols)
        for symbol in symbols:
            for i, axis in enumerate(symbol.dims):
                if axis is not None:
                    before = dims[i]
                    dims[i] = axis if before is None else self.axes.unite(before, axis)
        axes = self.axes.find_all(dims)
        if len(set(axes)) < len(axes):
            raise NotABlock("two axes of one value would have to be the same")
        merged = tuple(d if d is None else self.axes.find(d) for d in dims)
        return Symbol(function_term(function, *operands), merged)

    def _converted(self, equation: Equation) -> Symbol:
        """Return a cast: to a wider type and back, or of truth values to numbers."""
        x = self.read(equation.inputs[0])
        old, new = equation.inputs[0].aval.dtype, jnp.dtype(equation.params["new_dtype"])
        if isinstance(x.term, float):
            return x
        if old == np.dtype(bool) and is_float(new):
            return Symbol(function_term("where", x.term, 1.0, 0.0), x.dims)
        if not (is_float(old) and is_float(new)):
            raise NotABlock(f"a cast from {old} to {new} is inside")
        if new.itemsize < self._dtype.itemsize:
            raise NotABlock(f"a cast to {new} is inside, narrower than its input: cast that, too")
        if new.itemsize == old.itemsize or isinstance(x.term, WeightTerm | ProductTerm):
            return x
        function = "wide" if new.itemsize > old.itemsize else "narrow"
        return Symbol(function_term(function, x.term), x.dims)

    def _product(self, equation: Equation) -> Symbol:
        """Return a contraction with a weight over one axis."""
        (contracted, batch) = equation.params["dimension_numbers"]
        symbols, at = [self.read(v) for v in equation.inputs], equation.weight
        x, weight = (symbols[1 - (at or 0)].term, symbols[at or 0].term)
        if at is None or isinstance(x, WeightTerm | float):
            raise NotABlock("a product without a weight is inside")
        if batch[0]:
            raise NotABlock(
                "its weights have a matrix for each of several heads or groups: convert the "
                "function of one, and vmap the converted one"
            )
        if len(contracted[0]) != 1:
            raise NotABlock(f"a product inside sums over more than one axis, or none: {MATRICES}")
        over = [s.dims[c[0]] for s, c in zip(symbols, contracted, strict=True)]
        if over[0] is None or over[1] is None:
            raise NotABlock("a product inside sums what is repeated")
        assert isinstance(weight, WeightTerm), "it is a view of a leaf"
        term: Term = self.axes.product(x, weight, self.axes.unite(over[0], over[1]))
        self.axes.note(term.axes)
        if equation.outputs[0].aval.dtype.itemsize > self._dtype.itemsize:
            term = function_term("wide", term)
        pairs = zip(symbols, contracted, strict=True)
        return Symbol(term, tuple(d for s, c in pairs for i, d in enumerate(s.dims) if i != c[0]))

    # A part of an axis that weights alone have is a part of the weights (`scopes.rearranged`).

    def sliced(self, term: Term, axis: int, start: int, stop: int) -> tuple[Term, int]:
        """Return the part ``[start, stop)`` of an axis of weights, which is a new one."""
        new = self.axes.new(stop - start)

        def change(view: LeafView, name: str) -> tuple[LeafView, dict[str, int]]:
            return view.sliced(name, start, stop)[0], {name: new}

        return self._reweighted(term, axis, change), new

    def indexed(self, term: Term, axis: int, index: int) -> Term:
        """Return one element along an axis of weights."""
        return self._reweighted(term, axis, lambda view, name: (view.indexed(name, index), {}))

    def regrouped(
        self, term: Term, axes: Sequence[int | None], parts: Sequence[int]
    ) -> tuple[Term, list[int | None]]:
        """Return an axis of weights cut into several.

        Raises:
          NotABlock: there are several axes.
        """
        if len(axes) != 1 or axes[0] is None:
            raise NotABlock("a reshape inside joins axes")
        numbers = [self.axes.new(size) for size in parts]

        def change(view: LeafView, name: str) -> tuple[LeafView, dict[str, int]]:
            view, names = view.regrouped([name], parts)
            return view, dict(zip(names, numbers, strict=True))

        return self._reweighted(term, axes[0], change), [*numbers]

    def _reweighted(
        self,
        term: Term,
        axis: int,
        change: Callable[[LeafView, str], tuple[LeafView, dict[str, int]]],
    ) -> Term:
        """Return a term whose weights that have an axis are changed.

        Args:
          term: the term.
          axis: the axis.
          change: takes a view and what it calls the axis; returns what it has instead.

        Raises:
          NotABlock: the input of the block has the axis.
        """
        memo: dict[int, Any] = {}
        axis = self.axes.find(axis)

        def changed(x: Any) -> Any:
            if isinstance(x, float) or axis not in self.axes.of(x):
                return x
            if id(x) not in memo:
                if isinstance(x, WeightTerm):
                    (name,) = (n for n, a in x.numbers.items() if self.axes.find(a) == axis)
                    view, new = change(x.view, name)
                    unchanged = {n: a for n, a in x.numbers.items() if n != name}
                    memo[id(x)] = weight_term(view, unchanged | new)
                elif isinstance(x, ProductTerm):
                    memo[id(x)] = self.axes.product(changed(x.x), changed(x.weight), x.over)
                elif isinstance(x, FunctionTerm):
                    memo[id(x)] = function_term(x.function, *map(changed, x.operands))
                else:
                    raise NotABlock("a part of its input is used")
            return memo[id(x)]

        result: Term = changed(term)
        return result


def _is_constant(variable: Variable) -> bool:
    if variable.const is not UNKNOWN:
        return True
    equation = variable.equation
    if variable.view is not None or equation is None or callee(equation.eqn) is not None:
        return False
    is_simple = function_of(equation.eqn) is not None or equation.name in STRUCTURAL
    return is_simple and bool(equation.inputs) and all(map(_is_constant, equation.inputs))


# Formulas: which functions of elements are activations by name, and which are not.

CUSTOM: dict[str, Function] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "logaddexp": jnp.logaddexp,
}
"""Functions of jax with a derivative of their own, which formulas name."""

ACTIVATIONS = (
    "silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "exp", "log", "square", "rsqrt",
)  # fmt: skip
"""Activations that are operations."""


def formula_of(term: Term, base: Term) -> Formula:
    """Return `term`, a function of the elements of `base`, as a formula."""
    numbers: dict[int, int] = {id(base): 0}
    calls: list[FormulaStep] = []

    def number(x: Term | float) -> int | float:
        if isinstance(x, float):
            return x
        if id(x) not in numbers:
            assert isinstance(x, FunctionTerm), "a formula is made of functions"
            calls.append(FormulaStep(x.function, tuple(map(number, x.operands))))
            numbers[id(x)] = len(calls)
        return numbers[id(x)]

    result = number(term)
    assert isinstance(result, int), "a term is no number"
    return Formula(tuple(calls), result)


@lru_cache(maxsize=8)
def activations(dtype: str) -> Mapping[str, str]:
    """Return operations by the formulas that jax's functions have in an element type."""
    operations: dict[str, str] = {}
    for name in ACTIVATIONS:
        jaxpr, _ = trace(ELEMENTWISE[name], [shape_of((3,), dtype)])
        inputs, (result,) = _run(jaxpr, custom_function)
        assert isinstance(result.term, Term), "an activation is no number"
        operations[str(formula_of(result.term, inputs[0]))] = name
    return operations


Avals = tuple[tuple[tuple[int, ...], str], ...]


def custom_function(equation: Equation) -> str | None:
    """Return the name of a function of `CUSTOM` that an equation calls, derivative included."""
    atoms = equation.eqn.invars
    if not all(is_float(a.aval.dtype) for a in atoms):
        return None
    numbers = tuple(float(a.val) if is_literal(a) else None for a in atoms)
    variables = [a for a in atoms if not is_literal(a)]
    avals = tuple((tuple(a.aval.shape), str(a.aval.dtype)) for a in variables)

    def called(*arrays: AnyArray) -> AnyArray:
        values = dict(zip(variables, arrays, strict=True))
        return evaluate([equation.eqn], values, equation.eqn.outvars, equation.frame.jaxpr)[0]

    text = _spelled(called, avals)
    names = (name for name in CUSTOM if _spelled_custom(name, numbers, avals) == text)
    return None if text is None else next(names, None)


@lru_cache(maxsize=64)
def _spelled_custom(
    name: str, numbers: tuple[float | None, ...], avals: Avals
) -> tuple[str, ...] | None:
    if (name == "logaddexp") != (len(numbers) == 2):
        return None

    def called(*arrays: AnyArray) -> AnyArray:
        remaining = iter(arrays)
        return CUSTOM[name](*(next(remaining) if n is None else n for n in numbers))

    return _spelled(called, avals)


def _spelled(function: Function, avals: Avals) -> tuple[str, ...] | None:
    """Return a function and its derivative as text; None where they are no formulas."""
    count = len(avals)

    def with_derivative(*arrays: AnyArray) -> AnyArray:
        return jax.jvp(function, arrays[:count], arrays[count:])

    jaxpr, _ = trace(with_derivative, [shape_of(*a) for a in avals] * 2)
    try:
        inputs, results = _run(jaxpr, None)
    except NotABlock:
        return None
    texts = {id(x): f"x{i}" for i, x in enumerate(inputs)}

    def spell(x: Term | float) -> str:
        if isinstance(x, float):
            return repr(x)
        if id(x) not in texts:
            assert isinstance(x, FunctionTerm), "there are no weights"
            texts[id(x)] = f"{x.function}({', '.join(map(spell, x.operands))})"
        return texts[id(x)]

    return tuple(spell(s.term) for s in results)


def _run(jaxpr: Jaxpr, name_custom: NameCustom | None) -> tuple[list[InputTerm], list[Symbol]]:
    """Run a jaxpr of elementwise equations on symbols; return its inputs and results.

    Raises:
      NotABlock: it has other equations.
    """
    axes = Axes()
    variables = [Variable(v.aval) for v in opened(jaxpr)[0].invars]
    scope = fill(JaxprScope(), jaxpr, variables)
    symbols = Symbols(axes, variables[0].aval.dtype, name_custom)
    # Axes are told apart by their places, counted from the last: two may have one size.
    numbers: dict[tuple[int, int], int] = {}
    inputs = []
    for variable in variables:
        sized = list(enumerate(reversed(variable.shape)))[::-1]
        for position, size in sized:
            if (position, size) not in numbers:
                numbers[position, size] = axes.new(size)
        dims = tuple(map(numbers.__getitem__, sized))
        term = InputTerm(frozenset(dims))
        symbols.values[variable] = Symbol(term, dims)
        inputs.append(term)
    for equation in scope.equations:
        symbols.run(equation)
    return inputs, [symbols.read(v) for v in scope.outputs]
