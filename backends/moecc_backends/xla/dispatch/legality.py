"""What stands between dispatch and combine, and whether each row stands by itself.

Under a capacity, rows may meet: a graph can sum over the slots of an expert, or return them.  Then
they have to be in slots, empty ones included.  Where no row meets another, they can be sorted, or
never be made at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.graph import Node, Value
from moecc.ir.traits import RowMove
from moecc.ir.verify import where
from moecc_backends.xla.trace.values import SLOT_AXES

_SLOTS = frozenset(SLOT_AXES)


def is_ragged(slots: Value) -> bool:
    """Whether `slots` gives as many slots as there are choices."""
    return slots.node is not None and slots.node.attrs.get("slots") == "ragged"


def why_rows_meet(slots: Value) -> str | None:
    """Return why the rows of `slots` have to be in slots, or None if each stands by itself."""
    for node in region(slots):
        reason = _why_not_alone(node, slots)
        if reason is not None:
            return f"{where(node)}: {reason}"
    return None


def region(slots: Value) -> Iterator[Node]:
    """Yield the nodes that work on the rows of `slots`, and on what is made of them."""
    left = [n for n in slots.users if _dispatches(n, slots)]
    seen = set(left)
    while left:
        node = left.pop()
        yield node
        for value in node.results:
            new = [n for n in value.users if not _ends(n, value) and n not in seen]
            seen.update(new)
            left.extend(new)


def _dispatches(node: Node, slots: Value) -> bool:
    return node.op.moves is RowMove.TO_SLOTS and node.operands[2] is slots


def _ends(node: Node, rows: Value) -> bool:
    combines = node.op.moves is RowMove.TO_TOKENS and node.operands[0] is rows
    return combines or node is rows.graph.terminator


def _why_not_alone(node: Node, slots: Value) -> str | None:
    return "rows go to other devices" if node.op.places else why_meets(node, slots)


def why_meets(node: Node, slots: Value) -> str | None:
    """Return why `node`, which works on the rows of `slots`, does not do so row by row, or None."""
    if node.op.moves is RowMove.TO_SLOTS:
        return _why_leaves(node) if _dispatches(node, slots) else "rows are dispatched again"
    if node.op.moves is RowMove.TO_TOKENS:
        return "the gates or slots are made of rows"
    if node.body is not None:
        return "rows enter a body"
    return _why_mixed(node) or _why_leaves(node)


def _why_mixed(node: Node) -> str | None:
    """Return why `node` takes rows together, or the axes of their slots apart."""
    mixed = _SLOTS & set(node.mixes)
    if node.op.name == "positions" and "slot" not in mixed:
        # It reads no row: which expert or group a row belongs to is known wherever the row is.
        return None
    if mixed:
        return f"{node.op} mixes the rows along {', '.join(sorted(mixed))}"
    rows = any(set(v.type.names) >= _SLOTS for v in node.operands)
    if rows and not all(set(v.type.names) >= _SLOTS for v in node.results):
        return f"{node.op} takes the axes {', '.join(SLOT_AXES)} apart"
    return None


def _why_leaves(node: Node) -> str | None:
    if any(value.is_output for value in node.results):
        return "rows are returned by the graph"
    if not any(value.users for value in node.results):
        return "rows are never combined"
    return None
