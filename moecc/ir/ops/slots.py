"""Slots: which choice gets one at which expert, and the movement of rows between tokens and slots.

``assign_slots`` assigns slots to the choices of tokens, ``expert_choice`` lets experts choose
tokens; both return the slot of every choice of every token, or −1, so that ``dispatch`` and
``combine`` are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor, inf, prod
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from moecc.errors import InputError
from moecc.ir.arrays import NOTHING, Array, Data, SlotAssignment, meaning
from moecc.ir.graph import Node, Value
from moecc.ir.operand import Attrs as _SlotsAttrs
from moecc.ir.operand import Definition, Operand
from moecc.ir.operation import OPS, Attr, Attrs, OpDef, register
from moecc.ir.ops.rules import (
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

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh


V = TypeVar("V", bound=Operand)


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


# The meaning of slots: assignment, and the movement of rows between tokens and slots.


@meaning("assign_slots")
def assign_slots(
    choices: Array,
    /,
    *given: Array,
    tokens: tuple[str, ...],
    experts: int,
    order: str,
    using: tuple[str, ...],
    **attrs: object,
) -> Array:
    """Return the slot of each choice at its expert, or −1 where it is dropped.

    Raises:
      InputError: the groups do not divide the tokens.
    """
    (choice,) = (a for a in choices.axes if a not in tokens)
    layout = (*tokens, choice)
    chosen = _by_token(choices, tokens, (choice,))
    groups, size, limit = _bounds({**attrs, "experts": experts}, *chosen.shape)
    more = dict(zip(using, given, strict=True))
    wanted = _wanted(chosen, more, tokens, choice)
    extents = np.zeros((groups, experts), np.int64)
    placed = np.full_like(chosen, -1)
    for at in _filling(_turns(more, tokens, len(chosen)), chosen.shape[1], order):
        cell = at[0] // size, chosen[at]
        if wanted[at] and 0 <= cell[1] < experts and extents[cell] != limit:
            placed[at] = extents[cell]
            extents[cell] += 1
    count = int(extents.max(initial=0)) if limit is None else limit
    result = Array(placed.reshape([choices.size(a) for a in layout]), layout)
    assignment = SlotAssignment(tokens, extents, count, limit is None)
    return Array(result.to(choices.axes), choices.axes, assignment=assignment)


def _bounds(attrs: _SlotsAttrs, tokens: int, choices: int) -> tuple[int, int, int | None]:
    """Return the number of groups, the tokens of one, and the capacity if there is one."""
    groups = group_count(attrs, tokens)
    size = max(1, tokens // max(groups, 1))
    bounded = attrs["slots"] == "capacity"
    return groups, size, capacity(attrs, size, choices) if bounded else None


def _wanted(chosen: Data, more: dict[str, Array], tokens: tuple[str, ...], choice: str) -> Data:
    """Return which choices request a slot, `[token, choice]`."""
    wanted = np.ones(chosen.shape, bool)
    if "keep" in more:
        wanted &= _by_token(more["keep"], tokens, (choice,))
    if "mask" in more:
        wanted &= _by_token(more["mask"], tokens, ())[:, None]
    return wanted


def _turns(more: dict[str, Array], tokens: tuple[str, ...], count: int) -> Data:
    """Return the tokens in the order in which they are assigned slots."""
    if "priority" not in more:
        return np.arange(count)
    return np.argsort(-_by_token(more["priority"], tokens, ()), kind="stable")


def _filling(turns: Data, choices: int, order: str) -> Iterator[tuple[int, int]]:
    """Yield token and rank of the choices in the order in which they are assigned slots."""
    if order == "choice":
        yield from ((token, rank) for rank in range(choices) for token in turns)
    else:
        yield from ((token, rank) for token in turns for rank in range(choices))


@meaning("expert_choice")
def expert_choice(
    scores: Array,
    /,
    *given: Array,
    tokens: tuple[str, ...],
    axis: str,
    choice: str,
    using: tuple[str, ...],
    **attrs: object,
) -> tuple[Array, Array, Array]:
    """Return, for each token and expert, the expert, the score, and the slot or −1.

    Raises:
      InputError: the groups do not divide the tokens.
    """
    values = _by_token(scores, tokens, (axis,))
    groups, size, limit = _bounds(attrs, len(values), 1)
    assert limit is not None, "expert choice is always bounded"
    ranked = values.copy()
    for mask in given:
        ranked[~_by_token(mask, tokens, ())] = -np.inf
    placed = np.full(values.shape, -1)
    for group, expert in np.ndindex(groups, values.shape[1]):
        column = ranked[group * size : (group + 1) * size, expert]
        best = np.argsort(-column, kind="stable")[:limit]
        # Padding is sorted last, and is not taken even where slots are left.
        best = best[column[best] > -np.inf]
        placed[group * size + best, expert] = np.arange(len(best))
    extents = np.stack([(part >= 0).sum(0) for part in np.split(placed, groups)])
    layout = (*tokens, choice)
    shape = [*(scores.size(a) for a in tokens), values.shape[1]]
    every = (*(a for a in scores.axes if a != axis), choice)
    numbers = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    results = [Array(d.reshape(shape), layout).to(every) for d in (numbers, values, placed)]
    assignment = SlotAssignment(tokens, extents, limit, False)
    last = Array(results[2], every, assignment=assignment)
    return Array(results[0], every), Array(results[1], every), last


def _by_token(x: Array, tokens: tuple[str, ...], rest: tuple[str, ...]) -> Data:
    """Return the data of `x` with the token axes merged into a leading one."""
    return x.to((*tokens, *rest)).reshape(-1, *(x.size(a) for a in rest))


def _slots_assignment(slots: Array) -> SlotAssignment:
    if slots.assignment is None:
        raise TypeError("these slots do not come from assign_slots or expert_choice")
    return slots.assignment


def _routes(experts: Array, slots: Array) -> Iterator[tuple[int, tuple[Data, Data, Data, Data]]]:
    """Yield, for each rank of choice, token, group, expert and slot of the choices with a slot."""
    assignment = _slots_assignment(slots)
    rest = tuple(a for a in slots.axes if a not in assignment.tokens)
    taken = _by_token(slots, assignment.tokens, rest)
    chosen = _by_token(experts, assignment.tokens, rest)
    size = max(1, len(taken) // len(assignment.extents))
    for rank in range(taken.shape[1]):
        (token,) = np.nonzero(taken[:, rank] >= 0)
        yield rank, (token, token // size, chosen[token, rank], taken[token, rank])


@meaning("dispatch")
def dispatch(x: Array, experts: Array, slots: Array) -> Array:
    """Return the tokens, each in the slots of its choices.

    An empty slot under a capacity holds zeros.  Elements beyond a ragged extent are NaN.
    """
    assignment = _slots_assignment(slots)
    rest = tuple(a for a in x.axes if a not in assignment.tokens)
    source = _by_token(x, assignment.tokens, rest)
    empty = poison(x.data) if assignment.is_ragged else x.data.dtype.type(0)
    rows = np.full((*assignment.extents.shape, assignment.slots, *source.shape[1:]), empty)
    for _, (token, group, expert, slot) in _routes(experts, slots):
        rows[group, expert, slot] = source[token]
    return Array(rows, ("group", "expert", "slot", *rest))


@meaning("dispatch_gates")
def dispatch_gates(gates: Array, experts: Array, slots: Array) -> Array:
    """Return the gate of the choice in each slot; empty slots are as those of ``dispatch``."""
    assignment = _slots_assignment(slots)
    (choice,) = (a for a in gates.axes if a not in assignment.tokens)
    source = _by_token(gates, assignment.tokens, (choice,))
    empty = poison(gates.data) if assignment.is_ragged else 0.0
    made = np.full((*assignment.extents.shape, assignment.slots), empty)
    for rank, (token, group, expert, slot) in _routes(experts, slots):
        made[group, expert, slot] = source[token, rank]
    return Array(made, ("group", "expert", "slot"))


@meaning("weight_rows")
def weight_rows(rows: Array, gates: Array, precision: str) -> Array:
    """Return each row times its gate."""
    return rows.map(lambda data: gates.to(rows.axes) * data)


@meaning("combine_weighted")
def combine_weighted(rows: Array, experts: Array, slots: Array) -> Array:
    """Return each token's sum over its choices of their rows; a dropped one adds nothing."""
    made = combine(rows, experts, slots, Array(np.ones(slots.data.shape), slots.axes))
    assert isinstance(made, Array), "one result"
    return made


