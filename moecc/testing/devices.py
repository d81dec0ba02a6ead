"""Whether devices of a mesh together compute what a graph means, and values are sharded as before.

Collectives are the identity on global values, so the interpreter does not see them.  Where the
graph to compare is on a mesh, it runs once more, device by device.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from moecc.backend import MeshBackend, get_backend
from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import mesh_of
from moecc.ir.sharding_rules import spelled
from moecc.ir.traits import Collective
from moecc.testing.comparing import Trial, gaps
from moecc.testing.data import Sizes, inputs_for, params_for

MAX_DEVICES = 16
"""Larger meshes are not run device by device: it would take too long."""

_PREFIX = "devices compute something else: "


def divisible(sizes: Sizes, *graphs: Graph) -> dict[str, int]:
    """Return `sizes`, multiplied so that the mesh of each graph divides what it splits."""
    factors: dict[str, int] = {}
    for graph in graphs:
        for name, parts in _split_sizes(graph):
            factors[name] = lcm(factors.get(name, 1), parts)
    return {n: s * factors.get(n, 1) for n, s in sizes.items()}


def _split_sizes(graph: Graph) -> Iterator[tuple[str, int]]:
    """Yield the variables that are the size of a split axis, each with the number of parts."""
    mesh = mesh_of(graph)
    if mesh is None or mesh.devices > MAX_DEVICES:
        return
    for value in _values(graph):
        for axis in value.type.axes:
            if axis.mesh and isinstance(axis.size, str):
                yield axis.size, mesh.size(axis.mesh)


def _values(graph: Graph) -> Iterator[Value]:
    yield from graph.inputs.values()
    yield from graph.params.values()
    for node in graph.every_node():
        yield from node.results


def moved_values(before: Graph, after: Graph) -> Iterator[str]:
    """Yield what is sharded otherwise than before, of two graphs on meshes.

    The mesh, the inputs and the outputs are part of a graph's interface.  A
    pass that lays a graph on a mesh, or takes it off, has nothing to keep.
    """
    meshes = mesh_of(before), mesh_of(after)
    if None in meshes:
        return
    if meshes[0] != meshes[1]:
        yield f"the mesh differs\n  expected: {meshes[0]}\n  found: {meshes[1]}"
    for what, old, new in (
        ("input", before.inputs, after.inputs),
        ("output", before.outputs, after.outputs),
    ):
        for name, value in old.items():
            expected, found = (_placement(v) for v in (value, new[name]))
            if expected != found:
                yield (
                    f"{what} {name} is sharded in another way\n"
                    f"  expected: {expected}\n  found: {found}"
                )


def _placement(value: Value) -> str:
    text = f"[{', '.join(map(spelled, value.type.axes))}]"
    left = ", ".join(sorted(value.type.unreduced))
    return f"{text} unreduced({left})" if left else text


def device_gaps(trial: Trial) -> list[str]:
    """Return a line for each output that the devices of the mesh of `after` compute otherwise."""
    mesh = mesh_of(trial.after)
    if mesh is None or mesh.devices > MAX_DEVICES or _is_open(trial.after):
        return []
    inputs = inputs_for(trial.before, trial.seed, trial.sizes)
    given = params_for(trial.before, trial.seed, trial.sizes), inputs
    params = params_for(trial.after, trial.seed, trial.sizes)
    backend = get_backend("reference")
    assert isinstance(backend, MeshBackend)
    try:
        found = backend.run_on_mesh(trial.after, params, inputs)
    except (InputError, AssertionError) as error:
        return [f"{_PREFIX}{error} (seed {trial.seed})"]
    lines = gaps(trial.before, given, found, seed=trial.seed, tolerance=trial.tolerance)
    return [_PREFIX + line for line in lines]


def _is_open(graph: Graph) -> bool:
    """Whether it is still open which collectives reshard a value."""
    return any(n.op.collective is Collective.ANY for n in graph.every_node())
