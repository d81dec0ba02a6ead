"""The first layers of a deep model, with its embedding and its output: a smaller model to run."""

from __future__ import annotations

import re

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import clone

_LAYER = re.compile(r"layers\.([0-9]{1,6})(?:\.|\Z)")


def layer_count(graph: Graph) -> int:
    """Return the number of layers of a decoder or encoder alone; 0 for other models."""
    numbers = {n for node in graph if (n := _number(node)) is not None}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def first_layers(graph: Graph, count: int) -> Graph:
    """Return a copy of `graph` without the layers from `count` on.

    What the last of them gives is replaced by what layer `count` takes: the stream that all layers
    add to.

    Raises:
      InputError: the layers do not pass on one value alone.
    """
    copy = clone(graph)
    total = layer_count(copy)
    if not 0 < count < total:
        return copy
    stream, end = _stream_into(copy, count), _stream_into(copy, total)
    if stream.type != end.type:
        raise InputError("the layers do not pass on a value of one type", where=f"layers.{count}")
    users = [user for user in end.users if _number(user) is None]
    for user in users:
        for at, operand in enumerate(user.operands):
            if operand is end:
                user.set_operand(at, stream)
    for node in copy.walk_back():
        if node.is_dead:
            node.erase()
    for name in [n for n, v in copy.params.items() if not v.users]:
        copy.erase_param(name)
    return copy


def _number(node: Node) -> int | None:
    found = _LAYER.match(node.loc)
    return int(found[1]) if found else None


def _stream_into(graph: Graph, layer: int) -> Value:
    """Return the value of the layer before that later nodes use.

    Raises:
      InputError: there are several.
    """
    found: dict[Value, None] = {}
    for node in graph:
        number = _number(node)
        if number is not None and number < layer:
            continue
        if number is None and layer != layer_count(graph):
            continue
        for value in node.operands:
            if value.node is not None and _number(value.node) == layer - 1:
                found[value] = None
    for value in graph.outputs.values() if layer == layer_count(graph) else ():
        if value.node is not None and _number(value.node) == layer - 1:
            found[value] = None
    if len(found) != 1:
        names = ", ".join(f"%{value.name}" for value in found) or "nothing"
        raise InputError("a layer passes on several values", where=f"layers.{layer}", found=names)
    return next(iter(found))
