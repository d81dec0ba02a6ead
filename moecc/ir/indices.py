"""Values used as indices, and the bounds of their elements."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.graph import Value
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
