"""A graph on a mesh as one program: the same for every device, on the part that each holds.

What a device does stands in the graph: parts where types lie split, and collectives where they
change.  So the compiler has nothing to guess, and inserts no collective of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import Mesh, mesh_of
from moecc.ir.verify import where
from moecc.types.dtypes import F32, DType
from moecc.types.tensor import TensorType
from moecc_backends.xla.backend import Tree, finished, trace
from moecc_backends.xla.dispatch.choose import check_dispatch
from moecc_backends.xla.trace.device_view import Local
from moecc_backends.xla.trace.options import DEFAULTS, Options
from moecc_backends.xla.trace.values import Operand


def sharded_function(
    graph: Graph,
    mesh: jax.sharding.Mesh,
    *,
    dtype: DType = F32,
    options: Options = DEFAULTS,
) -> Callable[[Tree, Tree], dict[str, jax.Array]]:
    """Return `graph` as a function of global parameters and inputs, run part by part on `mesh`.

    Args:
      graph: a graph on a mesh, its collectives lowered.
      mesh: devices, with the axes of the graph's mesh.
      dtype: what to compute in, as in `moecc_backends.xla.backend.function`.
      options: what was chosen for the lowering; its platform is that of the devices.

    Raises:
      InputError: the graph is on no mesh, or on another; an output is a sum not yet carried out;
        a dispatch lowering is forced that does not fit.
    """
    own = _checked(graph, mesh)
    check_dispatch(graph, options)
    nodes = list(graph)
    params = {n: v for n, v in graph.params.items() if v.users}

    def one(weights: Tree, inputs: Tree) -> dict[str, jax.Array]:
        given = {v: inputs[n] for n, v in graph.inputs.items()}
        given |= {v: weights[n] for n, v in params.items()}
        values = trace(nodes, given, dtype, options, local=Local(own))
        return {n: _settled(values[v], v, own) for n, v in graph.outputs.items()}

    mapped = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(_specs(params), _specs(graph.inputs)),
        out_specs=_specs(graph.outputs),
        check_vma=True,
    )

    def run(weights: Tree, inputs: Tree) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = mapped(
            {n: weights[n] for n in params}, {n: inputs[n] for n in graph.inputs}
        )
        return found

    return run


def device_mesh(graph: Graph, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return the mesh of `graph` made of `devices`, or of those at hand.

    Raises:
      InputError: the graph is on no mesh, or there are not enough devices.
    """
    own = mesh_of(graph)
    if own is None:
        raise InputError("the graph is on no mesh", hint="annotate-sharding{mesh=data:8}")
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
    """Return where each of `values`, the parameters of a graph, say, lies on `mesh`."""
    return {n: NamedSharding(mesh, spec) for n, spec in _specs(values).items()}


def _specs(values: dict[str, Value]) -> dict[str, PartitionSpec]:
    return {n: spec(v.type) for n, v in values.items()}


def spec(type: TensorType) -> PartitionSpec:
    """Return where the axes of `type` lie, as jax spells it."""
    parts = (axis.mesh or None for axis in type.axes)
    return PartitionSpec(*parts)  # type: ignore[no-untyped-call]


def _checked(graph: Graph, mesh: jax.sharding.Mesh) -> Mesh:
    own = mesh_of(graph)
    found = ",".join(f"{n}:{s}" for n, s in mesh.shape.items())
    if own is None or str(own) != found:
        raise InputError(
            "the graph is on another mesh than the devices",
            expected="no mesh" if own is None else str(own),
            found=found,
        )
    problems = list(_unfinished(graph))
    if problems:
        raise InputError(problems)
    return own


def _unfinished(graph: Graph) -> Iterator[Problem]:
    hint = "run lower-collectives"
    for name, value in graph.outputs.items():
        if value.type.unreduced:
            what = "an output is a sum not yet carried out"
            yield Problem(what, f"output {name}", found=str(value.type), hint=hint)
    for node in graph:
        if node.op.name == "reshard":
            yield Problem("the collectives are not lowered", where(node), hint=hint)


def _settled(value: Operand, declared: Value, mesh: Mesh) -> jax.Array:
    array = finished(value, declared)
    return Local(mesh).settled(array, declared.type)
