"""The meaning of slots: assignment, and the movement of rows between tokens and slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moecc.ir.operand import Attrs
from moecc.ir.table.slots import capacity, group_count
from moecc_backends.reference.arrays import NOTHING, Array, Data, SlotAssignment, meaning


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


def _bounds(attrs: Attrs, tokens: int, choices: int) -> tuple[int, int, int | None]:
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


def _assignment(slots: Array) -> SlotAssignment:
    if slots.assignment is None:
        raise TypeError("these slots do not come from assign_slots or expert_choice")
    return slots.assignment


def _routes(experts: Array, slots: Array) -> Iterator[tuple[int, tuple[Data, Data, Data, Data]]]:
    """Yield, for each rank of choice, token, group, expert and slot of the choices with a slot."""
    assignment = _assignment(slots)
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
    assignment = _assignment(slots)
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
    assignment = _assignment(slots)
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
    assignment = _assignment(slots)
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
    assignment = _assignment(slots)
    rest = tuple(a for a in x.axes if a not in assignment.tokens)
    source = _by_token(x, assignment.tokens, rest)
    groups = len(assignment.extents)
    parts = source.reshape(groups, -1, *source.shape[1:])
    return Array(parts.sum(1), ("group", *rest))
