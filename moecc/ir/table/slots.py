"""Slots: which choice gets one at which expert, and the movement of rows between tokens and slots.

``assign_slots`` assigns slots to the choices of tokens, ``expert_choice`` lets experts choose
tokens; both return the slot of every choice of every token, or −1, so that ``dispatch`` and
``combine`` are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, floor, inf, prod
from typing import TYPE_CHECKING, TypeVar

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.operand import Definition, Operand
from moecc.ir.ops import OPS, Attr, Attrs, OpDef, register
from moecc.ir.table.rules import (
    axis_of,
    dispatched,
    need_float,
    need_kind,
    no_duplicates,
    no_ragged,
    numbered,
    same_size,
)
from moecc.ir.traits import Index, Residual, RowMove
from moecc.types import I32, Axis, Extent, TensorType

V = TypeVar("V", bound=Operand)

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh

USING = ("keep", "priority", "mask")
"""Further operands of ``assign_slots``, by the words of its attribute ``using``."""

_GROUPS = {
    "groups": Attr("int", 1, doc="the number of token groups"),
    "group_size": Attr("int", 0, doc="the tokens of a group, in place of their number; 0: not"),
}
_ROUNDED = {
    "rounding": Attr("str", "floor", ("floor", "round", "ceil"), doc="to a whole number"),
    "minimum": Attr("int", 4, doc="the least capacity"),
    "multiple": Attr("int", 1, doc="the capacity is then raised to a multiple of this"),
    "cap": Attr("bool", True, doc="whether it is at most the tokens of a group"),
}


def operands_by_word(operands: Sequence[V], attrs: Attrs) -> dict[str, V]:
    """Return the operands after the first of a node with an attribute ``using``, by word.

    Raises:
      InputError: there are more or fewer operands than words.
    """
    words: tuple[str, ...] = attrs["using"]
    more = operands[1:]
    if len(words) != len(more):
        raise InputError(
            "each operand after the first has its word in using",
            expected=f"{len(words)} more: {', '.join(words)}" if words else "no more operands",
            found=", ".join(f"%{v.name}" for v in more) or "none",
        )
    return dict(zip(words, more, strict=True))


_LEAST = (("experts", 1), ("groups", 1), ("minimum", 1), ("group_size", 0), ("multiple", 1))


def _check_counts(attrs: Attrs) -> None:
    for name, least in _LEAST:
        if attrs[name] < least:
            raise InputError(f"{name} must be at least {least}", found=str(attrs[name]))
    if attrs["group_size"] and attrs["groups"] != 1:
        raise InputError(
            "groups are defined by their number or by their size",
            found=f"groups={attrs['groups']}, group_size={attrs['group_size']}",
            hint="omit one of them",
        )
    if attrs["slots"] == "capacity" and not 0 < attrs["capacity_factor"] < inf:
        raise InputError(
            "a capacity needs a positive capacity_factor", found=str(attrs["capacity_factor"])
        )


def _check_groups(type: TensorType, attrs: Attrs) -> None:
    """Raise InputError if the groups do not divide the tokens, where their number is known."""
    sizes = [type[n].size for n in attrs["tokens"]]
    known = [s for s in sizes if isinstance(s, int)]
    if len(known) == len(sizes):
        group_count(attrs, prod(known))


def _check_per_token(type: TensorType, like: TensorType, tokens: Sequence[str], what: str) -> None:
    """Raise InputError unless `type` has just the token axes, with the sizes of `like`."""
    if set(type.names) != set(tokens):
        raise InputError(
            f"{what} has one element per token", expected=", ".join(tokens), found=str(type)
        )
    for name in tokens:
        same_size(like[name], type[name])


def _infer_assign_slots(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
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
    _check_counts(attrs)
    _check_groups(experts, attrs)
    _check_given(operands_by_word(operands, attrs), experts, attrs["tokens"])
    return (TensorType(I32, experts.axes),)


def _check_given(given: dict[str, Operand], experts: TensorType, tokens: tuple[str, ...]) -> None:
    if "keep" in given:
        keep = given["keep"].type
        need_kind(keep, "bool", "what is kept")
        if set(keep.names) != set(experts.names):
            raise InputError(
                "what is kept has one element per choice", expected=str(experts), found=str(keep)
            )
        for axis in experts.axes:
            same_size(axis, keep[axis.name])
    if "priority" in given:
        need_float(given["priority"].type, "the priority")
        _check_per_token(given["priority"].type, experts, tokens, "the priority")
    if "mask" in given:
        need_kind(given["mask"].type, "bool", "the mask")
        _check_per_token(given["mask"].type, experts, tokens, "the mask")


def _own_groups(node: Definition, mesh: Mesh) -> Attrs:
    if node.attrs["group_size"]:
        return node.attrs
    outermost = node.results[-1].type[node.attrs["tokens"][0]]
    return {**node.attrs, "groups": node.attrs["groups"] // mesh.size(outermost.mesh)}


register(
    OpDef(
        "assign_slots",
        """The slot of each choice at its expert, or −1 where it is dropped.

        Tokens are numbered over the token axes, outermost first, and cut into `groups` equal
        groups, or into groups of `group_size`; slots are counted in each group apart.  ragged: as
        many slots as choices.  capacity: C = capacity_factor · tokens of a group / experts
        (convention `tokens`, the paper's) or that times top-k (`assignments`), rounded, at least
        `minimum`, raised to a multiple, and with `cap` at most the tokens of a group.  order:
        `choice` fills all first choices before any second (ST-MoE, Appendix D); `token` goes token
        by token, and is strictly causal.  A choice that names no expert, say −1, is dropped.

        `using` names further operands, in their order.  keep, `pred[tokens, choice]`: the other
        choices get no slot.  priority, `f32[tokens]`: tokens of a group take their turns by
        falling priority, equal ones in their order (batch-prioritised routing, Riquelme et al.
        2021); not causal.  mask, `pred[tokens]`: true for tokens, false for padding, which gets no
        slot but counts to its group.""",
        ("experts",),
        _infer_assign_slots,
        results=("slots",),
        attrs={
            "tokens": Attr("axes", doc="the token axes"),
            "experts": Attr("int", doc="the number of experts", pins=True),
            **_GROUPS,
            "slots": Attr("str", "ragged", ("ragged", "capacity"), doc="dropless, or bounded"),
            "capacity_factor": Attr("float", 0.0, doc="the capacity factor"),
            "convention": Attr(
                "str", "tokens", ("tokens", "assignments"), doc="what it multiplies"
            ),
            **_ROUNDED,
            "order": Attr("str", "choice", ("choice", "token"), doc="the order of filling"),
            "using": Attr("words", (), USING, doc="what the further operands are"),
        },
        mixes=lambda operands, _attrs: operands[0].type.names,
        variadic=True,
        sharding=numbered,
        local=_own_groups,
        index=Index(0, lambda node: node.attrs["experts"]),
        assigns_slots=True,
    )
)


def _infer_expert_choice(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    scores = operands[0].type
    need_float(scores, "the scores")
    expert = axis_of(scores, attrs["axis"])
    left = {a.name for a in scores.axes} - {attrs["axis"]}
    if left != set(attrs["tokens"]):
        raise InputError(
            "besides the experts, the scores have the token axes",
            expected=", ".join(attrs["tokens"]),
            found=str(scores),
        )
    same_size(Axis(attrs["axis"], attrs["experts"]), expert)
    no_ragged(scores, scores.names, "cannot choose")
    _check_counts(attrs)
    _check_groups(scores, attrs)
    given = operands_by_word(operands, attrs)
    if "mask" in given:
        need_kind(given["mask"].type, "bool", "the mask")
        _check_per_token(given["mask"].type, scores, attrs["tokens"], "the mask")
    axes = [a for a in scores.axes if a is not expert]
    every = no_duplicates((*axes, Axis(attrs["choice"], attrs["experts"])))
    return (TensorType(I32, every), TensorType(scores.dtype, every), TensorType(I32, every))


register(
    OpDef(
        "expert_choice",
        """Each expert takes the C tokens of a group that score highest with it (Zhou et al. 2022).

        The results are those of ``route`` and ``assign_slots``: a token has one choice for each
        expert, the gate is the score, and the slot is −1 where the expert did not take the token.
        Equal scores go to the earlier token.  C is that of ``assign_slots``, and always at most the
        tokens of a group.  Whether a token is taken depends on all tokens of its group: not
        causal.""",
        ("scores",),
        _infer_expert_choice,
        results=("experts", "gates", "slots"),
        attrs={
            "tokens": Attr("axes", doc="the token axes"),
            "experts": Attr("int", doc="the number of experts", pins=True),
            **_GROUPS,
            "slots": Attr("str", "capacity", ("capacity",), doc="always bounded"),
            "capacity_factor": Attr("float", doc="the mean number of experts of a token"),
            "convention": Attr("str", "tokens", ("tokens",), doc="what it multiplies"),
            **_ROUNDED,
            "axis": Attr("axis", "expert", doc="the axis of the experts"),
            "choice": Attr("axis", "choice", doc="the new axis, one choice for each expert"),
            "using": Attr("words", (), ("mask",), doc="what the further operands are"),
        },
        mixes=lambda _operands, attrs: (attrs["axis"], *attrs["tokens"]),
        variadic=True,
        sharding=numbered,
        local=_own_groups,
        chooses=True,
        assigns_slots=True,
    )
)


_ROUNDINGS: dict[str, Callable[[Fraction], int]] = {"floor": floor, "round": round, "ceil": ceil}
"""`round` takes a half to the even neighbour, as flaxformer does."""


def capacity(attrs: Attrs, tokens: int, choices: int) -> int:
    """Return the capacity of each expert in a group under an ``assign_slots`` with `attrs`.

    The factor is taken as the decimal number that was written, not as the float nearest to it, so
    that 0.7 · 10 tokens are 7 slots everywhere.

    Args:
      attrs: of the ``assign_slots`` or ``expert_choice`` node.
      tokens: the tokens of a group.
      choices: the choices of a token.
    """
    exact = Fraction(repr(attrs["capacity_factor"])) * tokens / attrs["experts"]
    if attrs["convention"] == "assignments":
        exact *= choices
    multiple: int = attrs["multiple"]
    least = max(_ROUNDINGS[attrs["rounding"]](exact), attrs["minimum"])
    whole: int = -(-least // multiple) * multiple
    return min(whole, tokens) if attrs["cap"] else whole


def group_count(attrs: Attrs, tokens: int) -> int:
    """Return the number of groups that an ``assign_slots`` with `attrs` cuts `tokens` tokens into.

    Raises:
      InputError: the groups do not divide the tokens.
    """
    size: int = attrs["group_size"]
    divisor: int = size or attrs["groups"]
    if tokens % divisor:
        raise InputError(
            "the groups do not divide the tokens",
            expected=f"a multiple of {divisor} tokens",
            found=str(tokens),
            hint="choose a number of groups that divides batch times sequence"
            if not size
            else "pad the batch, or choose a group size that divides batch times sequence",
        )
    return tokens // size if size else divisor


def is_slots(value: Operand) -> bool:
    """Return whether `value` holds the slots of choices, which set the extents of rows."""
    node = value.node
    return node is not None and node.op.assigns_slots and value is node.results[-1]


def assigner(value: Operand) -> Node:
    """Return the node that assigns `value`: an ``assign_slots`` or an ``expert_choice``.

    Raises:
      InputError: another operation defines it.
    """
    node = value.node
    if not isinstance(node, Node) or not is_slots(value):
        raise InputError(
            "slots come from assign_slots or expert_choice",
            found=f"%{value.name} : {value.type}",
            hint="assign slots to the experts first",
        )
    return node


def _assignment(slots: Operand) -> Attrs:
    """Return the attributes of what gives `slots`."""
    return assigner(slots).attrs


def tokens_of(slots: Operand) -> tuple[str, ...]:
    """Return the token axes that `slots` are counted over, outermost first."""
    tokens: tuple[str, ...] = _assignment(slots)["tokens"]
    return tokens


def slot_axes(slots: Operand) -> tuple[Axis, Axis, Axis]:
    """Return the axes group, expert and slot of rows between dispatch and combine."""
    attrs = _assignment(slots)
    return (
        group_axis(slots),
        Axis("expert", attrs["experts"]),
        Axis("slot", Extent(attrs["slots"], slots)),
    )


def group_axis(slots: Operand) -> Axis:
    """Return the axis of the token groups that `slots` are counted in."""
    attrs = _assignment(slots)
    return Axis("group", Extent("groups", slots) if attrs["group_size"] else attrs["groups"])


def experts_of(slots: Operand) -> Value:
    """Return the experts to which `slots` belong: the choices of tokens, or of experts."""
    node = assigner(slots)
    return node.results[0] if node.op.chooses else node.operands[0]


def check_experts(slots: Operand, experts: Operand) -> None:
    """Raise InputError unless `slots` were assigned to `experts`."""
    placed = experts_of(slots)
    if placed is not experts:
        raise InputError(
            "experts and slots belong to different choices",
            expected=f"%{placed.name}, which %{slots.name} belongs to",
            found=f"%{experts.name}",
        )


def check_gates(slots: Operand, gates: TensorType) -> None:
    """Raise InputError unless there is a gate for each choice of `slots`."""
    if slots.type.names != gates.names or slots.type.sizes != gates.sizes:
        raise InputError(
            "gates and slots belong to different choices",
            expected=str(slots.type),
            found=str(gates),
        )


def _infer_dispatch(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, experts, slots = operands
    tokens = _assignment(slots)["tokens"]
    check_experts(slots, experts)
    for name in tokens:
        same_size(axis_of(x.type, name), slots.type[name])
    no_ragged(x.type, tokens, "cannot dispatch tokens")
    rest = (a for a in x.type.axes if a.name not in tokens)
    return (x.type.with_axes(no_duplicates((*slot_axes(slots), *rest))),)


register(
    OpDef(
        "dispatch",
        "The tokens, each in the slots that its choices were given; an empty slot holds zeros.",
        ("x", "experts", "slots"),
        _infer_dispatch,
        results=("rows",),
        mixes=lambda operands, _attrs: tuple(_assignment(operands[2])["tokens"]),
        linear=(0,),
        residual=Residual((1, 2)),
        sharding=dispatched,
        moves=RowMove.TO_SLOTS,
    )
)


def _infer_group_sum(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, slots = operands
    need_float(x.type)
    tokens = _assignment(slots)["tokens"]
    for name in tokens:
        same_size(axis_of(x.type, name), slots.type[name])
    no_ragged(x.type, tokens, "cannot sum")
    rest = (a for a in x.type.axes if a.name not in tokens)
    return (x.type.with_axes(no_duplicates((group_axis(slots), *rest))),)


register(
    OpDef(
        "group_sum",
        "The sum over the tokens of each group that an ``assign_slots`` counts in.",
        ("x", "slots"),
        _infer_group_sum,
        mixes=lambda operands, _attrs: tuple(_assignment(operands[1])["tokens"]),
        linear=(0,),
        sharding=dispatched,
    )
)

SLOT_ASSIGNERS = tuple(name for name, entry in OPS.items() if entry.assigns_slots)
"""The operations that assign slots; the last result holds the slot of each choice."""
