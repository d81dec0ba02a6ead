"""Values under trace: arrays with named axes, the rows that experts work on, and rows to come.

What a dispatch strategy has to offer is a protocol here, so that the framework knows no strategy
and imports none; `moecc_backends.xla.dispatch` has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from moecc.ir.graph import Node, Value
from moecc_backends.xla.trace.host_arrays import Master
from moecc_backends.xla.trace.routing import Routing

SLOT_AXES = ("expert", "group", "slot")
"""The axes of slots under a capacity, in the order in which they are laid out."""


MOST_LISTED = 32
"""Up to this many experts are written out one by one; more take long to compile."""


@dataclass(frozen=True)
class Named:
    """An array and the names of its axes, in order."""

    array: Array
    axes: tuple[str, ...]

    def size(self, axis: str) -> int:
        """Return the size of `axis`."""
        return int(self.array.shape[self.axes.index(axis)])

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the name of the axis, in order."""
        return dict(zip(self.axes, self.array.shape, strict=True))

    def to(self, axes: tuple[str, ...]) -> Named:
        """Return this array with its axes in the order `axes`, which has the same names."""
        if axes == self.axes:
            return self
        return Named(jnp.transpose(self.array, [self.axes.index(a) for a in axes]), axes)

    def over(self, axes: tuple[str, ...]) -> Array:
        """Return the array laid out for broadcasting over `axes`, which contains all its own."""
        mine = self.to(tuple(a for a in axes if a in self.axes))
        shape = [mine.size(a) if a in mine.axes else 1 for a in axes]
        return mine.array.reshape(shape)


class ExpertArrays(Named):
    """A parameter of experts as an array for each, so that one can be read in place.

    Whoever does not know of them sees one array, stacked.

    Attributes:
      parts: the array of each expert.
    """

    parts: tuple[Array, ...]

    def __init__(self, parts: tuple[Array, ...], axes: tuple[str, ...]) -> None:
        assert axes[0] == "expert", "experts come first"
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "axes", axes)

    @property
    def array(self) -> Array:
        """The arrays of all experts, stacked."""
        return jnp.stack(self.parts)

    def size(self, axis: str) -> int:
        """Return the size of `axis`."""
        return (
            len(self.parts) if axis == "expert" else Named(self.parts[0], self.axes[1:]).size(axis)
        )


class Uncast(Named):
    """A parameter in the type in which it is stored, of which a loop casts a slice a turn.

    Whoever does not know of it sees it cast.

    Attributes:
      master: the parameter, and where its gradient goes.
    """

    master: Master

    def __init__(self, master: Master, axes: tuple[str, ...]) -> None:
        object.__setattr__(self, "master", master)
        object.__setattr__(self, "axes", axes)

    @property
    def array(self) -> Array:
        """The parameter in the type of the computation."""
        return self.master.cast()


@dataclass(frozen=True)
class Rows:
    """Rows ``[rows, *axes]`` in place of the axes group, expert and slot.

    Nothing is padded to the busiest expert; `layout` knows which row belongs to which expert.

    Attributes:
      array: the rows.
      axes: of each.
      layout: how they are laid out.
      are_tokens: whether padding rows are tokens as well, of other experts: safe to read.
    """

    array: Array
    axes: tuple[str, ...]
    layout: RowLayout
    are_tokens: bool = False

    def with_array(self, array: Array, axes: tuple[str, ...] | None = None) -> Rows:
        """Return rows of the same layout with other contents."""
        return Rows(array, self.axes if axes is None else axes, self.layout)

    def inner(self) -> Named:
        """Return the rows as an ordinary array whose first axis is called ``rows``."""
        return Named(self.array, ("rows", *self.axes))


Operand = Named | Rows


@dataclass(frozen=True)
class Deferred:
    """What a lowering returns that makes nothing yet: its node is lowered at the combine.

    Attributes:
      routing: of the rows that are deferred.
      nodes: the operations that were deferred so far, in order.
    """

    routing: Routing
    nodes: list[Node] = field(default_factory=list)

    def nodes_behind(self, rows: Value) -> list[Node]:
        """Return the deferred operations that `rows` is made of, in order."""
        mine, wanted, left = set(self.nodes), set(), [rows]
        while left:
            node = left.pop().node
            if node in mine and node not in wanted:
                wanted.add(node)
                left.extend(node.operands)
        return [node for node in self.nodes if node in wanted]


