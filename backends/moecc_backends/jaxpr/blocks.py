"""Find feed-forward blocks in a scope: product with a weight, functions of elements, product.

A candidate is a product with a weight whose other operand is made, element by element, from
products with weights.  It is a block if these read one value, nothing comes in from outside, and
no value inside is used elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from moecc.ir.formula import FUNCTIONS
from moecc.ir.operation import OPS
from moecc.types import DType
from moecc.weights.expr import Expr
from moecc.weights.movement import Rename
from moecc_backends.jaxpr.jaxprs import user_line
from moecc_backends.jaxpr.scopes import UNKNOWN, Scope, Step, Val
from moecc_backends.jaxpr.symbols import (
    LINEAR,
    MATRICES,
    ONE_VALUE,
    Apply,
    Axes,
    Input,
    Misfit,
    Node,
    Product,
    Sym,
    Symbols,
    Weight,
    activations,
    custom_function,
    formula_of,
    function_of,
    is_elementwise,
)
from moecc_backends.jaxpr.views import STRUCTURAL, View

OPAQUE = {
    "pallas_call": "a Pallas kernel",
    "pure_callback": "a call of the host",
    "io_callback": "a call of the host",
    "custom_vjp_call": "a function with a gradient of its own",
    "custom_vjp_call_jaxpr": "a function with a gradient of its own",
    "custom_jvp_call": "a function with a gradient of its own",
    "ffi_call": "foreign code",
    "custom_call": "foreign code",
    "shard_map": "a `shard_map`",
    "optimization_barrier": "an optimization barrier",
}
"""What elementwise work may hide in, in words."""

_GRADIENT = (
    "a hidden value is also multiplied with one from outside: if it is for a gradient, convert the "
    "loss, and differentiate the converted function"
)

_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")


@dataclass(frozen=True)
class Island:
    """A feed-forward block of a scope.

    Attributes:
      scope: where it is.
      x: its input.
      output: its result.
      steps: its steps, in order.
      down: the product back.
      axes: the axes of its values.
      source: its input as a symbol.
      result: its result as a symbol.
      inner: the axis of its neurons.
      outer: the dimension of the input that its products sum over.
    """

    scope: Scope
    x: Val
    output: Val
    steps: tuple[Step, ...]
    down: Step
    axes: Axes
    source: Sym
    result: Sym
    inner: int
    outer: int

    @property
    def order(self) -> tuple[int, ...]:
        """Which dimension of the input each dimension of the result is."""
        find = self.axes.find
        before = [find(d) for d in self.source.dims if d is not None]
        return tuple(before.index(find(d)) for d in self.result.dims if d is not None)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves that its steps read."""
        views = (v.view for s in self.steps for v in s.inputs)
        return tuple(sorted({v.leaf.name for v in views if v is not None}))

    @property
    def line(self) -> str:
        """Where it is in the user's program."""
        return user_line(self.down.equation)


@dataclass(frozen=True)
class Miss:
    """What is nearly a block, and why it is none.

    Attributes:
      weights: the leaves of the products that were found.
      reason: why.
      line: where it is in the user's program.
    """

    weights: tuple[str, ...]
    reason: str
    line: str

    def __str__(self) -> str:
        place = f" ({self.line})" if self.line else ""
        return f"{', '.join(self.weights)}: {self.reason}{place}"


@dataclass
class Search:
    """The blocks of a function, and what is nearly one."""

    islands: list[Island] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


def find_islands(scope: Scope) -> Search:
    """Return the blocks of a scope and of the bodies in it, in order; no two share a step."""
    search = Search()
    missed: dict[Step, Miss] = {}
    _search(scope, search, missed)
    # A product that a block starts with is the end of nothing.
    inside = {step for island in search.islands for step in island.steps}
    search.misses += [miss for step, miss in missed.items() if step not in inside]
    return search


def _search(scope: Scope, search: Search, missed: dict[Step, Miss]) -> None:
    taken: set[Step] = set()
    order = {step: i for i, step in enumerate(scope.steps)}
    for step in scope.steps:
        for body in step.bodies:
            _search(body, search, missed)
        if weight_at(step) is None:
            continue
        found = _Candidate(step, order).examine()
        if isinstance(found, Miss):
            missed[step] = found
        elif found is not None and taken.isdisjoint(found.steps):
            taken.update(found.steps)
            search.islands.append(found)


