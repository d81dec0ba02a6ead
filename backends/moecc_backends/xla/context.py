"""The table of lowerings, and what a lowering may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc_backends.xla.named import Operand, Rows
from moecc_backends.xla.packing import Packing


@dataclass
class Context:
    """The state of one trace.

    Attributes:
      dtype: the type that floating-point values are computed in.
      values: what has been given and lowered so far.
      packings: how the rows of each ``place`` value lie, once it has been met.
      siblings: contractions that were lowered together with an earlier one.
    """

    dtype: Any
    values: dict[Value, Operand]
    packings: dict[Value, Packing] = field(default_factory=dict)
    siblings: dict[Node, Rows] = field(default_factory=dict)


Lowering = Callable[..., "Operand | tuple[Operand, ...]"]

LOWERINGS: dict[str, Lowering] = {}

TAKES_ROWS: set[str] = set()
"""The operations whose lowering takes packed rows."""


def lowering(*names: str, rows: bool = False) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of the operations `names`.

    Args:
      names: operations.
      rows: whether it takes packed rows in place of the axes group, expert and slot.
    """

    def register(function: Lowering) -> Lowering:
        for name in names:
            LOWERINGS[name] = function
            if rows:
                TAKES_ROWS.add(name)
        return function

    return register


def lower_node(ctx: Context, node: Node, operands: list[Operand]) -> tuple[Operand, ...]:
    """Return the results of `node` applied to `operands`, under trace.

    Raises:
      InputError: the operation has no lowering, or none for packed rows.
    """
    name = node.op.name
    function = LOWERINGS.get(name)
    if function is None:
        raise InputError(f"the xla backend cannot lower {name}", where=node.loc or None)
    if any(isinstance(x, Rows) for x in operands):
        _check_rows(node)
    result = function(ctx, node, *operands)
    return result if isinstance(result, tuple) else (result,)


PACKED = frozenset(("group", "expert", "slot"))
"""The axes in whose place packed rows have one."""


def _check_rows(node: Node) -> None:
    """Raise InputError if `node` needs apart what packed rows have in one axis."""
    attrs = node.attrs
    named = {attrs.get("axis"), *attrs.get("axes", ()), *attrs.get("over", ())}
    if node.op.name not in TAKES_ROWS or (named & PACKED and node.op.name != "positions"):
        raise InputError(
            f"the xla backend cannot lower this {node.op.name} of ragged slots",
            where=node.loc or None,
            found=", ".join(str(v.type) for v in node.operands),
            hint="give the experts a capacity, or use the reference backend",
        )
