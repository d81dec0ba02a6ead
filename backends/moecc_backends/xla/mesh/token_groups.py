"""The token groups of a graph that XLA's partitioner spreads over a mesh."""

from __future__ import annotations

from moecc.ir.attributes import SlotAttrs
from moecc.ir.graph import Graph


def group_counts(graph: Graph) -> set[int]:
    """Return the numbers of token groups in which slots are counted under a capacity."""
    nodes = (node for node in graph.every_node() if node.op.assigns_slots and not node.op.chooses)
    bounded = (attrs for attrs in map(SlotAttrs.of_node, nodes) if attrs.slots == "capacity")
    return {attrs.groups for attrs in bounded}
