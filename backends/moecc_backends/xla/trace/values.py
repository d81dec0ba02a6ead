"""Values of a trace: arrays with named axes, rows of experts, and operations on them."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from moecc.ir.graph import Node, Value
from moecc.types import DType, dtype_from_numpy
from moecc_backends.xla.trace.host_arrays import Master

PyTree = Any
"""A pytree of arrays or of what stands for them (types, shardings, tracers): jax has no type."""

Names = tuple[str, ...]
"""Names, in order: of axes for the most part."""

Arrays = tuple[Array, ...]
"""Several arrays, in order."""

NamedArrays = Mapping[str, Array]
"""Arrays by name: parameters, inputs, gradients."""

Outputs = dict[str, Array]
"""The arrays that a function returns, by name."""

Function = Callable[..., PyTree]
"""A function of pytrees, which jax traces."""


def varies(*arrays: Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Return the mesh axes along which any of `arrays` may differ from device to device."""
    # Only within shard_map has the type of an array this attribute.
    types = (getattr(jax.typeof(a), "manual_axis_type") for a in arrays)  # noqa: B009
    return frozenset[str]().union(*(type.varying for type in types))


def dtype_of(array: Array | jax.ShapeDtypeStruct) -> DType:
    """Return the element type of an array as the IR has it."""
    dtype = dtype_from_numpy(array.dtype)
    assert dtype is not None, "programs have such types alone"
    return dtype


def is_float(dtype: DTypeLike) -> bool:
    """Return whether a type is of floating point."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def manual_axes() -> frozenset[str]:
    """Return the mesh axes along which the traced program is the program of one device."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def unchecked(run: Function, *arrays: Array) -> PyTree:
    """Return ``run(*arrays)``, where jax does not track what varies over the mesh."""
    if not manual_axes():
        return run(*arrays)
    within = jax.shard_map(
        run,
        in_specs=tuple(PartitionSpec() for _ in arrays),
        out_specs=PartitionSpec(),
        axis_names=frozenset(),
        check_vma=False,
    )
    return within(*arrays)


# Which experts the tokens go to: what the lowering of a routing gives to a dispatch strategy.


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("experts", "slots", "wanted"),
    meta_fields=("num_experts", "groups", "capacity", "tokens", "token_sizes"),
)
@dataclass(frozen=True)
class Routing:
    """Which experts the tokens go to, before a strategy lays out rows.

    Attributes:
      experts: i32 ``[tokens, choice]``.
      slots: i32 ``[tokens, choice]``, within group and expert; −1 where a choice was dropped.
      wanted: bool ``[tokens, choice]``, which choices ask for a slot; None if all do.
      num_experts: the number of experts.
      groups: the number of token groups.
      capacity: the slots of an expert in a group, or None where all that ask get one.
      tokens: the token axes, outermost first.
      token_sizes: their sizes.
    """

    experts: Array
    slots: Array
    wanted: Array | None
    num_experts: int
    groups: int
    capacity: int | None
    tokens: Names
    token_sizes: tuple[int, ...]

    @property
    def assigned(self) -> Array | None:
        """Which choices have a slot, ``[tokens, choice]``; None if all do."""
        return self.wanted if self.capacity is None else self.slots >= 0

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return prod(self.token_sizes)

    @property
    def num_choices(self) -> int:
        """The choices of all tokens."""
        return int(self.experts.size)

    @property
    def num_slots(self) -> int | None:
        """The slots of all experts and groups; None without a capacity."""
        return None if self.capacity is None else self.num_experts * self.groups * self.capacity

    @property
    def slot_shape(self) -> tuple[int, int, int]:
        """The sizes of expert, group and slot under a capacity."""
        assert self.capacity is not None, "slots need a capacity"
        return self.num_experts, self.groups, self.capacity

    def of_experts(self, first: Array | int, count: int) -> Routing:
        """Return the routing to `count` experts from `first` on; other choices have no slot."""
        experts = self.experts - first
        is_own = (experts >= 0) & (experts < count)
        wanted = is_own if self.wanted is None else self.wanted & is_own
        return replace(
            self,
            experts=jnp.where(is_own, experts, 0),
            slots=jnp.where(is_own, self.slots, -1),
            wanted=wanted,
            num_experts=count,
        )


# Values under trace: arrays with named axes, the rows that experts work on, and rows to come.
#
# What a dispatch strategy has to offer is a base class here, so that the framework knows no
# strategy and imports none; `moecc_backends.xla.dispatch` has them.

SLOT_AXES = ("expert", "group", "slot")
"""The axes of slots under a capacity, in the order in which they are laid out."""


MOST_LISTED = 32
"""Up to this many experts are written out one by one; more take long to compile."""


