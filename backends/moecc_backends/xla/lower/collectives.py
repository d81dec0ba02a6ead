"""Lowering of collectives: what one device does of them, or nothing where arrays are whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.table.collectives import COLLECTIVES
from moecc_backends.xla.dispatch.expert_exchange import own_rows, rows_sent, rows_sent_back
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.device_view import Local, varies
from moecc_backends.xla.trace.values import Named, Operand, Rows, lifted

Collective = Callable[[Local, Node, Named], jax.Array]

_LOCAL: dict[str, Collective] = {}


@lowering(*COLLECTIVES)
def _collective(ctx: Context, node: Node, x: Operand) -> Operand:
    if ctx.local.mesh is None:
        # On the global value it is the identity.
        return x
    if isinstance(x, Rows) and {"expert", "group"} & set(node.attrs.values()):
        return _of_rows(ctx, node, x)
    function = _LOCAL.get(node.op.name)
    if function is None:
        raise InputError(
            f"the xla backend cannot lower {node.op.name} on a mesh",
            found=str(node.operands[0].type),
            hint="lower-collectives" if node.op.name == "reshard" else None,
        )
    return lifted(x, lambda full: Named(function(ctx.local, node, full), full.axes))


def _of_rows(ctx: Context, node: Node, x: Rows) -> Rows:
    """Bring packed rows to the devices of their experts, or back from them."""
    packing = x.packing
    assert isinstance(packing, SortedRows), "rows that go to other devices are sorted"
    if node.op.name == "shard":
        return own_rows(ctx, node, x, packing)
    if node.attrs["split"] == "expert":
        return rows_sent(ctx, node, x, packing)
    return rows_sent_back(x, packing)


def _collective_of(name: str) -> Callable[[Collective], Collective]:
    def register(function: Collective) -> Collective:
        _LOCAL[name] = function
        return function

    return register


@_collective_of("shard")
def _shard(local: Local, node: Node, x: Named) -> jax.Array:
    name, mesh = node.attrs["axis"], node.attrs["mesh"]
    at, before = x.axes.index(name), node.operands[0].type[name]
    assert local.mesh is not None, "without a mesh nothing is sent"
    size = x.size(name) // local.mesh.size(mesh)
    if not varies(x.array) & {*mesh, *before.mesh}:
        part: jax.Array = _part_of_agreed(x.array, mesh, at, size)
        return part
    array = local.varying(x.array, frozenset((*mesh, *before.mesh)))
    return _part(array, mesh, at, size)


def _part(array: jax.Array, mesh: tuple[str, ...], at: int, size: int) -> jax.Array:
    # The mesh axes join innermost, so the own part lies within the part that is there.
    start = jax.lax.axis_index(mesh) * size
    return jax.lax.dynamic_slice_in_dim(array, start, size, at)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _part_of_agreed(array: Any, mesh: tuple[str, ...], at: int, size: int) -> Any:
    """Return the own part of what is the same along `mesh`; its gradient is gathered.

    Left to itself it would be a sum of parts among zeros, which sends twice as much.
    """
    return _part(jax.lax.pcast(array, mesh, to="varying"), mesh, at, size)


def _part_forward(array: Any, mesh: tuple[str, ...], at: int, size: int) -> tuple[Any, None]:
    return _part_of_agreed(array, mesh, at, size), None


def _part_backward(
    mesh: tuple[str, ...], at: int, size: int, residuals: None, gradient: Any
) -> tuple[Any]:
    return (jax.lax.all_gather(gradient, mesh, axis=at, tiled=True, to="invarying"),)


_part_of_agreed.defvjp(_part_forward, _part_backward)


@_collective_of("all_gather")
def _all_gather(local: Local, node: Node, x: Named) -> jax.Array:
    mesh = node.attrs["mesh"]
    array = local.varying(x.array, frozenset(mesh))
    to = "invarying" if any(_is_agreed(node.result, m) for m in mesh) else "varying"
    at = x.axes.index(node.attrs["axis"])
    gathered: jax.Array = jax.lax.all_gather(array, mesh, axis=at, tiled=True, to=to)
    return gathered


def _is_agreed(value: Value, mesh: str) -> bool:
    """Whether devices along a mesh axis have to agree that `value` is the same for all of them.

    They need not where all that is made of it differs from device to device anyway.  Then its
    gradient is a sum of what each device contributes, carried out as the parts are scattered.
    """
    if value.is_output:
        return True
    made = [r for user in value.users for r in user.results]
    return any(not _lies_on(r, mesh) and _is_agreed(r, mesh) for r in made)


def _lies_on(value: Value, mesh: str) -> bool:
    return mesh in value.type.unreduced or any(mesh in a.mesh for a in value.type.axes)


@_collective_of("all_reduce")
def _all_reduce(local: Local, node: Node, x: Named) -> jax.Array:
    mesh = node.attrs["mesh"]
    array = local.varying(x.array, frozenset(mesh))
    reduced: jax.Array = jax.lax.psum(array, mesh)  # type: ignore[no-untyped-call]
    return reduced


@_collective_of("reduce_scatter")
def _reduce_scatter(local: Local, node: Node, x: Named) -> jax.Array:
    mesh, at = node.attrs["mesh"], x.axes.index(node.attrs["axis"])
    array = local.varying(x.array, frozenset(mesh))
    part: jax.Array = jax.lax.psum_scatter(  # type: ignore[no-untyped-call]
        array, mesh, scatter_dimension=at, tiled=True
    )
    return part


@_collective_of("all_to_all")
def _all_to_all(local: Local, node: Node, x: Named) -> jax.Array:
    mesh, split, gather = (node.attrs[n] for n in ("mesh", "split", "gather"))
    moved: jax.Array = jax.lax.all_to_all(  # type: ignore[no-untyped-call]
        local.varying(x.array, frozenset(mesh)),
        mesh,
        split_axis=x.axes.index(split),
        concat_axis=x.axes.index(gather),
        tiled=True,
    )
    return moved
