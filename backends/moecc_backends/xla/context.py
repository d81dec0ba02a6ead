"""The table of lowerings, and what a lowering may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jax.ad_checkpoint import checkpoint_name

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.kept import kept_name
from moecc.ir.verify import where
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


def lowering(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of the operations `names`."""

    def register(function: Lowering) -> Lowering:
        for name in names:
            LOWERINGS[name] = function
        return function

    return register


def lower_node(ctx: Context, node: Node, operands: list[Operand]) -> tuple[Operand, ...]:
    """Return the results of `node` applied to `operands`, under trace.

    Raises:
      InputError: the operation has no lowering, or does not fit these operands.
    """
    name = node.op.name
    function = LOWERINGS.get(name)
    if function is None:
        raise InputError(f"the xla backend cannot lower {name}", where=where(node))
    try:
        result = function(ctx, node, *operands)
    except InputError as error:
        raise InputError(replace(p, where=p.where or where(node)) for p in error.problems) from None
    results = result if isinstance(result, tuple) else (result,)
    known = kept_name(node)
    return results if known is None else (_named(results[0], known), *results[1:])


def _named(x: Operand, name: str) -> Operand:
    """Return `x` under the name by which a policy of rematerialisation knows it."""
    return replace(x, array=checkpoint_name(x.array, name))  # type: ignore[no-untyped-call]
