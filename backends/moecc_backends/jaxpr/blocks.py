"""Feed-forward blocks in a scope: product with a weight, functions of elements, product.

A candidate is a product with a weight whose other operand is made, element by element, from
products with weights.  It is a block if these read one value, nothing comes in from outside, and
no value inside is used elsewhere.  Its equations become operations of the IR on its input and
parameters, independent of any graph: their text is the same wherever the same computation is
found, which is how a block of another function is known to be one that was converted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moecc.ir.formula import FUNCTIONS
from moecc.ir.operation import OPS
from moecc.types import DType
from moecc.weights.expr import Expr
from moecc.weights.movement import Rename
from moecc_backends.jaxpr.scopes import STRUCTURAL, UNKNOWN, Equation, JaxprScope, Variable
from moecc_backends.jaxpr.symbols import (
    LINEAR,
    MATRICES,
    ONE_VALUE,
    Axes,
    FunctionTerm,
    InputTerm,
    ProductTerm,
    Symbol,
    Symbols,
    Term,
    WeightTerm,
    activations,
    custom_function,
    formula_of,
    function_of,
    is_elementwise,
)
from moecc_backends.jaxpr.views import Iteration, LeafView, NotABlock, has_inside

OUTER, INNER = "embed", "mlp"
"""The names of the two axes of a block's parameters."""

_CUSTOM_GRADIENT = "a function with a gradient of its own"
OPAQUE = {
    "pallas_call": "a Pallas kernel",
    "pure_callback": "a call of the host",
    "io_callback": "a call of the host",
    "custom_vjp_call": _CUSTOM_GRADIENT,
    "custom_vjp_call_jaxpr": _CUSTOM_GRADIENT,
    "custom_jvp_call": _CUSTOM_GRADIENT,
    "ffi_call": "foreign code",
    "custom_call": "foreign code",
    "shard_map": "a `shard_map`",
    "optimization_barrier": "an optimization barrier",
}
"""What elementwise work may hide in, in words."""

_USED_BY_GRADIENT = (
    "a hidden value is also multiplied with one from outside: if it is for a gradient, convert the "
    "loss, and differentiate the converted function"
)

_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")


@dataclass(frozen=True)
class BlockMiss:
    """What is nearly a block, and why it is none.

    Attributes:
      weights: the leaves of its products.
      reason: why.
      line: where it is in the user's program.
    """

    weights: tuple[str, ...]
    reason: str
    line: str

    def __str__(self) -> str:
        line = f" ({self.line})" if self.line else ""
        return f"{', '.join(self.weights)}: {self.reason}{line}"


