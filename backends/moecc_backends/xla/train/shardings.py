"""Where parameters and inputs of a training step are sharded, and the graph as its model.

Types of the graph say it, with the graph's own collectives; or a layout of the plan does, and XLA's
partitioner adds the collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from moecc.errors import InputError, Problem
from moecc.ir.attributes import ScanAttrs
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import mesh_of
from moecc.ir.table.repetition import repetitions
from moecc.sharding.layout import Layout
from moecc.sharding.spec import value_spec
from moecc.types.dtypes import DType
from moecc_backends.xla.lower.function import function
from moecc_backends.xla.lower.gspmd import GspmdLowering
from moecc_backends.xla.lower.shard_map import sharded_function
from moecc_backends.xla.mesh.specs import spec
from moecc_backends.xla.mesh.token_groups import group_counts
from moecc_backends.xla.trace.options import Options
from moecc_backends.xla.trace.typed_jax import Devices, partition_spec
from moecc_backends.xla.train.loss import Model


@dataclass(frozen=True)
class TrainStepConfig:
    """How a graph is trained or run.

    Attributes:
      sizes: what the variables of the graph stand for.
      dtype: the type of the computation.
      optimizer: of `moecc_backends.xla.train.step.OPTIMIZERS`; None for the forward pass.
      platform: what it is lowered for, ``tpu``, ``gpu`` or ``cpu``.
      layout: what XLA's partitioner shards the graph by; None where the graph is on a mesh.
    """

    sizes: Mapping[str, int]
    dtype: DType
    optimizer: str | None = None
    platform: str = "cpu"
    layout: Layout | None = None

    @property
    def options(self) -> Options:
        """What is chosen for the lowering."""
        return Options(platform=self.platform)


class StepShardings(Protocol):
    """How parameters and inputs of a graph are sharded, and the graph as a function of them."""

    def param(self, value: Value) -> NamedSharding:
        """Return the sharding of a parameter."""
        ...

    def along(self, value: Value, sizes: Mapping[str, int]) -> NamedSharding:
        """Return the sharding of an array with some axes of `value`, of the sizes given."""
        ...

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function on the mesh."""
        ...


@dataclass(frozen=True)
class ExplicitShardings:
    """Shardings as the types of the graph say them, with the graph's own collectives."""

    mesh: jax.sharding.Mesh
    config: TrainStepConfig

    def param(self, value: Value) -> NamedSharding:
        """Return the sharding of a parameter."""
        return NamedSharding(self.mesh, spec(value.type))

    def along(self, value: Value, sizes: Mapping[str, int]) -> NamedSharding:
        """Return the sharding of an array with some axes of `value`, of the sizes given."""
        return NamedSharding(
            self.mesh, partition_spec(*(value.type[n].mesh or None for n in sizes))
        )

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function on the mesh."""
        config = self.config
        return sharded_function(graph, self.mesh, dtype=config.dtype, options=config.options)


@dataclass(frozen=True)
class GspmdShardings:
    """Shardings of a layout of the plan, with the collectives that XLA's partitioner adds."""

    lowering: GspmdLowering
    config: TrainStepConfig

    def param(self, value: Value) -> NamedSharding:
        """Return the sharding of a parameter."""
        return self.lowering.weight_sharding(value, stored=True, layers=_layer_axis(value))

    def along(self, value: Value, sizes: Mapping[str, int]) -> NamedSharding:
        """Return the sharding of an array with some axes of `value`, of the sizes given."""
        return self.lowering.sharding(tuple(sizes), value_spec(self.lowering.plan, sizes))

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function on the mesh."""
        config = self.config
        return function(
            graph, dtype=config.dtype, options=config.options, interceptor=self.lowering
        )


def step_shardings(graph: Graph, config: TrainStepConfig, devices: Devices) -> StepShardings:
    """Return the shardings of the step of `graph` over `devices`.

    Raises:
      InputError: the graph is on no mesh, or the mesh cuts a group of tokens.
    """
    grid = mesh_of(graph) if config.layout is None else config.layout.mesh
    if grid is None:
        raise InputError("the graph is on no mesh", hint="annotate-sharding{mesh=data:8}")
    mesh = jax.sharding.Mesh(np.array(devices).reshape(grid.shape), grid.names)
    if config.layout is None:
        return ExplicitShardings(mesh, config)
    check_groups(graph, config.layout)
    return GspmdShardings(GspmdLowering(mesh, config.layout), config)


def check_groups(graph: Graph, layout: Layout) -> None:
    """Raise InputError if a group of tokens, within which slots are counted, would be cut."""
    shards = layout.mesh.size(layout.batch_axes)
    found = [
        Problem(
            f"{' x '.join(layout.batch_axes)} cuts the token groups",
            f"mesh {layout.mesh}",
            f"a divisor of {groups} groups",
            str(shards),
            f"specialize{{groups={shards}}} makes as many groups",
        )
        for groups in sorted(group_counts(graph))
        if groups % shards
    ]
    if found:
        raise InputError(found)


def _layer_axis(value: Value) -> str:
    """Return the axis along which `value` is stacked for a scan, or an empty string."""
    scans = [node for node in value.users if node.body is not None]
    names = {repetitions(node.attrs)[0] for node in scans if _is_stacked(node, value)}
    return names.pop() if names else ""


def _is_stacked(scan: Node, value: Value) -> bool:
    attrs = ScanAttrs.of_node(scan)
    return value in scan.operands[attrs.carries : attrs.carries + attrs.stacked]
