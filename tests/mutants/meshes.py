"""Wrong rewrites of graphs that lie on a mesh, and tables that are wrong about what may be split.

The global values stay: collectives are the identity there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from moecc.errors import InputError
from moecc.ir import OPS, Builder, Graph, Value
from moecc.ir.mesh import Mesh, Rule, mesh_of, set_mesh
from moecc.ir.ops import collectives
from moecc.ir.structure import infer_again
from moecc.ir.traits import LocalRule
from moecc.types import Axis, TensorType

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
        if others[0].size % 2 == 0:
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

    def wrong(entry, operands, attrs):
        return replace(rule(entry, operands, attrs), unsharded=frozenset())

    return wrong


def unsummed(rule: Rule) -> Rule:
    """Return a rule that forgets that the operation sums."""

    def wrong(entry, operands, attrs):
        return replace(rule(entry, operands, attrs), summed=frozenset())

    return wrong


def exchanged(rule: Rule) -> Rule:
    """Return a rule by which two axes of the result lie as the other one does."""

    def wrong(entry, operands, attrs):
        space = rule(entry, operands, attrs)
        names = [*space.result]
        turned = dict(zip(names[:2], reversed(names[:2]), strict=True))
        return replace(space, result={n: space.result[turned.get(n, n)] for n in names})

    return wrong


def outermost(rule: Rule) -> Rule:
    """Return a rule of ``merge`` by which the last part may be sharded, and not the first."""

    def wrong(entry, operands, attrs):
        space = rule(entry, operands, attrs)
        *others, last = attrs["axes"]
        result = {**space.result, attrs["into"]: last}
        return replace(space, result=result, unsharded=frozenset(others))

    return wrong


def innermost(rule: Rule) -> Rule:
    """Return a rule of ``split`` by which the last of the new axes is sharded."""

    def wrong(entry, operands, attrs):
        space, names = rule(entry, operands, attrs), [name for name, _ in attrs["into"]]
        result = {n: d for n, d in space.result.items() if n != names[0]}
        return replace(space, result={**result, names[-1]: attrs["axis"]})

    return wrong


def as_on_one_device(_rule: LocalRule) -> LocalRule:
    """Return a rule by which a device runs an operation with the attributes of all."""
    return lambda node, _mesh: node.attrs


@dataclass(frozen=True)
class WrongRow:
    """A row of a table, and what makes it wrong."""

    op: str
    wrong: Callable[[Any], Any]
    column: str = "sharding"


_FREE = ("softmax", "rms_norm", "layer_norm", "max", "logsumexp", "route")
_SUMS = ("contract", "sum", "mean", "embedding", "combine")

TABLES: dict[str, WrongRow] = {
    **{name: WrongRow(name, free) for name in _FREE},
    **{name: WrongRow(name, unsummed) for name in _SUMS},
    **{f"{name} exchanged": WrongRow(name, exchanged) for name in ("contract", "mul", "dispatch")},
    "merge": WrongRow("merge", outermost),
    "split": WrongRow("split", innermost),
    "local assign_slots": WrongRow("assign_slots", as_on_one_device, "local"),
    "local split": WrongRow("split", as_on_one_device, "local"),
}
"""Rows that are wrong: what may be sharded, what is a sum, which axis is which, local counts."""


def gathered_outermost(type: TensorType, name: str, mesh: tuple[str, ...]) -> TensorType:
    """Return a type without mesh axes, taken away where they are not innermost."""
    axes = (replace(a, mesh=a.mesh[len(mesh) :] if a.name == name else a.mesh) for a in type.axes)
    return type.with_axes(axes)


def scattered_outermost(type: TensorType, name: str, mesh: tuple[str, ...]) -> TensorType:
    """Return a type with more mesh axes, the new ones outermost."""
    axes = (replace(a, mesh=(*mesh, *a.mesh)) if a.name == name else a for a in type.axes)
    return type.with_axes(axes)


def scattered_elsewhere(type: TensorType, name: str, mesh: tuple[str, ...]) -> TensorType:
    """Return a type with more mesh axes at another axis of the same size."""
    axis = type[name]
    others = [a.name for a in type.axes if a.size == axis.size and a.name != name and not a.mesh]
    other = others[0] if others else name
    axes = (replace(a, mesh=(*a.mesh, *mesh)) if a.name == other else a for a in type.axes)
    return type.with_axes(axes)


def reduced_everywhere(type: TensorType, mesh: tuple[str, ...]) -> TensorType:
    """Return a type as a sum that is carried out, whatever the mesh axes."""
    return TensorType(type.dtype, type.axes)


COLLECTIVES: dict[str, tuple[str, Callable[..., TensorType]]] = {
    "gather outermost": ("_gathered", gathered_outermost),
    "scatter outermost": ("_scattered", scattered_outermost),
    "scatter elsewhere": ("_scattered", scattered_elsewhere),
    "reduce everywhere": ("_reduced", reduced_everywhere),
}
"""Types of collectives that are wrong: the order of mesh axes, the axis, the group that adds."""


def operations_of(row: str) -> set[str]:
    """Return the operations whose types a row decides."""
    if row in COLLECTIVES:
        is_gather = row.startswith("gather")
        return {"all_to_all", *(["all_gather"] if is_gather else ["shard", "reduce_scatter"])}
    return {TABLES[row].op}


@contextmanager
def wrong_row(name: str) -> Iterator[None]:
    """Make a row of a table wrong for a while."""
    if name in COLLECTIVES:
        attribute, wrong_type = COLLECTIVES[name]
        right = getattr(collectives, attribute)
        setattr(collectives, attribute, wrong_type)
        try:
            yield
        finally:
            setattr(collectives, attribute, right)
        return
    row = TABLES[name]
    entry, rule = OPS[row.op], getattr(OPS[row.op], row.column)
    assert rule is not None
    # Rows are frozen, and compared by identity: a copy would be another operation.
    object.__setattr__(entry, row.column, row.wrong(rule))
    try:
        yield
    finally:
        object.__setattr__(entry, row.column, rule)
