"""Moments carried into a model that a pipeline made of a trained one, by formula.

A pipeline makes each parameter W of the new model from parameters w of the old one, so that the
function stays: F(W(w)) = f(w).  By the chain rule ∇f = Jᵀ ∇F, with J the Jacobian of W(w).  Where a
matrix is copied E times, ∇f is the sum of the copies' gradients, which share it evenly: a copy has
1/E of it.  Where it is scaled by s, its gradient is scaled by 1/s; where it is cut, stacked or
permuted, so is the gradient.  A first moment is a mean of gradients and goes the same way; a second
moment, a mean of squares, goes with the squares of the factors, and so do Adafactor's means of them
over rows and columns.  What is drawn has no moments: zeros.

Squares of the noise of gradients do not quite: where tokens are divided among E experts, k of them
each, a copy's noise is up to E/k larger than 1/E² says.  No system that we know carries moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.ir.graph import Graph
from moecc.steps.moment_axes import COLUMN, FIRST, ROW, SECOND, moment_types
from moecc.steps.settings import parameter_settings
from moecc.train.recipe import OptimizerSection
from moecc.types.dtypes import F32
from moecc.types.tensor import TensorType
from moecc.weights.arithmetic import Add, Cast, Scale, Select
from moecc.weights.expr import Expr, Full, Source, sources
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)

POWERS = {FIRST: 1, SECOND: 2, ROW: 2, COLUMN: 2}
"""How moments go with a factor on the gradient, by their kind."""

MOMENTS = "moments"
"""What moments are called in a state, before a dot and their kind."""


class _UnknownError(Exception):
    """A moment does not follow from those of the source."""


def carried_moments(
    graph: Graph, weights: Mapping[str, Expr], source: Graph, section: OptimizerSection
) -> tuple[dict[str, Expr], list[str]]:
    """Return expressions for the moments of a model over those of its source.

    Args:
      graph: the canonical graph of the model.
      weights: how its parameters are made of those of the source.
      source: the canonical graph of the source.
      section: the optimiser of both.

    Returns:
      The expressions by name, ``moments.m.NAME``; and the parameters whose moments do not follow,
      and are zeros.
    """
    old, new = _types(source, section), _types(graph, section)
    made: dict[str, Expr] = {}
    unknown: dict[str, None] = {}
    for kind, types in new.items():
        for name, type in types.items():
            try:
                rule = _Rule(kind, old.get(kind, {}), graph.params[name].type, type)
                made[f"{MOMENTS}.{kind}.{name}"] = rule.of(weights[name])
            except _UnknownError:
                unknown[name] = None
    return made, list(unknown)


def _types(graph: Graph, section: OptimizerSection) -> dict[str, dict[str, TensorType]]:
    settings = parameter_settings(graph, section)
    types = {name: graph.params[name].type.bare for name in settings}
    return moment_types(section.name, types, settings)


@dataclass(frozen=True)
class _Rule:
    """Makes the expression of one moment from that of its parameter.

    Attributes:
      kind: of the moment.
      known: the types of the source's moments of this kind, by parameter.
      param: the type of the new parameter.
      type: the type of the new moment.
    """

    kind: str
    known: Mapping[str, TensorType]
    param: TensorType
    type: TensorType

    def of(self, weight: Expr) -> Expr:
        """Return the moment of a parameter that is `weight`. Raises _UnknownError."""
        gone = frozenset(self.param.names) - frozenset(self.type.names)
        return self._of(weight, gone)

    def _of(self, x: Expr, gone: frozenset[str]) -> Expr:
        """Return the moment of a part of the expression, which lacks the axes in `gone`."""
        if not sources(x):
            return Full(0.0, x.type.with_dtype(F32).without(*gone))
        match x:
            case Source():
                return self._source(x, gone)
            case Cast():
                return self._of(x.x, gone)
            case Scale():
                return self._scaled(self._of(x.x, gone), x.factor)
            case Tile():
                copies = Tile(self._of(x.x, gone), x.axis, x.size, _place(x, gone, x.axis))
                return self._scaled(copies, float(x.size))
            case Stack():
                parts = tuple(self._of(part, gone) for part in x.xs)
                return Stack(parts, x.axis, _place(x, gone, x.axis))
            case Add():
                return self._sum(x, gone)
            case Select() if not gone:
                return Select(x.mask, self._part(x.a, x), self._part(x.b, x))
        return self._moved(x, gone)

    def _moved(self, x: Expr, gone: frozenset[str]) -> Expr:
        match x:
            case Concat() if x.axis not in gone:
                return Concat(tuple(self._of(part, gone) for part in x.xs), x.axis)
            case Index() if x.axis not in gone:
                return Index(self._of(x.x, gone), x.axis, x.at)
            case Slice() if x.axis in gone:
                # The mean over a part of an axis is taken to be that over all of it.
                return self._of(x.x, gone)
            case Slice():
                return Slice(self._of(x.x, gone), x.axis, x.start, x.stop)
            case Permute():
                kept = tuple(n for n in x.type.names if n not in gone)
                return Permute(self._of(x.x, gone), kept)
            case Rename():
                before = frozenset(x.old if n == x.new else n for n in gone)
                inner = self._of(x.x, before)
                return inner if x.new in gone else Rename(inner, x.old, x.new)
            case Split() | Merge() if not gone:
                return x.with_operands(self._of(x.x, gone))
        raise _UnknownError

    def _source(self, x: Source, gone: frozenset[str]) -> Expr:
        found = self.known.get(x.name)
        wanted = x.type.without(*gone)
        if found is None or found.names != wanted.names or found.shape != wanted.shape:
            raise _UnknownError
        return Source(f"{MOMENTS}.{self.kind}.{x.name}", TensorType(F32, wanted.axes))

    def _scaled(self, x: Expr, factor: float) -> Expr:
        if factor == 0:
            raise _UnknownError
        return Scale(x, float(factor) ** -POWERS[self.kind])

    def _sum(self, x: Add, gone: frozenset[str]) -> Expr:
        """Return the moment of a sum with what is drawn, which has no part in the gradient."""
        own = [part for part in (x.a, x.b) if sources(part)]
        if len(own) != 1 or own[0].type.names != x.type.names:
            raise _UnknownError
        return self._of(own[0], gone)

    def _part(self, part: Expr, whole: Expr) -> Expr:
        if part.type.names != whole.type.names:
            raise _UnknownError
        return self._of(part, frozenset())


def _place(x: Expr, gone: frozenset[str], axis: str) -> int:
    """Return where a new axis lies among those that are kept."""
    if axis in gone:
        raise _UnknownError
    return [n for n in x.type.names if n not in gone].index(axis)
