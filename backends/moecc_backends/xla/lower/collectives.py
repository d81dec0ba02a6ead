"""Lowering of collectives: what one device does, or nothing where arrays are whole."""

from __future__ import annotations

from functools import partial

import jax
from jax import Array, lax

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.ops.collectives import CollectiveOp, ShardOp
from moecc_backends.xla.dispatch.rounds import local_rows, send_rows, send_rows_back
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.trace.context import DeviceView, TraceContext, lowering
from moecc_backends.xla.trace.values import Named, Names, Operand, Rows, lifted, varies


@lowering(
    "reshard",
    "shard",
    "all_gather",
    "all_reduce",
    "reduce_scatter",
    "all_to_all",
    "ragged_all_to_all",
)
def _collective(ctx: TraceContext, node: Node, x: Operand) -> Operand:
    if ctx.view.mesh is None:
        # On the global value it is the identity.
        return x
    if isinstance(x, Rows) and {"expert", "group"} & set(node.attrs.values()):
        assert isinstance(x.layout, SortedRows), "rows that go to other devices are sorted"
        if node.op.name == "shard":
            return local_rows(ctx, node, x, x.layout)
        if node.attrs["split"] == "expert":
            return send_rows(ctx, node, x, x.layout)
        return send_rows_back(x, x.layout)
    return lifted(x, lambda full: Named(_on_device(ctx.view, node, full), full.axes))


def _on_device(view: DeviceView, node: Node, x: Named) -> Array:
    """Return what one device has after a collective."""
    name, attrs = node.op.name, node.attrs
    if name in ("reshard", "ragged_all_to_all"):
        raise InputError(
            f"the xla backend cannot lower {node.op} on a mesh",
            found=str(node.operands[0].type),
            hint="lower-collectives" if name == "reshard" else None,
        )
    mesh = CollectiveOp.of_node(node).mesh
    if name == "shard":
        return _shard(view, node, x, mesh)
    array = view.varying(x.array, frozenset(mesh))
    if name == "all_reduce":
        return lax.psum(array, mesh)
    if name == "all_to_all":
        split, gather = (x.axes.index(attrs[word]) for word in ("split", "gather"))
        return lax.all_to_all(array, mesh, split, gather, tiled=True)
    at = x.axes.index(attrs["axis"])
    if name == "reduce_scatter":
        return lax.psum_scatter(array, mesh, scatter_dimension=at, tiled=True)
    to = "invarying" if any(_is_agreed(node.result, m) for m in mesh) else "varying"
    return lax.all_gather(array, mesh, axis=at, tiled=True, to=to)


def _shard(view: DeviceView, node: Node, x: Named, mesh: Names) -> Array:
    name = ShardOp.of_node(node).axis
    at, meshes = x.axes.index(name), {*mesh, *node.operands[0].type[name].mesh}
    assert view.mesh is not None, "without a mesh nothing is sent"
    size = x.size(name) // view.mesh.size(mesh)
    if not varies(x.array) & meshes:
        return _shard_of_replicated(x.array, mesh, at, size)
    return _part(view.varying(x.array, frozenset(meshes)), mesh, at, size)


def _part(array: Array, mesh: Names, at: int, size: int) -> Array:
    # The mesh axes join innermost, so the local shard is within the one that is there.
    start = lax.axis_index(mesh) * size
    return lax.dynamic_slice_in_dim(array, start, size, at)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _shard_of_replicated(array: Array, mesh: Names, at: int, size: int) -> Array:
    """Slice this device's shard of an array replicated along `mesh`; its gradient is gathered.

    The derivative of a slice would be a sum of shards among zeros, which sends twice as much.
    """
    return _part(lax.pcast(array, mesh, to="varying"), mesh, at, size)


_shard_of_replicated.defvjp(
    lambda array, mesh, at, size: (_shard_of_replicated(array, mesh, at, size), None),
    lambda mesh, at, size, _, gradient: (
        lax.all_gather(gradient, mesh, axis=at, tiled=True, to="invarying"),
    ),
)


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