@dataclass(frozen=True)
class Named:
    """An array and the names of its axes, in order."""

    array: Array
    axes: Names

    def size(self, axis: str) -> int:
        """Return the size of `axis`."""
        return int(self.array.shape[self.axes.index(axis)])

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the name of the axis, in order."""
        return dict(zip(self.axes, self.array.shape, strict=True))

    def to(self, axes: Names) -> Named:
        """Return this array with its axes in the order `axes`, which has the same names."""
        if axes == self.axes:
            return self
        return Named(jnp.transpose(self.array, [self.axes.index(a) for a in axes]), axes)

    def over(self, axes: Names) -> Array:
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

    def __init__(self, parts: tuple[Array, ...], axes: Names) -> None:
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

    def __init__(self, master: Master, axes: Names) -> None:
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
      axes: the axes of a row.
      layout: how they are laid out.
      are_tokens: whether padding rows are tokens as well, of other experts: safe to read.
    """

    array: Array
    axes: Names
    layout: RowLayout
    are_tokens: bool = False

    def with_array(self, array: Array, axes: Names | None = None) -> Rows:
        """Return rows of the same layout with other contents."""
        return Rows(array, self.axes if axes is None else axes, self.layout)

    def inner(self) -> Named:
        """Return the rows as an ordinary array whose first axis is called ``rows``."""
        return Named(self.array, ("rows", *self.axes))

    def of(self, rows: Named) -> Rows:
        """Return rows of the same layout of an ordinary array with the axis ``rows``."""
        inner = tuple(a for a in rows.axes if a != "rows")
        return self.with_array(rows.to(("rows", *inner)).array, inner)

    def padded(self, value: float | None, gradient: float | None) -> Rows:
        """Return rows with other contents where there is no token, see `padded`."""
        if self.layout.is_full:
            return self
        return self.with_array(padded(self.array, self.layout.is_used, value, gradient))


Operand = Named | Rows


@dataclass(frozen=True)
class Deferred:
    """What a lowering returns that makes nothing yet: its node is lowered at the combine.

    Attributes:
      routing: the routing of the deferred rows.
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

    @property
    def row_axes(self) -> Names:
        """The axes of a row."""
        return tuple(a for a in self.value.type.names if a not in SLOT_AXES)

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


@dataclass(frozen=True)
class DispatchLayout(ABC):
    """How a strategy lays out the rows of a routing: plan, permute, multiply, unpermute.

    A strategy is planned once for a routing; then tokens are permuted into rows, experts work on
    them, and rows are unpermuted into tokens.  Both take and return arrays with named axes, so a
    strategy may exchange rows between devices, do so in rounds, or bring a gradient of its own.

    Attributes:
      routing: what was routed.
    """

    routing: Routing

    @abstractmethod
    def permute(self, x: Named) -> Operand | Deferred:
        """Return the rows of tokens ``[*tokens, *axes]``.

        Rows without a token may hold anything.
        """

    @abstractmethod
    def permute_gates(self, gates: Array) -> Operand | Deferred:
        """Return the gate of each row, of ``[tokens, choice]``; of those without a token, any."""

    @abstractmethod
    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Return for each token the sum of its rows, weighted: ``[*tokens, *axes]``.

        The sum runs in float32 at least.  Rows without a token are never read.

        Args:
          rows: what experts made of the rows that `permute` returned.
          gates: ``[tokens, choice]``, all token axes flattened; None where rows have weights.
        """

    def of_experts(self, first: Array | int, count: int) -> DispatchLayout:
        """Return the same strategy for `count` experts from `first` on, which a device has."""
        return replace(self, routing=self.routing.of_experts(first, count))


