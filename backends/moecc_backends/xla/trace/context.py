"""The table of lowerings, and the state that a lowering may look at.

The framework lowers nodes in order and knows no operation: what is particular to one stands at its
registration.  It knows no dispatch strategy either, only that some rows are `Deferred`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import nan, prod

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry2x32_p
from jax.typing import DTypeLike

from moecc.errors import InputError, Problem, UsageError, nearest, raise_problems
from moecc.ir.attention import ATTENTIONS
from moecc.ir.conventions import DISPATCHES
from moecc.ir.graph import Node, Value, where
from moecc.ir.mesh import Mesh
from moecc.ir.operation import Attrs
from moecc.ir.ops.repetition import remat_name
from moecc.ir.structure import local_attrs
from moecc.types import Axis, TensorType
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    DispatchLayout,
    Named,
    Operand,
    Routing,
    Rows,
    lifted,
    varies,
)

# What a lowering needs to know of the mesh: the shard of an array that one device holds.
#
# Under `shard_map` a graph is lowered for one device: arrays are shards, and sizes are those of
# shards.  Most operations do to a shard what they do to the whole.  A few have to know more: the
# number of shards, or where the local one begins.

_MOST_ELEMENTS = 2**32


@dataclass(frozen=True)
class DeviceView:
    """The device of a mesh that a program is lowered for.

    Attributes:
      mesh: the mesh; None where arrays are whole.
      varied: arrays that vary over mesh axes, by the array that did not: each is made once, so
        that their gradients are added before they are reduced.
    """

    mesh: Mesh | None = None
    varied: dict[tuple[int, frozenset[str]], tuple[Array, Array]] = field(default_factory=dict)

    def shard_count(self, axis: Axis) -> int:
        """Return the number of shards of `axis`."""
        return 1 if self.mesh is None else self.mesh.size(axis.mesh)

    def shard_index(self, mesh: tuple[str, ...]) -> Array | int:
        """Return which of the shards along the mesh axes `mesh` is the local one."""
        if self.mesh is None or self.mesh.size(mesh) == 1:
            return 0
        return lax.axis_index(mesh)

    def offset(self, axis: Axis, size: int) -> Array | int:
        """Return where the local shard of `axis`, of `size` elements, begins."""
        return self.shard_index(axis.mesh) * size

    def attrs(self, node: Node) -> Attrs:
        """Return the attributes of `node` for the local shard: sizes and counts are local."""
        return node.attrs if self.mesh is None else local_attrs(node, self.mesh)

    def element_numbers(self, type: TensorType, shape: tuple[int, ...]) -> Array | None:
        """Return the number of each element of a shard in the whole array, row by row.

        None where the shard is the whole.

        Args:
          type: the type of the whole, its axes in the order in which elements are numbered.
          shape: the shape of the shard.

        Raises:
          InputError: the whole has more elements than 32 bits count; they would draw twice alike.
        """
        counts = [self.shard_count(a) for a in type.axes]
        if all(n == 1 for n in counts):
            return None
        if prod(shape) * prod(counts) > _MOST_ELEMENTS:
            raise InputError(
                "random numbers for more elements than 32 bits can count, on a mesh",
                expected=f"at most {_MOST_ELEMENTS:,}",
                found=f"{prod(shape) * prod(counts):,}",
                hint="noise on smaller values, or a smaller batch",
            )
        number = jnp.zeros(shape, jnp.uint32)
        for at, (axis, size) in enumerate(zip(type.axes, shape, strict=True)):
            along = lax.broadcasted_iota(jnp.uint32, shape, at)
            start = jnp.asarray(self.offset(axis, size), jnp.uint32)
            number = number * jnp.uint32(size * self.shard_count(axis)) + start + along
        return number

    def varying(self, array: Array, axes: frozenset[str]) -> Array:
        """Return `array` as one that may differ along the mesh axes `axes`."""
        missing = axes - varies(array)
        if not missing or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return array
        key = (id(array), missing)
        if key not in self.varied:
            varied = lax.pcast(array, tuple(sorted(missing)), to="varying")
            # The array is kept with it, so that no other takes its id.
            self.varied[key] = (array, varied)
        return self.varied[key][1]

    def settled(self, array: Array, type: TensorType) -> Array:
        """Return `array` as one that may differ wherever its `type` is sharded or unreduced."""
        if self.mesh is None:
            return array
        axes = {m for a in type.axes for m in a.mesh} | set(type.unreduced)
        return self.varying(array, frozenset(axes))


def zeros_like_on_devices(shape: jax.ShapeDtypeStruct) -> Array:
    """Return zeros that may differ along the mesh axes along which what has this shape does."""
    return DeviceView().varying(jnp.zeros(shape.shape, shape.dtype), varies(shape))


def bits_at(key: Array, numbers: Array) -> Array:
    """Return the 32 bits that ``jax.random.bits`` draws for the numbered elements of an array.

    They belong to key and number alone (threefry with counters, which jax calls partitionable).
    """
    words = jax.random.key_data(key).astype(jnp.uint32)
    key_words = (jnp.broadcast_to(w, numbers.shape) for w in words)
    counters = (jnp.zeros_like(numbers), numbers)
    first, second = threefry2x32_p.bind(*key_words, *counters)
    return first ^ second


# What may be chosen when a graph is lowered.

AUTO = "auto"
"""The dispatch lowering is chosen for each routing by platform and shape."""

PLATFORMS = ("cpu", "gpu", "tpu")


@dataclass(frozen=True)
class Options:
    """Choices for the lowering of a graph.

    Attributes:
      dispatch: one of `DISPATCHES`, or ``auto``.
      platform: one of `PLATFORMS`; None for that of the devices at hand.
      attention: one of `ATTENTIONS`, or ``auto``.
      poison: fill padding rows, which have no token, with NaN, to see that nothing reads them.
      in_place: whether every expert has arrays of its own, which are read where they are.
      located: whether what a node is lowered to names its place, for texts that people read.

    Raises:
      UsageError: there is no such lowering, kernel or platform.
    """

    dispatch: str = AUTO
    platform: str | None = None
    attention: str = AUTO
    poison: bool = False
    in_place: bool = False
    located: bool = False

    def __post_init__(self) -> None:
        chosen = {
            "dispatch lowering": (self.dispatch, (AUTO, *DISPATCHES)),
            "attention kernel": (self.attention, (AUTO, *ATTENTIONS)),
            "platform": ("cpu" if self.platform is None else self.platform, PLATFORMS),
        }
        problems = [
            Problem(
                f"unknown {kind} {name!r}", expected=", ".join(names), hint=nearest(name, names)
            )
            for kind, (name, names) in chosen.items()
            if name not in names
        ]
        raise_problems(problems, UsageError)

    @property
    def target(self) -> str:
        """The platform that is lowered for."""
        return self.platform or str(jax.default_backend())


DEFAULTS = Options()
"""Everything chosen by platform and shape."""


Lowered = Operand | tuple[Operand, ...] | Deferred
"""What a lowering returns."""

Function = Callable[..., Lowered]
"""``(context, node, *operands)`` → an operand, a tuple of them, or `Deferred`."""

AnyOperand = Operand | DeferredRows

VALUE = "value"
"""The name of what the graph calls a value and no policy calls otherwise; parameters have none."""


@dataclass(frozen=True)
class Lowering:
    """How an operation is lowered.

    Attributes:
      function: makes the results.
      takes_deferred: whether it is called with `DeferredRows` too, instead of being deferred.
      names_result: whether it names its result for rematerialisation itself.
    """

    function: Function
    takes_deferred: bool
    names_result: bool


LOWERINGS: dict[str, Lowering] = {}


def lowering(
    *names: str, takes_deferred: bool = False, names_result: bool = False
) -> Callable[[Function], Function]:
    """Register a function as the lowering of the operations `names`, see `Lowering`."""

    def register(function: Function) -> Function:
        entry = Lowering(function, takes_deferred, names_result)
        LOWERINGS.update(dict.fromkeys(names, entry))
        return function

    return register


def lowering_along(
    *names: str, names_result: bool = False
) -> Callable[[Callable[[TraceContext, Node, Named], Named]], Function]:
    """Register what an operation does along axes of its operand; rows of experts keep theirs."""

    def register(function: Callable[[TraceContext, Node, Named], Named]) -> Function:
        def lower(ctx: TraceContext, node: Node, x: Operand) -> Operand:
            return lifted(x, lambda full: function(ctx, node, full))

        return lowering(*names, names_result=names_result)(lower)

    return register


class Interceptor:
    """Stands between the framework and lowerings, for what shards values.

    This one calls lowerings as they are: what arrays need of a mesh, a device knows itself.
    """

    def __call__(
        self, ctx: TraceContext, node: Node, operands: list[AnyOperand], function: Function
    ) -> Lowered:
        """Return what the lowering `function` of `node` makes of `operands`."""
        return function(ctx, node, *_alike(ctx, node, operands))

    def by_group(
        self,
        function: Callable[..., Array],
        groups: int,
        arrays: tuple[Array | None, ...],
    ) -> Array:
        """Return ``function(groups, *arrays)``, which works on each token group by itself.

        Args:
          function: takes a number of groups and arrays with the tokens of all of them in front.
          groups: how many there are.
          arrays: ``[tokens, …]``, or None.
        """
        return function(groups, *arrays)

    def layout(self, routing: Routing) -> DispatchLayout | None:
        """Return the layout that the rows of `routing` must have; None leaves the choice."""
        return None


DIRECT = Interceptor()


@dataclass
class TraceContext:
    """The state of one trace.

    Attributes:
      dtype: the type that floating-point values are computed in.
      values: what has been given and lowered so far.
      options: what was chosen for the lowering.
      layouts: how the rows of each routing are laid out, by the value that assigns its slots.
      deferred: values that are made when the rows of their routing are combined.
      view: which device of a mesh this is, if arrays are shards.
      weights: the parameters of a body, and what is made of them alone.
      outside: the value of the outermost graph that an input of a body is in every run.
      interceptor: calls every lowering.
    """

    dtype: DTypeLike
    values: dict[Value, Operand]
    options: Options
    layouts: dict[Value, DispatchLayout] = field(default_factory=dict)
    deferred: dict[Value, Deferred] = field(default_factory=dict)
    view: DeviceView = field(default_factory=DeviceView)
    weights: set[Value] = field(default_factory=set)
    outside: Mapping[Value, Value] = field(default_factory=dict)
    interceptor: Interceptor = DIRECT

    def within(
        self,
        values: dict[Value, Operand],
        layouts: Mapping[Value, DispatchLayout] | None = None,
    ) -> TraceContext:
        """Return the state of a trace within this one, which sees `values` alone."""
        # An array that was made varying within the inner trace must not leave it.
        view = replace(self.view, varied={})
        return replace(self, values=values, layouts=dict(layouts or {}), deferred={}, view=view)

    def operand(self, value: Value) -> AnyOperand:
        """Return a value that was lowered, or the rows that were deferred."""
        if value not in self.deferred:
            return self.values[value]

        def lower(rows: DeferredRows, values: dict[Value, Operand], layout: DispatchLayout) -> None:
            layouts = {v: layout for v in self.layouts if self.layouts[v].routing is rows.routing}
            left = [node for node in rows.nodes if not values.keys() >= set(node.results)]
            lower_nodes(self.within(values, layouts), left)

        return DeferredRows(value, self.deferred[value], self.values, lower)


def lower_nodes(ctx: TraceContext, nodes: Iterable[Node]) -> None:
    """Lower `nodes` in order, under trace; their results go to the values of `ctx`.

    Raises:
      InputError: an operation has no lowering, or does not fit its operands.
    """
    for node in nodes:
        if node.operands and ctx.weights.issuperset(node.operands):
            ctx.weights.update(node.results)
        entry = LOWERINGS.get(node.op.name)
        if entry is None:
            raise InputError(f"the xla backend cannot lower {node.op}", where=where(node))
        # A node is deferred with its operands, unless it can do without them.
        deferred = [ctx.deferred[v] for v in node.operands if v in ctx.deferred]
        is_deferred = deferred and not entry.takes_deferred
        lowered = deferred[0] if is_deferred else _lowered(ctx, node, entry)
        if isinstance(lowered, Deferred):
            lowered.nodes.append(node)
            ctx.deferred.update(dict.fromkeys(node.results, lowered))
        else:
            ctx.values.update(zip(node.results, lowered, strict=True))


def _lowered(ctx: TraceContext, node: Node, entry: Lowering) -> tuple[Operand, ...] | Deferred:
    scope = jax.named_scope(node.loc) if ctx.options.located and node.loc else nullcontext()
    try:
        with scope:
            lowered = ctx.interceptor(ctx, node, [*map(ctx.operand, node.operands)], entry.function)
    except InputError as error:
        raise InputError(replace(p, where=p.where or where(node)) for p in error.problems) from None
    if isinstance(lowered, Deferred):
        return lowered
    results: tuple[Operand, ...] = lowered if isinstance(lowered, tuple) else (lowered,)
    if ctx.options.poison:
        results = tuple(x.padded(nan, nan) if isinstance(x, Rows) else x for x in results)
    first = remat_name(node)
    # What is made again of others at no cost: a view, or rows times a number each.
    unnamed = node.op.alias or node.op.is_weighting or entry.names_result
    if first is None and (unnamed or ctx.weights.issuperset(node.results)):
        return results
    return (_named(results[0], first or VALUE), *(_named(x, VALUE) for x in results[1:]))


def _alike(ctx: TraceContext, node: Node, operands: list[AnyOperand]) -> list[AnyOperand]:
    """Return `operands` so that all of them vary over the mesh as one of them does.

    An own gradient, such as that of a grouped product, knows nothing of what only some vary over.
    """
    if ctx.view.mesh is None or node.op.places or node.body is not None:
        return operands
    present = [x for x in operands if not isinstance(x, DeferredRows)]
    axes = varies(*(x.array for x in present))
    return [
        x if isinstance(x, DeferredRows) else replace(x, array=ctx.view.varying(x.array, axes))
        for x in operands
    ]


def _named(x: Operand, name: str) -> Operand:
    """Return `x` under the name by which a policy of rematerialisation knows it."""
    if jnp.issubdtype(x.array.dtype, jax.dtypes.extended):
        return x
    return replace(x, array=checkpoint_name(x.array, name))