@dataclass(frozen=True)
class BlockSlice:
    """A feed-forward block as equations of a scope.

    Attributes:
      scope: the scope.
      x: its input.
      output: its result.
      equations: its equations, in order.
      line: where it is in the user's program.
      axes: the axes of its values.
      source: its input as a symbol.
      result: its result as a symbol.
      inner: the axis of its neurons.
      outer: the dimension of the input that its products sum over.
    """

    scope: JaxprScope
    x: Variable
    output: Variable
    equations: tuple[Equation, ...]
    line: str
    axes: Axes
    source: Symbol
    result: Symbol
    inner: int
    outer: int

    @property
    def order(self) -> tuple[int, ...]:
        """Which dimension of the input each dimension of the result is."""
        before = self.axes.find_all(self.source.dims)
        return tuple(map(before.index, self.axes.find_all(self.result.dims)))

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves that its equations read."""
        views = (v.view for e in self.equations for v in e.inputs)
        return tuple(sorted({v.leaf.name for v in views if v is not None}))


def find_blocks(scope: JaxprScope) -> tuple[list[BlockSlice], list[BlockMiss]]:
    """Return the blocks of a scope and of the bodies in it, in order, and near misses.

    No two blocks share an equation.
    """
    blocks: list[BlockSlice] = []
    misses: dict[Equation, BlockMiss] = {}
    used: set[Equation] = set()

    def search(scope: JaxprScope) -> None:
        order = {equation: i for i, equation in enumerate(scope.equations)}
        for equation in scope.equations:
            for body in equation.bodies:
                search(body)
            block = None if equation.weight is None else _RegionSearch(equation, order).examine()
            if isinstance(block, BlockMiss):
                misses[equation] = block
            elif block is not None and used.isdisjoint(block.equations):
                used.update(block.equations)
                blocks.append(block)

    search(scope)
    # A product that a block starts with is the end of nothing.
    return blocks, [miss for equation, miss in misses.items() if equation not in used]


def _data(product: Equation) -> int:
    """Return which operand of a product with a weight is not the weight."""
    assert product.weight is not None, "a product with a weight"
    return 1 - product.weight


class _RegionSearch:
    """The region that a product with a weight ends."""

    def __init__(self, down: Equation, order: dict[Equation, int]) -> None:
        self._down = down
        self._order = order
        self._inside: set[Equation] = set()
        self._ups: list[Equation] = []
        self._outside: list[Variable] = []
        self._hiding: list[str] = []

    def examine(self) -> BlockSlice | BlockMiss | None:
        """Return the block, why it is none, or None where it is no candidate."""
        self._walk(self._down.inputs[_data(self._down)])
        is_linear = all(map(_is_linear, self._inside.difference(self._ups)))
        if not self._ups or is_linear or self._is_stream():
            return None
        try:
            for reason in self._reasons():
                raise NotABlock(reason)
            return self._block()
        except NotABlock as reason:
            views = (v.view for e in (*self._ups, self._down) for v in e.inputs)
            names = {v.leaf.name for v in views if v is not None}
            return BlockMiss(tuple(sorted(names)), str(reason), self._down.line)

    def _walk(self, hidden: Variable) -> None:
        """Collect the equations that `hidden` is made by, back to products with weights."""
        stack = [hidden]
        while stack:
            variable = stack.pop()
            equation = variable.equation
            is_fixed = variable.view is not None or variable.const is not UNKNOWN
            if is_fixed or equation in self._inside:
                continue
            if equation is not None and equation.weight is not None:
                self._inside.add(equation)
                self._ups.append(equation)
            elif equation is not None and self._is_passed(equation):
                self._inside.add(equation)
                stack.extend(equation.inputs)
            else:
                self._outside.append(variable)

    def _is_passed(self, equation: Equation) -> bool:
        """Whether the walk goes on behind an equation."""
        if equation.name == "custom_jvp_call" and custom_function(equation) is not None:
            return True
        if equation.name in OPAQUE:
            self._hiding.append(OPAQUE[equation.name])
            return True
        return is_elementwise(equation.eqn)

    def _is_stream(self) -> bool:
        """Whether the walk only went from layer to layer along a residual stream and its norms."""
        reduced = [v.equation for v in self._outside if v.equation and _is_reduction(v.equation)]
        return bool(reduced) and (len(reduced) < len(self._outside) or len(self._roots()) > 1)

    def _roots(self) -> set[Variable]:
        return {up.inputs[_data(up)].same for up in self._ups}

    def _reasons(self) -> Iterator[str]:
        """Yield why the region is no block."""
        for words in self._hiding:
            yield f"{words} is inside it, which has no lift over experts: write it in jax.numpy"
        yield from map(_why_outside, self._outside)
        if len(self._roots()) > 1:
            yield (
                f"its products take {len(self._roots())} different values: merge what adapts its "
                "weights into them, or give all products one value"
            )
        escapes = [
            reason
            for equation in sorted(self._inside, key=self._order.__getitem__)
            for variable in equation.outputs
            for reason in self._escapes(variable)
        ]
        yield from sorted(escapes, key=lambda reason: reason != _USED_BY_GRADIENT)

    def _escapes(self, variable: Variable) -> Iterator[str]:
        if variable.is_returned:
            yield "a value inside it is returned: return it from another function"
        for user in variable.users:
            if user in self._inside or user is self._down:
                continue
            if user.name == "dot_general" and user.weight is None:
                yield _USED_BY_GRADIENT
            else:
                at = f" at {user.line}" if user.line else ""
                use = f"a hidden value is also used by `{user.name}`{at}"
                yield f"{use}: leave that to another function"

    def _block(self) -> BlockSlice:
        up = min(self._ups, key=self._order.__getitem__)
        x = up.inputs[_data(up)].same
        over = up.params["dimension_numbers"][0][_data(up)]
        if len(over) != 1:
            raise NotABlock(f"its products sum over more than one axis, or none: {MATRICES}")
        axes = Axes()
        numbers = tuple(map(axes.new, x.shape))
        axes.note(numbers)
        source = Symbol(InputTerm(frozenset(numbers)), numbers)
        symbols = Symbols(axes, x.aval.dtype, custom_function)
        symbols.values[x] = source
        equations = sorted(self._inside | {self._down}, key=self._order.__getitem__)
        for equation in equations:
            symbols.run(equation)
        inner = self._inner_axis(symbols, axes.find(numbers[over[0]]))
        output, bias = _with_bias(self._down.outputs[0], symbols)
        result = symbols.values[output]
        before, after = set(axes.find_all(source.dims)), set(axes.find_all(result.dims))
        if before != after or len(result.dims) != len(after):
            raise NotABlock("its result has other axes than its input")
        return BlockSlice(
            self._down.scope,
            x,
            output,
            (*equations, *bias),
            self._down.line,
            axes,
            source,
            result,
            inner,
            over[0],
        )

    def _inner_axis(self, symbols: Symbols, outer: int) -> int:
        """Return the axis of neurons, after tying the last weight's new axis to the outer one."""
        axes, data = symbols.axes, _data(self._down)
        hidden = symbols.read(self._down.inputs[data])
        (over,) = self._down.params["dimension_numbers"][0][data]
        before = axes.find_all(hidden.dims)
        result = symbols.values[self._down.outputs[0]]
        new = [axis for axis in axes.find_all(result.dims) if axis not in before]
        if len(new) != 1:
            raise NotABlock("its last weight adds more than one axis, or none")
        if axes.sizes[new[0]] != axes.sizes[outer]:
            raise NotABlock(
                f"it maps {axes.sizes[outer]} numbers to {axes.sizes[new[0]]}: a block is two "
                "layers, and its result is as wide as its input"
            )
        axes.unite(new[0], outer)
        inner = hidden.dims[over]
        assert inner is not None, "it is summed"
        return axes.find(inner)