@meaning("combine")
def combine(rows: Array, experts: Array, slots: Array, gates: Array) -> Array:
    """Return each token's sum over its choices of gate times row; a dropped one adds nothing."""
    assignment = _slots_assignment(slots)
    rest = tuple(a for a in rows.axes if a not in ("group", "expert", "slot"))
    source = rows.to(("group", "expert", "slot", *rest))
    (choice,) = (a for a in gates.axes if a not in assignment.tokens)
    weights = _by_token(gates, assignment.tokens, (choice,))
    total = np.zeros((len(weights), *source.shape[3:]))
    for rank, (token, group, expert, slot) in _routes(experts, slots):
        weight = weights[token, rank].reshape(-1, *[1] * len(rest))
        total[token] += weight * source[group, expert, slot]
    outer = tuple(a for a in slots.axes if a in assignment.tokens)
    shape = [slots.size(a) for a in assignment.tokens]
    result = Array(total.reshape(*shape, *total.shape[1:]), (*assignment.tokens, *rest))
    return Array(result.to((*outer, *rest)), (*outer, *rest))


def poison(data: Data) -> float | int | bool:
    """Return the filler of nonexistent elements: NaN, the least integer, or False."""
    if data.dtype.kind == "f":
        return float("nan")
    return NOTHING if data.dtype.kind == "i" else False


def poisoned(x: Array, slot: str, assignment: SlotAssignment) -> Array:
    """Return `x` with fillers beyond the extents of its ragged axis `slot`.

    A value that lost its group or expert axis, or part of one, is returned as it is.
    """
    where = ("group", "expert", slot)
    shape = (*assignment.extents.shape, assignment.slots)
    if not set(where) <= set(x.axes) or tuple(x.size(a) for a in where) != shape:
        return x
    beyond = np.arange(assignment.slots) >= assignment.extents[..., None]
    data = np.where(Array(beyond, where).to(x.axes), poison(x.data), x.data)
    return replace(x, data=data.astype(x.data.dtype))


@meaning("group_sum")
def group_sum(x: Array, slots: Array) -> Array:
    """Return the sum over the tokens of each group."""
    assignment = _slots_assignment(slots)
    rest = tuple(a for a in x.axes if a not in assignment.tokens)
    source = _by_token(x, assignment.tokens, rest)
    groups = len(assignment.extents)
    parts = source.reshape(groups, -1, *source.shape[1:])
    return Array(parts.sum(1), ("group", *rest))
