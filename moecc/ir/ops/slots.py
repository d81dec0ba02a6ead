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
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data, SlotAssignment, poison
from moecc.ir.graph import Node, Value
from moecc.ir.operand import Attrs, Definition, Operand
from moecc.ir.operation import (
    AxisName,
    AxisNames,
    Bool,
    Float,
    Int,
    Op,
    Word,
    Words,
    operation,
)
from moecc.ir.ops.rules import (
    axis_of,
    by_name,
    combined,
    dispatched,
    gates_dispatched,
    need_float,
    need_kind,
    no_duplicates,
    no_ragged,
    numbered,
    same_size,
)
from moecc.ir.traits import PAIR, IndexOperand, Residual, RowMove
from moecc.support.lazy import np
from moecc.terms.tensor import SlotTerms, Tensor
from moecc.terms.term import Algebra, Head, Polynomial
from moecc.types import I32, Axis, Extent, TensorType

V = TypeVar("V")

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh

Slots = Literal["ragged", "capacity"]
Convention = Literal["tokens", "assignments"]
Rounding = Literal["floor", "round", "ceil"]
Order = Literal["choice", "token"]
Using = Literal["keep", "priority", "mask"]
"""Further operands of ``assign_slots``, by the words of its attribute ``using``."""


def operands_by_word(operands: Sequence[V], attrs: Attrs) -> dict[str, V]:
    """Return the operands after the first of a node with an attribute ``using``, by word.

    Raises:
      InputError: there are more or fewer operands than words.
    """
    words: tuple[str, ...] = attrs["using"]
    further = operands[1:]
    if len(words) != len(further):
        raise InputError(
            "each operand after the first has its word in using",
            expected=f"{len(words)} more: {', '.join(words)}" if words else "no more operands",
            found=", ".join(f"%{v.name}" for v in further if isinstance(v, Value)) or "none",
        )
    return dict(zip(words, further, strict=True))


def _check_per_token(type: TensorType, like: TensorType, tokens: Sequence[str], noun: str) -> None:
    """Raise InputError unless `type` has just the token axes, with the sizes of `like`."""
    if set(type.names) != set(tokens):
        raise InputError(
            f"{noun} has one element per token", expected=", ".join(tokens), found=str(type)
        )
    for name in tokens:
        same_size(like[name], type[name])


def _by_token(x: Array, tokens: tuple[str, ...], inner: tuple[str, ...]) -> Data:
    """Return the data of `x` with the token axes merged into a leading one."""
    return x.to((*tokens, *inner)).reshape(-1, *(x.size(a) for a in inner))


