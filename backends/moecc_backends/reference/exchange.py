"""The effect of collectives on each device, and the number of elements each sends to others.

A ring of n devices sends (n − 1)/n of the global value in a gather or a reduce-scatter, and twice
that in an all-reduce; an exchange sends what is not for the device itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moecc.ir.attributes import (
    AllGatherAttrs,
    AllReduceAttrs,
    AllToAllAttrs,
    RaggedAllToAllAttrs,
    ReduceScatterAttrs,
    ShardAttrs,
)
from moecc.ir.graph import Node
from moecc.ir.mesh import Coordinates, Mesh
from moecc.types import TensorType
from moecc_backends.reference.arrays import Array, Data

Parts = dict[Coordinates, Array]
Sent = dict[Coordinates, int]
Rows = Callable[[TensorType, Coordinates], Data]
"""The slots in use of a device's shard of ragged rows, ``[group, expert]``."""

Exchange = Callable[[Node, Parts, Mesh, Rows], "tuple[Parts, Sent]"]

EXCHANGES: dict[str, Exchange] = {}


def exchange(name: str) -> Callable[[Exchange], Exchange]:
    """Register a function as the implementation of the collective `name`."""

    def register(function: Exchange) -> Exchange:
        EXCHANGES[name] = function
        return function

    return register


def _block(x: Array, axis: str, part: int, parts: int) -> Array:
    """Return block `part` of the `parts` equal blocks of `x` along `axis`."""
    at = x.axes.index(axis)
    size = x.data.shape[at] // parts
    return replace(x, data=x.data.take(range(part * size, (part + 1) * size), at), assignment=None)


def _together(pieces: list[Array], axis: str) -> Array:
    at = pieces[0].axes.index(axis)
    return replace(pieces[0], data=np.concatenate([p.data for p in pieces], at), assignment=None)


@exchange("shard")
def _shard(node: Node, x: Parts, mesh: Mesh, rows: Rows) -> tuple[Parts, Sent]:
    attrs = ShardAttrs.of_node(node)
    over, n = attrs.mesh, mesh.size(attrs.mesh)
    parts = {d: _block(a, attrs.axis, mesh.part(d, over), n) for d, a in x.items()}
    return parts, dict.fromkeys(x, 0)


@exchange("all_gather")
def _all_gather(node: Node, x: Parts, mesh: Mesh, rows: Rows) -> tuple[Parts, Sent]:
    attrs = AllGatherAttrs.of_node(node)
    over = attrs.mesh
    parts = {d: _together([x[p] for p in mesh.peers(d, over)], attrs.axis) for d in x}
    return parts, {d: a.data.size * (mesh.size(over) - 1) for d, a in x.items()}


def added(parts: list[Data]) -> Data:
    """Return the sum of the devices' data, in device order; of opposite infinities it is NaN."""
    total = parts[0]
    with np.errstate(invalid="ignore"):
        for part in parts[1:]:
            total = total + part
    return total


def _sums(x: Parts, over: tuple[str, ...], mesh: Mesh) -> Parts:
    """Return the sum over `over` on every device, added in the order of the devices."""
    return {
        d: replace(a, data=added([x[p].data for p in mesh.peers(d, over)])) for d, a in x.items()
    }


@exchange("all_reduce")
def _all_reduce(node: Node, x: Parts, mesh: Mesh, rows: Rows) -> tuple[Parts, Sent]:
    over = AllReduceAttrs.of_node(node).mesh
    n = mesh.size(over)
    return _sums(x, over, mesh), {d: 2 * a.data.size * (n - 1) // n for d, a in x.items()}


@exchange("reduce_scatter")
def _reduce_scatter(node: Node, x: Parts, mesh: Mesh, rows: Rows) -> tuple[Parts, Sent]:
    attrs = ReduceScatterAttrs.of_node(node)
    over, n, sums = attrs.mesh, mesh.size(attrs.mesh), _sums(x, attrs.mesh, mesh)
    parts = {d: _block(a, attrs.axis, mesh.part(d, over), n) for d, a in sums.items()}
    return parts, {d: a.data.size * (n - 1) // n for d, a in x.items()}


@exchange("all_to_all")
def _all_to_all(node: Node, x: Parts, mesh: Mesh, rows: Rows) -> tuple[Parts, Sent]:
    attrs = AllToAllAttrs.of_node(node)
    n = mesh.size(attrs.mesh)
    return _exchanged(attrs, x, mesh), {d: a.data.size * (n - 1) // n for d, a in x.items()}


def _exchanged(attrs: AllToAllAttrs | RaggedAllToAllAttrs, x: Parts, mesh: Mesh) -> Parts:
    over, split, gather = attrs.mesh, attrs.split, attrs.gather
    return {
        d: _together(
            [_block(x[p], split, mesh.part(d, over), mesh.size(over)) for p in mesh.peers(d, over)],
            gather,
        )
        for d in x
    }


@exchange("ragged_all_to_all")
def _ragged_all_to_all(node: Node, x: Parts, mesh: Mesh, rows: Rows) -> tuple[Parts, Sent]:
    """Send the occupied rows; every device has room for the same number of slots."""
    type, attrs = node.operands[0].type, RaggedAllToAllAttrs.of_node(node)
    ragged = type.ragged
    assert ragged is not None, "the type is checked"
    return _exchanged(attrs, x, mesh), {
        d: _rows_sent(rows(type, d), attrs.split, mesh, d, attrs.mesh) * _row_size(a, ragged.name)
        for d, a in x.items()
    }


def _rows_sent(
    extents: Data, split: str, mesh: Mesh, at: Coordinates, over: tuple[str, ...]
) -> int:
    """Return how many of the rows counted by `extents` go to other devices."""
    n = mesh.size(over)
    own = _block(Array(extents, ("group", "expert")), split, mesh.part(at, over), n)
    return int(extents.sum() - own.data.sum())


def _row_size(x: Array, slot: str) -> int:
    """Return the number of elements of one row."""
    sizes = [x.size(a) for a in x.axes if a not in ("group", "expert", slot)]
    return int(np.prod(sizes))
