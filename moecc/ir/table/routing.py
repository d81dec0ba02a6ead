"""Routing as plain tensors: the expert, slot and gate of each choice, and the exchange of rows.

``route`` picks experts and gates, ``place`` gives each choice a slot of its expert, ``dispatch``
moves tokens to slots, and ``combine`` brings results back.  Between the last two stand the
expert's own operations, lifted over the expert axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, floor, inf
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.dtypes import I32
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, need_float, need_kind, no_duplicates, no_ragged, same_size
from moecc.ir.types import Axis, Extent, TensorType

if TYPE_CHECKING:
    from moecc.ir.graph import Node, Value

GATES = (
    "renormalised",
    "softmax",
    "sigmoid-renormalised",
    "sigmoid",
    "sparsemixer",
    "ones",
)
"""Gate conventions A, B, C, D, S and U of the exactness lemmas (``docs/exactness.md``)."""


def _infer_route(operands: Sequence[Value], attrs: Attrs) -> tuple[TensorType, ...]:
    logits = operands[0].type
    need_float(logits, "the router's logits")
    expert = axis_of(logits, attrs["axis"])
    no_ragged(logits, (expert.name,), "cannot choose")
    k = attrs["top_k"]
    if k < 1 or (isinstance(expert.size, int) and k > expert.size):
        raise InputError(
            "top_k does not suit the experts", expected=f"1 <= top_k <= {expert.size}", found=str(k)
        )
    if attrs["gates"] == "sparsemixer" and k > 2:
        raise InputError("sparsemixer gates are defined for top_k 1 and 2", found=str(k))
    rest = [a for a in logits.axes if a is not expert]
    axes = no_duplicates((*rest, Axis(attrs["choice"], k)))
    return (TensorType(I32, axes), TensorType(logits.dtype, axes))


register(
    OpDef(
        "route",
        """The k experts with the largest logits, best first, and their gates.

        A tie takes the lowest expert.  The gate conventions are

        renormalised: softmax over the chosen logits. softmax: softmax over all, not renormalised.
        sigmoid-renormalised: sigmoid, renormalised. sigmoid: sigmoid as is. sparsemixer: each
        choice's softmax among the logits near it (PhiMoE). ones: 1.  All times `scale`.""",
        ("logits",),
        _infer_route,
        results=("experts", "gates"),
        attrs={
            "top_k": Attr("int", doc="experts per token"),
            "gates": Attr("str", "renormalised", GATES, doc="the gate convention"),
            "scale": Attr("float", 1.0, doc="what the gates are multiplied by"),
            "axis": Attr("axis", "expert", doc="the axis of the experts"),
            "choice": Attr("axis", "choice", doc="the new axis, of size top_k"),
        },
        mixes=lambda _operands, attrs: (attrs["axis"],),
    )
)


def _infer_place(operands: Sequence[Value], attrs: Attrs) -> tuple[TensorType, ...]:
    experts = operands[0].type
    need_kind(experts, "int", "the experts")
    for name in attrs["tokens"]:
        axis_of(experts, name)
    no_ragged(experts, attrs["tokens"], "cannot number tokens")
    left = [a.name for a in experts.axes if a.name not in attrs["tokens"]]
    if len(left) != 1:
        raise InputError(
            "besides the token axes, the experts have one axis of choices",
            expected=f"{', '.join(attrs['tokens'])} and one more",
            found=str(experts),
        )
    for name in ("experts", "groups", "minimum"):
        if attrs[name] < 1:
            raise InputError(f"{name} must be at least 1", found=str(attrs[name]))
    if attrs["slots"] == "capacity" and not 0 < attrs["capacity_factor"] < inf:
        raise InputError(
            "a capacity needs a positive capacity_factor", found=str(attrs["capacity_factor"])
        )
    return (TensorType(I32, experts.axes),)


register(
    OpDef(
        "place",
        """The slot of each choice at its expert, or −1 where it is dropped.

        Tokens are numbered over the token axes, outermost first, and cut into `groups` equal
        groups; slots are counted in each group apart.  ragged: as many slots as choices.
        capacity: C = capacity_factor · tokens of a group / experts (convention `tokens`, the
        paper's) or that times top-k (`assignments`), rounded, at least `minimum`, at most the
        tokens of a group.  order: `choice` fills all first choices before any second (ST-MoE,
        Appendix D); `token` goes token by token, and is strictly causal.  A choice that names no
        expert, say −1, is dropped.""",
        ("experts",),
        _infer_place,
        results=("place",),
        attrs={
            "tokens": Attr("axes", doc="the token axes"),
            "experts": Attr("int", doc="the number of experts"),
            "groups": Attr("int", 1, doc="the number of token groups"),
            "slots": Attr("str", "ragged", ("ragged", "capacity"), doc="dropless, or bounded"),
            "capacity_factor": Attr("float", 0.0, doc="the capacity factor"),
            "convention": Attr(
                "str", "tokens", ("tokens", "assignments"), doc="what it multiplies"
            ),
            "rounding": Attr("str", "floor", ("floor", "round", "ceil"), doc="to a whole number"),
            "minimum": Attr("int", 4, doc="the least capacity"),
            "order": Attr("str", "choice", ("choice", "token"), doc="the order of filling"),
        },
        mixes=lambda _operands, attrs: tuple(attrs["tokens"]),
    )
)


