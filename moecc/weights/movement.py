"""Expressions that move data without arithmetic: the bytes of an element never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

from moecc.support.ranges import Progression, varying
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Head
from moecc.types import DTYPES, Axis, TensorType
from moecc.weights.draws import Draw
from moecc.weights.expr import Expr, axis_of, check_name, check_type, node

# A short text for stacks of many expressions that differ in a number.
#
# ``each(layer=0..2, source("layers.{layer}.w" : f32[embed=4]))`` is the stack, along ``layer``, of
# the three expressions obtained with 0, 1 and 2 substituted for ``{layer}``. They can be nested.


def in_short(texts: Sequence[str], axis: str) -> str | None:
    """Return ``axis=first..last, text`` for the expressions `texts`, or None if there is none."""
    mark = f"{{{axis}}}"
    if len(texts) < 2 or any(mark in text for text in texts):
        return None
    variation = varying(texts)
    if variation is None or len(set(variation[1].values())) != 1:
        return None
    pieces, numbers = variation
    spelled = "".join(mark if i in numbers else piece for i, piece in enumerate(pieces))
    return f"{axis}={next(iter(numbers.values()))}, {spelled}"


def in_full(text: str, axis: str, numbers: Progression) -> list[str]:
    """Return the texts that ``each`` expands to."""
    mark = f"{{{axis}}}"
    return [text.replace(mark, str(numbers.start + i * numbers.step)) for i in range(numbers.count)]


Sizes = tuple[tuple[str, int], ...]
"""Names of axes with their sizes."""


@node
class Tile(Expr):
    """Copies along a new axis: ``tile(x, expert=8)``.

    Attributes:
      x: the expression to copy.
      axis: the name of the new axis.
      size: the number of copies.
      position: the position of the new axis in the result.
    """

    syntax = "tile({x}, {axis}={size}[, position={position}])"
    rearranges = True
    x: Expr
    axis: str
    size: int
    position: int = 0

    def _infer(self) -> TensorType:
        if self.size < 1:
            raise self.error("an axis needs at least one copy", found=str(self.size))
        return _with_new_axis(self, self.x.type, Axis(self.axis, self.size), self.position)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        (x,) = operands
        new = algebra.axis(self.axis, self.size)
        return replace(x, axes=(*x.axes[: self.position], new, *x.axes[self.position :]))


@node
class Stack(Expr):
    """Expressions of one type along a new axis: ``stack(x, y, axis=expert)``.

    Attributes:
      xs: the expressions to stack.
      axis: the name of the new axis.
      position: the position of the new axis in the result.
    """

    syntax = "stack({xs}axis={axis}[, position={position}])"
    rearranges = True
    xs: tuple[Expr, ...]
    axis: str
    position: int = 0

    def _infer(self) -> TensorType:
        if not self.xs:
            raise self.error("nothing to stack")
        first = self.xs[0].type
        for x in self.xs[1:]:
            if x.type != first:
                raise self.error(
                    "stacked expressions must have one type", expected=str(first), found=str(x.type)
                )
        return _with_new_axis(self, first, Axis(self.axis, len(self.xs)), self.position)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.stacked(operands, self.axis, self.position)

    def __str__(self) -> str:
        short = in_short([str(x) for x in self.xs], self.axis)
        if short is None:
            return super().__str__()
        position = f", position={self.position}" if self.position else ""
        return f"each({short}{position})"


@node
class Concat(Expr):
    """Expressions concatenated along an existing axis: ``concat(x, y, axis=mlp)``."""

    syntax = "concat({xs}axis={axis})"
    rearranges = True
    xs: tuple[Expr, ...]
    axis: str

    def _infer(self) -> TensorType:
        if not self.xs:
            raise self.error("nothing to concatenate")
        first = self.xs[0].type
        at = axis_of(self, self.xs[0], self.axis)
        for x in self.xs[1:]:
            same = x.type.names == first.names and x.type.dtype is first.dtype
            if not same or _resized(x.type, at, 0) != _resized(first, at, 0):
                raise self.error(
                    f"concatenated expressions may differ only in axis {self.axis!r}",
                    expected=str(first),
                    found=str(x.type),
                )
        return _resized(first, at, sum(x.type.axes[at].fixed_size for x in self.xs))

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.pieces(operands, self.axis)


@node
class Index(Expr):
    """One position of an axis, which is removed: ``index(x, expert=3)``."""

    syntax = "index({x}, {axis}={at})"
    rearranges = True
    x: Expr
    axis: str
    at: int

    def _infer(self) -> TensorType:
        axis = self.x.type.axes[axis_of(self, self.x, self.axis)]
        if not 0 <= self.at < axis.fixed_size:
            raise self.error(
                f"there is no position {self.at} on axis {self.axis!r}",
                expected=f"0 to {axis.fixed_size - 1}",
            )
        return self.x.type.without(self.axis)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        (x,) = operands
        return x.moved(x.without(self.axis), {self.axis: algebra.number(self.at)})


@node
class Slice(Expr):
    """Positions [start, stop) of an axis: ``slice(x, mlp=0:768)``."""

    syntax = "slice({x}, {axis}={start}:{stop})"
    rearranges = True
    x: Expr
    axis: str
    start: int
    stop: int

    def _infer(self) -> TensorType:
        at = axis_of(self, self.x, self.axis)
        if not 0 <= self.start < self.stop <= self.x.type.axes[at].fixed_size:
            raise self.error(
                f"not a range of axis {self.axis!r}",
                expected=f"0 <= start < stop <= {self.x.type.axes[at].fixed_size}",
                found=f"{self.start}:{self.stop}",
            )
        return _resized(self.x.type, at, self.stop - self.start)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        (x,) = operands
        new = algebra.axis(self.axis, self.stop - self.start)
        position = algebra.add(algebra.index(new), algebra.number(self.start))
        axes = (new if v.name == self.axis else v for v in x.axes)
        return x.moved(axes, {self.axis: position})


@node
class Split(Expr):
    """An axis split into several, outermost first: ``split(x, mlp=(group=2, mlp=768))``."""

    syntax = "split({x}, {axis}={into})"
    rearranges = True
    x: Expr
    axis: str
    into: Sizes

    def _infer(self) -> TensorType:
        at = axis_of(self, self.x, self.axis)
        total = self.x.type.axes[at].fixed_size
        if not self.into or any(s < 1 for _, s in self.into):
            raise self.error("the parts of an axis need sizes of at least 1")
        if prod(s for _, s in self.into) != total:
            raise self.error(
                f"the product of the parts is not the size of axis {self.axis!r}",
                expected=str(total),
                found=" * ".join(str(s) for _, s in self.into),
            )
        parts = tuple(Axis(n, s) for n, s in self.into)
        return _renamed(self, _spliced(self.x.type, at, at + 1, parts))

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.split(operands[0], self.axis, self.into)


@node
class Merge(Expr):
    """Neighbouring axes merged into one, the inverse of `Split`: ``merge(x, (group, mlp)=mlp)``."""

    syntax = "merge({x}, {axes}={into})"
    rearranges = True
    x: Expr
    axes: tuple[str, ...]
    into: str

    def _infer(self) -> TensorType:
        if not self.axes:
            raise self.error("no axes to merge")
        at = [axis_of(self, self.x, name) for name in self.axes]
        if any(b != a + 1 for a, b in pairwise(at)):
            raise self.error(
                "merged axes must be neighbours, in order",
                found=str(self.x.type),
                hint="permute the operand first",
            )
        merged = self.x.type.axes[at[0] : at[-1] + 1]
        axis = Axis(self.into, prod(a.fixed_size for a in merged))
        return _renamed(self, _spliced(self.x.type, at[0], at[-1] + 1, (axis,)))

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.merged(operands[0], self.axes, self.into)


@node
class Rename(Expr):
    """Another name for an axis: ``rename(x, mlp=inner)``."""

    syntax = "rename({x}, {old}={new})"
    rearranges = True
    x: Expr
    old: str
    new: str

    def _infer(self) -> TensorType:
        at = axis_of(self, self.x, self.old)
        axis = Axis(self.new, self.x.type.axes[at].size)
        return _renamed(self, _spliced(self.x.type, at, at + 1, (axis,)))

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        (x,) = operands
        new = algebra.axis(self.new, x.axis(self.old).size)
        axes = (new if v.name == self.old else v for v in x.axes)
        return x.moved(axes, {self.old: algebra.index(new)})


@node
class Permute(Expr):
    """The axes in another order: ``permute(x, (embed, mlp))``."""

    syntax = "permute({x}, {order})"
    rearranges = True
    x: Expr
    order: tuple[str, ...]

    def _infer(self) -> TensorType:
        if sorted(self.order) != sorted(self.x.type.names):
            raise self.error(
                "the order must name each axis once",
                expected=", ".join(self.x.type.names),
                found=", ".join(self.order),
            )
        return self.x.type.with_axes(self.x.type[name] for name in self.order)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        (x,) = operands
        return replace(x, axes=tuple(x.axis(name) for name in self.order))


def _spliced(type: TensorType, start: int, stop: int, axes: tuple[Axis, ...]) -> TensorType:
    return type.with_axes((*type.axes[:start], *axes, *type.axes[stop:]))


def _resized(type: TensorType, at: int, size: int) -> TensorType:
    return _spliced(type, at, at + 1, (Axis(type.axes[at].name, size),))


def _renamed(expr: Expr, type: TensorType) -> TensorType:
    for name in type.names:
        check_name(expr, name)
    if len(set(type.names)) != len(type.names):
        raise expr.error("the result would have two axes of the same name", found=str(type))
    return type


def _with_new_axis(expr: Expr, type: TensorType, axis: Axis, position: int) -> TensorType:
    if not 0 <= position <= type.rank:
        raise expr.error(
            "the position of the new axis is out of range",
            expected=f"0 to {type.rank}",
            found=str(position),
        )
    return _renamed(expr, _spliced(type, position, position, (axis,)))


# Expressions that choose positions of an axis: an order, and what is taken in it.
#
# An order is a vector of whole numbers over one axis.  A joint permutation of the neurons of a
# block changes nothing (lemma L8 of ``docs/exactness.md``); a cut of the permuted axis makes
# experts of neurons that belong together.

I32 = DTYPES["i32"]


@node
class Take(Expr):
    """Positions of an axis in another order: ``take(x, mlp=order)``.

    Attributes:
      x: the expression whose positions are taken.
      axis: the axis.
      order: the positions, ``i32[axis=n]``; the result has n positions.
    """

    syntax = "take({x}, {axis}={order})"
    rearranges = True
    x: Expr
    axis: str
    order: Expr

    def _infer(self) -> TensorType:
        at = axis_of(self, self.x, self.axis)
        order = self.order.type
        if order.dtype is not I32 or order.names != (self.axis,):
            raise self.error(
                "an order is a vector of whole numbers",
                expected=f"i32[{self.axis}=…]",
                found=str(order),
            )
        axes = list(self.x.type.axes)
        axes[at] = Axis(self.axis, order.axes[0].fixed_size)
        return self.x.type.with_axes(axes)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        x, order = operands
        (new,) = order.axes
        axes = (new if v.name == self.axis else v for v in x.axes)
        return x.moved(axes, {self.axis: order.body})


@node
class Permutation(Draw):
    """A random order of all positions: ``permutation(i32[mlp=1536], key=0x1f)``.

    The positions in the order of their random words.
    """

    syntax = "permutation({type}, key={key:key})"
    rearranges = True
    type: TensorType
    key: int

    def _infer(self) -> TensorType:
        check_type(self, self.type)
        if self.type.dtype is not I32 or self.type.rank != 1:
            message = "an order is a vector of whole numbers"
            raise self.error(message, expected="i32[axis=n]", found=str(self.type))
        return self._check_key(self.type)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        (axis,) = self.axes_in(algebra)
        head = Head("permutation", (axis.size, self.key))
        return Tensor(algebra, (axis,), algebra.apply(head, (), [algebra.index(axis)]))


@node
class Clusters(Expr):
    """An order that puts neurons that are active together side by side.

    ``clusters(counts, axis=mlp, first=384, groups=6)``: first the 384 neurons that are active most
    often, then six groups of equal size.

    Attributes:
      counts: how often two neurons are active at the same token, ``[axis, other]``, symmetric; its
        diagonal is how often one is.
      axis: the axis of the neurons.
      first: the number of neurons that come first, by how often they are active.
      groups: the groups that the others are divided into.
    """

    syntax = "clusters({counts}, axis={axis}, first={first}, groups={groups})"
    counts: Expr
    axis: str
    first: int
    groups: int

    def _infer(self) -> TensorType:
        type = self.counts.type
        at = axis_of(self, self.counts, self.axis)
        sizes = type.shape
        if at != 0 or type.rank != 2 or sizes[0] != sizes[1]:
            raise self.error(
                "counts of pairs are a square",
                expected=f"[{self.axis}=n, other=n]",
                found=str(type),
            )
        left = sizes[0] - self.first
        if self.groups < 1 or not 0 <= self.first < sizes[0] or left % self.groups:
            raise self.error(
                "the neurons do not divide into groups",
                expected=f"a divisor of {sizes[0]} − {self.first}",
                found=str(self.groups),
            )
        return TensorType(I32, (type.axes[0],))


@node
class Aligned(Expr):
    """An order of neurons that brings a block's weights nearest to those of a reference.

    ``aligned(gate, down, gate_of_reference, down_of_reference, axis=mlp)``: of all orders, the one
    of the largest sum of products with the reference, which has the least squared distance from it
    (Ainsworth et al. 2022, weight matching of one layer).

    Attributes:
      xs: the weights with an axis of neurons, then those of the reference, in the same order.
      axis: the axis of the neurons.
    """

    syntax = "aligned({xs}axis={axis})"
    xs: tuple[Expr, ...]
    axis: str

    def _infer(self) -> TensorType:
        count = len(self.xs) // 2
        weights, references = self.xs[:count], self.xs[count:]
        if not count or [x.type.axes for x in weights] != [x.type.axes for x in references]:
            raise self.error(
                "a reference has the shapes of the weights",
                expected=", ".join(str(x.type) for x in weights) or "weights and references",
                found=", ".join(str(x.type) for x in references) or "nothing",
            )
        neurons = weights[0].type.axes[axis_of(self, weights[0], self.axis)]
        for x in weights:
            if x.type.axes[axis_of(self, x, self.axis)] != neurons or not x.type.dtype.is_float:
                raise self.error("not weights of the same neurons", found=str(x.type))
        return TensorType(I32, (neurons,))

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        # Some order of all neurons, which the text identifies.
        (axis,) = self.axes_in(algebra)
        head = Head("permutation", (axis.size, str(self)))
        return Tensor(algebra, (axis,), algebra.apply(head, (), [algebra.index(axis)]))
