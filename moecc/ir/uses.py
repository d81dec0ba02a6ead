"""The uses of a value, also under the names that it has after operations that keep its elements."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.graph import Node, Value


def uses_of(param: Value) -> Iterator[tuple[Node, Value]]:
    """Yield the nodes that use `param`, and the value that stands for it there."""
    pending, seen = [param], {param}
    while pending:
        value = pending.pop()
        for node in value.users:
            if not node.op.carries:
                yield node, value
            elif node.result not in seen:
                seen.add(node.result)
                pending.append(node.result)
