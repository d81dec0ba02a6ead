"""Where parameters and inputs of a training step are sharded, and the graph as its model.

Types of the graph say it, with the graph's own collectives; or a layout of the plan does, and XLA's
partitioner adds the collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import Mesh, mesh_of
from moecc.ir.ops.repetition import repetitions
from moecc.sharding.layout import Layout, value_spec
from moecc.train.settings import StepSpec
from moecc.types import Axis, TensorType
from moecc_backends.xla.lower.function import function
from moecc_backends.xla.lower.mesh import GspmdLowering, sharded_function
from moecc_backends.xla.lower.scan import is_stacked
from moecc_backends.xla.mesh.specs import group_counts, spec
from moecc_backends.xla.trace.context import DeviceView, Options
from moecc_backends.xla.trace.typed_jax import Function, PyTree
from moecc_backends.xla.train.gradients import LoweringConfig

Model = Callable[[Mapping[str, PyTree], Mapping[str, PyTree]], dict[str, jax.Array]]
"""A graph as ``(params, inputs) → outputs``."""


class StepShardings(Protocol):
    """How parameters and inputs of a graph are sharded, and how it is lowered there."""

    def param(self, value: Value) -> Sharding:
        """Return the sharding of a parameter."""
        ...

    def along(self, type: TensorType) -> Sharding:
        """Return the sharding of an array of inputs or targets."""
        ...

    @property
    def whole(self) -> Sharding:
        """What every device has."""
        ...

    @property
    def lowering(self) -> LoweringConfig:
        """How and where nodes are lowered."""
        ...

    def mapped(self, function: Function, given: Sequence[PyTree], made: PyTree) -> Function:
        """Return `function`, which works on what `lowering` says, as one of whole arrays.

        Args:
          function: takes trees of arrays.
          given: types in place of the arrays that it takes, a tree for each argument; None for what
            every device has.
          made: types in place of the arrays that it returns, likewise.
        """
        ...

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function of whole arrays."""
        ...


@dataclass(frozen=True)
class OneDevice:
    """One device, which has everything."""

    device: jax.Device
    spec: StepSpec

    @property
    def whole(self) -> Sharding:
        """What the device has."""
        return jax.sharding.SingleDeviceSharding(self.device)

    @property
    def lowering(self) -> LoweringConfig:
        """How nodes are lowered."""
        return LoweringConfig(self.spec.config.compute_type, options(self.spec))

    def param(self, value: Value) -> Sharding:
        """Return the sharding of a parameter."""
        return self.whole

    def along(self, type: TensorType) -> Sharding:
        """Return the sharding of an array of inputs or targets."""
        return self.whole

    def mapped(self, function: Function, given: Sequence[PyTree], made: PyTree) -> Function:
        """Return `function`."""
        return function

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function of whole arrays."""
        return function(graph, dtype=self.spec.config.compute_type, options=options(self.spec))


@dataclass(frozen=True)
class ExplicitShardings:
    """Shardings as the types of the graph say them, with the graph's own collectives."""

    mesh: jax.sharding.Mesh
    own: Mesh
    spec: StepSpec

    @property
    def whole(self) -> Sharding:
        """What every device has."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def lowering(self) -> LoweringConfig:
        """How and where nodes are lowered: on the shards of a device."""
        return LoweringConfig(
            self.spec.config.compute_type, options(self.spec), DeviceView(self.own)
        )

    def param(self, value: Value) -> Sharding:
        """Return the sharding of a parameter."""
        return self.along(value.type)

    def along(self, type: TensorType) -> Sharding:
        """Return the sharding of an array of inputs or targets."""
        return NamedSharding(self.mesh, spec(type))

    def mapped(self, function: Function, given: Sequence[PyTree], made: PyTree) -> Function:
        """Return `function`, run shard by shard."""
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=_specs(tuple(given)), out_specs=_specs(made),
            check_vma=True,
        )  # fmt: skip

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function of whole arrays."""
        return sharded_function(
            graph, self.mesh, dtype=self.spec.config.compute_type, options=options(self.spec)
        )


def _specs(types: PyTree) -> PyTree:
    """Return types as the specs of jax, in the same tree."""
    return jax.tree.map(
        lambda t: PartitionSpec() if t is None else spec(t),
        types,
        is_leaf=lambda t: t is None or isinstance(t, TensorType),
    )


@dataclass(frozen=True)
class GspmdShardings:
    """Shardings of a layout of the plan, with the collectives that XLA's partitioner adds."""

    interceptor: GspmdLowering
    spec: StepSpec

    @property
    def whole(self) -> Sharding:
        """What every device has."""
        return NamedSharding(self.interceptor.mesh, PartitionSpec())

    @property
    def lowering(self) -> LoweringConfig:
        """How nodes are lowered: for one device, with hints for the partitioner."""
        return LoweringConfig(
            self.spec.config.compute_type, options(self.spec), interceptor=self.interceptor
        )

    def param(self, value: Value) -> Sharding:
        """Return the sharding of a parameter."""
        return self.interceptor.weight_sharding(value, stored=True, layers=_layer_axis(value))

    def along(self, type: TensorType) -> Sharding:
        """Return the sharding of an array of inputs or targets."""
        sizes = {a.name: size_of(a, self.spec.sizes) for a in type.axes}
        return self.interceptor.sharding(tuple(sizes), value_spec(self.interceptor.plan, sizes))

    def mapped(self, function: Function, given: Sequence[PyTree], made: PyTree) -> Function:
        """Return `function`."""
        return function

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function of whole arrays."""
        return function(
            graph,
            dtype=self.spec.config.compute_type,
            options=options(self.spec),
            interceptor=self.interceptor,
        )


def options(spec: StepSpec) -> Options:
    """Return what is chosen for the lowering."""
    return Options(platform=spec.platform)


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
        return OneDevice(devices[0], spec)
    if grid is None:
        raise InputError(
            "the graph is on no mesh", hint="annotate-sharding{mesh=data:8 rules=st-moe}"
        )
    mesh = jax.sharding.Mesh(np.array(devices).reshape(grid.shape), grid.names)
    if spec.layout is None:
        return ExplicitShardings(mesh, grid, spec)
    check_groups(graph, spec.layout)
    return GspmdShardings(GspmdLowering(mesh, spec.layout), spec)


def check_groups(graph: Graph, layout: Layout) -> None:
    """Raise InputError if a group of tokens, within which slots are counted, would be cut."""
    shards = layout.shards["batch"]
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
    names = {repetitions(node.attrs)[0] for node in scans if is_stacked(node, value)}
    return names.pop() if names else ""
