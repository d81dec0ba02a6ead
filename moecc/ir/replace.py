"""Replace one value by another and update the types that refer to it.

A type may refer to a value: the slots of dispatched rows have the extents that their
``assign_slots`` value sets.  So replacing a value must infer again the types that refer to it.
"""

from __future__ import annotations

from collections.abc import Iterable

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.table.slots import is_slots


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
