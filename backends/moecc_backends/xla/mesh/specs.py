"""Devices as the mesh of a graph, and the shardings that types say."""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import mesh_of
from moecc.types.tensor import TensorType
from moecc_backends.xla.trace.typed_jax import partition_spec


def device_mesh(graph: Graph, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return the mesh of `graph` made of `devices`, or of those at hand.

    Raises:
      InputError: the graph is on no mesh, or there are not enough devices.
    """
    own = mesh_of(graph)
    if own is None:
        raise InputError(
            "the graph is on no mesh", hint="annotate-sharding{mesh=data:8 rules=st-moe}"
        )
    devices = jax.devices() if devices is None else devices
    if len(devices) < own.devices:
        raise InputError(
            "there are not enough devices", expected=f"{own.devices} ({own})",
            found=f"{len(devices)} of {devices[0].platform}",
            hint=f"XLA_FLAGS=--xla_force_host_platform_device_count={own.devices} makes a CPU many",
        )  # fmt: skip
    kinds = (jax.sharding.AxisType.Auto,) * len(own.axes)
    return jax.make_mesh(own.shape, own.names, kinds, devices=devices[: own.devices])


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
    parts = (axis.mesh or None for axis in type.axes)
    return partition_spec(*parts)
