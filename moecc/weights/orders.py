"""Expressions that choose positions of an axis: an order, and what is taken in it.

An order is a vector of whole numbers over one axis.  A joint permutation of the neurons of a block
changes nothing (lemma L8 of ``docs/exactness.md``); a cut of the permuted axis makes experts of
neurons that belong together.
"""

from __future__ import annotations

from moecc.types.dtypes import DTYPES
from moecc.types.tensor import Axis, TensorType
from moecc.weights.draws import Draw
from moecc.weights.expr import Expr, axis_of, check_type, node, size

I32 = DTYPES["i32"]


@node
class Take(Expr):
    """Positions of an axis in another order: ``take(x, mlp=order)``.

    Attributes:
      x: the expression whose positions are taken.
      axis: the axis.
      order: the positions, ``i32[axis=n]``; the result has n positions.
    """

    op = "take"
    x: Expr
    axis: str
    order: Expr

    def _infer(self) -> TensorType:
        at = axis_of(self, self.x, self.axis)
        order = self.order.type
        if order.dtype is not I32 or order.names != (self.axis,):
            raise self.error(
                "an order is a vector of whole numbers", expected=f"i32[{self.axis}=…]",
                found=str(order),
            )  # fmt: skip
        axes = list(self.x.type.axes)
        axes[at] = Axis(self.axis, size(order.axes[0]))
        return self.x.type.with_axes(axes)

    def __str__(self) -> str:
        return f"take({self.x}, {self.axis}={self.order})"


@node
class Permutation(Draw):
    """A random order of all positions: ``permutation(i32[mlp=1536], key=0x1f)``.

    The positions in the order of their random words.
    """

    op = "permutation"
    type: TensorType
    key: int

    def _infer(self) -> TensorType:
        check_type(self, self.type)
        if self.type.dtype is not I32 or self.type.rank != 1:
            what = "an order is a vector of whole numbers"
            raise self.error(what, expected="i32[axis=n]", found=str(self.type))
        return self._check_key(self.type)

    def __str__(self) -> str:
        return f"permutation({self.type}, {self._key_text})"


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

    op = "clusters"
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
                "counts of pairs are a square", expected=f"[{self.axis}=n, other=n]",
                found=str(type),
            )  # fmt: skip
        left = sizes[0] - self.first
        if self.groups < 1 or not 0 <= self.first < sizes[0] or left % self.groups:
            raise self.error(
                "the neurons do not divide into groups",
                expected=f"a divisor of {sizes[0]} − {self.first}", found=str(self.groups),
            )  # fmt: skip
        return TensorType(I32, (type.axes[0],))

    def __str__(self) -> str:
        return (
            f"clusters({self.counts}, axis={self.axis}, first={self.first}, groups={self.groups})"
        )
