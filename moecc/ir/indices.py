"""What the integers of a value pick, and what they stay below."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.graph import Value
from moecc.types.tensor import Size


def index_sizes(value: Value, *, strict: bool = False) -> Iterator[Size]:
    """Yield what the integers of `value` stay below where operations use them as indices.

    Args:
      value: the integers.
      strict: whether to look only at uses that have no meaning for other integers.
    """
    for user in value.users:
        index = user.op.index
        if index is None or user.operands[index.operand] is not value:
            continue
        if index.strict or not strict:
            yield index.below(user)
