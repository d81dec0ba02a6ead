"""Lowering of collectives: what one device does, or nothing where arrays are whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.ops.collectives import AllGatherOp, AllReduceOp, AllToAllOp, ReduceScatterOp, ShardOp
from moecc_backends.xla.dispatch.rounds import local_rows, send_rows, send_rows_back
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.trace.context import DeviceView, TraceContext, lowering
from moecc_backends.xla.trace.values import Named, Operand, Rows, lifted, varies

Collective = Callable[[DeviceView, Node, Named], Array]
OfRows = Callable[[TraceContext, Node, Rows, SortedRows], Rows]


def collective(name: str, of_rows: OfRows | None = None) -> Callable[[Collective], Collective]:
    """Register what one device does of a collective, and what becomes of rows sorted by expert."""

    def register(function: Collective) -> Collective:
        lowering(name)(partial(_collective, function, of_rows))
        return function

    return register


def _collective(
    function: Collective, of_rows: OfRows | None, ctx: TraceContext, node: Node, x: Operand
) -> Operand:
    if ctx.view.mesh is None:
        # On the global value it is the identity.
        return x
    if isinstance(x, Rows) and {"expert", "group"} & set(node.attrs.values()):
        assert of_rows is not None, "these rows stay where they are"
        assert isinstance(x.layout, SortedRows), "rows that go to other devices are sorted"
        return of_rows(ctx, node, x, x.layout)
    return lifted(x, lambda full: Named(function(ctx.view, node, full), full.axes))


@collective("reshard")
def _reshard(view: DeviceView, node: Node, x: Named) -> Array:
    raise _not_lowered(node, hint="lower-collectives")


def _not_lowered(node: Node, hint: str | None = None) -> InputError:
    message = f"the xla backend cannot lower {node.op} on a mesh"
    return InputError(message, found=str(node.operands[0].type), hint=hint)


def _exchange_rows(ctx: TraceContext, node: Node, x: Rows, layout: SortedRows) -> Rows:
    """Bring rows to the devices of their experts, or back from them."""
    if node.attrs["split"] == "expert":
        return send_rows(ctx, node, x, layout)
    return send_rows_back(x, layout)


@collective("shard", of_rows=local_rows)
def _shard(view: DeviceView, node: Node, x: Named) -> Array:
    attrs = ShardOp.of_node(node)
    name, mesh = attrs.axis, attrs.mesh
    at, before = x.axes.index(name), node.operands[0].type[name]
    assert view.mesh is not None, "without a mesh nothing is sent"
    size = x.size(name) // view.mesh.size(mesh)
    if not varies(x.array) & {*mesh, *before.mesh}:
        return _shard_of_replicated(x.array, mesh, at, size)
    array = view.varying(x.array, frozenset((*mesh, *before.mesh)))
    return _part(array, mesh, at, size)


def _part(array: Array, mesh: tuple[str, ...], at: int, size: int) -> Array:
    # The mesh axes join innermost, so the local shard is within the one that is there.
    start = jax.lax.axis_index(mesh) * size
    return jax.lax.dynamic_slice_in_dim(array, start, size, at)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _shard_of_replicated(array: Array, mesh: tuple[str, ...], at: int, size: int) -> Array:
    """Slice this device's shard of an array replicated along `mesh`; its gradient is gathered.

    The derivative of a slice would be a sum of shards among zeros, which sends twice as much.
    """
    return _part(jax.lax.pcast(array, mesh, to="varying"), mesh, at, size)


_shard_of_replicated.defvjp(
    lambda array, mesh, at, size: (_shard_of_replicated(array, mesh, at, size), None),
    lambda mesh, at, size, _, gradient: (
        jax.lax.all_gather(gradient, mesh, axis=at, tiled=True, to="invarying"),
    ),
)


@collective("all_gather")
def _all_gather(view: DeviceView, node: Node, x: Named) -> Array:
    attrs = AllGatherOp.of_node(node)
    mesh = attrs.mesh
    array = view.varying(x.array, frozenset(mesh))
    to = "invarying" if any(_is_agreed(node.result, m) for m in mesh) else "varying"
    at = x.axes.index(attrs.axis)
    return jax.lax.all_gather(array, mesh, axis=at, tiled=True, to=to)


def _is_agreed(value: Value, mesh: str) -> bool:
    """Whether devices along a mesh axis have to agree that `value` is the same for all of them.

    They need not where all that is made of it differs from device to device anyway.  Then its
    gradient is a sum of what each device contributes, carried out as the shards are scattered.
    """
    if value.is_output:
        return True
    results = [r for user in value.users for r in user.results]
    return any(
        not (mesh in r.type.unreduced or any(mesh in a.mesh for a in r.type.axes))
        and _is_agreed(r, mesh)
        for r in results
    )


@collective("all_reduce")
def _all_reduce(view: DeviceView, node: Node, x: Named) -> Array:
    mesh = AllReduceOp.of_node(node).mesh
    return jax.lax.psum(view.varying(x.array, frozenset(mesh)), mesh)


@collective("reduce_scatter")
def _reduce_scatter(view: DeviceView, node: Node, x: Named) -> Array:
    attrs = ReduceScatterOp.of_node(node)
    array = view.varying(x.array, frozenset(attrs.mesh))
    return jax.lax.psum_scatter(
        array, attrs.mesh, scatter_dimension=x.axes.index(attrs.axis), tiled=True
    )


@collective("all_to_all", of_rows=_exchange_rows)
def _all_to_all(view: DeviceView, node: Node, x: Named) -> Array:
    attrs = AllToAllOp.of_node(node)
    array = view.varying(x.array, frozenset(attrs.mesh))
    return jax.lax.all_to_all(
        array, attrs.mesh, x.axes.index(attrs.split), x.axes.index(attrs.gather), tiled=True
    )


@collective("ragged_all_to_all", of_rows=_exchange_rows)
def _ragged_all_to_all(view: DeviceView, node: Node, x: Named) -> Array:
    raise _not_lowered(node)