def _with_bias(output: Variable, symbols: Symbols) -> tuple[Variable, list[Equation]]:
    """Return the result with a bias added, and the equations that do so, where there are any."""
    equations: list[Equation] = []
    variable = output
    while len(variable.users) == 1 and not variable.is_returned:
        (equation,) = variable.users
        is_sum = function_of(equation.eqn) == "add"
        if is_sum:
            views = [v.view for v in equation.inputs if v is not variable]
            if len(views) != 1 or views[0] is None or len(views[0].sizes) != 1:
                break
        elif equation.name != "transpose":
            break
        try:
            symbols.run(equation)
        except NotABlock:
            break
        equations.append(equation)
        variable = equation.outputs[0]
        if is_sum:
            return variable, equations
    return output, []


def _is_linear(equation: Equation) -> bool:
    """Whether an equation of a region is linear in what it takes of it."""
    function = function_of(equation.eqn)
    if equation.name in STRUCTURAL or function in LINEAR:
        return True
    fixed = [v.view is not None or v.const is not UNKNOWN for v in equation.inputs]
    return any(fixed) if function == "mul" else function == "div" and fixed[1]


def _why_outside(variable: Variable) -> str:
    """Return in words what comes into a region from outside."""
    if _is_random(variable):
        return "dropout is inside it: trace the function without (deterministic, or rate 0)"
    equation = variable.equation
    if equation is None:
        value = f"`{variable.name}`" if variable.name else "a value"
        return f"it also takes {value} from outside: {ONE_VALUE}"
    if _is_reduction(equation):
        return (
            f"`{equation.name}` inside it mixes its hidden values (a norm, perhaps): between its "
            "products a block has functions of elements alone"
        )
    at = f" at {equation.line}" if equation.line else ""
    return f"it also takes the result of `{equation.name}`{at}: {ONE_VALUE}"


