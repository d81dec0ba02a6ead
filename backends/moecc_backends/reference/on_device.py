"""One operation on one device: its meaning on local shards, given the device's coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moecc.ir.attributes import EmbeddingAttrs, MeanAttrs
from moecc.ir.graph import Node
from moecc.ir.mesh import Coordinates, Mesh
from moecc.ir.structure import local_attrs
from moecc_backends.reference.arrays import MEANINGS, NOTHING, Array
from moecc_backends.reference.buffers import kept_from

PerDevice = Callable[[Node, list[Array], Coordinates, Mesh], "Array | tuple[Array, ...]"]

LOCAL: dict[str, PerDevice] = {}
"""Implementations of operations that depend on the coordinates of the device."""


def local(*names: str) -> Callable[[PerDevice], PerDevice]:
    """Register a function as the per-device implementation of the operations `names`."""

    def register(function: PerDevice) -> PerDevice:
        LOCAL.update(dict.fromkeys(names, function))
        return function

    return register


def run_local(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> tuple[Array, ...]:
    """Return the results of `node` on the device at `at`, from its local shards of the operands."""
    function = LOCAL.get(node.op.name, _plain)
    made = function(node, operands, at, mesh)
    return made if isinstance(made, tuple) else (made,)


def _plain(
    node: Node, operands: list[Array], at: Coordinates, mesh: Mesh
) -> Array | tuple[Array, ...]:
    return MEANINGS[node.op.name](*operands, **local_attrs(node, mesh))


@local("positions")
def _positions(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    (axis,) = node.result.type.axes
    size = operands[0].size(axis.name)
    return Array(np.arange(size) + mesh.part(at, axis.mesh) * size, (axis.name,))


@local("random_uniform", "random_normal")
def _random(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Draw the global numbers, of which a device keeps its shard."""
    key, like = operands
    axes = [node.result.type[n] for n in like.axes]
    shape = [s * mesh.size(a.mesh) for s, a in zip(like.data.shape, axes, strict=True)]
    made = MEANINGS[node.op.name](key, Array(np.empty(shape), like.axes), **node.attrs)
    assert isinstance(made, Array), "one result"
    data = made.data
    for number, axis in enumerate(axes):
        size = like.data.shape[number]
        start = mesh.part(at, axis.mesh) * size
        data = data.take(range(start, start + size), number)
    return Array(data, like.axes)


@local("mean")
def _mean(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return this device's share of the mean: the sum of its shard over the global size."""
    made = _plain(node, operands, at, mesh)
    assert isinstance(made, Array), "one result"
    type = node.operands[0].type
    parts = mesh.size(m for n in MeanAttrs.of_node(node).axes for m in type[n].mesh)
    return made.map(lambda d: d / parts)


@local("embedding")
def _embedding(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return the rows of this device's shard, and zeros for the others."""
    table, ids = operands
    axis = node.operands[0].type[EmbeddingAttrs.of_node(node).axis]
    size = table.size(axis.name)
    if not axis.mesh:
        return _one(_plain(node, operands, at, mesh))
    there = ids.data != NOTHING
    index = np.where(there, ids.data - mesh.part(at, axis.mesh) * size, 0)
    mine = (index >= 0) & (index < size)
    picked = replace(ids, data=np.where(mine, index, 0))
    rows = _one(_plain(node, [table, picked], at, mesh))
    mask = Array(mine, ids.axes).to(rows.axes)
    return rows.map(lambda d: np.where(mask, d, 0))


@local("combine", "combine_weighted")
def _combine(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return the contribution of this device's experts to each token."""
    rows, experts, slots, *gates = operands
    axis = node.operands[0].type["expert"]
    size = rows.size("expert")
    index = experts.data - mesh.part(at, axis.mesh) * size
    mine = (index >= 0) & (index < size)
    own = replace(slots, data=np.where(Array(mine, experts.axes).to(slots.axes), slots.data, -1))
    return _one(_plain(node, [rows, replace(experts, data=index), own, *gates], at, mesh))


@local("within_buffer")
def _within_buffer(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return which of this device's choices fit, from the counts of all that exchange rows."""
    experts, slots, counts = operands
    attrs = dict(local_attrs(node, mesh))
    tokens = node.operands[0].type[attrs["tokens"][0]].mesh
    over = tokens[len(node.operands[2].type["group"].mesh) :]
    groups = counts.size("group") // mesh.size(over)
    first = mesh.part(at, over) * groups
    return kept_from(experts, slots, counts, attrs["tokens"], attrs, first=first, groups=groups)


def _one(made: Array | tuple[Array, ...]) -> Array:
    assert isinstance(made, Array), "one result"
    return made
