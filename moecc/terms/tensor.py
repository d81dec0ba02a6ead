"""Tensors as terms: named axes, and a polynomial of their index variables.

Operations and weight expressions state their meanings with the methods of this module.  Nothing
here rewrites by lemmas; the algebra's rules do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from moecc.terms.term import (
    Abstraction,
    Algebra,
    Coefficient,
    Head,
    Polynomial,
    Size,
    Var,
)
from moecc.types import DType


@dataclass(frozen=True, eq=False)
class SlotTerms:
    """The assignment of slots to choices, as far as terms know it.

    Attributes:
      head: the attributes and sizes of the rule of the assignment.
      operands: the operands of the assignment, each as a closed abstraction.
      tokens: the token axes, outermost first.
      choice: the axis of choices.
      experts: the expert of each choice.
      placed: 1 for a choice that has a slot, else 0.
      ragged: whether slots that no choice has do not exist.
      sizes: of the axes group, expert and slot.
    """

    head: tuple[Hashable, ...]
    operands: tuple[Abstraction, ...]
    tokens: tuple[Var, ...]
    choice: Var
    experts: Polynomial
    placed: Polynomial
    ragged: bool
    sizes: tuple[Size, Size, Size]

    def place(self, algebra: Algebra, choice: Polynomial) -> dict[str, Polynomial]:
        """Return the row of a choice of each token: its group, its expert and its slot."""
        tokens = [algebra.index(v) for v in self.tokens]
        own_slot, group = Head("own_slot", self.head), Head("group_of", self.head)
        return {
            "group": algebra.apply(group, self.operands, tokens),
            "expert": algebra.substitute(self.experts, {self.choice: choice}),
            "slot": algebra.apply(own_slot, self.operands, [*tokens, choice]),
        }


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value at its indices.

    Attributes:
      algebra: builds its terms.
      axes: the index variable of each axis, in order.
      body: the element at these indices.
      finite: whether every element is a finite number; arithmetic is for finite numbers alone.
      slots: for slots of choices, their assignment.
      dtype: the declared element type, which casts and comparisons read.
    """

    algebra: Algebra
    axes: tuple[Var, ...]
    body: Polynomial
    finite: bool = True
    slots: SlotTerms | None = None
    dtype: DType | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, in order."""
        return tuple(v.name for v in self.axes)

    def axis(self, name: str) -> Var:
        """Return the variable of an axis."""
        return next(v for v in self.axes if v.name == name)

    def has(self, name: str) -> bool:
        """Return whether there is an axis of this name."""
        return any(v.name == name for v in self.axes)

    def at(self, indices: Mapping[str, Polynomial]) -> Polynomial:
        """Return the element at indices; axes without one keep their variables."""
        values = {v: indices[v.name] for v in self.axes if v.name in indices}
        return self.algebra.substitute(self.body, values) if values else self.body

    def moved(self, axes: Iterable[Var], indices: Mapping[str, Polynomial]) -> Tensor:
        """Return the tensor with `axes` whose elements are this one's at `indices`."""
        return replace(self, axes=tuple(axes), body=self.at(indices), slots=None)

    def with_body(self, body: Polynomial) -> Tensor:
        """Return a tensor with these axes and other elements."""
        return replace(self, body=body, slots=None)

    def without(self, *names: str) -> tuple[Var, ...]:
        """Return the axes but for some."""
        return tuple(v for v in self.axes if v.name not in names)

    def along(self, *names: str) -> Abstraction:
        """Return the elements as a function of their indices along some axes."""
        return self.algebra.abstract([self.axis(n) for n in names], self.body)

    def closed(self) -> Abstraction:
        """Return the elements as a function of all indices, in the order of the axes."""
        return self.algebra.abstract(self.axes, self.body)

    def factor(self) -> Polynomial:
        """Return the element as one factor of a product, even where it is a sum."""
        return grouped(self.algebra, self.body)

    def named(self) -> Polynomial:
        """Return the element under a name, so that nothing looks inside until it must."""
        return let(self.algebra, self.body)


def grouped(algebra: Algebra, body: Polynomial) -> Polynomial:
    """Return a polynomial as one factor: in parentheses, under a name, or as it is."""
    match algebra.rules.cut(body, "factor"):
        case "name":
            return let(algebra, body)
        case "group":
            return algebra.apply(Head("group"), (), (body,))
    return body


def let(algebra: Algebra, body: Polynomial) -> Polynomial:
    """Return a polynomial as a named function of its free variables, applied to them."""
    if body.factor is not None or not body.terms:
        return body
    arguments = [algebra.index(v) for v in body.free]
    return algebra.apply(Head("let"), (algebra.abstract(body.free, body),), arguments)