def weight_at(step: Step) -> int | None:
    """Return which operand of a product is a weight; None for any other step."""
    if step.name != "dot_general":
        return None
    views = [v.view is not None for v in step.inputs]
    return views.index(True) if sum(views) == 1 else None


class _Candidate:
    """The region that a product with a weight ends."""

    def __init__(self, down: Step, order: dict[Step, int]) -> None:
        self._down = down
        self._order = order
        self._inside: set[Step] = set()
        self._ups: list[Step] = []
        self._outside: list[Val] = []
        self._hidden_in: list[str] = []

    def examine(self) -> Island | Miss | None:
        """Return the block, why it is none, or None where it is no candidate."""
        self._walk(self._down.inputs[1 - self._weight(self._down)])
        if not self._ups or not self._is_nonlinear() or self._is_stream():
            return None
        reason = next(self._reasons(), None)
        if reason is not None:
            return self._miss(reason)
        try:
            return self._island()
        except Misfit as misfit:
            return self._miss(str(misfit))

    def _miss(self, reason: str) -> Miss:
        products = [*self._ups, self._down]
        leaves = (s.inputs[self._weight(s)].view for s in products)
        names = dict.fromkeys(v.leaf.name for v in leaves if v is not None)
        return Miss(tuple(sorted(names)), reason, user_line(self._down.equation))

    @staticmethod
    def _weight(step: Step) -> int:
        at = weight_at(step)
        assert at is not None, "a product with a weight"
        return at

    def _walk(self, hidden: Val) -> None:
        """Collect the steps that `hidden` is made by, back to products with weights."""
        stack = [hidden]
        while stack:
            value = stack.pop()
            step = value.step
            if value.view is not None or value.const is not UNKNOWN or step in self._inside:
                continue
            if step is None:
                self._outside.append(value)
            elif weight_at(step) is not None:
                self._inside.add(step)
                self._ups.append(step)
            elif self._passes(step):
                self._inside.add(step)
                stack.extend(step.inputs)
            else:
                self._outside.append(value)

    def _passes(self, step: Step) -> bool:
        """Whether the walk goes on behind a step."""
        if step.name == "custom_jvp_call" and custom_function(step) is not None:
            return True
        if step.name in OPAQUE:
            self._hidden_in.append(OPAQUE[step.name])
            return True
        return is_elementwise(step.equation)

    def _is_nonlinear(self) -> bool:
        ups = set(self._ups)
        return any(not _is_linear(s) for s in self._inside if s not in ups)

    def _is_stream(self) -> bool:
        """Whether the walk only went from layer to layer along a residual stream and its norms."""
        reduced = [v for v in self._outside if v.step is not None and _is_reduction(v.step)]
        others = len(reduced) < len(self._outside) or len(self._roots()) > 1
        return bool(reduced) and others

    def _roots(self) -> set[Val]:
        return {up.inputs[1 - self._weight(up)].same for up in self._ups}

    def _reasons(self) -> Iterator[str]:
        """Yield why the region is no block."""
        for what in self._hidden_in:
            yield f"{what} is inside it, which has no lift over experts: write it in jax.numpy"
        for value in self._outside:
            yield _why_outside(value)
        if len(self._roots()) > 1:
            yield (
                f"its products take {len(self._roots())} different values: merge what adapts its "
                "weights into them, or give all products one value"
            )
        inside = sorted(self._inside, key=self._order.__getitem__)
        escapes = [reason for step in inside for reason in self._escapes(step)]
        yield from sorted(escapes, key=lambda reason: reason != _GRADIENT)

    def _escapes(self, step: Step) -> Iterator[str]:
        for value in step.outputs:
            if value.is_returned:
                yield "a value inside it is returned: return it from another function"
            for user in value.users:
                if user not in self._inside and user is not self._down:
                    yield _why_escaping(user)

    def _island(self) -> Island:
        up = min(self._ups, key=self._order.__getitem__)
        x = up.inputs[1 - self._weight(up)].same
        (contracted, _) = up.params["dimension_numbers"]
        over = contracted[1 - self._weight(up)]
        if len(over) != 1:
            raise Misfit(f"its products sum over more than one axis, or none: {MATRICES}")
        axes = Axes()
        numbers = tuple(map(axes.new, x.shape))
        axes.note(numbers)
        source = Sym(Input(numbers), numbers)
        symbols = Symbols(axes, x.aval.dtype, custom_function)
        symbols.values[x] = source
        steps = sorted(self._inside | {self._down}, key=self._order.__getitem__)
        for step in steps:
            symbols.run(step)
        outer = axes.find(numbers[over[0]])
        inner = self._inner(symbols, outer)
        output, more = _with_bias(self._down.outputs[0], symbols, outer)
        result = symbols.values[output]
        self._check(source, result, axes)
        return Island(
            scope=self._down.scope,
            x=x,
            output=output,
            steps=(*steps, *more),
            down=self._down,
            axes=axes,
            source=source,
            result=result,
            inner=inner,
            outer=over[0],
        )

    def _inner(self, symbols: Symbols, outer: int) -> int:
        """Return the axis of neurons, after tying the last weight's new axis to the outer one."""
        axes = symbols.axes
        made = symbols.values[self._down.outputs[0]]
        hidden = symbols.read(self._down.inputs[1 - self._weight(self._down)])
        (over,) = self._down.params["dimension_numbers"][0][1 - self._weight(self._down)]
        inner = hidden.dims[over]
        assert inner is not None, "it is summed"
        before = {d for d in hidden.dims if d is not None}
        new = [d for d in made.dims if d is not None and axes.find(d) not in
               {axes.find(b) for b in before}]  # fmt: skip
        if len(new) != 1:
            raise Misfit("its last weight adds more than one axis, or none")
        if axes.sizes[axes.find(new[0])] != axes.sizes[outer]:
            width = axes.sizes[axes.find(new[0])]
            raise Misfit(
                f"it maps {axes.sizes[outer]} numbers to {width}: a block is two layers, and its "
                "result is as wide as its input"
            )
        axes.unite(new[0], outer)
        return axes.find(inner)

    def _check(self, source: Sym, result: Sym, axes: Axes) -> None:
        before = {axes.find(d) for d in source.dims if d is not None}
        after = {axes.find(d) for d in result.dims if d is not None}
        if before != after or len(result.dims) != len(after):
            raise Misfit("its result has other axes than its input")