def _is_reduction(equation: Equation) -> bool:
    if "reduces" in equation.params:  # an operation of another program says so itself
        return bool(equation.params["reduces"])
    return equation.name.startswith("reduce_") and equation.name != "reduce_precision"


def _is_random(variable: Variable) -> bool:
    """Whether random bits are among what a variable is made by, in a few equations."""
    variables = [variable]
    for _ in range(12):
        equations = [v.equation for v in variables if v.equation is not None]
        if any(e.name in _RANDOM or any(has_inside(e.eqn, p) for p in _RANDOM) for e in equations):
            return True
        variables = [v for e in equations for v in e.inputs]
    return False


# Operations of a block.


def _operations(operands: int) -> frozenset[str]:
    """Return the functions of formulas that are operations of the same name and meaning."""
    names = (n for n, f in FUNCTIONS.items() if len(f.takes) == operands and n in OPS)
    return frozenset(n for n in names if OPS[n].liftable and not OPS[n].attrs)


_UNARY, _BINARY = _operations(1), _operations(2)


@dataclass(frozen=True)
class Param:
    """A parameter of a block.

    Attributes:
      view: the leaf, as it is seen.
      names: the name of each axis of the view: ``embed`` or ``mlp``.
    """

    view: LeafView
    names: tuple[tuple[str, str], ...]

    def expression(self, iteration: Iteration) -> Expr:
        """Return its weight, in one iteration of each loop."""
        expr = self.view.expression(iteration)
        for old, new in self.names:
            expr = Rename(expr, old, new)
        return expr


@dataclass(frozen=True)
class Operation:
    """An operation of a block.

    Attributes:
      name: the name of the operation.
      operands: ``x``, ``p0`` for the first parameter, ``v0`` for the first operation.
      attrs: its attributes.
    """

    name: str
    operands: tuple[str, ...]
    attrs: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        attrs = "".join(f" {n}={v}" for n, v in self.attrs)
        return f"{self.name}({', '.join(self.operands)}{attrs})"