def joint_axes(tensors: Sequence[Tensor]) -> tuple[Var, ...]:
    """Return the axes of the tensor that has most."""
    return max(tensors, key=lambda t: len(t.axes)).axes


def pointwise(name: str, attrs: Sequence[Hashable], tensors: Sequence[Tensor]) -> Tensor:
    """Return an uninterpreted function of one element of each tensor."""
    algebra = tensors[0].algebra
    body = algebra.apply(Head(name, tuple(attrs)), (), [t.body for t in tensors])
    finite = all(t.finite for t in tensors)
    return Tensor(algebra, joint_axes(tensors), body, finite)


def of_positive(name: str, x: Tensor) -> Tensor:
    """Return an uninterpreted function, which is finite of positive numbers alone."""
    at = x.body.constant
    if at is None or at > 0:
        return pointwise(name, (), (x,))
    return replace(pointwise(f"{name} of infinite", (), (x,)), finite=False)


def summed(*tensors: Tensor) -> Tensor:
    """Return the sum, element by element."""
    algebra = tensors[0].algebra
    bodies = [
        let(algebra, t.body) if algebra.rules.cut(t.body, "summand") else t.body for t in tensors
    ]
    return Tensor(algebra, joint_axes(tensors), algebra.add(*bodies))


def multiplied(*tensors: Tensor) -> Tensor:
    """Return the product, element by element."""
    algebra = tensors[0].algebra
    body = algebra.multiply(*(t.factor() for t in tensors))
    return Tensor(algebra, joint_axes(tensors), body)


def scaled(x: Tensor, by: Coefficient | float) -> Tensor:
    """Return the product with a number, which a float is exactly."""
    algebra = x.algebra
    number = algebra.number(by)
    constant = number.constant
    if constant is None:
        return x.with_body(algebra.multiply(number, x.body))
    return x.with_body(algebra.scale(x.body, constant))


def contracted(x: Tensor, w: Tensor, over: Sequence[str]) -> Tensor:
    """Return the sum of the product over axes; other axes that both have are matched."""
    algebra = x.algebra
    bound = {name: algebra.fresh(x.axis(name)) for name in over}
    indices = {name: algebra.index(v) for name, v in bound.items()}
    parts = [replace(t, body=t.factor()).at(indices) for t in (x, w)]
    axes = [*x.without(*over), *(v for v in w.without(*over) if not x.has(v.name))]
    return Tensor(algebra, tuple(axes), algebra.multiply(*parts, over=tuple(bound.values())))


def total(x: Tensor, axes: Sequence[str]) -> Tensor:
    """Return the sum over axes."""
    algebra = x.algebra
    bound = {name: algebra.fresh(x.axis(name)) for name in axes}
    body = x.at({name: algebra.index(v) for name, v in bound.items()})
    summed_body = algebra.multiply(body, over=tuple(bound.values()))
    return Tensor(algebra, x.without(*axes), summed_body)


def pieces(parts: Sequence[Tensor], axis: str) -> Tensor:
    """Return tensors one after the other along an axis."""
    algebra, start = parts[0].algebra, 0
    sizes = [t.axis(axis).size for t in parts]
    assert all(isinstance(s, int) for s in sizes)
    joined_axis = algebra.axis(axis, sum(int(s) for s in sizes))
    position, bodies = algebra.index(joined_axis), []
    for part, size in zip(parts, sizes, strict=True):
        stop = start + int(size)
        inside = algebra.apply(Head("range", (start, stop)), (), [position])
        shifted = part.at({axis: algebra.subtract(position, algebra.number(start))})
        bodies.append(algebra.multiply(inside, shifted))
        start = stop
    axes = tuple(joined_axis if v.name == axis else v for v in parts[0].axes)
    return Tensor(algebra, axes, algebra.add(*bodies))


def stacked(parts: Sequence[Tensor], axis: str, position: int = 0) -> Tensor:
    """Return tensors along a new axis."""
    algebra = parts[0].algebra
    new = algebra.axis(axis, len(parts))
    bodies = [algebra.index(new), *(t.body for t in parts)]
    body = algebra.apply(Head("stack", (len(parts),)), (), bodies)
    axes = (*parts[0].axes[:position], new, *parts[0].axes[position:])
    return Tensor(algebra, axes, body, all(t.finite for t in parts))


def split(x: Tensor, axis: str, into: Sequence[tuple[str, Size]]) -> Tensor:
    """Return the tensor with an axis cut into several, the first outermost."""
    algebra = x.algebra
    axes = [algebra.axis(n, s) for n, s in into]
    position = algebra.zero
    for v in axes:
        assert isinstance(v.size, int)
        position = algebra.add(algebra.scale(position, v.size), algebra.index(v))
    order = (new for v in x.axes for new in (axes if v.name == axis else (v,)))
    return x.moved(order, {axis: position})