_ROUNDINGS: dict[str, Callable[[Fraction], int]] = {"floor": floor, "round": round, "ceil": ceil}
"""`round` takes a half to the even neighbour, as flaxformer does."""


def capacity(attrs: Attrs, tokens: int, choices: int) -> int:
    """Return the slots that a ``place`` with `attrs` gives each expert in a group.

    The factor counts as the decimal number that is written, not as the float nearest to it, so
    that 0.7 · 10 tokens are 7 slots everywhere.

    Args:
      attrs: of the ``place`` node.
      tokens: the tokens of a group.
      choices: the choices of a token.
    """
    exact = Fraction(repr(attrs["capacity_factor"])) * tokens / attrs["experts"]
    if attrs["convention"] == "assignments":
        exact *= choices
    least: int = attrs["minimum"]
    return min(max(_ROUNDINGS[attrs["rounding"]](exact), least), tokens)


def placing(value: Value) -> Node:
    """Return the ``place`` node that defines `value`.

    Raises:
      InputError: something else defines it.
    """
    if value.node is None or value.node.op.name != "place":
        raise InputError(
            "slots come from a place operation",
            found=f"%{value.name} : {value.type}",
            hint="place the experts first",
        )
    return value.node


def slot_axes(place: Value) -> tuple[Axis, Axis, Axis]:
    """Return the axes group, expert and slot that rows have between dispatch and combine."""
    attrs = placing(place).attrs
    return (
        Axis("group", attrs["groups"]),
        Axis("expert", attrs["experts"]),
        Axis("slot", Extent(attrs["slots"], place)),
    )


def _check_experts(place: Value, experts: Value) -> None:
    placed = placing(place).operands[0]
    if placed is not experts:
        raise InputError(
            "experts and slots belong to different choices",
            expected=f"%{placed.name}, which %{place.name} places",
            found=f"%{experts.name}",
        )


def _check_gates(place: Value, gates: TensorType) -> None:
    if place.type.names != gates.names or place.type.sizes != gates.sizes:
        raise InputError(
            "gates and slots belong to different choices",
            expected=str(place.type),
            found=str(gates),
        )


def _infer_dispatch(operands: Sequence[Value], attrs: Attrs) -> tuple[TensorType, ...]:
    x, experts, place = operands
    tokens = placing(place).attrs["tokens"]
    _check_experts(place, experts)
    for name in tokens:
        same_size(axis_of(x.type, name), place.type[name])
    no_ragged(x.type, tokens, "cannot dispatch tokens")
    rest = (a for a in x.type.axes if a.name not in tokens)
    return (x.type.with_axes(no_duplicates((*slot_axes(place), *rest))),)


def _mixes_tokens(operands: Sequence[Value], attrs: Attrs) -> tuple[str, ...]:
    return tuple(placing(operands[2]).attrs["tokens"])


register(
    OpDef(
        "dispatch",
        "The tokens, each in the slots that its choices were given; an empty slot holds zeros.",
        ("x", "experts", "place"),
        _infer_dispatch,
        results=("rows",),
        mixes=_mixes_tokens,
        linear=(0,),
    )
)


def _infer_combine(operands: Sequence[Value], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, experts, place, gates = operands
    _check_experts(place, experts)
    _check_gates(place, gates.type)
    for axis in slot_axes(place):
        same_size(axis_of(rows.type, axis.name, "the rows"), axis)
    need_float(rows.type, "the rows")
    need_float(gates.type, "the gates")
    tokens = placing(place).attrs["tokens"]
    inner = (a for a in rows.type.axes if a.name not in ("group", "expert", "slot"))
    outer = (a for a in place.type.axes if a.name in tokens)
    return (rows.type.with_axes(no_duplicates((*outer, *inner))),)


register(
    OpDef(
        "combine",
        "For each token the sum over its choices of gate times row; a dropped one adds nothing.",
        ("rows", "experts", "place", "gates"),
        _infer_combine,
        mixes=lambda _operands, _attrs: ("group", "expert", "slot"),
        linear=(0, 3),
    )
)
