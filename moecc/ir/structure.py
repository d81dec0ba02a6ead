"""Copy graphs; equality and hash up to the names of values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from moecc.ir.graph import Graph, Value, setter_of
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.types.tensor import Axis, Extent, TensorType


def retype(type: TensorType, values: dict[Value, Value]) -> TensorType:
    """Return `type` with its extents remapped to the images of their values in `values`."""
    if not type.extents:
        return type
    return type.with_axes(
        Axis(a.name, Extent(a.size.kind, _image(a.size, values)), a.mesh)
        if isinstance(a.size, Extent)
        else a
        for a in type.axes
    )


def clone(graph: Graph) -> Graph:
    """Return a copy of `graph` with the same names; only weight expressions are shared."""
    copy = Graph(graph.name, json.loads(json.dumps(graph.attrs)))
    values: dict[Value, Value] = {}
    for name, value in graph.inputs.items():
        values[value] = copy.input(name, value.type)
    for name, value in graph.params.items():
        values[value] = copy.param(name, value.type, value.weight, loc=value.loc)
    for node in graph:
        names = [v.name for v in node.results]
        made = copy.append(
            node.op,
            [values[v] for v in node.operands],
            copied(node.attrs),
            names=names,
            loc=node.loc,
            origin=node.origin,
        )
        values.update(zip(node.results, made.results, strict=True))
    for name, value in graph.outputs.items():
        copy.set_output(name, values[value])
    return copy


def _image(extent: Extent, values: dict[Value, Value]) -> Value:
    value = setter_of(extent)
    return values.get(value, value)


def copied(attrs: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of a node's attributes, with bodies cloned."""
    body = attrs.get("body")
    return {**attrs, "body": clone(body)} if isinstance(body, Graph) else dict(attrs)


def _type_key(type: TensorType, numbers: dict[Value, int]) -> object:
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
        uses = tuple(numbers[v] for v in node.operands)
        for value in node.results:
            numbers[value] = len(numbers)
        types = tuple(_type_key(v.type, numbers) for v in node.results)
        yield (node.op.name, uses, attributes(node.attrs), types)
    yield tuple((n if named else "", numbers[v]) for n, v in graph.outputs.items())


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
    return str(item) if not hasattr(item, "type") or isinstance(item, str) else _weight(item)


def _weight(item: object) -> str:
    from moecc.weights.text import format_expr

    return format_expr(item)  # type: ignore[arg-type]
