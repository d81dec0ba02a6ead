"""Exchanging one value for another, and the types that follow from it.

A type may refer to a value: the slots of dispatched rows have the extents that their
``assign_slots`` value sets.  So whoever exchanges a value must infer again what refers to it.
"""

from __future__ import annotations

from collections.abc import Iterable

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.table.slots import is_slots


def replace_value(old: Value, new: Value) -> None:
    """Make every user of `old`, the outputs included, use `new`, and keep all types right.

    `new` must be defined before the users of `old`.  Linear in the users of `old`, unless types
    change: then in the distance between `old` and the last value that is concerned.

    Raises:
      InputError: the type of a user does not follow any more; the graph is then half changed.
    """
    if old is new:
        return
    users = list(old.users)
    old.replace_by(new)
    if old.type != new.type or is_slots(old):
        infer_again(old.graph, users, start=old.node)


def infer_again(graph: Graph, nodes: Iterable[Node], *, start: Node | None = None) -> None:
    """Infer the types of the results of `nodes` again, and of all that follows from those.

    Args:
      graph: the graph.
      nodes: nodes whose operands or attributes have changed.
      start: a node that is not after any of them; None is the beginning of the graph.

    Raises:
      InputError: operands and attributes do not suit an operation any more.
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
    """Infer the types of one node again and return the users that may be concerned.

    The types of dispatched rows follow from the attributes of a placing node, not from its type.
    """
    users: list[Node] = []
    for value, type in zip(
        node.results, node.op.result_types(node.operands, node.attrs), strict=True
    ):
        if value.type != type or is_slots(value):
            value.type = type
            users.extend(value.users)
    return users
