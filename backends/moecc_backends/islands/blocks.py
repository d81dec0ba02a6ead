"""A block as operations of the IR on its input and parameters, independent of any graph.

The text of a block is the same wherever the same computation is found: it is how a block of another
function is known to be one that was converted.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from moecc.ir.formula import FUNCTIONS
from moecc.ir.ops import OPS
from moecc.weights.expr import Expr
from moecc.weights.movement import Rename
from moecc_backends.islands.dag import Apply, Input, Misfit, Node, Product, Weight
from moecc_backends.islands.find import Island, nodes_of
from moecc_backends.islands.formulas import activations, formula_of
from moecc_backends.islands.views import View

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
