"""Where parameters and inputs of a training step are sharded, and the graph as its model.

Types of the graph say it, with the graph's own collectives; or a layout of the plan does, and XLA's
partitioner adds the collectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import Mesh, mesh_of
from moecc.ir.ops.repetition import repetitions
from moecc.sharding.layout import value_spec
from moecc.train.settings import StepSpec
from moecc.types import Axis, TensorType
from moecc_backends.xla.lower.function import function
from moecc_backends.xla.lower.mesh import GspmdLowering, sharded_function
from moecc_backends.xla.lower.scan import is_stacked
from moecc_backends.xla.mesh.specs import group_counts, spec
from moecc_backends.xla.trace.context import DIRECT, DeviceView, Options
from moecc_backends.xla.trace.typed_jax import Function, PyTree
from moecc_backends.xla.train.gradients import LoweringConfig


@dataclass(frozen=True)
class StepShardings:
    """Where the parameters and inputs of a step lie, and how its graph is lowered there.

    Attributes:
      spec: the settings of the step.
      device: the first device, which has everything where there is no mesh.
      mesh: the devices; None for one device.
      grid: the mesh of the graph, whose types state the shardings and which has collectives of its
        own; None on one device, or where XLA's partitioner adds the collectives.
      interceptor: the hints for the partitioner.
    """

    spec: StepSpec
    device: jax.Device
    mesh: jax.sharding.Mesh | None = None
    grid: Mesh | None = None
    interceptor: GspmdLowering | None = None

    @property
    def whole(self) -> Sharding:
        """The sharding of an array that every device has."""
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def lowering(self) -> LoweringConfig:
        """How and where nodes are lowered: on the shards of a device, or on whole arrays."""
        return LoweringConfig(
            self.spec.config.compute_type,
            Options(platform=self.spec.platform),
            None if self.grid is None else DeviceView(self.grid),
            self.interceptor or DIRECT,
        )

    def param(self, value: Value) -> Sharding:
        """Return the sharding of a parameter."""
        if self.interceptor is None:
            return self.along(value.type)
        # The axis along which a scan has stacked the parameter.
        scans = [node for node in value.users if node.body is not None]
        stacked = {repetitions(node.attrs)[0] for node in scans if is_stacked(node, value)}
        layers = stacked.pop() if stacked else ""
        return self.interceptor.weight_sharding(value, stored=True, layers=layers)

    def along(self, type: TensorType) -> Sharding:
        """Return the sharding of an array of inputs or targets."""
        if self.interceptor is not None:
            sizes = {a.name: size_of(a, self.spec.sizes) for a in type.axes}
            return self.interceptor.sharding(tuple(sizes), value_spec(self.interceptor.plan, sizes))
        return self.whole if self.mesh is None else NamedSharding(self.mesh, spec(type))

    def mapped(self, function: Function, arguments: Sequence[PyTree], results: PyTree) -> Function:
        """Return `function`, which works on what `lowering` says, as one of whole arrays.

        Args:
          function: takes trees of arrays.
          arguments: types in place of the arrays that it takes, a tree for each argument; None for
            arrays that every device has.
          results: types in place of the arrays that it returns, likewise.
        """
        if self.grid is None:
            return function
        in_specs, out_specs = jax.tree.map(
            lambda t: PartitionSpec() if t is None else spec(t),
            (tuple(arguments), results),
            is_leaf=lambda t: t is None or isinstance(t, TensorType),
        )
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
        )

    def model(self, graph: Graph) -> Function:
        """Return `graph` as a function ``(params, inputs) → outputs`` of whole arrays."""
        config = self.lowering
        if self.grid is not None:
            assert self.mesh is not None, "a grid is one of devices"
            return sharded_function(graph, self.mesh, dtype=config.dtype, options=config.options)
        return function(
            graph, dtype=config.dtype, options=config.options, interceptor=config.interceptor
        )


def size_of(axis: Axis, sizes: Mapping[str, int]) -> int:
    """Return the size of an axis, which a number or a variable says."""
    return axis.size if isinstance(axis.size, int) else sizes[str(axis.size)]


def step_shardings(graph: Graph, spec: StepSpec, devices: list[jax.Device]) -> StepShardings:
    """Return the shardings of the step of `graph` over `devices`.

    Raises:
      InputError: the graph is on no mesh and there are several devices, or the mesh cuts a group
        of tokens.
    """
    grid = mesh_of(graph) if spec.layout is None else spec.layout.mesh
    if grid is None and len(devices) == 1:
        return StepShardings(spec, devices[0])
    if grid is None:
        raise InputError(
            "the graph is on no mesh", hint="annotate-sharding{mesh=data:8 rules=st-moe}"
        )
    mesh = jax.sharding.Mesh(np.array(devices).reshape(grid.shape), grid.names)
    if spec.layout is None:
        return StepShardings(spec, devices[0], mesh, grid)
    layout = spec.layout
    shards = layout.shards["batch"]
    problems = [
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
    if problems:
        raise InputError(problems)
    lowering = GspmdLowering(mesh, spec.layout)
    return StepShardings(spec, devices[0], mesh, interceptor=lowering)
