"""Which equations work element by element, and what formulas call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.ir.formula import FUNCTIONS, Formula, FormulaStep
from moecc.ir.ops.elementwise import FORMULAS
from moecc_backends.jaxpr.jaxprs import (
    AnyArray,
    Equation,
    Jaxpr,
    callee,
    evaluate,
    float_bits,
    is_literal,
    opened,
    shape_of,
    trace,
)
from moecc_backends.jaxpr.scopes import UNKNOWN, Scope, Step, Val, fill
from moecc_backends.jaxpr.views import STRUCTURAL, View, groups
from moecc_backends.xla.trace.typed_jax import Function

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


# The computation of a block on named axes: products with weights, and functions of elements.
#
# Axes are numbers that are found to be one as equations show it.  Two axes become one only if no
# value has both: an embedding times its transpose must not become square.

ONE_VALUE = "a block takes one value, so apply the other before it or behind it"
MATRICES = "reshape its weights to matrices"
"""Ways out of reasons."""


class Misfit(Exception):
    """Why a part of a program is not a block: shown as the reason of a near miss."""


@dataclass(frozen=True, eq=False)
class Node:
    """A value of a block; compared by identity."""


@dataclass(frozen=True, eq=False)
class Input(Node):
    """The input of the block, or of a formula.

    Attributes:
      axes: its axes, by dimension.
      name: what a formula calls it.
    """

    axes: tuple[int, ...] = ()
    name: str = "a"


@dataclass(frozen=True, eq=False)
class Weight(Node):
    """A view of a leaf.

    Attributes:
      view: the view.
      axes: the number of each axis of the view, by its name.
    """

    view: View
    axes: dict[str, int]


@dataclass(frozen=True, eq=False)
class Product(Node):
    """A contraction with a weight over one axis."""

    x: Node
    weight: Weight
    over: int


@dataclass(frozen=True, eq=False)
class Apply(Node):
    """A function of formulas, element by element; numbers stand for themselves."""

    function: str
    operands: tuple[Node | float, ...]


@dataclass(frozen=True)
class Sym:
    """An array of the program: a value of the block, and which dimension is which axis."""

    node: Node | float
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

    def note(self, axes: tuple[int, ...]) -> None:
        """Note that a value has all of `axes`, which are therefore different."""
        self._values.append(frozenset(axes))

    def unite(self, a: int, b: int) -> int:
        """Make two axes one.

        Raises:
          Misfit: a value has both, or they differ in size.
        """
        a, b = self.find(a), self.find(b)
        if a == b:
            return a
        if self.sizes[a] != self.sizes[b]:
            raise Misfit(f"an axis has the sizes {self.sizes[a]} and {self.sizes[b]}")
        for axes in self._values:
            if {a, b} <= {self.find(n) for n in axes}:
                raise Misfit("two axes of one value would have to be the same")
        self._first[max(a, b)] = min(a, b)
        return min(a, b)


def axes_of(node: Node | float, axes: Axes) -> frozenset[int]:
    """Return the axes of a value, each as the number that stands for it."""
    found: dict[int, frozenset[int]] = {}

    def of(x: Node | float) -> frozenset[int]:
        if isinstance(x, float):
            return frozenset()
        if id(x) not in found:
            found[id(x)] = own(x)
        return found[id(x)]

    def own(x: Node) -> frozenset[int]:
        if isinstance(x, Input):
            return frozenset(map(axes.find, x.axes))
        if isinstance(x, Weight):
            return frozenset(map(axes.find, x.axes.values()))
        if isinstance(x, Product):
            return (of(x.x) | of(x.weight)) - {axes.find(x.over)}
        assert isinstance(x, Apply)
        return frozenset().union(*map(of, x.operands))

    return of(node)


def reweighted(node: Node, axis: int, change: Callable[[Weight, str], Weight], axes: Axes) -> Node:
    """Return a value whose weights that have an axis are changed.

    Args:
      node: the value.
      axis: the axis.
      change: takes a weight, and what the weight calls the axis.
      axes: the axes.

    Raises:
      Misfit: the input of the block has the axis.
    """
    made: dict[int, Node | float] = {}

    def changed(x: Node | float) -> Node | float:
        if isinstance(x, float) or axis not in axes_of(x, axes):
            return x
        if id(x) not in made:
            made[id(x)] = own(x)
        return made[id(x)]

    def own(x: Node) -> Node | float:
        if isinstance(x, Weight):
            (name,) = (n for n, number in x.axes.items() if axes.find(number) == axis)
            return change(x, name)
        if isinstance(x, Product):
            inner, weight = changed(x.x), changed(x.weight)
            assert isinstance(weight, Weight)
            assert isinstance(inner, Node)
            return Product(inner, weight, x.over)
        if isinstance(x, Apply):
            return Apply(x.function, tuple(map(changed, x.operands)))
        raise Misfit("a part of its input is used")

    found = changed(node)
    assert isinstance(found, Node)
    return found


def sliced(weight: Weight, name: str, part: tuple[int, int], number: int) -> Weight:
    """Return a weight with an axis cut to `part`, under another number."""
    return Weight(weight.view.sliced(name, *part), {**weight.axes, name: number})


def indexed(weight: Weight, name: str, at: int) -> Weight:
    """Return one element along an axis of a weight."""
    left = {n: number for n, number in weight.axes.items() if n != name}
    return Weight(weight.view.with_dims((name,)).indexed(name, at), left)


def split(weight: Weight, name: str, parts: tuple[int, ...], numbers: tuple[int, ...]) -> Weight:
    """Return a weight with an axis cut into axes of the sizes `parts`."""
    view, names = weight.view.with_dims((name,)).split(name, parts)
    left = {n: number for n, number in weight.axes.items() if n != name}
    return Weight(view, left | dict(zip(names, numbers, strict=True)))


# Equations run on symbols: what a block computes, on named axes instead of dimensions.

Custom = Callable[[Step], str | None]
"""Names the function with a derivative of its own that a step calls, where it is known."""

IDENTITY = frozenset(("copy", "copy_p", "name", "sharding_constraint", "pvary", "pcast"))
"""Equations whose result has the elements of the operand, in their places."""


class Symbols:
    """Runs steps on symbols.

    Args:
      axes: the axes found so far.
      dtype: the type that the block computes in.
      custom: names functions with derivatives of their own; None runs what they call instead.
    """

    def __init__(self, axes: Axes, dtype: Any, custom: Custom | None) -> None:
        self.axes = axes
        self.values: dict[Val, Sym] = {}
        self._dtype = jnp.dtype(dtype)
        self._itemsize = self._dtype.itemsize
        self._custom = custom

    def read(self, value: Val) -> Sym:
        """Return the symbol of a value.

        Raises:
          Misfit: it is neither known, nor a weight, nor a number.
        """
        found = self.values.get(value) or self.values.get(value.same)
        if found is None:
            found = self._outside(value)
            self.values[value] = found
        return found

    def _outside(self, value: Val) -> Sym:
        if value.view is not None:
            return self._weight(value)
        if value.const is not UNKNOWN:
            return _number(value)
        step = value.step
        if step is None or not all(_is_constant(v) for v in step.inputs):
            raise Misfit(f"it takes another value from outside: {ONE_VALUE}")
        self.run(step)
        return self.values[value]

    def _weight(self, value: Val) -> Sym:
        view = value.view
        assert view is not None, "asked for because it has one"
        self._check_casts(view)
        numbers = {name: self.axes.new(size) for name, size in view.sizes}
        self.axes.note(tuple(numbers.values()))
        return Sym(Weight(view, numbers), tuple(n if n is None else numbers[n] for n in view.dims))

    def _check_casts(self, view: View) -> None:
        """Raise Misfit where a weight is rounded to less than the block computes in."""
        for dtype in view.casts:
            wanted = (float_bits(self._dtype), float_bits(view.leaf.dtype.numpy))
            pairs = zip(float_bits(dtype), *wanted, strict=True)
            if any(kept < min(needed) for kept, *needed in pairs):
                raise Misfit(
                    f"its weight {view.leaf.name} is rounded to {dtype} first: a block has leaves "
                    f"as they are; cast its input to {dtype}, too, or the leaf"
                )

    def run(self, step: Step) -> None:
        """Find the symbols of what `step` defines.

        Raises:
          Misfit: it is no step of a block.
        """
        if step.outputs and step.outputs[0].view is not None:
            return
        inside = step.inside(custom=self._custom is None)
        if inside is not None:
            self._call(step, inside)
            return
        for value, made in zip(step.outputs, self._made(step), strict=True):
            self.values[value] = made

    def _call(self, step: Step, inside: Scope) -> None:
        for outer, inner in zip(step.inputs, inside.inputs, strict=True):
            self.values[inner] = self.read(outer)
        for one in inside.steps:
            self.run(one)
        for outer, inner in zip(step.outputs, inside.outputs, strict=True):
            self.values[outer] = self.read(inner)

    def _made(self, step: Step) -> list[Sym]:
        rule = _RULES.get(step.name)
        if rule is not None:
            return rule(self, step)
        if step.name == "custom_jvp_call" and self._custom is not None:
            name = self._custom(step)
            if name is None:
                raise Misfit("a function with a gradient of its own is inside")
        else:
            name = function_of(step.equation)
        if name is None:
            raise Misfit(f"`{step.name}` inside it does not work element by element")
        return [self.apply(name, step)]

    def apply(self, function: str, step: Step) -> Sym:
        """Return a function of the operands of a step, element by element."""
        given = [self.read(v) for v in step.inputs]
        if function == "where":
            given = [given[0], given[2], given[1]]
        _check_numbers(step)
        operands: list[Node | float] = [s.node for s in given]
        if step.name == "integer_pow":
            operands.append(float(step.params["y"]))
        numbers = tuple(x for x in operands if isinstance(x, float))
        if len(numbers) == len(operands):
            return Sym(folded(function, numbers))
        return Sym(Apply(function, tuple(operands)), self._together(given))

    def _together(self, given: Sequence[Sym]) -> tuple[int | None, ...]:
        rank = max(len(s.dims) for s in given)
        dims: list[int | None] = [None] * rank
        for symbol in given:
            for i, axis in enumerate(symbol.dims):
                if axis is None:
                    continue
                before = dims[i]
                dims[i] = axis if before is None else self.axes.unite(before, axis)
        found = tuple(d if d is None else self.axes.find(d) for d in dims)
        named = tuple(d for d in found if d is not None)
        if len(set(named)) < len(named):
            raise Misfit("two axes of one value would have to be the same")
        return found

    # --- steps that are not element by element

    def converted(self, step: Step) -> list[Sym]:
        """A cast: to a wider type and back, or of truth values to numbers."""
        x = self.read(step.inputs[0])
        old, new = step.inputs[0].aval.dtype, jnp.dtype(step.params["new_dtype"])
        if isinstance(x.node, float):
            return [x]
        if old == np.dtype(bool) and jnp.issubdtype(new, jnp.floating):
            return [Sym(Apply("where", (x.node, 1.0, 0.0)), x.dims)]
        if not (jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)):
            raise Misfit(f"a cast from {old} to {new} is inside")
        if new.itemsize < self._itemsize:
            raise Misfit(f"a cast to {new} is inside, narrower than its input: cast that, too")
        if new.itemsize == old.itemsize or isinstance(x.node, Weight | Product):
            return [x]
        wide = new.itemsize > old.itemsize
        return [Sym(Apply("wide" if wide else "narrow", (x.node,)), x.dims)]

    def same(self, step: Step) -> list[Sym]:
        """The operand as it is."""
        return [self.read(step.inputs[0])]

    def transposed(self, step: Step) -> list[Sym]:
        """The dimensions in another order."""
        x = self.read(step.inputs[0])
        return [Sym(x.node, tuple(x.dims[i] for i in step.params["permutation"]))]

    def broadcast(self, step: Step) -> list[Sym]:
        """More dimensions, along which nothing varies."""
        x = self.read(step.inputs[0])
        shape = step.params["shape"]
        if isinstance(x.node, float):
            return [Sym(x.node)]
        dims: list[int | None] = [None] * len(shape)
        for old, new in enumerate(step.params["broadcast_dimensions"]):
            if step.inputs[0].shape[old] == shape[new]:
                dims[new] = x.dims[old]
            elif x.dims[old] is not None:
                raise Misfit("an axis of size one is repeated inside")
        return [Sym(x.node, tuple(dims))]

    def reshaped(self, step: Step) -> list[Sym]:
        """Dimensions of size one come or go; an axis of weights is cut into several."""
        x = self.read(step.inputs[0])
        old, new = step.inputs[0].shape, step.outputs[0].shape
        if isinstance(x.node, float):
            return [Sym(x.node)]
        node, dims = x.node, list[int | None]()
        for before, after in groups(old, new):
            axes = [x.dims[i] for i in before if old[i] != 1]
            wide = [new[j] for j in after if new[j] != 1]
            if axes and len(axes) == 1 and len(wide) > 1 and axes[0] is not None:
                node, axes = self._parted(node, axes[0], tuple(wide))
            if len(axes) != len(wide):
                raise Misfit("a reshape inside joins axes")
            left = iter(axes)
            dims += [next(left) if new[j] != 1 else None for j in after]
        return [Sym(node, tuple(dims))]

    def _parted(
        self, node: Node, axis: int, parts: tuple[int, ...]
    ) -> tuple[Node, list[int | None]]:
        numbers = tuple(map(self.axes.new, parts))

        def change(weight: Weight, name: str) -> Weight:
            return split(weight, name, parts, numbers)

        return reweighted(node, self.axes.find(axis), change, self.axes), list(numbers)

    def squeezed(self, step: Step) -> list[Sym]:
        """Dimensions of size one go; an axis along which there is one element goes with them."""
        x = self.read(step.inputs[0])
        gone = step.params["dimensions"]
        node = x.node
        for i in gone:
            axis = x.dims[i] if x.dims else None
            if axis is not None and not isinstance(node, float):
                node = self._at(node, axis, 0)
        return [Sym(node, tuple(d for i, d in enumerate(x.dims) if i not in gone))]

    def _at(self, node: Node, axis: int, at: int) -> Node:
        def change(weight: Weight, name: str) -> Weight:
            return indexed(weight, name, at)

        return reweighted(node, self.axes.find(axis), change, self.axes)

    def cut(self, step: Step) -> list[Sym]:
        """A part of an axis that only weights have, or every n-th of its elements."""
        starts, stops = step.params["start_indices"], step.params["limit_indices"]
        strides = step.params["strides"] or [1] * len(starts)
        x = self.read(step.inputs[0])
        for dimension, ends in enumerate(zip(starts, stops, strides, strict=True)):
            start, stop, stride = map(int, ends)
            size = step.inputs[0].shape[dimension]
            if stride == 1:
                x = self._part(x, dimension, start, stop, size)
            else:
                x = self._every(x, dimension, start, stop, (stride, size))
        return [x]

    def split(self, step: Step) -> list[Sym]:
        """All parts of an axis that only weights have."""
        x, at, made = self.read(step.inputs[0]), 0, []
        whole = step.inputs[0].shape[step.params["axis"]]
        for size in step.params["sizes"]:
            made.append(self._part(x, step.params["axis"], at, at + int(size), whole))
            at += int(size)
        return made

    def _part(self, x: Sym, dimension: int, start: int, stop: int, size: int) -> Sym:
        axis = x.dims[dimension] if x.dims else None
        if axis is None or isinstance(x.node, float) or (start, stop) == (0, size):
            return x
        new = self.axes.new(stop - start)

        def change(weight: Weight, name: str) -> Weight:
            return sliced(weight, name, (start, stop), new)

        node = reweighted(x.node, self.axes.find(axis), change, self.axes)
        return Sym(node, tuple(new if i == dimension else d for i, d in enumerate(x.dims)))

    def _every(self, x: Sym, dimension: int, start: int, stop: int, steps: tuple[int, int]) -> Sym:
        stride, size = steps
        axis = x.dims[dimension] if x.dims else None
        if axis is None or isinstance(x.node, float):
            return x
        if size % stride or start >= stride or stop <= size - stride + start:
            raise Misfit("a slice with strides inside takes no part of equal parts")
        node, parts = self._parted(x.node, axis, (size // stride, stride))
        assert parts[1] is not None
        dims = tuple(parts[0] if i == dimension else d for i, d in enumerate(x.dims))
        return Sym(self._at(node, parts[1], start), dims)

    def product(self, step: Step) -> list[Sym]:
        """A contraction with a weight over one axis."""
        (contracted, batch) = step.params["dimension_numbers"]
        given = [self.read(v) for v in step.inputs]
        at = next((i for i, v in enumerate(step.inputs) if v.view is not None), None)
        if at is None or isinstance(given[1 - at].node, Weight | float):
            raise Misfit("a product without a weight is inside")
        if batch[0]:
            raise Misfit(
                "its weights have a matrix for each of several heads or groups: convert the "
                "function of one, and vmap the converted one"
            )
        if len(contracted[0]) != 1:
            raise Misfit(f"a product inside sums over more than one axis, or none: {MATRICES}")
        over = [s.dims[c[0]] for s, c in zip(given, contracted, strict=True)]
        if over[0] is None or over[1] is None:
            raise Misfit("a product inside sums what is repeated")
        axis = self.axes.unite(over[0], over[1])
        free = [[d for i, d in enumerate(s.dims) if i != c[0]]
                for s, c in zip(given, contracted, strict=True)]  # fmt: skip
        x, weight = given[1 - at].node, given[at].node
        assert isinstance(weight, Weight)
        assert not isinstance(x, float)
        made = Product(x, weight, axis)
        self.axes.note(tuple(axes_of(made, self.axes)))
        is_wide = step.outputs[0].aval.dtype.itemsize > self._itemsize
        node: Node = Apply("wide", (made,)) if is_wide else made
        return [Sym(node, (*free[0], *free[1]))]


def _number(value: Val) -> Sym:
    data = np.asarray(value.const)
    if data.size != 1:
        raise Misfit("it takes an array of constants: make it a parameter")
    if not (jnp.issubdtype(data.dtype, jnp.number) or data.dtype == bool):
        raise Misfit("it takes a constant that is no number")
    return Sym(float(data.reshape(()).astype(np.float64)))


def _is_constant(value: Val) -> bool:
    if value.const is not UNKNOWN:
        return True
    step = value.step
    if value.view is not None or step is None or callee(step.equation) is not None:
        return False
    known = function_of(step.equation) is not None or step.name in _RULES
    return known and bool(step.inputs) and all(map(_is_constant, step.inputs))


def _check_numbers(step: Step) -> None:
    for value in step.inputs:
        dtype = value.aval.dtype
        fits = jnp.issubdtype(dtype, jnp.floating) or dtype == np.dtype(bool)
        if not fits and value.const is UNKNOWN:
            raise Misfit(f"values of the type {dtype} are inside")


Rule = Callable[[Symbols, Step], list[Sym]]

_RULES: dict[str, Rule] = {
    **dict.fromkeys(IDENTITY, Symbols.same),
    "convert_element_type": Symbols.converted,
    "transpose": Symbols.transposed,
    "broadcast_in_dim": Symbols.broadcast,
    "reshape": Symbols.reshaped,
    "squeeze": Symbols.squeezed,
    "slice": Symbols.cut,
    "split": Symbols.split,
    "dot_general": Symbols.product,
}


# Formulas of blocks: which functions of elements are activations by name, and which are not.

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
    steps: list[FormulaStep] = []

    def number(x: Node | float) -> int | float:
        if isinstance(x, float):
            return x
        if id(x) not in numbers:
            assert isinstance(x, Apply), "a formula is made of functions"
            steps.append(FormulaStep(x.function, tuple(map(number, x.operands))))
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
