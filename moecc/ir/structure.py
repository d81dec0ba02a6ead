"""Copy graphs; equality and hash up to the names of values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.mesh import Mesh, nearest_divisor, nearest_multiple
from moecc.ir.operand import Attrs
from moecc.ir.ops.slots import is_slots
from moecc.support.text import amount
from moecc.types import Axis, Extent, Size, TensorType, tensor
from moecc.weights.expr import Expr, Source


def weight_of(param: Value, name: str = "") -> Expr:
    """Return the weight of a parameter; without an expression it is the tensor of its name.

    Args:
      param: the parameter.
      name: the name of the tensor, where the parameter was renamed.
    """
    plain = tensor(param.type.dtype, **{a.name: a.size for a in param.type})
    return Source(name or param.name, plain) if param.weight is None else param.weight


def clone(graph: Graph) -> Graph:
    """Return a copy of `graph` with the same names; only weight expressions are shared."""
    copy = Graph(graph.name, json.loads(json.dumps(graph.attrs)))
    values: dict[Value, Value] = {}
    for name, value in graph.inputs.items():
        values[value] = copy.input(name, value.type)
    for name, value in graph.params.items():
        values[value] = copy.param(name, value.type, value.weight, loc=value.loc)
    for node in graph:
        copy.copy(node, values, copied(node.attrs))
    for name, value in graph.outputs.items():
        copy.set_output(name, values[value])
    return copy


def copied(attrs: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of a node's attributes, with bodies cloned."""
    body = attrs.get("body")
    return {**attrs, "body": clone(body)} if isinstance(body, Graph) else dict(attrs)


def type_key(type: TensorType, numbers: Mapping[Value, int]) -> object:
    """Return a key that is equal for equal types; values that set extents are numbered."""
    if not type.extents:
        return type
    axes = tuple(
        (a.name, a.mesh, a.size.kind, numbers.get(setter_of(a.size), -1))
        if isinstance(a.size, Extent)
        else a
        for a in type.axes
    )
    return (type.dtype, axes, type.unreduced)


def structure(graph: Graph, *, named: bool = True) -> Iterator[object]:
    """Yield the content of `graph`, a statement at a time, with values numbered, not named.

    The names of inputs, parameters and outputs count; those of other values, and locations, don't.
    If not `named`, as for a body, inputs and outputs are identified by their order.
    """
    numbers: dict[Value, int] = {}
    yield json.dumps(graph.attrs, sort_keys=True)
    # The order of the axes of a mesh numbers its devices.
    yield ",".join(graph.attrs.get(MESH) or ())
    for name, value in graph.inputs.items():
        numbers[value] = len(numbers)
        yield ("input", name if named else "", value.type)
    for name, value in graph.params.items():
        numbers[value] = len(numbers)
        yield ("param", name, value.type, value.weight)
    for node in graph:
        yield statement(node, numbers)
    yield tuple((n if named else "", numbers[v]) for n, v in graph.outputs.items())


def statement(node: Node, numbers: dict[Value, int]) -> tuple[object, ...]:
    """Return what a node does, its operands by their numbers; its results are numbered."""
    uses = tuple(numbers[v] for v in node.operands)
    for value in node.results:
        numbers[value] = len(numbers)
    types = tuple(type_key(v.type, numbers) for v in node.results)
    return (node.op.name, uses, attributes(node.attrs), types)


def attributes(attrs: Mapping[str, object]) -> tuple[object, ...]:
    """Return the attributes of a node, what it repeats by its structure."""
    if "body" not in attrs:
        return tuple(attrs.items())
    return tuple(
        (n, tuple(structure(v, named=False)) if isinstance(v, Graph) else v)
        for n, v in attrs.items()
    )


def equal(a: Graph, b: Graph) -> bool:
    """Whether two graphs are equal up to the names of values."""
    return a is b or list(structure(a)) == list(structure(b))


