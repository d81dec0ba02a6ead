"""The table of lowerings, and what a lowering may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.remat_names import remat_name
from moecc.ir.verify import where
from moecc_backends.xla.dispatch.all_experts import Dense
from moecc_backends.xla.dispatch.layout import Packing
from moecc_backends.xla.trace.device_view import Local, varies
from moecc_backends.xla.trace.options import Options
from moecc_backends.xla.trace.values import Operand, Rows, poisoned_rows


@dataclass
class Context:
    """The state of one trace.

    Attributes:
      dtype: the type that floating-point values are computed in.
      values: what has been given and lowered so far.
      options: what was chosen for the lowering.
      packings: how the rows of each ``assign_slots`` value lie, once it has been met.
      siblings: contractions that were lowered together with an earlier one.
      put_off: values that the combine of their routing makes, expert by expert.
      local: where the device stands on a mesh, if arrays are parts.
      weights: the parameters of a body, and what is made of them alone.
      around: calls every lowering, where something lays operands and results over devices.
    """

    dtype: Any
    values: dict[Value, Operand]
    options: Options = field(default_factory=Options)
    packings: dict[Value, Packing | Dense] = field(default_factory=dict)
    siblings: dict[Node, Rows] = field(default_factory=dict)
    put_off: dict[Value, Dense] = field(default_factory=dict)
    local: Local = field(default_factory=Local)
    weights: set[Value] = field(default_factory=set)
    around: Around | None = None

    def beside(self, x: Operand, other: Operand) -> Operand:
        """Return `x` as an array that varies over the mesh as `other` does."""
        if self.local.mesh is None:
            return x
        return replace(x, array=self.local.varying(x.array, varies(other.array)))


Lowering = Callable[..., "Operand | tuple[Operand, ...]"]

Around = Callable[
    [Context, Node, "list[Operand | None]", Lowering], "Operand | tuple[Operand, ...]"
]
"""Takes the place of the plain call of a lowering."""

LOWERINGS: dict[str, Lowering] = {}

VALUE = "value"
"""The name of what the graph calls a value and no policy calls otherwise; parameters have none."""


def lowering(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of the operations `names`."""

    def register(function: Lowering) -> Lowering:
        for name in names:
            LOWERINGS[name] = function
        return function

    return register


def lower_nodes(ctx: Context, nodes: Iterable[Node]) -> None:
    """Lower `nodes` in order, under trace; their results go to the values of `ctx`.

    Raises:
      InputError: an operation has no lowering, or does not fit its operands.
    """
    for node in nodes:
        dense = _puts_off(ctx, node)
        if dense is not None:
            dense.nodes.append(node)
            ctx.put_off.update((v, dense) for v in node.results)
            continue
        if node.operands and ctx.weights.issuperset(node.operands):
            ctx.weights.update(node.results)
        results = _lowered(ctx, node)
        ctx.values.update(zip(node.results, results, strict=True))


def _puts_off(ctx: Context, node: Node) -> Dense | None:
    """Return the routing whose combine is to lower `node`, or None if it is lowered now."""
    name = node.op.name
    if name == "dispatch":
        packing = ctx.packings[node.operands[2]]
        return packing if isinstance(packing, Dense) else None
    if name == "combine" or (name == "positions" and node.attrs["axis"] in ("expert", "group")):
        return None
    return next((ctx.put_off[v] for v in node.operands if v in ctx.put_off), None)


def _lowered(ctx: Context, node: Node) -> tuple[Operand, ...]:
    name = node.op.name
    function = LOWERINGS.get(name)
    if function is None:
        raise InputError(f"the xla backend cannot lower {name}", where=where(node))
    operands = [None if v in ctx.put_off else ctx.values[v] for v in node.operands]
    try:
        if ctx.around is None:
            result = function(ctx, node, *_alike(ctx, node, operands))
        else:
            result = ctx.around(ctx, node, operands, function)
    except InputError as error:
        raise InputError(replace(p, where=p.where or where(node)) for p in error.problems) from None
    results = result if isinstance(result, tuple) else (result,)
    if ctx.options.poison:
        results = tuple(poisoned_rows(x) if isinstance(x, Rows) else x for x in results)
    first = remat_name(node)
    unnamed = node.op.alias or node.op.is_distribution
    if first is None and (unnamed or ctx.weights.issuperset(node.results)):
        return results
    return (_named(results[0], first or VALUE), *(_named(x, VALUE) for x in results[1:]))


def _alike(ctx: Context, node: Node, operands: list[Operand | None]) -> list[Operand | None]:
    """Return `operands` so that all of them vary over the mesh as one of them does.

    An own gradient, such as that of a grouped product, knows nothing of what only some vary over.
    """
    if ctx.local.mesh is None or node.op.places or node.body is not None:
        return operands
    axes = frozenset[str]().union(*(varies(x.array) for x in operands if x is not None))
    return [
        x if x is None else replace(x, array=ctx.local.varying(x.array, axes)) for x in operands
    ]


def _named(x: Operand, name: str) -> Operand:
    """Return `x` under the name by which a policy of rematerialisation knows it."""
    if jnp.issubdtype(x.array.dtype, jax.dtypes.extended):
        return x
    return replace(x, array=checkpoint_name(x.array, name))  # type: ignore[no-untyped-call]
