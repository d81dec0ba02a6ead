"""The token groups of a graph that XLA's partitioner spreads over a mesh."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.graph import Graph, Node


def group_counts(graph: Graph) -> set[int]:
    """Return the numbers of token groups in which slots are counted under a capacity."""
    return {
        int(node.attrs["groups"])
        for node in _all_nodes(graph)
        if node.op.name == "place" and node.attrs["slots"] == "capacity"
    }


def _all_nodes(graph: Graph) -> Iterator[Node]:
    for node in graph:
        yield node
        if node.body is not None:
            yield from node.body