def _with_bias(output: Val, symbols: Symbols, outer: int) -> tuple[Val, list[Step]]:
    """Return the result with a bias added to it, and the steps that do so, where there are any."""
    more: list[Step] = []
    value = output
    while len(value.users) == 1 and not value.is_returned:
        (step,) = value.users
        is_sum = function_of(step.equation) == "add"
        if is_sum:
            other = step.inputs[1] if step.inputs[0] is value else step.inputs[0]
            if other.view is None or len(other.view.sizes) != 1:
                break
        elif step.name != "transpose":
            break
        try:
            symbols.run(step)
        except Misfit:
            break
        more.append(step)
        value = step.outputs[0]
        if is_sum:
            return value, more
    return output, []


def _is_linear(step: Step) -> bool:
    """Whether a step of a region is linear in what it takes of it."""
    if step.name in STRUCTURAL:
        return True
    function = function_of(step.equation)
    if function in LINEAR:
        return True
    fixed = [v.view is not None or v.const is not UNKNOWN for v in step.inputs]
    if function == "mul":
        return any(fixed)
    return function == "div" and fixed[1]


def _why_outside(value: Val) -> str:
    """Return in words what comes into a region from outside."""
    if _is_random(value):
        return "dropout is inside it: trace the function without (deterministic, or rate 0)"
    step = value.step
    if step is None:
        return f"it also takes a value from outside: {ONE_VALUE}"
    line = user_line(step.equation)
    if _is_reduction(step):
        return (
            f"`{step.name}` inside it mixes its hidden values (a norm, perhaps): between its "
            "products a block has functions of elements alone"
        )
    place = f" at {line}" if line else ""
    return f"it also takes the result of `{step.name}`{place}: {ONE_VALUE}"


def _why_escaping(user: Step) -> str:
    if user.name == "dot_general" and weight_at(user) is None:
        return _GRADIENT
    line = user_line(user.equation)
    place = f" at {line}" if line else ""
    return f"a hidden value is also used by `{user.name}`{place}: leave that to another function"


def _is_reduction(step: Step) -> bool:
    return step.name.startswith("reduce_") and step.name != "reduce_precision"


def _is_random(value: Val, steps: int = 12) -> bool:
    """Whether random bits are among what a value is made by, in a few steps."""
    values = [value]
    for _ in range(steps):
        made = [v.step for v in values if v.step is not None]
        if any(_draws(s) for s in made):
            return True
        values = [v for s in made for v in s.inputs]
    return False


