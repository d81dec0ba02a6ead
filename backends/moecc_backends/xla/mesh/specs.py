"""Devices as the mesh of a graph, and the shardings that types say."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import mesh_of
from moecc.ir.ops.slots import SlotsOp
from moecc.types import Array, TensorType
from moecc.weights.evaluate import Evaluator
from moecc.weights.expr import Box, Expr


def device_mesh(graph: Graph, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return the mesh of `graph` made of `devices`, or of those at hand.

    Raises:
      InputError: the graph is on no mesh, or there are not enough devices.
    """
    grid = mesh_of(graph)
    if grid is None:
        raise InputError(
            "the graph is on no mesh", hint="annotate-sharding{mesh=data:8 rules=st-moe}"
        )
    devices = jax.devices() if devices is None else devices
    if len(devices) < grid.devices:
        raise InputError(
            "there are not enough devices", expected=f"{grid.devices} ({grid})",
            found=f"{len(devices)} of {devices[0].platform}",
            hint=f"XLA_FLAGS=--xla_force_host_platform_device_count={grid.devices} makes a CPU "
            "many",
        )  # fmt: skip
    kinds = (jax.sharding.AxisType.Auto,) * len(grid.axes)
    return jax.make_mesh(grid.shape, grid.names, kinds, devices=devices[: grid.devices])


def shardings(
    values: dict[str, Value], mesh: jax.sharding.Mesh
) -> dict[str, jax.sharding.NamedSharding]:
    """Return the sharding on `mesh` of each of `values`, the parameters of a graph, say."""
    return {n: NamedSharding(mesh, spec) for n, spec in specs(values).items()}


def specs(values: dict[str, Value]) -> dict[str, PartitionSpec]:
    """Return how each of `values` is sharded, as jax spells it."""
    return {n: spec(v.type) for n, v in values.items()}


def spec(type: TensorType) -> PartitionSpec:
    """Return how the axes of `type` are sharded, as jax spells it."""
    return PartitionSpec(*(axis.mesh or None for axis in type.axes))


def sharded_array(
    evaluator: Evaluator, wanted: Expr, shape: tuple[int, ...], where: jax.sharding.Sharding
) -> jax.Array:
    """Return the values of a weight expression as an array whose shards are evaluated one by one.

    Args:
      evaluator: of the expression.
      wanted: the expression.
      shape: of the array.
      where: its devices, each of which evaluates its own part.
    """
    blocks: dict[Box, Array] = {}

    def part(index: tuple[slice, ...] | None) -> Array:
        assert index is not None, "every device has its part"
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        # Devices that are copies of one another ask for the same part.
        if box not in blocks:
            blocks[box] = np.array(evaluator.block(wanted, box), order="C")
        return blocks[box]

    return jax.make_array_from_callback(shape, where, part)


# The token groups of a graph that XLA's partitioner spreads over a mesh.


def group_counts(graph: Graph) -> set[int]:
    """Return the numbers of token groups in which slots are counted under a capacity."""
    nodes = (node for node in graph.every_node() if node.op.assigns_slots and not node.op.chooses)
    bounded = (attrs for attrs in map(SlotsOp.of_node, nodes) if attrs.slots == "capacity")
    return {attrs.groups for attrs in bounded}
