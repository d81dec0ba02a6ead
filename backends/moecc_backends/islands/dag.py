"""The computation of a block on named axes: products with weights, and functions of elements.

Axes are numbers that are found to be one as equations show it.  Two axes become one only if no
value has both: an embedding times its transpose must not become square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moecc_backends.islands.views import View

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
