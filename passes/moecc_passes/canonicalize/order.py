"""The canonical order of commutative operands."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import attributes


def order_operands(graph: Graph) -> int:
    """Put operands of commutative operations in canonical order; return how many were exchanged.

    Each value has a key derived from how it is computed: its operation, its attributes and
    the keys of its operands, or the type of an input or parameter.  Names and locations do not
    count, so two graphs that compute the same in the same way agree.  Operands with equal keys keep
    their order.
    """
    keys: dict[Value, int] = {}
    rows: dict[str, int] = {}
    for value in (*graph.inputs.values(), *graph.params.values()):
        keys[value] = _row(rows, f"{'param' if value.is_param else value.name} {value.type}")
    exchanged = 0
    for node in graph:
        parts = [keys[v] for v in node.operands]
        if node.op.commutative and parts[0] > parts[1] and _exchange(node):
            parts.reverse()
            exchanged += 1
        row = _row(rows, _made_by(node))
        # A hash of integers is the same in every process; a hash of text is not.
        key = hash((row, *parts))
        for value in node.results:
            keys[value] = key + value.index
    return exchanged


def _made_by(node: Node) -> str:
    """Return the operation and its attributes; a body by its structure, not by its identity."""
    if not node.attrs:
        return node.op.name
    return f"{node.op.name} {node.attrs if node.body is None else attributes(node.attrs)}"


def _row(rows: dict[str, int], text: str) -> int:
    number = rows.get(text)
    if number is None:
        number = rows[text] = crc32(text.encode())
    return number


def _exchange(node: Node) -> bool:
    """Exchange the two operands, unless that changes the order of the result's axes."""
    a, b = node.operands
    if not _same_types(node, (b, a)):
        return False
    node.set_operand(0, b)
    node.set_operand(1, a)
    return True


def _same_types(node: Node, operands: Sequence[Value]) -> bool:
    return node.op.result_types(operands, node.attrs) == tuple(v.type for v in node.results)
