"""The table of lowerings, and what a lowering may look at.

The framework lowers nodes in order and knows no operation: what is particular to one stands at its
registration.  It knows no dispatch strategy either, only that some rows are `Deferred`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.ops import OpDef
from moecc.ir.remat_names import remat_name
from moecc.ir.verify import where
from moecc_backends.xla.trace.arrays import poisoned_rows
from moecc_backends.xla.trace.device_view import DeviceView, varies
from moecc_backends.xla.trace.options import Options
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.typed_jax import named
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    DispatchLayout,
    Operand,
    Rows,
)

Lowered = Operand | tuple[Operand, ...] | Deferred
"""What a lowering returns."""

Function = Callable[..., Lowered]
"""``(context, node, *operands)`` → an operand, a tuple of them, or `Deferred`."""

Given = Operand | DeferredRows

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
    takes_deferred: bool = False
    names_result: bool = False


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


def is_lowered(op: OpDef) -> bool:
    """Return whether the operation `op` has a lowering."""
    return LOWERINGS.get(op.name) is not None


class Interceptor(Protocol):
    """What stands between the framework and lowerings, where something else shards values."""

    def __call__(
        self, ctx: Context, node: Node, operands: list[Given], function: Function
    ) -> Lowered:
        """Return what the lowering `function` of `node` makes of `operands`."""
        ...

    def by_group(
        self,
        function: Callable[..., jax.Array],
        groups: int,
        arrays: tuple[jax.Array | None, ...],
    ) -> jax.Array:
        """Return ``function(groups, *arrays)``, which works on each token group by itself.

        Args:
          function: takes a number of groups and arrays with the tokens of all of them in front.
          groups: how many there are.
          arrays: ``[tokens, …]``, or None.
        """
        ...

    def layout(self, routing: Routing) -> DispatchLayout | None:
        """Return the layout that the rows of `routing` must have; None leaves the choice."""
        ...


class DirectCalls:
    """Calls lowerings as they are: what arrays need of a mesh, a device knows itself."""

    def __call__(
        self, ctx: Context, node: Node, operands: list[Given], function: Function
    ) -> Lowered:
        """Return what the lowering `function` of `node` makes of `operands`."""
        return function(ctx, node, *_alike(ctx, node, operands))

    def by_group(
        self,
        function: Callable[..., jax.Array],
        groups: int,
        arrays: tuple[jax.Array | None, ...],
    ) -> jax.Array:
        """Return ``function(groups, *arrays)``: all groups at once."""
        return function(groups, *arrays)

    def layout(self, routing: Routing) -> DispatchLayout | None:
        """Return None: any layout will do."""
        return None


DIRECT = DirectCalls()


@dataclass
class Context:
    """The state of one trace.

    Attributes:
      dtype: the type that floating-point values are computed in.
      values: what has been given and lowered so far.
      options: what was chosen for the lowering.
      layouts: how the rows of each routing are laid out, by the value that assigns its slots.
      deferred: values that are made when the rows of their routing are combined.
      view: which device of a mesh this is, if arrays are shards.
      weights: the parameters of a body, and what is made of them alone.
      interceptor: calls every lowering.
    """

    dtype: DTypeLike
    values: dict[Value, Operand]
    options: Options = field(default_factory=Options)
    layouts: dict[Value, DispatchLayout] = field(default_factory=dict)
    deferred: dict[Value, Deferred] = field(default_factory=dict)
    view: DeviceView = field(default_factory=DeviceView)
    weights: set[Value] = field(default_factory=set)
    interceptor: Interceptor = DIRECT

    def within(
        self,
        values: dict[Value, Operand],
        layouts: Mapping[Value, DispatchLayout] | None = None,
    ) -> Context:
        """Return the state of a trace within this one, which sees `values` alone."""
        # An array that was made varying within the inner trace must not leave it.
        view = replace(self.view, varied={})
        return replace(self, values=values, layouts=dict(layouts or {}), deferred={}, view=view)

    def operand(self, value: Value) -> Given:
        """Return a value that was lowered, or the rows that were deferred."""
        if value not in self.deferred:
            return self.values[value]
        return DeferredRows(value, self.deferred[value], self.values, self._lower_deferred)

    def _lower_deferred(
        self, rows: DeferredRows, values: dict[Value, Operand], layout: DispatchLayout
    ) -> None:
        layouts = {v: layout for v in self.layouts if self.layouts[v].routing is rows.routing}
        left = [node for node in rows.nodes if not values.keys() >= set(node.results)]
        lower_nodes(self.within(values, layouts), left)


def lower_nodes(ctx: Context, nodes: Iterable[Node]) -> None:
    """Lower `nodes` in order, under trace; their results go to the values of `ctx`.

    Raises:
      InputError: an operation has no lowering, or does not fit its operands.
    """
    for node in nodes:
        if node.operands and ctx.weights.issuperset(node.operands):
            ctx.weights.update(node.results)
        made = _deferred(ctx, node) or _lowered(ctx, node)
        if isinstance(made, Deferred):
            made.nodes.append(node)
            ctx.deferred.update(dict.fromkeys(node.results, made))
        else:
            ctx.values.update(zip(node.results, made, strict=True))


def _deferred(ctx: Context, node: Node) -> Deferred | None:
    """Return what `node` is deferred with, because an operand is and it cannot do without."""
    found = next((ctx.deferred[v] for v in node.operands if v in ctx.deferred), None)
    return None if found is None or _entry(node).takes_deferred else found


def _entry(node: Node) -> Lowering:
    found = LOWERINGS.get(node.op.name)
    if found is None:
        raise InputError(f"the xla backend cannot lower {node.op}", where=where(node))
    return found


def _lowered(ctx: Context, node: Node) -> tuple[Operand, ...] | Deferred:
    entry = _entry(node)
    try:
        made = ctx.interceptor(ctx, node, [*map(ctx.operand, node.operands)], entry.function)
    except InputError as error:
        raise InputError(replace(p, where=p.where or where(node)) for p in error.problems) from None
    if isinstance(made, Deferred):
        return made
    results: tuple[Operand, ...] = made if isinstance(made, tuple) else (made,)
    if ctx.options.poison:
        results = tuple(poisoned_rows(x) if isinstance(x, Rows) else x for x in results)
    first = remat_name(node)
    # What is made again of others at no cost: a view, or rows times a number each.
    unnamed = node.op.alias or node.op.is_weighting or entry.names_result
    if first is None and (unnamed or ctx.weights.issuperset(node.results)):
        return results
    return (_named(results[0], first or VALUE), *(_named(x, VALUE) for x in results[1:]))


def _alike(ctx: Context, node: Node, operands: list[Given]) -> list[Given]:
    """Return `operands` so that all of them vary over the mesh as one of them does.

    An own gradient, such as that of a grouped product, knows nothing of what only some vary over.
    """
    if ctx.view.mesh is None or node.op.places or node.body is not None:
        return operands
    made = [x for x in operands if not isinstance(x, DeferredRows)]
    axes = frozenset[str]().union(*(varies(x.array) for x in made))
    return [
        x if isinstance(x, DeferredRows) else replace(x, array=ctx.view.varying(x.array, axes))
        for x in operands
    ]


def _named(x: Operand, name: str) -> Operand:
    """Return `x` under the name by which a policy of rematerialisation knows it."""
    if jnp.issubdtype(x.array.dtype, jax.dtypes.extended):
        return x
    return replace(x, array=named(x.array, name))