@dataclass
class JaxprBlock:
    """A block: operations, the last of which is the result.

    Attributes:
      params: the parameters, in the order of use.
      operations: the operations, in order.
    """

    params: list[Param] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it computes; equal for equal blocks."""
        return "; ".join(map(str, self.operations))

    @property
    def summary(self) -> str:
        """The names of its operations, in order."""
        return " ".join(o.name for o in self.operations)


def block_of(block: BlockSlice) -> JaxprBlock:
    """Return the operations of a block.

    Raises:
      NotABlock: it has no such operations, or a parameter has other axes than the two of a block.
    """
    emitter = _Emitter(block)
    emitter.emit(block.result.term)
    return emitter.block


class _Emitter:
    def __init__(self, block: BlockSlice) -> None:
        self.block = JaxprBlock()
        self._axes = block.axes
        outer = block.source.dims[block.outer]
        assert outer is not None, "an axis of the input"
        self._names = {self._axes.find(outer): OUTER, self._axes.find(block.inner): INNER}
        self._emitted: dict[int, str] = {}
        self._activations = activations(str(block.x.aval.dtype))

    def emit(self, term: Term | float) -> str:
        """Return the operand that stands for `term`, after the operations that make it."""
        if isinstance(term, float):
            return self._add("constant", value=term)
        if isinstance(term, InputTerm):
            return "x"
        if id(term) not in self._emitted:
            self._emitted[id(term)] = self._operation(term)
        return self._emitted[id(term)]

    def _operation(self, term: Term) -> str:
        if isinstance(term, WeightTerm):
            return self._param(term)
        if isinstance(term, ProductTerm):
            over = self._names.get(self._axes.find(term.over))
            if over is None:
                raise NotABlock("a product inside it sums over tokens")
            x = self.emit(term.x)
            return self._add("contract", x, self._param(term.weight), over=over)
        assert isinstance(term, FunctionTerm), "there is no other term"
        # Between operations everything is in the type that the block computes in.
        if term.function in _CASTS:
            return self.emit(term.operands[0])
        base, inner = _base(term), [x for x in term.operands if isinstance(x, Term)]
        if base is None:
            if term.function not in _BINARY:
                raise NotABlock(
                    f"`{term.function}` inside it takes several hidden values: of two, blocks have "
                    "sums, products, quotients, maxima and minima"
                )
            return self._add(term.function, *map(self.emit, term.operands))
        formula = str(formula_of(term, base))
        if formula in self._activations:
            return self._add(self._activations[formula], self.emit(base))
        # A function of one value that is made of another first may be an operation by itself.
        is_chained = (len(inner) == 1 and inner[0] is not base) or len(term.operands) == 1
        if is_chained and term.function in _UNARY:
            return self._add(term.function, self.emit(inner[0]))
        numbers = [x for x in term.operands if isinstance(x, float)]
        if len(term.operands) == 2 and len(numbers) == 1 and term.function in _BINARY:
            if term.function == "mul":
                return self._add("scale", self.emit(inner[0]), by=numbers[0])
            return self._add(term.function, *map(self.emit, term.operands))
        return self._add("pointwise", self.emit(base), function=formula)

    def _add(self, name: str, *operands: str, **attrs: object) -> str:
        self.block.operations.append(Operation(name, operands, tuple(attrs.items())))
        return f"v{len(self.block.operations) - 1}"

    def _param(self, weight: WeightTerm) -> str:
        names = []
        for axis, number in weight.numbers.items():
            name = self._names.get(self._axes.find(number))
            if name is None:
                raise NotABlock(f"its weight {weight.view.leaf.name} has another axis than the two")
            names.append((axis, name))
        view = weight.view.with_dims([axis for axis, _ in weight.view.sizes])
        params, param = self.block.params, Param(view, tuple(names))
        if param not in params:
            params.append(param)
        return f"p{params.index(param)}"


def _base(term: FunctionTerm) -> Term | None:
    """Return the value of whose elements `term` is a function, the furthest back; or None."""
    bases: dict[int, Term | None] = {}

    def base(x: Term) -> Term | None:
        if not isinstance(x, FunctionTerm):
            return None
        if id(x) not in bases:
            inner = dict.fromkeys(o for o in x.operands if isinstance(o, Term))
            candidates = [dict.fromkeys((base(o), o)) for o in inner]
            shared = (c for c in candidates[0] if all(c in others for others in candidates))
            bases[id(x)] = next((c for c in shared if c is not None), None)
        return bases[id(x)]

    return base(term)


# What a block computes, whatever element type it is traced in.  A function traced with parameters
# in bfloat16 has the casts and the rounded numbers of bfloat16, and is the same function of the
# user's program as in float32.

_CASTS = ("wide", "narrow")
_NUMBER = re.compile(r"(?<=#)[^ ;]+")


def identity(block: BlockSlice) -> str:
    """Return the computation of a block as text without casts, its numbers in full.

    Values are numbered in the order of use, and each is spelled once.
    """
    names: dict[object, str] = {}
    lines: list[str] = []

    def name(term: Term | float) -> str:
        if isinstance(term, float):
            return f"#{term!r}"
        if isinstance(term, InputTerm):
            return "x"
        if isinstance(term, WeightTerm):
            key = (term.view.leaf.name, term.view.moves)
            return names.setdefault(key, f"w{len(names)}")
        if isinstance(term, FunctionTerm) and term.function in _CASTS:
            return name(term.operands[0])
        if id(term) not in names:
            if isinstance(term, ProductTerm):
                line = f"contract {name(term.x)} {name(term.weight)}"
            else:
                assert isinstance(term, FunctionTerm), "there is no other term"
                line = " ".join([term.function, *map(name, term.operands)])
            lines.append(line)
            names[id(term)] = f"v{len(names)}"
        return names[id(term)]

    name(block.result.term)
    return "; ".join(lines)


def same_in(a: str, b: str, dtype: DType) -> bool:
    """Return whether two identities are the same where their numbers are rounded to `dtype`."""

    def rounded(number: re.Match[str]) -> str:
        with np.errstate(all="ignore"):
            return repr(float(np.asarray(float(number[0])).astype(dtype.numpy)))

    return _NUMBER.sub(rounded, a) == _NUMBER.sub(rounded, b)
