"""Bounded receive buffers: which rows fit on a device, where an exchange may drop some.

The exchange itself stays the identity: a row without room gets no slot at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, inf
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.operand import Definition, Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, need_float, need_kind, no_ragged
from moecc.ir.table.sharding import received
from moecc.types.dtypes import PRED
from moecc.types.tensor import TensorType

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh


def buffer_rows(attrs: Attrs, tokens: int, choices: int) -> int:
    """Return the rows that fit on a device: its share of the choices times the factor.

    Args:
      attrs: of a ``within_buffer`` node.
      tokens: the tokens of a block of devices that exchange rows.
      choices: the choices of a token.
    """
    share = Fraction(tokens * choices, attrs["parts"])
    return ceil(Fraction(repr(attrs["factor"])) * share)


def _infer_within_buffer(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    experts, slots, counts = (v.type for v in operands)
    need_kind(experts, "int", "the experts")
    need_kind(slots, "int", "the slots")
    need_float(counts, "the counts")
    tokens: tuple[str, ...] = attrs["tokens"]
    for name in tokens:
        axis_of(experts, name)
    no_ragged(experts, experts.names, "no buffer")
    if not tokens or experts.names != slots.names or experts.sizes != slots.sizes:
        raise InputError(
            "experts and slots belong to different choices",
            expected=str(experts),
            found=str(slots),
        )
    if len(experts) != len(tokens) + 1 or set(counts.names) != {"group", "expert"}:
        raise InputError(
            "rows are counted by group and expert, and choices by token",
            expected=f"counts [group, expert]; {', '.join(tokens)} and an axis of choices",
            found=f"{counts}; {experts}",
        )
    _check_numbers(counts, attrs)
    _check_placement(experts[tokens[0]].mesh, counts)
    return (TensorType(PRED, experts.axes),)


def _check_numbers(counts: TensorType, attrs: Attrs) -> None:
    for what, name in (("expert", "parts"), ("group", "blocks")):
        size, number = counts[what].size, attrs[name]
        if number < 1 or (isinstance(size, int) and size % number):
            raise InputError(
                f"{name} do not divide the axis {what!r}",
                expected=f"a divisor of {size}",
                found=str(number),
            )
    if not 0 < attrs["factor"] < inf:
        raise InputError("a buffer needs a positive factor", found=str(attrs["factor"]))


def _check_placement(tokens: tuple[str, ...], counts: TensorType) -> None:
    """Raise InputError unless a device knows the counts of all that it exchanges with."""
    mesh = counts["group"].mesh
    if counts["expert"].mesh or counts.unreduced or tokens[: len(mesh)] != mesh:
        raise InputError(
            "the counts are not sharded so that a device knows those of its peers",
            expected=f"group on the outermost of {'*'.join(tokens) or 'no mesh axis'}",
            found=str(counts),
            hint="all_gather them over the mesh axes of the exchange",
        )


def _in_own_block(node: Definition, mesh: Mesh) -> Attrs:
    shards = mesh.size(node.operands[2].type["group"].mesh)
    return {**node.attrs, "blocks": node.attrs["blocks"] // shards}


register(
    OpDef(
        "within_buffer",
        """Which choices have a slot and room in the buffer of the device that has their expert.

        Experts are cut into `parts` equal runs, one a device, and groups into `blocks` equal runs
        that exchange rows among themselves.  A device has room for `factor` times its share of the
        choices of a block, rounded up; rows arrive by group, then expert, then slot, and what
        arrives later is left out.  counts says how many slots of each group and expert are taken.
        As `keep` of an ``assign_slots`` the result leaves the other slots as they are.""",
        ("experts", "slots", "counts"),
        _infer_within_buffer,
        results=("keep",),
        attrs={
            "tokens": Attr("axes", doc="the token axes"),
            "parts": Attr("int", doc="how many devices share the experts"),
            "blocks": Attr("int", 1, doc="how many sets of such devices there are"),
            "factor": Attr("float", doc="the room of a device, in shares"),
        },
        mixes=lambda _operands, attrs: tuple(attrs["tokens"]),
        sharding=received,
        local=_in_own_block,
    )
)
