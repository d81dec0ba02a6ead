"""Parameters and moments under the names of the model, whatever passes made of its graph.

A *canonical* graph is the model that is trained, unrolled and on no mesh; its parameters are
tensors of a state, by their own names.  A graph that passes made of it, rolled and sharded say, has
weight expressions over these tensors.  Read forwards they restore the state of any program; read
backwards they say which tensors a program's arrays hold.  A moment of a parameter goes the same
ways, along the axes that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from moecc.errors import InputError
from moecc.formats.source import COLUMN, FIRST, ROW, SECOND
from moecc.ir.graph import Graph, Value, setter_of
from moecc.ir.ops.slots import SlotsOp, assigner
from moecc.ir.structure import clone
from moecc.ir.unroll import unroll, users_within
from moecc.translate.export import tensors_of
from moecc.types import F32, DType, Extent, TensorType
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.draws import Draw
from moecc.weights.expr import Expr, Full, Source, sources, transform, walk
from moecc.weights.movement import Concat, Index, Merge, Permute, Rename, Slice, Split, Stack, Tile

Weights = Mapping[str, Expr]
"""Weight expressions by the name of a parameter."""


@dataclass(frozen=True)
class Canonical:
    """A model that is trained, with its parameters as tensors of a state.

    Attributes:
      graph: the model.
      weights: how each parameter was made, before the first step.
    """

    graph: Graph
    weights: Weights


def canonical(graph: Graph, dtype: DType = F32) -> Canonical:
    """Return a copy of `graph`, unrolled, whose parameters are sources of their own names.

    Args:
      graph: the model, after its pipeline and before anything that is for training.
      dtype: of the master weights.

    Raises:
      InputError: a parameter has no weight expression, or one with symbolic sizes.
    """
    copy = clone(graph)
    unroll(copy)
    weights: dict[str, Expr] = {}
    for name, param in copy.params.items():
        if param.weight is None:
            raise InputError(f"the parameter %{name} has no weight expression")
        weights[name] = Cast(param.weight, dtype)
        param.weight = Source(name, TensorType(dtype, param.type.bare.axes))
    return Canonical(copy, weights)


def initial(param: Expr, weights: Weights) -> Expr:
    """Return what a program's parameter is before the first step.

    Args:
      param: its expression over the tensors of a state.
      weights: how these were made.
    """

    def made(node: Expr) -> Expr:
        return weights[node.name] if isinstance(node, Source) else node

    return transform(param, made)


def moment(param: Expr, kind: str, shape: tuple[int, ...]) -> Expr | None:
    """Return the expression of a moment of a program's parameter, over tensors of a state.

    Args:
      param: the parameter's expression.
      kind: what the moment's tensors are called, before a dot and the name of their parameter.
      shape: of the moment: the parameter's, or that without one axis, as Adafactor's factors are.

    Returns:
      None where the moment has none of the parameter's axes, and so holds nothing.
    """
    if shape == param.type.shape:
        return _renamed(param, kind, None)
    stacked = {node.axis for node in walk(param) if isinstance(node, Stack)}
    for dropped in param.type.names:
        if dropped not in stacked and shape == param.type.without(dropped).shape:
            return _renamed(param, kind, dropped)
    return None


def _renamed(param: Expr, kind: str, dropped: str | None) -> Expr:
    def moved(node: Expr) -> Expr:
        if not isinstance(node, Source):
            return node
        type = node.type if dropped is None else node.type.without(dropped)
        return Source(f"{kind}.{node.name}", type)

    return transform(param, moved)


def stored(name: str, param: Expr) -> list[tuple[str, Expr]]:
    """Return the tensors that an array of a program holds, with what each is of the array.

    Args:
      name: what the array is called in the expressions that are returned.
      param: the array's expression over tensors of a state.

    Raises:
      InputError: the array is not made by moving tensors alone.
    """
    try:
        return tensors_of([(param, Source(name, param.type))])
    except ValueError as error:
        raise InputError(f"the parameter %{name} cannot be saved: {error}") from None


# Moments of an optimiser, carried into a model that a pipeline made of a trained one.
#
# They are what training would have left had the copies been there all the while. A copy i of a
# matrix has the effective weight w in the output of a token: the gate times what the conversion
# scaled the block by, 0 where the token goes elsewhere. Copies of a matrix share a weight of 1 in
# all, so with E copies, k of which a token goes to, w has the mean p = 1/E and the mean square q =
# 1/(E·k) (the gates of a router that has not learned are equal). Over routings,
#
#     E[m'] = p · m,    E[v'] = p² · v + (q − p²) · u,
#
# where u is the mean square gradient of single tokens over their number: v without what all tokens
# have in common, v − m² (docs/training.md). Where a conversion multiplies a weight by s, its
# gradient is divided by s. New parameters have no moments; nor do redrawn neurons, which keep the
# second moment of those that they replace.

FACTORS = (ROW, COLUMN)

COPIES = ("expert", "copy")
"""The axes along which a conversion copies weights."""

NameOf = Callable[[str, str], str]
"""From the kind of a moment and the name of a tensor to what the moment is saved as."""


@dataclass(frozen=True)
class CarriedMoments:
    """The moments of a graph's parameters, as expressions over those of the model before.

    Attributes:
      graph: what the pipeline made, unrolled; its weights read tensors of the model before.
      types_before: the types of the moments before, by kind and tensor.
      count: the updates that they are made of.
      b1: decay of the first moment.
      b2: decay of the second moment.
      name_of: what a moment is saved as.
    """

    graph: Graph
    types_before: Mapping[str, Mapping[str, TensorType]]
    count: int
    b1: float = 0.9
    b2: float = 0.95
    name_of: NameOf = "moments.{}.{}".format

    def moment(self, name: str, kind: str, type: TensorType) -> Expr:
        """Return a moment of a parameter: zeros where nothing is known of it.

        Args:
          name: of the parameter.
          kind: ``m``, ``v``, ``v_row`` or ``v_col``.
          type: of the moment: the parameter's, or that without one axis.
        """
        zeros = Full(0.0, type.bare.with_dtype(F32))
        param = self.graph.params[name]
        moment = None if param.weight is None else self._moment(param, param.weight, kind, type)
        if moment is None or set(moment.type.names) != set(type.names):
            return zeros
        return moment if moment.type.names == type.names else Permute(moment, type.names)

    def _moment(self, param: Value, weight: Expr, kind: str, type: TensorType) -> Expr | None:
        gone = frozenset(param.type.names) - frozenset(type.names)
        moved = _MomentMover(self.types_before, self.name_of, kind, gone).of(weight)
        if moved is None:
            return None
        copies = _copies(weight)
        if copies == 1:
            return moved
        share = 1 / copies
        if kind == FIRST:
            return Scale(moved, share)
        square = share / self._chosen[param] if param in self._chosen else share
        scaled: Expr = Scale(moved, square)
        first = _MomentMover(self.types_before, self.name_of, FIRST, gone).of(weight)
        if kind != SECOND or first is None or square == share**2:
            return scaled
        mean = Scale(Mul(first, first), self._correction)
        return Add(scaled, Scale(Minimum(mean, moved), share**2 - square))

    @cached_property
    def _correction(self) -> float:
        """The factor that makes the square of the first moment comparable to the second."""
        if not self.count:
            return 1.0
        return float((1 - self.b2**self.count) / (1 - self.b1**self.count) ** 2)

    @cached_property
    def _chosen(self) -> dict[Value, float]:
        """The number of copies of each part that a token goes to, by the parameter of experts."""
        chosen = {}
        for param in self.graph.params.values():
            slots = next(_slots_of(param), None)
            if slots is not None and param.weight is not None:
                copies = _copies(param.weight)
                node = assigner(slots)
                attrs = SlotsOp.of_node(node)
                (choices,) = (a.size for a in slots.type if a.name not in attrs.tokens)
                # Experts that choose take so many tokens that each has this number on average.
                each = attrs.capacity_factor if node.op.chooses else choices
                assert isinstance(each, int | float), "the number of choices is known"
                chosen[param] = max(each * copies / attrs.experts, 1e-6)
        return chosen


def _slots_of(param: Value) -> Iterator[Value]:
    """Yield the slots of the rows that a parameter is multiplied with."""
    for node in users_within(param):
        for value in node.operands:
            for axis in value.type:
                if axis.name == "slot" and isinstance(axis.size, Extent):
                    yield setter_of(axis.size)


def _copies(weight: Expr) -> int:
    """Return how many copies of a tensor a weight holds along an axis of experts."""
    count, x = 1, weight
    while x.operands:
        if isinstance(x, Tile) and x.axis in COPIES and sources(x):
            count *= x.size
        x = _origin(x)
    return count


def _origin(e: Expr) -> Expr:
    """Return the operand that `e` brings tensors from, not what is added or drawn anew."""
    return next((x for x in reversed(e.operands) if _brings(x)), e.operands[-1])


def _brings(e: Expr) -> bool:
    """Return whether `e` brings tensors as they are, rather than what is computed of them."""
    if isinstance(e, Mul | Moment):
        return False
    return isinstance(e, Source) or any(map(_brings, e.operands))


@dataclass(frozen=True)
class _MomentMover:
    """Moves moments as an expression moves weights.

    Attributes:
      types_before: the types of the moments before, by kind and tensor.
      name_of: what a moment is saved as.
      kind: of the moment.
      gone: axes of the parameter that the moment does not have.
    """

    types_before: Mapping[str, Mapping[str, TensorType]]
    name_of: NameOf
    kind: str
    gone: frozenset[str]

    def of(self, e: Expr) -> Expr | None:
        """Return the moment of `e`, or None where nothing is known of it."""
        if isinstance(e, Source):
            wanted = frozenset(e.type.names) - self.gone
            kinds = FACTORS if self.kind in FACTORS else (self.kind,)
            for kind in kinds:
                type = self.types_before.get(kind, {}).get(e.name)
                if type is not None and frozenset(type.names) == wanted:
                    return Source(self.name_of(kind, e.name), type)
            return None
        if isinstance(e, Draw | Full):
            return None
        if isinstance(e, Select):
            moment = self.of(e.b)
            if (
                moment is None
                or self.kind != FIRST
                or not set(e.mask.type.names) <= set(moment.type.names)
            ):
                return moment
            return Select(e.mask, Full(0.0, moment.type), moment)
        if isinstance(e, Add):
            # Noise on a copy.
            parts = [x for x in e.operands if _brings(x)]
            return self.of(parts[0]) if len(parts) == 1 else None
        if isinstance(e, Cast):
            return self.of(e.x)
        if isinstance(e, Scale):
            inner = self.of(e.x)
            power = 1 if self.kind == FIRST else 2
            return None if inner is None or not e.factor else Scale(inner, e.factor**-power)
        return self._moved(e)

    def _moved(self, e: Expr) -> Expr | None:
        inner = [self.of(x) for x in e.operands]
        moments = [x for x in inner if x is not None]
        if len(moments) < len(inner) or not moments:
            return None
        x, names = moments[0], moments[0].type.names
        match e:
            case Tile():
                return Tile(x, e.axis, e.size, min(e.position, x.type.rank))
            case Stack():
                return Stack(tuple(moments), e.axis, min(e.position, x.type.rank))
            case Concat():
                return Concat(tuple(moments), e.axis) if e.axis in names else x
            case Index():
                return Index(x, e.axis, e.at) if e.axis in names else x
            case Slice():
                return Slice(x, e.axis, e.start, e.stop) if e.axis in names else x
            case Rename():
                return Rename(x, e.old, e.new) if e.old in names else x
            case Permute():
                return Permute(x, tuple(n for n in e.order if n in names))
            case Split():
                if e.axis in x.type.names:
                    return Split(x, e.axis, e.into)
                # A mean along an axis that is cut is taken for the mean along each of its parts.
                for name, size in e.into:
                    if name != e.axis:
                        x = Tile(x, name, size)
                return x
            case Merge():
                return Merge(x, e.axes, e.into) if set(e.axes) <= set(names) else None
        return None
