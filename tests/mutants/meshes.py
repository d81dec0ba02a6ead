"""Wrong rewrites of graphs that lie on a mesh, and tables that are wrong about what may be split.

The global values stay: collectives are the identity there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from moecc.errors import InputError
from moecc.ir import OPS, Builder, Graph, Value
from moecc.ir.mesh import Mesh, mesh_of, set_mesh
from moecc.ir.operand import Attrs, Operand, OperationRow
from moecc.ir.sharding_rules import Rule, Space
from moecc.ir.structure import infer_again
from moecc.types import Axis

from .rewriting import maker, named


def last_split(value: Value) -> Axis | None:
    """Return an axis of `value` that lies split."""
    return next((a for a in value.type.axes if a.mesh), None)


def float_outputs(graph: Graph) -> Iterator[tuple[str, Value]]:
    yield from [(n, v) for n, v in graph.outputs.items() if v.type.dtype.is_float]


def gather_an_output(graph: Graph) -> int:
    """An output is whole on every device, where every device had its part."""
    for name, value in float_outputs(graph):
        axis = last_split(value)
        if axis is not None:
            made = Builder(graph).all_gather(value, axis=axis.name, mesh=axis.mesh)
            graph.set_output(name, made)
            return 1
    return 0


def split_an_output_along_another_axis(graph: Graph) -> int:
    """The right mesh axis, and the wrong axis of the value."""
    for name, value in float_outputs(graph):
        axis = last_split(value)
        others = [a for a in value.type.axes if not a.mesh and isinstance(a.size, int)]
        if axis is None or not others:
            continue
        mesh = axis.mesh[-1:]
        try:
            made = Builder(graph).all_to_all(
                value, mesh=mesh, split=others[0].name, gather=axis.name
            )
        except InputError:
            continue
        if others[0].size % 2 == 0:  # type: ignore[operator]
            graph.set_output(name, made)
            return 1
        made.node.erase()
    return 0


def return_a_sum_not_carried_out(graph: Graph) -> int:
    """The last all_reduce is left out: devices return their summands."""
    for name, value in float_outputs(graph):
        reduced = maker(value, "all_reduce")
        if reduced is not None:
            graph.set_output(name, reduced.operands[0])
            return 1
    return 0


def exchange_the_mesh_axes(graph: Graph) -> int:
    """What lay on a lies on b, everywhere: a graph as good, which nobody asked for."""
    other = {"a": "b", "b": "a"}
    laid = [v for v in (*graph.inputs.values(), *graph.params.values()) if v.type.is_sharded]
    for value in laid:
        axes = (Axis(a.name, a.size, tuple(other[m] for m in a.mesh)) for a in value.type.axes)
        value.type = value.type.with_axes(axes)
    for node in graph:
        if "mesh" in node.attrs:
            node.attrs["mesh"] = tuple(other[m] for m in node.attrs["mesh"])
    infer_again(graph, list(graph))
    return len(laid)


def make_the_mesh_larger(graph: Graph) -> int:
    """Twice the devices along an axis that nothing of fixed size lies on."""
    mesh = mesh_of(graph)
    if mesh is None or mesh.size(("a",)) > 2:
        return 0
    set_mesh(graph, Mesh((("a", 4), ("b", 2))))
    return 1


def lay_inputs_whole(graph: Graph) -> int:
    """Every device is given all of an input, and takes its part: nothing is sent, or saved."""
    for value in graph.inputs.values():
        axis = last_split(value)
        if axis is None or value.is_output or not value.users:
            continue
        users, type = list(value.users), value.type
        value.type = type.bare
        builder = Builder(graph, before=next(iter(graph)))
        made = value
        for each in type.axes:
            if each.mesh:
                made = builder.shard(made, axis=each.name, mesh=each.mesh)
        for user in users:
            for at, operand in enumerate(user.operands):
                if operand is value:
                    user.set_operand(at, made)
        return 1
    return 0


MUTANTS = named(
    gather_an_output,
    split_an_output_along_another_axis,
    return_a_sum_not_carried_out,
    exchange_the_mesh_axes,
    make_the_mesh_larger,
    lay_inputs_whole,
)


def free(rule: Rule) -> Rule:
    """Return a rule that needs nothing whole any more."""

    def wrong(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
        return replace(rule(entry, operands, attrs), unsharded=frozenset())

    return wrong


def unsummed(rule: Rule) -> Rule:
    """Return a rule that forgets that the operation sums."""

    def wrong(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
        return replace(rule(entry, operands, attrs), summed=frozenset())

    return wrong


TABLES: dict[str, Callable[[Rule], Rule]] = {
    "softmax": free,
    "rms_norm": free,
    "max": free,
    "logsumexp": free,
    "contract": unsummed,
    "sum": unsummed,
}
"""Operations whose row is wrong about sharding, so that an axis may be split that must not be."""


@contextmanager
def wrong_row(name: str) -> Iterator[None]:
    """Make the row of an operation wrong about sharding for a while."""
    entry, rule = OPS[name], OPS[name].sharding
    assert rule is not None
    # Rows are frozen, and compared by identity: a copy would be another operation.
    object.__setattr__(entry, "sharding", TABLES[name](rule))
    try:
        yield
    finally:
        object.__setattr__(entry, "sharding", rule)