def merged(x: Tensor, axes: Sequence[str], into: str) -> Tensor:
    """Return the tensor with several axes made one, the first outermost."""
    algebra, size = x.algebra, 1
    indices: dict[str, tuple[int, int]] = {}
    for name in reversed(axes):
        axis_size = x.axis(name).size
        assert isinstance(axis_size, int)
        indices[name] = (size, axis_size)
        size *= axis_size
    joined_axis = algebra.axis(into, size)
    position = algebra.index(joined_axis)
    values = {
        name: remainder(algebra, quotient(algebra, position, inner), size_of_axis)
        for name, (inner, size_of_axis) in indices.items()
    }
    order = (joined_axis if v.name == axes[0] else v for v in x.axes if v.name not in axes[1:])
    return x.moved(order, values)


def quotient(algebra: Algebra, index: Polynomial, by: int) -> Polynomial:
    """Return an index divided by a number, rounded down."""
    return index if by == 1 else algebra.apply(Head("div", (by,)), (), [index])


def remainder(algebra: Algebra, index: Polynomial, by: int) -> Polynomial:
    """Return the remainder of an index divided by a number."""
    return algebra.apply(Head("mod", (by,)), (), [index])


def divided(a: Tensor, b: Tensor) -> Tensor:
    """Return the quotient, element by element; that by a constant 0 is no finite number."""
    if b.body.constant == 0:
        return replace(pointwise("div of infinite", (), (a, b)), finite=False)
    algebra = a.algebra
    inverse = algebra.apply(Head("inverse"), (), [b.body])
    body = algebra.multiply(a.factor(), inverse)
    return Tensor(algebra, joint_axes((a, b)), body)


def symmetric(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Return an uninterpreted function of two elements that may be exchanged."""
    if a.body.serial > b.body.serial:
        a, b = b, a
    return pointwise(name, (), (a, b))


def chosen(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a where the condition is 1, b where it is 0."""
    algebra = a.algebra
    opposite = algebra.subtract(algebra.one, condition.body)
    body = algebra.add(
        algebra.multiply(condition.body, a.factor()), algebra.multiply(opposite, b.factor())
    )
    return Tensor(algebra, joint_axes((a, b, condition)), body)


def crossed(a: Tensor, b: Tensor) -> tuple[Var, ...]:
    """Return the axes of both; those of one name are matched."""
    return (*a.axes, *(v for v in b.axes if not a.has(v.name)))


def softmax(x: Tensor, axis: str, sink: Tensor | None = None) -> Tensor:
    """Return exp(x) over its sum along an axis, to which exp of a further score may belong.

    With a sink s it is softmax(x) · sigmoid(logsumexp(x) − s), which is the same.
    """
    algebra, index = x.algebra, x.algebra.index(x.axis(axis))
    head = Head("share" if x.finite else "masked_share", ("softmax",))
    weights = Tensor(algebra, x.axes, algebra.apply(head, [x.along(axis)], [index]))
    if sink is None:
        return weights
    return multiplied(weights, sink_gate(reduced(x, "logsumexp", (axis,)), sink))


def sink_gate(total: Tensor, sink: Tensor) -> Tensor:
    """Return sigmoid(total − sink), where the total may be −∞."""
    apart = (
        summed(total, scaled(sink, -1))
        if total.finite
        else pointwise("sub of infinite", (), (total, sink))
    )
    return replace(pointwise("sigmoid", (), (apart,)), finite=True)


def inverse_size(algebra: Algebra, axis: Var) -> Polynomial:
    """Return 1 / n for the size n of an axis."""
    if isinstance(axis.size, int):
        return algebra.number(Fraction(1, axis.size))
    return algebra.apply(Head("inverse_size", (axis.size,)))


def reduced(x: Tensor, name: str, axes: Sequence[str]) -> Tensor:
    """Return an uninterpreted function of all elements along axes, which it reduces away."""
    body = x.algebra.apply(Head(name), [x.along(*sorted(axes))])
    return replace(x, axes=x.without(*axes), body=body, slots=None)


def normalised(x: Tensor, name: str, axis: str, eps: float, scale: Tensor) -> Tensor:
    """Return a norm of x along an axis, an uninterpreted function, times the scale."""
    algebra = x.algebra
    along = replace(x, body=x.named()).along(axis)
    unit = algebra.apply(Head(name, (eps,)), [along], [algebra.index(x.axis(axis))])
    return Tensor(algebra, x.axes, algebra.multiply(unit, scale.factor()))
