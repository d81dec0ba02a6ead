"""Hoist layer-invariant computations before the layers are compared."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.ir.graph import Graph, Node, Value
from moecc.rewrite import P, fits
from moecc_passes.roll_layers.layers import Layer

POSITIONS = P.positions(P.any())


def data_dependent(graph: Graph) -> set[Value]:
    """Return the values that depend on data of the inputs, random keys excluded."""
    found = {v for v in graph.inputs.values() if v.type.dtype.kind != "key"}
    for node in graph:
        # Positions are known from the shape.
        if not fits(POSITIONS, node) and any(v in found for v in node.operands):
            found.update(node.results)
    return found


def hoist(layers: Sequence[Layer], dependent: set[Value]) -> int:
    """Move computations shared by layers before the first layer; return how many nodes moved.

    They depend on no data: constants, tables of positions, functions of parameters alone.
    """
    home = {node: i for i, layer in enumerate(layers) for node in layer.nodes}
    free = [n for n in home if not any(v in dependent for v in (*n.operands, *n.results))]
    shared: set[Node] = set()
    for node in reversed(free):
        if node in shared or any(home.get(u, home[node]) != home[node] for u in _users(node)):
            shared.add(node)
            shared.update(v.node for v in node.operands if v.node in home)
    left = [[node for node in layer.nodes if node not in shared] for layer in layers]
    if not all(left):
        return 0
    moved = [node for node in free if node in shared]
    ahead = list(home)[: len(moved)] == moved
    for node in moved:
        node.move_before(left[0][0])
    for layer, nodes in zip(layers, left, strict=True):
        layer.nodes = nodes
    return 0 if ahead else len(moved)


def _users(node: Node) -> set[Node]:
    return {user for value in node.results for user in value.users}
