"""Values used as indices, and the bounds of their elements."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.graph import Graph, Value
from moecc.types.tensor import Size


def index_sizes(value: Value, *, strict: bool = False) -> Iterator[Size]:
    """Yield the exclusive upper bounds of `value` where operations use it as an index.

    Uses of what collectives bring to other devices are uses of it.

    Args:
      value: an integer value.
      strict: whether to consider only uses that are undefined for out-of-range integers.
    """
    for user in value.users:
        if user.op.collective is not None:
            yield from index_sizes(user.result, strict=strict)
        index = user.op.index
        if index is None or user.operands[index.operand] is not value:
            continue
        if index.strict or not strict:
            yield index.below(user)


def index_bound(value: Value) -> int | None:
    """Return what the integers of `value` stay below: the rows of tables that they pick."""
    return min((s for s in index_sizes(value, strict=True) if isinstance(s, int)), default=None)


def length_bounds(graph: Graph) -> dict[str, int]:
    """Return the longest sequences that learned positions allow, by the variable of the length."""
    found: dict[str, int] = {}
    for node in graph:
        if node.op.name == "positions" and (bound := index_bound(node.result)) is not None:
            for axis in node.result.type:
                if isinstance(axis.size, str):
                    found[axis.size] = min(bound, found.get(axis.size, bound))
    return found