class RowLayout(DispatchLayout):
    """Rows without axes of experts and groups: each stands by itself."""

    @property
    def is_full(self) -> bool:
        """Whether it is certain that every row has a token."""
        return False

    @property
    @abstractmethod
    def is_used(self) -> Array:
        """Whether each row has a token: bool ``[rows]``."""

    @property
    @abstractmethod
    def row_tokens(self) -> Array:
        """The token of each row, i32 ``[rows]``; any number where the row has none."""

    @property
    @abstractmethod
    def row_experts(self) -> Array:
        """The expert of each row, i32 ``[rows]``; any expert where the row has no token."""

    @property
    def row_groups(self) -> Array:
        """The group of the token of each row; any group where the row has no token."""
        routing = self.routing
        tokens_of_group = max(routing.num_tokens // max(routing.groups, 1), 1)
        return jnp.clip(self.row_tokens // tokens_of_group, 0, max(routing.groups - 1, 0))

    @abstractmethod
    def by_expert(self, values: Array) -> Array:
        """Pick for each row what its expert has of ``[experts, …]``: ``[rows, …]``."""

    def matmul(self, x: Rows, weight: Named, over: Names, kind: DTypeLike) -> Rows:
        """Multiply rows with the weights of their experts, and sum over the axes `over`.

        Args:
          x: the rows.
          weight: the weight of each expert or group, over all axes `over`.
          over: what is summed over.
          kind: the type that a kernel is asked for; others sum in float32 at least.
        """
        return gathered_matmul(x, weight, over)


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


# Padding rows, which have no token: zeroed where they would count, or poisoned with NaN.
#
# Where choices are dropped, fewer rows are used than there are.  What the others hold is left to
# whatever computed it (a kernel of an accelerator may leave anything there), and nothing may read
# it.  A sum over rows would: the gradient of what rows share.  There it is zero.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def padded(
    rows: Array, is_used: Array, value: float | None = None, gradient: float | None = None
) -> Array:
    """Return floating-point rows with `value` in padding rows; None leaves them.

    Args:
      rows: ``[rows, …]``.
      is_used: bool ``[rows]``.
      value: what padding rows hold.
      gradient: what padding rows of the cotangent hold, likewise.
    """
    if value is None or not is_float(rows.dtype):
        return rows
    used = is_used.reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.where(used, rows, jnp.asarray(value, rows.dtype))


# The derivative of a choice of the two would keep the mask as wide as the rows.
padded.defvjp(
    lambda rows, is_used, value, gradient: (padded(rows, is_used, value, gradient), is_used),
    lambda value, gradient, is_used, cotangent: (padded(cotangent, is_used, gradient), None),
)


def lifted(x: Operand, function: Callable[[Named], Named]) -> Operand:
    """Apply to `x` what does something along its own axes; rows keep their layout."""
    return lifted_all(x, lambda full: (function(full),))[0]


def lifted_all(x: Operand, function: Callable[[Named], tuple[Named, ...]]) -> tuple[Operand, ...]:
    """Apply to `x` a function of several results, as `lifted` does."""
    return function(x) if isinstance(x, Named) else tuple(map(x.of, function(x.inner())))


def elementwise(function: Callable[..., Array], *operands: Operand) -> Operand:
    """Apply `function` to operands, broadcast over the axes of the largest operand."""
    rows = next((x for x in operands if isinstance(x, Rows)), None)
    named = [broadcast_like(x, rows) for x in operands]
    axes = max((x.axes for x in named), key=len)
    result = Named(function(*(x.over(axes) for x in named)), axes)
    return result if rows is None else rows.of(result)


def einsum(x: Named, w: Named, over: Names, kind: DTypeLike | None = None) -> Named:
    """Sum the product of two arrays over the axes `over`; others that both have are batch axes.

    Args:
      x: one of them; the result has its type.
      w: the other.
      over: what is summed over.
      kind: the type that the product is asked for in; float32 at least by default.
    """
    outer, columns = (tuple(a for a in v.axes if a not in over) for v in (x, w))
    result = (*outer, *(a for a in columns if a not in x.axes))
    wide = kind or accumulator(x.array.dtype)
    sizes = [x.size(a) for a in over]
    if columns and set(over) == set(x.axes) & set(w.axes) and x.array.size == prod(sizes):
        # A matrix with a vector, as in a step of decoding: on a CPU twice as quick as a product
        # with one row.  The matrix is read as it is stored.
        vector = x.to((*outer, *over)).array.reshape(sizes)
        at = tuple(map(w.axes.index, over)), tuple(range(len(over)))
        product = lax.dot_general(w.array, vector, (at, ((), ())), preferred_element_type=wide)
        shape = [1] * len(outer) + [w.size(a) for a in columns]
        array = product.astype(x.array.dtype).reshape(shape)
        return Named(array, (*outer, *columns)).to(result)
    letters = dict(zip(dict.fromkeys((*x.axes, *w.axes)), string.ascii_letters, strict=False))
    spell = ["".join(letters[a] for a in axes) for axes in (x.axes, w.axes, result)]
    array = jnp.einsum(
        f"{spell[0]},{spell[1]}->{spell[2]}",
        x.array,
        w.array,
        preferred_element_type=wide,
    )
    return Named(array.astype(x.array.dtype), result)


def per_row(value: Operand, layout: RowLayout) -> Named:
    """Return `value` so that it broadcasts against rows of experts, under the axis ``rows``.

    A value with an expert axis, such as the bias of each expert, is picked by the row's expert,
    and one with a group axis by the group of the row's token.  Rows without a token reach no
    gradient of what they share with others.
    """
    if isinstance(value, Rows):
        return value.inner()
    is_masked = not layout.is_full and is_float(value.array.dtype)
    inner = tuple(a for a in value.axes if a not in ("rows", "group", "expert"))
    outer = tuple(a for a in ("group", "expert") if a in value.axes)
    if outer == ("expert",):
        return Named(layout.by_expert(value.to((*outer, *inner)).array), ("rows", *inner))
    if outer:
        index = {"group": layout.row_groups, "expert": layout.row_experts}
        array = value.to((*outer, *inner)).array[tuple(index[a] for a in outer)]
    elif not is_masked:
        return value
    elif "rows" in value.axes:
        array = value.to(("rows", *inner)).array
    else:
        array = jnp.broadcast_to(value.array, (layout.is_used.size, *value.array.shape))
    return Named(padded(array, layout.is_used, None, 0) if is_masked else array, ("rows", *inner))


def broadcast_like(value: Operand, x: Operand | None) -> Named:
    """Return `value`, whose axes are among those of `x`, so that it broadcasts against `x`."""
    if isinstance(x, Rows):
        return per_row(value, x.layout)
    assert isinstance(value, Named), "it has no axis that the other lacks"
    return value


def gathered_matmul(x: Rows, weight: Named, over: Names) -> Rows:
    """Multiply each row with a copy of its expert's weights.

    The copies are large: for few rows, or a product so odd that they are small.
    """
    return x.of(einsum(x.inner(), per_row(weight, x.layout), over))