def fingerprint(graph: Graph) -> str:
    """Return a hash, as hexadecimal digits, that equal graphs share; stable between processes."""
    digest = hashlib.sha256()
    for statement in structure(graph):
        digest.update(_stable(statement).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _stable(item: object) -> str:
    if isinstance(item, tuple):
        return f"({','.join(map(_stable, item))})"
    return str(item)


# Replace one value by another and update the types that refer to it.
#
# A type may refer to a value: the slots of dispatched rows have the extents that their
# ``assign_slots`` value sets.  So replacing a value must infer again the types that refer to it.


def replace_value(old: Value, new: Value) -> None:
    """Replace all uses of `old`, outputs included, by `new`, and update all types.

    `new` must be defined before the users of `old`.  Linear in the users of `old`, unless types
    change: then linear in the distance between `old` and the last affected value.

    Raises:
      InputError: the type of a user cannot be inferred any more; the graph is then half changed.
    """
    if old is new:
        return
    users = list(old.users)
    old.replace_by(new)
    if old.type != new.type or is_slots(old):
        infer_again(old.graph, users, start=old.node)


def erase_unused(value: Value) -> None:
    """Erase the node of `value` if nothing uses it, and so on backwards."""
    pending = [value]
    while pending:
        node = pending.pop().node
        if node is not None and node.alive and node.is_dead:
            operands = list(node.operands)
            node.erase()
            pending.extend(operands)


def infer_again(graph: Graph, nodes: Iterable[Node], *, start: Node | None = None) -> None:
    """Infer again the result types of `nodes`, and of everything that depends on them.

    Args:
      graph: the graph.
      nodes: nodes whose operands or attributes have changed.
      start: a node not after any of them; None is the beginning of the graph.

    Raises:
      InputError: operands and attributes are no longer valid for an operation.
    """
    pending = set(nodes)
    pending.discard(graph.terminator)
    for node in graph.walk(start):
        if not pending:
            return
        if node in pending:
            pending.discard(node)
            pending.update(_infer(node))
            pending.discard(graph.terminator)


def _infer(node: Node) -> list[Node]:
    """Infer again the types of one node and return the users that may be affected.

    The types of dispatched rows depend on the attributes of an assigning node, not on its type.
    """
    users: list[Node] = []
    for value, type in zip(
        node.results, node.op.result_types(node.operands, node.attrs), strict=True
    ):
        if value.type != type or is_slots(value):
            value.type = type
            users.extend(value.users)
    return users


# The uses of a value, also under the names that it has after operations that keep its elements.


def worked_on(node: Node) -> tuple[Value, ...]:
    """Return the values whose axes together are the places that a node works at.

    Along an axis that windows run along, the places of the result count; a recurrence has a state
    for each place of its keys and values, and none for a query.
    """
    return tuple(node.operands[1:3]) if node.op.recurs else (*node.operands, *node.results)


def uses_of(param: Value) -> Iterator[tuple[Node, Value]]:
    """Yield the nodes that use `param`, and the value that stands for it there."""
    pending, seen = [param], {param}
    while pending:
        value = pending.pop()
        for node in value.users:
            if not node.op.carries:
                yield node, value
            elif node.result not in seen:
                seen.add(node.result)
                pending.append(node.result)


# The program of one device: local types and local attributes of a graph sharded on a mesh.
#
# Every device runs the same operations on its local shards.  Beyond `local_attrs`, these operations
# need the device's coordinates, because their result depends on the position in the global value:
# ``positions`` and random numbers along a sharded axis, ``embedding`` of a table with sharded rows,
# ``combine`` of sharded experts (other devices add the rest), ``within_buffer``, which numbers
# groups, and ``mean`` over a sharded axis, which divides by the global size.


def local_size(axis: Axis, size: int, mesh: Mesh) -> int:
    """Return the size of a local shard of `axis`, whose global size is `size`.

    Raises:
      InputError: the mesh axes do not divide it.
    """
    parts = mesh.size(axis.mesh)
    if size % parts:
        raise InputError(
            f"the axis {axis.name!r} does not divide over the mesh",
            expected=f"a multiple of {parts} ({'*'.join(axis.mesh)})",
            found=str(size),
            hint=f"{amount(nearest_divisor(size, parts), 'part')} would, or a size of "
            f"{nearest_multiple(size, parts)}",
        )
    return size // parts


def local_attrs(node: Node, mesh: Mesh) -> Attrs:
    """Return the attributes with which a device runs `node` on its local shards: local counts."""
    return node.attrs if node.op.local is None else node.op.local(node, mesh)


# A graph without its opaque regions: what is between them, with inputs and outputs of its own.


def without_opaque(graph: Graph) -> Graph:
    """Return `graph` cut at its opaque regions, or itself where it has none.

    What a region makes becomes an input, and what one takes an output, by the name of the value.
    """
    if not any(node.op.opaque for node in graph):
        return graph
    copy = clone(graph)
    opaque = [node for node in copy if node.op.opaque]
    inside = {value for node in opaque for value in node.results}
    outputs = {n: v for n, v in copy.outputs.items() if v not in inside}
    operands = (v for node in opaque for v in node.operands)
    outputs |= {v.name: v for v in operands if v.node is not None and v not in inside}
    for name in list(copy.outputs):
        copy.drop_output(name)
    for node in reversed(opaque):
        names = [value.name for value in node.results]
        for value, name in zip(node.results, names, strict=True):
            copy.rename(value, copy.fresh(name))
        inputs = (copy.input(n, v.type) for n, v in zip(names, node.results, strict=True))
        node.replace_by(*inputs)
    for name, value in outputs.items():
        copy.set_output(name, value)
    return copy


# Values used as indices, and the bounds of their elements.


def index_sizes(value: Value, *, strict: bool = False) -> Iterator[Size]:
    """Yield the exclusive upper bounds of `value` where operations use it as an index.

    Uses of what collectives bring to other devices are uses of it.

    Args:
      value: an integer value.
      strict: whether to consider only uses that are undefined for out-of-range integers.
    """
    for user in value.users:
        if user.op.collective is not None:
            yield from index_sizes(user.result, strict=strict)
        index = user.op.index
        if index is None or user.operands[index.operand] is not value:
            continue
        if index.strict or not strict:
            yield index.below(user)


def index_bound(value: Value) -> int | None:
    """Return what the integers of `value` stay below: the rows of tables that they pick."""
    return min((s for s in index_sizes(value, strict=True) if isinstance(s, int)), default=None)


def length_bounds(graph: Graph) -> dict[str, int]:
    """Return the longest sequences that learned positions allow, by the variable of the length."""
    bounds: dict[str, int] = {}
    for node in graph:
        if node.op.name == "positions" and (bound := index_bound(node.result)) is not None:
            for axis in node.result.type:
                if isinstance(axis.size, str):
                    bounds[axis.size] = min(bound, bounds.get(axis.size, bound))
    return bounds


def lost_precision(before: Graph, after: Graph) -> list[str]:
    """Return the places where products lost the attribute ``precision=f32``, a line each.

    Float64 does not show it: both graphs compute the same there, and in real arithmetic.  A place
    is a location that has lost more precise products than products: a pass that removes a router
    removes both.
    """
    remaining = _precisions(after)
    return [
        f"the products at @{loc} lost precision={_PRECISE}"
        for loc, precisions in _precisions(before).items()
        for left in [remaining.get(loc, [])]
        if precisions.count(_PRECISE) - left.count(_PRECISE) > max(len(precisions) - len(left), 0)
    ]


_PRECISE = "f32"


def _precisions(graph: Graph) -> dict[str, list[object]]:
    """Return by location the values of ``precision`` of all products there."""
    precisions: dict[str, list[object]] = {}
    for node in graph.every_node():
        if "precision" in node.attrs:
            precisions.setdefault(node.loc, []).append(node.attrs["precision"])
    return precisions
