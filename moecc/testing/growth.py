"""Growing a random graph: append-only, operands are earlier values, well typed by construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.table.rules import EXTENT_AXES
from moecc.testing.choices import Choices, pick
from moecc.testing.weights import grow_weight
from moecc.types.dtypes import DType
from moecc.types.tensor import Axis, TensorType

T = TypeVar("T")

SIZES = (2, 1, 3, 4, 6)
"""Sizes of fixed axes, the ones to shrink to first."""

LOCATIONS = ("", "layers.0.ffn", "layers.1.attn", "layers.11.mlp", "embed", "encoder.blocks.3")


class Growth:
    """A graph that grows by steps.

    A step takes the growth, appends what it can, and may append nothing.

    Attributes:
      graph: the graph so far.
      builder: appends to it.
      values: what later steps may use, in order of definition.
      taps: interior values that the graph returns beside its sinks.
      is_square: whether all sizes are equal, so that a wrong orientation is well typed.
    """

    def __init__(self, choices: Choices, dtype: DType) -> None:
        self.choices = choices
        self.dtype = dtype
        self.graph = Graph()
        self.builder = Builder(self.graph)
        self.values: list[Value] = []
        self.taps: list[Value] = []
        self._sizes: dict[str, int] = {}
        self.is_square = self.chance(30)

    def pick(self, items: Sequence[T]) -> T:
        """Return one of `items`, which are ordered from simple to complex."""
        return pick(self.choices, items)

    def chance(self, percent: int) -> bool:
        """Return whether something happens that happens in `percent` of all cases."""
        return self.choices.below(100) >= 100 - percent

    def relocate(self) -> None:
        """Give the nodes that follow another location."""
        self.builder.loc = self.pick(LOCATIONS)

    def emit(self, op: str, *operands: Value, **attrs: object) -> Value:
        """Append an operation and return its first result; later steps may use all results."""
        node = self.builder.node(op, *operands, names=(), **attrs)
        self.values += node.results
        return node.results[0]

    def input(self, hint: str, type: TensorType) -> Value:
        """Add an input."""
        value = self.graph.input(self.graph.fresh(hint), type)
        self.values.append(value)
        return value

    def param(self, hint: str, axes: Iterable[Axis], dtype: DType) -> Value:
        """Add a parameter, or return one of that type that is there already.

        A quarter of them is made by a weight expression.
        """
        type = TensorType(dtype, tuple(axes))
        same = [v for v in self.graph.params.values() if v.type == type]
        if same and self.chance(15):
            return self.pick(same)
        weight = grow_weight(self.choices, type) if self.chance(25) else None
        return self.graph.param(self.graph.fresh(hint), type, weight, loc=self.builder.loc)

    def constant(self, value: float, dtype: DType) -> Value:
        """Append a scalar constant."""
        return self.emit("constant", value=value, dtype=dtype.name)

    def size_of(self, name: str) -> int:
        """Return the usual size of the axis `name` in this graph."""
        key = "" if self.is_square else name
        if key not in self._sizes:
            self._sizes[key] = self.pick(SIZES)
        return self._sizes[key]

    @property
    def tokens(self) -> tuple[Axis, Axis]:
        """The axes that number the tokens of an input."""
        return Axis("batch", "S" if self.is_square else "B"), Axis("seq", "S")

    @property
    def embed(self) -> Axis:
        """The axis of the model's width."""
        return Axis("embed", self.size_of("embed"))

    def new_axis(self, hint: str, *types: TensorType) -> Axis:
        """Return an axis of fixed size that none of `types` has."""
        name, number = hint, 2
        while any(name in t for t in types):
            name, number = f"{hint}{number}", number + 1
        return Axis(name, self.size_of(name))

    def find(self, fits: Callable[[Value], bool]) -> Value | None:
        """Return an earlier value that fits, if there is one."""
        found = [v for v in self.values if fits(v)]
        if not found:
            return None
        # Patterns are made of what follows one another.
        return self.pick(found[-3:] if self.chance(50) else found)

    def find_float(self, fits: Callable[[TensorType], bool] = lambda _: True) -> Value | None:
        """Return an earlier floating-point value whose type fits, if there is one."""
        return self.find(lambda v: v.type.dtype.is_float and fits(v.type))

    def find_within(self, wide: TensorType) -> Value | None:
        """Return an earlier value of the element type of `wide`, with axes of `wide` only."""
        return self.find(lambda v: v.type.dtype == wide.dtype and is_within(v.type, wide))

    def tap(self, since: int, percent: int = 30) -> None:
        """At a chance, use a value defined since `since` once more, or return it.

        Rewrites go wrong where something inside the pattern has another user.
        """
        if since >= len(self.values) or not self.chance(percent):
            return
        value = self.pick(self.values[since:])
        if value.type.dtype.is_float and self.chance(50):
            value = self.emit("relu", value)
        self.taps.append(value)


Step = Callable[[Growth], None]


def is_within(narrow: TensorType, wide: TensorType) -> bool:
    """Return whether each axis of `narrow` is one of `wide`."""
    return all(wide.by_name.get(a.name) == a for a in narrow.axes)


def fixed(type: TensorType) -> list[Axis]:
    """Return the axes whose size is a number."""
    return [a for a in type.axes if isinstance(a.size, int)]


def symbolic(type: TensorType) -> list[Axis]:
    """Return the axes whose size is a variable."""
    return [a for a in type.axes if isinstance(a.size, str)]


def mixable(type: TensorType) -> list[Axis]:
    """Return the axes along which elements may be mixed: none that tells rows apart."""
    if type.ragged is None:
        return list(type.axes)
    return [a for a in type.axes if not a.is_ragged and a.name not in EXTENT_AXES]


def mixable_fixed(type: TensorType) -> list[Axis]:
    """Return the axes of fixed size along which elements may be mixed."""
    return [a for a in mixable(type) if isinstance(a.size, int)]


def token_width(type: TensorType) -> Axis | None:
    """Return the one fixed axis of a stream of tokens, ``[batch, seq, embed]``."""
    axes = fixed(type)
    is_stream = len(axes) == 1 and symbolic(type) and len(type.axes) == len(symbolic(type)) + 1
    return axes[0] if is_stream else None