def _draws(step: Step) -> bool:
    from moecc_backends.jaxpr.jaxprs import contains, inner_jaxprs

    if step.name in _RANDOM:
        return True
    return any(contains(j, p) for j in inner_jaxprs(step.equation) for p in _RANDOM)


def nodes_of(island: Island) -> Node:
    """Return the computation of a block."""
    node = island.result.node
    assert isinstance(node, Node), "a product is no number"
    return node


# A block as operations of the IR on its input and parameters, independent of any graph.
#
# The text of a block is the same wherever the same computation is found: it is how a block of
# another
# function is known to be one that was converted.

OUTER, INNER = "embed", "mlp"
"""The names of the two axes of a block's parameters."""


def _operations(operands: int) -> frozenset[str]:
    """Return the functions of formulas that are operations of the same name and meaning."""
    named = (n for n, one in FUNCTIONS.items() if len(one.takes) == operands and n in OPS)
    return frozenset(n for n in named if OPS[n].liftable and not OPS[n].attrs)


_UNARY, _BINARY = _operations(1), _operations(2)


@dataclass(frozen=True)
class Param:
    """A parameter of a block.

    Attributes:
      view: the leaf, as it is seen.
      names: the name of each axis of the view: ``embed`` or ``mlp``.
    """

    view: View
    names: tuple[tuple[str, str], ...]

    def expression(self, at: Mapping[Hashable, int]) -> Expr:
        """Return its weight, in the iterations `at` of loops."""
        made = self.view.expression(at)
        for old, new in self.names:
            made = Rename(made, old, new)
        return made


@dataclass(frozen=True)
class Operation:
    """An operation of a block.

    Attributes:
      name: of the operation.
      operands: ``x``, ``p0`` for the first parameter, ``v0`` for the first operation.
      attrs: its attributes.
    """

    name: str
    operands: tuple[str, ...]
    attrs: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        attrs = "".join(f" {n}={v}" for n, v in self.attrs)
        return f"{self.name}({', '.join(self.operands)}{attrs})"


