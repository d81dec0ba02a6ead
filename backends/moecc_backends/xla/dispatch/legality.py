"""What lies between dispatch and combine, and whether each row could be anywhere.

Under a capacity, rows may meet: a graph can sum over the slots of an expert, or return them.  Then
they have to lie in slots, empty ones included.  Where no row meets another, they can be packed,
or never be made at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.graph import Node, Value
from moecc.ir.verify import where
from moecc_backends.xla.trace.values import SLOT_AXES

_SLOTS = frozenset(SLOT_AXES)


def is_ragged(place: Value) -> bool:
    """Whether `place` gives as many slots as there are choices."""
    return place.node is not None and place.node.attrs.get("slots") == "ragged"


def why_rows_meet(place: Value) -> str | None:
    """Return why the rows of `place` have to lie in slots, or None if each stands by itself."""
    for node in region(place):
        reason = _why_not_alone(node, place)
        if reason is not None:
            return f"{where(node)}: {reason}"
    return None


def region(place: Value) -> Iterator[Node]:
    """Yield the nodes that work on the rows of `place`, and on what is made of them."""
    left = [n for n in place.users if n.op.name == "dispatch" and n.operands[2] is place]
    seen = set(left)
    while left:
        node = left.pop()
        yield node
        for value in node.results:
            new = [n for n in value.users if not _ends(n, value) and n not in seen]
            seen.update(new)
            left.extend(new)


def _ends(node: Node, rows: Value) -> bool:
    is_combined = node.op.name == "combine" and node.operands[0] is rows
    return is_combined or node is rows.graph.terminator


def _why_not_alone(node: Node, place: Value) -> str | None:
    if node.op.name == "dispatch":
        return _why_leaves(node) if node.operands[2] is place else "rows are dispatched again"
    if node.op.places:
        return "rows go to other devices"
    if node.op.name == "combine":
        return "the gates or slots are made of rows"
    if node.body is not None:
        return "rows enter a body"
    counted = node.op.name == "positions"
    mixed = _SLOTS & set(node.mixes)
    if mixed and not (counted and "slot" not in mixed):
        return f"{node.op.name} mixes the rows along {', '.join(sorted(mixed))}"
    rows = any(set(v.type.names) >= _SLOTS for v in node.operands)
    if rows and not counted and not all(set(v.type.names) >= _SLOTS for v in node.results):
        return f"{node.op.name} takes the axes {', '.join(SLOT_AXES)} apart"
    return _why_leaves(node)


def _why_leaves(node: Node) -> str | None:
    if any(value.is_output for value in node.results):
        return "rows are returned by the graph"
    if not any(value.users for value in node.results):
        return "rows are never combined"
    return None