class SlotsOp(Op):
    """An operation that assigns slots: its last result holds the slot of each choice."""

    tokens = AxisNames("the token axes")
    experts = Int("the number of experts", pins=True)
    groups = Int("the number of token groups", 1)
    group_size = Int("the tokens of a group, in place of their number; 0: not", 0)
    slots = Word("dropless, or bounded", "ragged", choices=get_args(Slots))
    capacity_factor = Float("the capacity factor", 0.0)
    convention = Word("what it multiplies", "tokens", choices=get_args(Convention))
    rounding = Word("to a whole number", "floor", choices=get_args(Rounding))
    minimum = Int("the least capacity", 4)
    multiple = Int("the capacity is then raised to a multiple of this", 1)
    cap = Bool("whether it is at most the tokens of a group", True)

    def check_groups(self, type: TensorType) -> None:
        """Raise InputError unless the numbers define groups and slots for tokens of `type`."""
        least = {"experts": 1, "groups": 1, "minimum": 1, "group_size": 0, "multiple": 1}
        for name, bound in least.items():
            if self.attrs[name] < bound:
                raise InputError(f"{name} must be at least {bound}", found=str(self.attrs[name]))
        if self.group_size and self.groups != 1:
            raise InputError(
                "groups are defined by their number or by their size",
                found=f"groups={self.groups}, group_size={self.group_size}",
                hint="omit one of them",
            )
        if self.slots == "capacity" and not 0 < self.capacity_factor < inf:
            raise InputError(
                "a capacity needs a positive capacity_factor", found=str(self.capacity_factor)
            )
        sizes = [type[n].size for n in self.tokens]
        known_sizes = [s for s in sizes if isinstance(s, int)]
        if len(known_sizes) == len(sizes):
            group_count(self.attrs, prod(known_sizes))

    def bounds(self, tokens: int, choices: int) -> tuple[int, int, int | None]:
        """Return the number of groups, the tokens of one, and the capacity if there is one."""
        groups = group_count(self.attrs, tokens)
        size = max(1, tokens // max(groups, 1))
        is_bounded = self.slots == "capacity"
        return groups, size, capacity(self.attrs, size, choices) if is_bounded else None

    def slot_terms(
        self, experts: Tensor, operands: Sequence[Tensor], choice: str, requested: Polynomial
    ) -> Tensor:
        """Return the slots of choices in index notation: an uninterpreted function of all tokens.

        Args:
          experts: the expert of each choice.
          operands: what determines the assignment, experts apart, each with the token axes.
          choice: the axis of the choices.
          requested: 1 for a choice that gets a slot if there is one, else 0.
        """
        algebra = experts.algebra
        tokens = tuple(experts.axis(name) for name in self.tokens)
        axes = (*tokens, experts.axis(choice))
        inner = [[v for v in t.axes if v not in tokens] for t in operands]
        closed = [
            algebra.abstract([*tokens, *more], t.body)
            for t, more in zip(operands, inner, strict=True)
        ]
        functions = (algebra.abstract(axes, experts.body), *closed)
        numbers = self.written("tokens", "choice", "axis")
        key = (type(self).__name__, *numbers, *(v.size for v in axes))
        slot = algebra.apply(Head("slot_of", key), functions, [algebra.index(v) for v in axes])
        groups = f"groups {slot.serial}" if self.group_size else self.groups
        ragged = self.slots == "ragged"
        sizes = (groups, self.experts, f"slots {slot.serial}")
        places = [algebra.index(v) for v in axes]
        placed = requested if ragged else algebra.apply(Head("placed", key), functions, places)
        assignment = SlotTerms(
            key, functions, tokens, axes[-1], experts.body, placed, ragged, sizes
        )
        return Tensor(algebra, experts.axes, slot, slots=assignment)


def _local_groups(node: Definition, mesh: Mesh) -> Attrs:
    if node.attrs["group_size"]:
        return node.attrs
    outermost = node.results[-1].type[node.attrs["tokens"][0]]
    return {**node.attrs, "groups": node.attrs["groups"] // mesh.size(outermost.mesh)}


@operation(
    "assign_slots",
    "experts",
    results=("slots",),
    variadic=True,
    sharding=numbered,
    local=_local_groups,
    index=IndexOperand(0, lambda node: node.attrs["experts"]),
    assigns_slots=True,
)
class AssignSlotsOp(SlotsOp):
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
    slot but counts to its group.
    """

    order = Word("the order of filling", "choice", choices=get_args(Order))
    using = Words("what the further operands are", (), choices=get_args(Using))

    def infer(self, *operands: Operand) -> TensorType:
        experts, tokens = operands[0].type, self.tokens
        need_kind(experts, "int", "the experts")
        for name in tokens:
            axis_of(experts, name)
        no_ragged(experts, tokens, "cannot number tokens")
        if len(experts) - len(set(tokens)) != 1:
            raise InputError(
                "besides the token axes, the experts have one axis of choices",
                expected=f"{', '.join(tokens)} and one more",
                found=str(experts),
            )
        self.check_groups(experts)
        further = {w: v.type for w, v in operands_by_word(operands, self.attrs).items()}
        if "keep" in further:
            keep = further["keep"]
            need_kind(keep, "bool", "what is kept")
            if set(keep.names) != set(experts.names):
                raise InputError(
                    "what is kept has one element per choice",
                    expected=str(experts),
                    found=str(keep),
                )
            for axis in experts.axes:
                same_size(axis, keep[axis.name])
        if "priority" in further:
            priority = further["priority"]
            need_float(priority, "the priority")
            _check_per_token(priority, experts, tokens, "the priority")
        if "mask" in further:
            mask = further["mask"]
            need_kind(mask, "bool", "the mask")
            _check_per_token(mask, experts, tokens, "the mask")
        return TensorType(I32, experts.axes)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return operands[0].type.names

    def meaning(self, *operands: Array) -> Array:
        """Assign slots choice by choice, in the order of filling."""
        choices, tokens = operands[0], self.tokens
        (choice,) = (a for a in choices.axes if a not in tokens)
        chosen = _by_token(choices, tokens, (choice,))
        groups, size, limit = self.bounds(*chosen.shape)
        further = operands_by_word(operands, self.attrs)
        requested = np.ones(chosen.shape, bool)
        if "keep" in further:
            requested &= _by_token(further["keep"], tokens, (choice,))
        if "mask" in further:
            requested &= _by_token(further["mask"], tokens, ())[:, None]
        turns = np.arange(len(chosen))
        if "priority" in further:
            turns = np.argsort(-_by_token(further["priority"], tokens, ()), kind="stable")
        ranks = range(chosen.shape[1])
        filling = (
            ((token, rank) for rank in ranks for token in turns)
            if self.order == "choice"
            else ((token, rank) for token in turns for rank in ranks)
        )
        extents = np.zeros((groups, self.experts), np.int64)
        slots = np.full_like(chosen, -1)
        for at in filling:
            cell = at[0] // size, chosen[at]
            if requested[at] and 0 <= cell[1] < self.experts and extents[cell] != limit:
                slots[at] = extents[cell]
                extents[cell] += 1
        count = int(extents.max(initial=0)) if limit is None else limit
        layout = (*tokens, choice)
        result = Array(slots.reshape([choices.size(a) for a in layout]), layout)
        assignment = SlotAssignment(tokens, extents, count, limit is None)
        return Array(result.to(choices.axes), choices.axes, assignment=assignment)

    def term(self, algebra: Algebra, experts: Tensor, *further: Tensor) -> Tensor:
        (choice,) = experts.without(*self.tokens)
        exists = algebra.apply(Head("range", (0, self.experts)), (), [experts.body])
        words = operands_by_word((experts, *further), self.attrs)
        wanted = [words[word].body for word in ("keep", "mask") if word in words]
        requested = algebra.multiply(exists, *wanted)
        return self.slot_terms(experts, further, choice.name, requested)


@operation(
    "expert_choice",
    "scores",
    results=("experts", "gates", "slots"),
    variadic=True,
    sharding=numbered,
    local=_local_groups,
    chooses=True,
    assigns_slots=True,
)
class ExpertChoiceOp(SlotsOp):
    """Each expert takes the C tokens of a group that score highest with it (Zhou et al. 2022).

    The results are those of ``route`` and ``assign_slots``: a token has one choice for each
    expert, the gate is the score, and the slot is −1 where the expert did not take the token.
    Equal scores go to the earlier token.  C is that of ``assign_slots``, and always at most the
    tokens of a group.  Whether a token is taken depends on all tokens of its group: not
    causal.
    """

    slots = Word("always bounded", "capacity", choices=("capacity",))
    capacity_factor = Float("the mean number of experts of a token")
    convention = Word("what it multiplies", "tokens", choices=("tokens",))
    axis = AxisName("the axis of the experts", "expert")
    choice = AxisName("the new axis, one choice for each expert", "choice")
    using = Words("what the further operands are", (), choices=("mask",))

    def infer(self, *operands: Operand) -> tuple[TensorType, ...]:
        scores, tokens = operands[0].type, self.tokens
        need_float(scores, "the scores")
        expert = axis_of(scores, self.axis)
        if {a.name for a in scores.axes} - {self.axis} != set(tokens):
            raise InputError(
                "besides the experts, the scores have the token axes",
                expected=", ".join(tokens),
                found=str(scores),
            )
        same_size(Axis(self.axis, self.experts), expert)
        no_ragged(scores, scores.names, "cannot choose")
        self.check_groups(scores)
        if mask := operands_by_word(operands, self.attrs).get("mask"):
            need_kind(mask.type, "bool", "the mask")
            _check_per_token(mask.type, scores, tokens, "the mask")
        outer = (a for a in scores.axes if a is not expert)
        axes = no_duplicates((*outer, Axis(self.choice, self.experts)))
        return (TensorType(I32, axes), TensorType(scores.dtype, axes), TensorType(I32, axes))

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return (self.axis, *self.tokens)

    def meaning(self, scores: Array, *masks: Array) -> tuple[Array, ...]:
        """Let every expert of every group take tokens, apart from one another."""
        tokens = self.tokens
        values = _by_token(scores, tokens, (self.axis,))
        groups, size, limit = self.bounds(len(values), 1)
        assert limit is not None, "expert choice is always bounded"
        ranked = values.copy()
        for mask in masks:
            ranked[~_by_token(mask, tokens, ())] = -np.inf
        slots = np.full(values.shape, -1)
        for group, expert in np.ndindex(groups, values.shape[1]):
            column = ranked[group * size : (group + 1) * size, expert]
            best = np.argsort(-column, kind="stable")[:limit]
            # Padding is sorted last, and is not taken even where slots are left.
            best = best[column[best] > -np.inf]
            slots[group * size + best, expert] = np.arange(len(best))
        extents = np.stack([(part >= 0).sum(0) for part in np.split(slots, groups)])
        shape = [*(scores.size(a) for a in tokens), values.shape[1]]
        axes = (*(a for a in scores.axes if a != self.axis), self.choice)
        experts = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        first, gates, last = (
            Array(data.reshape(shape), (*tokens, self.choice)).to(axes)
            for data in (experts, values, slots)
        )
        assignment = SlotAssignment(tokens, extents, limit, False)
        return Array(first, axes), Array(gates, axes), Array(last, axes, assignment=assignment)

    def term(self, algebra: Algebra, scores: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
        choice = algebra.axis(self.choice, self.experts)
        axes = (*scores.without(self.axis), choice)
        experts = Tensor(algebra, axes, algebra.index(choice))
        gates = scores.moved(axes, {self.axis: algebra.index(choice)})
        return experts, gates, self.slot_terms(experts, (gates, *masks), self.choice, algebra.one)


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
    slots: int = -(-least // multiple) * multiple
    return min(slots, tokens) if attrs["cap"] else slots


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


def _tokens_of(slots: Operand) -> tuple[str, ...]:
    """Return the token axes that `slots` are counted over, outermost first."""
    return SlotsOp.of_node(assigner(slots)).tokens


def _group_axis(slots: Operand) -> Axis:
    attrs = SlotsOp.of_node(assigner(slots))
    return Axis("group", Extent("groups", slots) if attrs.group_size else attrs.groups)


def _row_axes(slots: Operand) -> tuple[Axis, Axis, Axis]:
    """Return the axes group, expert and slot of rows between dispatch and combine."""
    attrs = SlotsOp.of_node(assigner(slots))
    slot = Axis("slot", Extent(attrs.slots, slots))
    return (_group_axis(slots), Axis("expert", attrs.experts), slot)


def experts_of(slots: Operand) -> Value:
    """Return the experts to which `slots` belong: the choices of tokens, or of experts."""
    node = assigner(slots)
    return node.results[0] if node.op.chooses else node.operands[0]


def _check_choices(slots: Operand, experts: Operand, gates: TensorType | None = None) -> None:
    """Raise InputError unless `slots` were assigned to `experts`, each choice with a gate."""
    assigned = experts_of(slots)
    if assigned is not experts:
        raise InputError(
            "experts and slots belong to different choices",
            expected=f"%{assigned.name}, which %{slots.name} belongs to",
            found=f"%{experts.name}",
        )
    if gates is None:
        return
    if slots.type.names != gates.names or slots.type.sizes != gates.sizes:
        raise InputError(
            "gates and slots belong to different choices",
            expected=str(slots.type),
            found=str(gates),
        )
    need_float(gates, "the gates")


def _without_tokens(x: TensorType, slots: Operand, message: str) -> Iterator[Axis]:
    """Yield the axes of `x` but for the token axes of `slots`, which it must have."""
    tokens = _tokens_of(slots)
    for name in tokens:
        same_size(axis_of(x, name), slots.type[name])
    no_ragged(x, tokens, message)
    yield from (a for a in x.axes if a.name not in tokens)


def _assignment(slots: Array) -> SlotAssignment:
    if slots.assignment is None:
        raise TypeError("these slots do not come from assign_slots or expert_choice")
    return slots.assignment


def _routes(experts: Array, slots: Array) -> Iterator[tuple[int, tuple[Data, Data, Data, Data]]]:
    """Yield, for each rank of choice, token, group, expert and slot of the choices with a slot."""
    assignment = _assignment(slots)
    choice = tuple(a for a in slots.axes if a not in assignment.tokens)
    numbers = _by_token(slots, assignment.tokens, choice)
    chosen = _by_token(experts, assignment.tokens, choice)
    size = max(1, len(numbers) // len(assignment.extents))
    for rank in range(numbers.shape[1]):
        (token,) = np.nonzero(numbers[:, rank] >= 0)
        yield rank, (token, token // size, chosen[token, rank], numbers[token, rank])


@operation(
    "dispatch",
    "x experts slots",
    results=("rows",),
    linear=(0,),
    residual=Residual((1, 2)),
    sharding=dispatched,
    moves=RowMove.TO_SLOTS,
)
class DispatchOp(Op):
    """The tokens, each in the slots that its choices were given; an empty slot holds zeros."""

    def infer(self, x: Operand, experts: Operand, slots: Operand) -> TensorType:
        _check_choices(slots, experts)
        inner = _without_tokens(x.type, slots, "cannot dispatch tokens")
        return x.type.with_axes(no_duplicates((*_row_axes(slots), *inner)))

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return _tokens_of(operands[2])

    def meaning(self, x: Array, experts: Array, slots: Array) -> Array:
        """Copy the tokens; elements beyond a ragged extent are NaN."""
        assignment = _assignment(slots)
        inner = tuple(a for a in x.axes if a not in assignment.tokens)
        source = _by_token(x, assignment.tokens, inner)
        empty = poison(x.data) if assignment.is_ragged else x.data.dtype.type(0)
        rows = np.full((*assignment.extents.shape, assignment.slots, *source.shape[1:]), empty)
        for _, (token, group, expert, slot) in _routes(experts, slots):
            rows[group, expert, slot] = source[token]
        return Array(rows, ("group", "expert", "slot", *inner))

    def term(self, algebra: Algebra, x: Tensor, experts: Tensor, slots: Tensor) -> Tensor:
        """Return the token of each row, times 0 for an empty slot."""
        assignment = _slot_terms(slots)
        tokens = {v.name: at for at, v in enumerate(assignment.tokens)}
        return _dispatched(replace(x, body=x.factor()), assignment, tokens)


@operation("group_sum", "x slots", linear=(0,), sharding=dispatched)
class GroupSumOp(Op):
    """The sum over the tokens of each group that an ``assign_slots`` counts in."""

    def infer(self, x: Operand, slots: Operand) -> TensorType:
        need_float(x.type)
        inner = _without_tokens(x.type, slots, "cannot sum")
        return x.type.with_axes(no_duplicates((_group_axis(slots), *inner)))

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return _tokens_of(operands[1])

    def meaning(self, x: Array, slots: Array) -> Array:
        assignment = _assignment(slots)
        inner = tuple(a for a in x.axes if a not in assignment.tokens)
        source = _by_token(x, assignment.tokens, inner)
        parts = source.reshape(len(assignment.extents), -1, *source.shape[1:])
        return Array(parts.sum(1), ("group", *inner))

    def term(self, algebra: Algebra, x: Tensor, slots: Tensor) -> Tensor:
        """Return an uninterpreted function of the tokens and the number of groups."""
        assignment = _slot_terms(slots)
        names = [v.name for v in assignment.tokens]
        group = algebra.axis("group", assignment.sizes[0])
        sizes = (a for a in assignment.head if str(a).startswith(("groups=", "group_size=")))
        head = Head("group_sum", tuple(sizes))
        body = algebra.apply(head, [x.along(*names)], [algebra.index(group)])
        return Tensor(algebra, (group, *x.without(*names)), body)


# Rows combined by their gates, or gates sent with the rows, which come back weighted:
# ``combine(rows, gates)`` is ``combine_weighted(weight_rows(rows, dispatch_gates(gates)))``.
# Where rows return from other devices, the gradient of the gates then needs no row that has
# returned.


class _CombiningOp(Op):
    """An operation that makes tokens of rows."""

    def infer(
        self, rows: Operand, experts: Operand, slots: Operand, gates: Operand | None = None
    ) -> TensorType:
        _check_choices(slots, experts, gates.type if gates is not None else None)
        for axis in _row_axes(slots):
            same_size(axis_of(rows.type, axis.name, "the rows"), axis)
        need_float(rows.type, "the rows")
        tokens = _tokens_of(slots)
        inner = (a for a in rows.type.axes if a.name not in ("group", "expert", "slot"))
        outer = (a for a in slots.type.axes if a.name in tokens)
        return rows.type.with_axes(no_duplicates((*outer, *inner)))

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        # The position of a token determines the group of its rows.
        return ("group", "expert", "slot", *_tokens_of(operands[2]))

    def meaning(
        self, rows: Array, experts: Array, slots: Array, gates: Array | None = None
    ) -> Array:
        gates = Array(np.ones(slots.data.shape), slots.axes) if gates is None else gates
        tokens = _assignment(slots).tokens
        inner = tuple(a for a in rows.axes if a not in ("group", "expert", "slot"))
        source = rows.to(("group", "expert", "slot", *inner))
        (choice,) = (a for a in gates.axes if a not in tokens)
        weights = _by_token(gates, tokens, (choice,))
        total = np.zeros((len(weights), *source.shape[3:]))
        for rank, (token, group, expert, slot) in _routes(experts, slots):
            weight = weights[token, rank].reshape(-1, *[1] * len(inner))
            total[token] += weight * source[group, expert, slot]
        shape = [slots.size(a) for a in tokens]
        result = Array(total.reshape(*shape, *total.shape[1:]), (*tokens, *inner))
        axes = (*(a for a in slots.axes if a in tokens), *inner)
        return Array(result.to(axes), axes)

    def term(
        self,
        algebra: Algebra,
        rows: Tensor,
        experts: Tensor,
        slots: Tensor,
        gates: Tensor | None = None,
    ) -> Tensor:
        """Return Σ over the choices that have a slot of the gate times the row in this slot."""
        assignment = _slot_terms(slots)
        choice = algebra.fresh(assignment.choice)
        index = {assignment.choice: algebra.index(choice)}
        factors = [rows.at(assignment.place(algebra, algebra.index(choice)))]
        if gates is not None:
            factors.append(algebra.substitute(gates.body, index))
        factors.append(algebra.substitute(assignment.placed, index))
        axes = (*(v for v in slots.axes if v in assignment.tokens), *rows.without(*_ROW_AXES))
        return Tensor(algebra, axes, algebra.multiply(*factors, over=(choice,)))


_ROW_AXES = ("group", "expert", "slot")


def _slot_terms(slots: Tensor) -> SlotTerms:
    if slots.slots is None:
        raise TypeError("these slots do not come from assign_slots or expert_choice")
    return slots.slots


def _dispatched(x: Tensor, assignment: SlotTerms, moved: dict[str, int]) -> Tensor:
    """Return rows, of each of which the token and the choice are functions of its place.

    Args:
      x: a value by token, and perhaps by choice.
      assignment: of slots to choices.
      moved: the axes of `x` that become rows, with their number among tokens and choice.
    """
    algebra = x.algebra
    axes = [
        algebra.axis(name, size) for name, size in zip(_ROW_AXES, assignment.sizes, strict=True)
    ]
    places = [algebra.index(v) for v in axes]
    key, functions = assignment.head, assignment.operands
    indices = {
        name: algebra.apply(Head("token_of", (at, *key)), functions, places)
        for name, at in moved.items()
    }
    rows = x.moved((*axes, *x.without(*moved)), indices)
    if assignment.ragged:
        return rows
    occupied = algebra.apply(Head("occupied", key), functions, places)
    return rows.with_body(algebra.multiply(occupied, rows.body))


@operation(
    "combine",
    "rows experts slots gates",
    linear=(0, 3),
    residual=Residual((0, 1, 2, 3)),
    sharding=combined,
    moves=RowMove.TO_TOKENS,
)
class CombineOp(_CombiningOp):
    """For each token the sum over its choices of gate times row; a dropped one adds nothing."""


@operation(
    "dispatch_gates",
    "gates experts slots",
    results=("row_gates",),
    linear=(0,),
    residual=Residual((1, 2)),
    sharding=gates_dispatched,
    moves=RowMove.GATES_TO_SLOTS,
)
class DispatchGatesOp(Op):
    """The gate of the choice that has each slot; an empty slot holds zero."""

    def infer(self, gates: Operand, experts: Operand, slots: Operand) -> TensorType:
        _check_choices(slots, experts, gates.type)
        return gates.type.with_axes(_row_axes(slots))

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return operands[0].type.names

    def meaning(self, gates: Array, experts: Array, slots: Array) -> Array:
        """Copy the gates; empty slots are as those of ``dispatch``."""
        assignment = _assignment(slots)
        (choice,) = (a for a in gates.axes if a not in assignment.tokens)
        source = _by_token(gates, assignment.tokens, (choice,))
        empty = poison(gates.data) if assignment.is_ragged else 0.0
        row_gates = np.full((*assignment.extents.shape, assignment.slots), empty)
        for rank, (token, group, expert, slot) in _routes(experts, slots):
            row_gates[group, expert, slot] = source[token, rank]
        return Array(row_gates, ("group", "expert", "slot"))

    def term(self, algebra: Algebra, gates: Tensor, experts: Tensor, slots: Tensor) -> Tensor:
        assignment = _slot_terms(slots)
        names = [v.name for v in (*assignment.tokens, assignment.choice)]
        moved = {name: at for at, name in enumerate(names)}
        return _dispatched(gates, assignment, moved)


@operation(
    "weight_rows",
    "rows row_gates",
    results=("weighted",),
    linear=(0, 1),
    elementwise=True,
    residual=PAIR,
    sharding=by_name,
)
class WeightRowsOp(Op):
    """Each row times its gate, in the type of the rows."""

    precision = Word("of the product, before it is rounded", "f32", choices=("default", "f32"))

    def infer(self, rows: Operand, gates: Operand) -> TensorType:
        need_float(rows.type, "the rows")
        need_float(gates.type, "the gates")
        for axis in gates.type:
            same_size(axis_of(rows.type, axis.name, "the rows"), axis)
        return rows.type

    def meaning(self, rows: Array, gates: Array) -> Array:
        return rows.map(lambda data: gates.to(rows.axes) * data)

    def term(self, algebra: Algebra, rows: Tensor, gates: Tensor) -> Tensor:
        return rows.with_body(algebra.multiply(rows.body, gates.body))


@operation(
    "combine_weighted",
    "rows experts slots",
    linear=(0,),
    residual=Residual((1, 2)),
    sharding=combined,
    moves=RowMove.TO_TOKENS,
)
class CombineWeightedOp(_CombiningOp):
    """For each token the sum over its choices of their rows; a dropped one adds nothing."""