@dataclass
class Block:
    """A block: operations, the last of which is the result.

    Attributes:
      params: the parameters, in the order of use.
      operations: in order.
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


def block_of(island: Island) -> Block:
    """Return a block that was found as operations.

    Raises:
      Misfit: it has no such operations, or a parameter has other axes than the two of a block.
    """
    return _Emitter(island).block()


class _Emitter:
    def __init__(self, island: Island) -> None:
        self._island = island
        axes = island.axes
        outer = island.source.dims[island.outer]
        assert outer is not None, "an axis of the input"
        self._names = {axes.find(outer): OUTER, axes.find(island.inner): INNER}
        self._block = Block()
        self._made: dict[int, str] = {}
        dtype = str(island.x.aval.dtype)
        self._activations = activations(dtype)

    def block(self) -> Block:
        self._emit(nodes_of(self._island))
        return self._block

    def _emit(self, node: Node | float) -> str:
        """Return the operand that stands for `node`, after the operations that make it."""
        if isinstance(node, float):
            return self._add("constant", (), value=node)
        if isinstance(node, Input):
            return "x"
        if id(node) not in self._made:
            self._made[id(node)] = self._operation(node)
        return self._made[id(node)]

    def _operation(self, node: Node) -> str:
        if isinstance(node, Weight):
            return self._param(node)
        if isinstance(node, Product):
            over = self._names.get(self._island.axes.find(node.over))
            if over is None:
                raise Misfit("a product inside it sums over tokens")
            return self._add("contract", (self._emit(node.x), self._param(node.weight)), over=over)
        assert isinstance(node, Apply)
        # Between operations everything is in the type that the block computes in.
        if node.function in ("wide", "narrow"):
            return self._emit(node.operands[0])
        return self._function(node)

    def _function(self, node: Apply) -> str:
        base = _base(node)
        if base is None:
            if node.function not in _BINARY:
                raise Misfit(
                    f"`{node.function}` inside it takes several hidden values: of two, blocks have "
                    "sums, products, quotients, maxima and minima"
                )
            return self._add(node.function, tuple(map(self._emit, node.operands)))
        formula = str(formula_of(node, base))
        known = self._activations.get(formula)
        if known is not None:
            return self._add(known, (self._emit(base),))
        inner = [x for x in node.operands if isinstance(x, Node)]
        if (len(inner) == 1 and inner[0] is not base) or len(node.operands) == 1:
            return self._chained(node, inner[0], formula, base)
        return self._simple(node, base) or self._pointwise(formula, base)

    def _chained(self, node: Apply, inner: Node, formula: str, base: Node) -> str:
        """Emit a function of one value that is made of another first."""
        if node.function in _UNARY:
            return self._add(node.function, (self._emit(inner),))
        return self._simple(node, inner) or self._pointwise(formula, base)

    def _simple(self, node: Apply, inner: Node) -> str | None:
        """Emit arithmetic of one value with a number as an operation, where it is one."""
        numbers = [x for x in node.operands if isinstance(x, float)]
        if len(node.operands) != 2 or len(numbers) != 1 or node.function not in _BINARY:
            return None
        if node.function == "mul":
            return self._add("scale", (self._emit(inner),), by=numbers[0])
        return self._add(node.function, tuple(map(self._emit, node.operands)))

    def _pointwise(self, formula: str, base: Node) -> str:
        return self._add("pointwise", (self._emit(base),), function=formula)

    def _add(self, name: str, operands: tuple[str, ...], **attrs: object) -> str:
        self._block.operations.append(Operation(name, operands, tuple(attrs.items())))
        return f"v{len(self._block.operations) - 1}"

    def _param(self, weight: Weight) -> str:
        axes = self._island.axes
        names = []
        for name, number in weight.axes.items():
            known = self._names.get(axes.find(number))
            if known is None:
                raise Misfit(f"its weight {weight.view.leaf.name} has another axis than the two")
            names.append((name, known))
        view = weight.view.with_dims(tuple(n for n, _ in weight.view.sizes))
        param = Param(view, tuple(names))
        if param not in self._block.params:
            self._block.params.append(param)
        return f"p{self._block.params.index(param)}"


def _base(node: Apply) -> Node | None:
    """Return the value of whose elements `node` is a function, the furthest back; or None."""
    found: dict[int, Node | None] = {}

    def base(x: Node) -> Node | None:
        if not isinstance(x, Apply):
            return None
        if id(x) not in found:
            found[id(x)] = _common(x)
        return found[id(x)]

    def _common(x: Apply) -> Node | None:
        inner = list(dict.fromkeys(o for o in x.operands if isinstance(o, Node)))
        candidates = [dict.fromkeys((base(o), o)) for o in inner]
        shared = [c for c in candidates[0] if c is not None and all(c in o for o in candidates)]
        return shared[0] if shared else None

    return base(node)


# What a block computes, whatever element type it is traced in: how it is known in another one.
#
# A function traced with parameters in bfloat16 has the casts and the rounded numbers of bfloat16,
# and
# is the same function of the user's program as in float32.

_CASTS = ("wide", "narrow")
_NUMBER = re.compile(r"(?<=#)[^ ;]+")


def identity(island: Island) -> str:
    """Return the computation of a block as text without casts, its numbers in full."""
    return _Speller(island).text()


def same_in(a: str, b: str, dtype: DType) -> bool:
    """Return whether two blocks are the same where their numbers are rounded to `dtype`."""
    return _rounded(a, dtype) == _rounded(b, dtype)


def _rounded(text: str, dtype: DType) -> str:
    def rounded(found: re.Match[str]) -> str:
        with np.errstate(all="ignore"):
            return repr(float(np.asarray(float(found[0])).astype(dtype.numpy)))

    return _NUMBER.sub(rounded, text)


class _Speller:
    """Numbers the values of a block in the order of use, and spells each once."""

    def __init__(self, island: Island) -> None:
        self._island = island
        self._names: dict[object, str] = {}
        self._lines: list[str] = []

    def text(self) -> str:
        self._name(nodes_of(self._island))
        return "; ".join(self._lines)

    def _name(self, node: Node | float) -> str:
        if isinstance(node, float):
            return f"#{node!r}"
        if isinstance(node, Input):
            return "x"
        if isinstance(node, Weight):
            key = (node.view.leaf.name, node.view.steps)
            return self._names.setdefault(key, f"w{len(self._names)}")
        if isinstance(node, Apply) and node.function in _CASTS:
            return self._name(node.operands[0])
        if id(node) not in self._names:
            self._lines.append(self._line(node))
            self._names[id(node)] = f"v{len(self._names)}"
        return self._names[id(node)]

    def _line(self, node: Node) -> str:
        if isinstance(node, Product):
            return f"contract {self._name(node.x)} {self._name(node.weight)}"
        assert isinstance(node, Apply), "a value of a block is a product, or a function"
        return " ".join([node.function, *map(self._name, node.operands)])
