"""A graph on a mesh as one program: the same for every device, on the shards that each holds.

What a device does stands in the graph: shards where types are sharded, and collectives where that
changes.  So the compiler has nothing to guess, and inserts no collective of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import jax

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import Mesh, mesh_of, nearest_multiple
from moecc.ir.traits import Collective
from moecc.ir.verify import where
from moecc.types.dtypes import F32, DType
from moecc_backends.xla.dispatch.choose import check_dispatch
from moecc_backends.xla.lower.function import Tree, finalize_output, lower_values
from moecc_backends.xla.mesh.specs import specs
from moecc_backends.xla.trace.device_view import DeviceView
from moecc_backends.xla.trace.options import DEFAULTS, Options
from moecc_backends.xla.trace.values import Operand


def sharded_function(
    graph: Graph,
    mesh: jax.sharding.Mesh,
    *,
    dtype: DType = F32,
    options: Options = DEFAULTS,
) -> Callable[[Tree, Tree], dict[str, jax.Array]]:
    """Return `graph` as a function of global parameters and inputs, run shard by shard on `mesh`.

    Args:
      graph: a graph on a mesh, its collectives lowered.
      mesh: devices, with the axes of the graph's mesh.
      dtype: what to compute in, as in `moecc_backends.xla.lower.function`.
      options: what was chosen for the lowering; its platform is that of the devices.

    Raises:
      InputError: the graph is on no mesh, or on another; an output is an unreduced sum;
        a dispatch lowering is forced that does not fit.  The function raises it for inputs with
        an axis that the mesh does not divide.
    """
    own = _checked(graph, mesh)
    check_dispatch(graph, options)
    nodes = list(graph)
    params = {n: v for n, v in graph.params.items() if v.users}

    def one(weights: Tree, inputs: Tree) -> dict[str, jax.Array]:
        arrays = {v: inputs[n] for n, v in graph.inputs.items()}
        arrays |= {v: weights[n] for n, v in params.items()}
        values = lower_values(nodes, arrays, dtype, options, view=DeviceView(own))
        return {n: _settled(values[v], v, own) for n, v in graph.outputs.items()}

    mapped = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(specs(params), specs(graph.inputs)),
        out_specs=specs(graph.outputs),
        check_vma=True,
    )

    def run(weights: Tree, inputs: Tree) -> dict[str, jax.Array]:
        _check_divided({v: inputs[n] for n, v in graph.inputs.items()}, own)
        found: dict[str, jax.Array] = mapped(
            {n: weights[n] for n in params}, {n: inputs[n] for n in graph.inputs}
        )
        return found

    return run


def _checked(graph: Graph, mesh: jax.sharding.Mesh) -> Mesh:
    own = mesh_of(graph)
    found = ",".join(f"{n}:{s}" for n, s in mesh.shape.items())
    if own is None or str(own) != found:
        raise InputError(
            "the graph is on another mesh than the devices",
            expected="no mesh" if own is None else str(own),
            found=found,
        )
    problems = list(_unfinalize_output(graph))
    if problems:
        raise InputError(problems)
    return own


def _check_divided(arrays: Mapping[Value, jax.Array], mesh: Mesh) -> None:
    """Raise InputError with every axis of an input that the mesh does not divide."""
    problems = [
        Problem(
            f"the mesh does not divide the axis {axis.name}",
            f"%{value.name}",
            f"a multiple of {parts} ({' x '.join(axis.mesh)})",
            str(size),
            f"{nearest_multiple(size, parts)} would do",
        )
        for value, array in arrays.items()
        for axis, size in zip(value.type.axes, array.shape, strict=False)
        if size % (parts := mesh.size(axis.mesh))
    ]
    if problems:
        raise InputError(problems)


def _unfinalize_output(graph: Graph) -> Iterator[Problem]:
    hint = "run lower-collectives"
    for name, value in graph.outputs.items():
        if value.type.unreduced:
            what = "an output is an unreduced sum"
            yield Problem(what, f"output {name}", found=str(value.type), hint=hint)
    for node in graph:
        if node.op.collective is Collective.ANY:
            yield Problem("the collectives are not lowered", where(node), hint=hint)


def _settled(value: Operand, declared: Value, mesh: Mesh) -> jax.Array:
    array = finalize_output(value, declared)
    return DeviceView(mesh).settled(array, declared.type)