@dataclass(frozen=True)
class DeferredRows:
    """Rows that were never made, as the operand of an operation that can do without them.

    Attributes:
      value: the rows.
      deferred: the operations that were deferred.
      values: everything that has been lowered so far.
      lower: lowers their nodes into values, with the rows that `dispatch` makes in a layout.
    """

    value: Value
    deferred: Deferred
    values: Mapping[Value, Operand]
    lower: Callable[[DeferredRows, dict[Value, Operand], DispatchLayout], None]

    @property
    def routing(self) -> Routing:
        """The routing of the rows."""
        return self.deferred.routing

    @property
    def nodes(self) -> list[Node]:
        """The operations that the rows are made by, in order."""
        return self.deferred.nodes_behind(self.value)

    def outside(self) -> dict[Value, Named]:
        """Return what the operations take that was made before."""
        nodes = self.nodes
        inside = {v for node in nodes for v in node.results}
        operands: dict[Value, Named] = {}
        for value in (v for node in nodes for v in node.operands if v not in inside):
            operand = self.values[value]
            assert isinstance(operand, Named), "rows of two routings never meet"
            operands[value] = operand
        return operands

    def make(self, outside: Mapping[Value, Operand], layout: DispatchLayout) -> Operand:
        """Return the rows, made of what `outside` holds, in a layout.

        What it has of the rows' own operations, such as dispatched rows, is not made again.
        """
        values: dict[Value, Operand] = dict(outside)
        self.lower(self, values, layout)
        return values[self.value]


class DispatchLayout(Protocol):
    """How a strategy lays out the rows of a routing: plan, permute, multiply, unpermute.

    A strategy is planned once for a routing; then tokens are permuted into rows, experts work on
    them, and rows are unpermuted into tokens.  Both take and return arrays with named axes, so a
    strategy may exchange rows between devices, do so in rounds, or bring a gradient of its own.
    """

    @property
    def routing(self) -> Routing:
        """What was routed."""
        ...

    def permute(self, x: Named) -> Operand | Deferred:
        """Return the rows of tokens ``[*tokens, *axes]``.

        Rows without a token may hold anything.
        """
        ...

    def permute_gates(self, gates: Array) -> Operand | Deferred:
        """Return the gate of each row, of ``[tokens, choice]``; of those without a token, any."""
        ...

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Return for each token the sum of its rows, weighted: ``[*tokens, *axes]``.

        The sum runs in float32 at least.  Rows without a token are never read.

        Args:
          rows: what experts made of the rows that `permute` returned.
          gates: ``[tokens, choice]``, all token axes flattened; None where rows have weights.
        """
        ...

    def of_experts(self, first: Array | int, count: int) -> DispatchLayout:
        """Return the same strategy for `count` experts from `first` on, which a device has."""
        ...


class RowLayout(DispatchLayout, Protocol):
    """Rows without axes of experts and groups: each stands by itself."""

    @property
    def is_used(self) -> Array:
        """Whether each row has a token: bool ``[rows]``."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether it is certain that every row has a token."""
        ...

    @property
    def row_experts(self) -> Array:
        """The expert of each row, i32 ``[rows]``; any expert where the row has no token."""
        ...

    @property
    def row_groups(self) -> Array:
        """The group of the token of each row; any group where the row has no token."""
        ...

    def by_expert(self, values: Array) -> Array:
        """Pick for each row what its expert has of ``[experts, …]``: ``[rows, …]``."""
        ...

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply rows with the weights of their experts, and sum over the axes `over`.

        Args:
          x: the rows.
          weight: of each expert or group, over all axes `over`.
          over: what is summed over.
          kind: the type that a kernel is asked for; others sum in float32 at least.
        """
        ...


# The type that sums are kept in, and the type that narrow floats are moved as.


def accumulator(dtype: DTypeLike) -> np.dtype[np.generic]:
    """Give the type to accumulate `dtype` in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def product_type(dtype: DTypeLike, platform: str) -> np.dtype[np.generic]:
    """Give the type that products of `dtype` are asked for in.

    Units of accelerators sum in float32 whatever the result is; asked for float32, a result that
    several devices add up would be sent wide, and gradients would multiply wide with narrow.  A CPU
    sums in the type of the result.
    """
    return accumulator(dtype) if platform == "cpu" else jnp.dtype(dtype)


def stored_as(dtype: DTypeLike) -> np.dtype[np.generic]:
    """Give the type to move `dtype` as: unsigned integers for floats under 32 bits.

    On a CPU, XLA widens those around every operation but a product, moving data included: to write
    a block of bfloat16 into an array is to convert the whole array twice.
    """
    itemsize_bytes = jnp.dtype(dtype).itemsize
    return jnp.dtype(dtype) if itemsize_bytes >= 4 else jnp.dtype(f"uint{8 * itemsize_bytes}")


def store(values: Array) -> Array:
    """View an array as what it is moved as; the bytes stay."""
    kind = stored_as(values.dtype)
    return values if values.dtype == kind else lax.bitcast_convert_type(values, kind)


def load(stored: Array, dtype: DTypeLike) -> Array:
    """View what was stored as `dtype` again."""
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)


# The name of a loop over rounds, by which its number of turns is found in a compiled program.

_SCOPE = "rounds_at_most_{}"
_FOUND = re.compile(_SCOPE.format(r"(\d+)"))


def rounds_scope(most: int) -> str:
    """Return the name of a loop over rounds of an exchange: one if balanced, at most `most`."""
    return _SCOPE.format(most)


def most_rounds(source: str) -> int | None:
    """Return how many turns the loop traced as `source` has at most; None if of no rounds."""
    counts = _FOUND.findall(source)
    return int(counts[-1]) if counts else None
