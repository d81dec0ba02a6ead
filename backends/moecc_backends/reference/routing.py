"""The meaning of routing: choices, gates, slots, and the exchange of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moecc.errors import InputError
from moecc.ir.table.routing import capacity
from moecc_backends.reference.arrays import NOTHING, Array, Data, meaning
from moecc_backends.reference.elementwise import logistic
from moecc_backends.reference.reduction import normalised

JITTER = 0.01
"""Half the relative distance from the best logit that sparsemixer still looks at (PhiMoE)."""


@meaning("route")
def route(
    logits: Array, *, top_k: int, gates: str, scale: float, axis: str, choice: str
) -> tuple[Array, Array]:
    """Return the experts with the largest logits, best first, and their gates."""
    rest = tuple(a for a in logits.axes if a != axis)
    scores = logits.to((*rest, axis))
    # A stable sort gives equal logits to the lowest expert.
    experts = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    weights = GATES[gates](scores, experts) * scale
    axes = (*rest, choice)
    return Array(experts, axes), Array(weights, axes)


def _of(scores: Data, experts: Data) -> Data:
    return np.take_along_axis(scores, experts, -1)


def _renormalised(scores: Data, experts: Data) -> Data:
    return normalised(_of(scores, experts))


def _softmax(scores: Data, experts: Data) -> Data:
    return _of(normalised(scores), experts)


def _sigmoid_renormalised(scores: Data, experts: Data) -> Data:
    chosen = logistic(_of(scores, experts))
    return np.asarray(chosen / chosen.sum(-1, keepdims=True))


def _sigmoid(scores: Data, experts: Data) -> Data:
    return logistic(_of(scores, experts))


def _sparsemixer(scores: Data, experts: Data) -> Data:
    """Each choice's softmax among the logits near it; earlier choices no longer take part."""
    left, gates = scores.copy(), []
    for choice in range(experts.shape[-1]):
        expert = experts[..., choice : choice + 1]
        best = _of(left, expert)
        distance = (best - scores) / np.maximum(np.abs(scores), best)
        near = np.where(distance > 2 * JITTER, -np.inf, left)
        gates.append(_of(normalised(near), expert))
        np.put_along_axis(left, expert, -np.inf, -1)
    return np.concatenate(gates, -1)


def _ones(scores: Data, experts: Data) -> Data:
    return np.ones(experts.shape)


GATES: dict[str, Callable[[Data, Data], Data]] = {
    "renormalised": _renormalised,
    "softmax": _softmax,
    "sigmoid-renormalised": _sigmoid_renormalised,
    "sigmoid": _sigmoid,
    "sparsemixer": _sparsemixer,
    "ones": _ones,
}
"""From logits `[…, expert]` and choices `[…, choice]` to gates `[…, choice]`."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the choices of each group of tokens went.

    Attributes:
      tokens: the token axes, outermost first.
      extents: the slots in use, `[group, expert]`.
      slots: the slots that every expert has: the capacity, or the largest extent.
      is_ragged: whether slots beyond an extent are not there.
    """

    tokens: tuple[str, ...]
    extents: Data
    slots: int
    is_ragged: bool


@meaning("place")
def place(
    choices: Array,
    /,
    *,
    tokens: tuple[str, ...],
    experts: int,
    groups: int,
    slots: str,
    order: str,
    **bound: Any,
) -> Array:
    """Return the slot of each choice at its expert, or −1 where it is dropped.

    Raises:
      InputError: the groups do not divide the tokens.
    """
    (choice,) = (a for a in choices.axes if a not in tokens)
    layout = (*tokens, choice)
    chosen = _by_token(choices, tokens, (choice,))
    size = _group_size(len(chosen), groups)
    limit = None
    if slots == "capacity":
        limit = capacity({"experts": experts, **bound}, size, choices.size(choice))
    extents = np.zeros((groups, experts), np.int64)
    placed = np.full_like(chosen, -1)
    for token, rank in _filling(len(chosen), choices.size(choice), order):
        group, expert = token // size, chosen[token, rank]
        if not 0 <= expert < experts or extents[group, expert] == limit:
            continue
        placed[token, rank] = extents[group, expert]
        extents[group, expert] += 1
    count = int(extents.max(initial=0)) if limit is None else limit
    result = Array(placed.reshape([choices.size(a) for a in layout]), layout)
    placement = Placement(tokens, extents, count, limit is None)
    return Array(result.to(choices.axes), choices.axes, placement=placement)


def _group_size(tokens: int, groups: int) -> int:
    if tokens % groups:
        raise InputError(
            "the groups do not divide the tokens",
            expected=f"a multiple of {groups} tokens",
            found=str(tokens),
            hint="choose a number of groups that divides batch times sequence",
        )
    return tokens // groups


def _filling(tokens: int, choices: int, order: str) -> Iterator[tuple[int, int]]:
    """Yield token and rank of the choices in the order in which they are given slots."""
    if order == "choice":
        yield from ((token, rank) for rank in range(choices) for token in range(tokens))
    else:
        yield from ((token, rank) for token in range(tokens) for rank in range(choices))


def _by_token(x: Array, tokens: tuple[str, ...], rest: tuple[str, ...]) -> Data:
    """Return the data of `x` with the token axes merged into a first one."""
    return x.to((*tokens, *rest)).reshape(-1, *(x.size(a) for a in rest))


def _placement(place: Array) -> Placement:
    if place.placement is None:
        raise TypeError("these slots do not come from a place operation")
    return place.placement


def _routes(experts: Array, place: Array) -> Iterator[tuple[int, tuple[Data, Data, Data, Data]]]:
    """Yield, for each rank of choice, token, group, expert and slot of what was placed."""
    placement = _placement(place)
    rest = tuple(a for a in place.axes if a not in placement.tokens)
    slots = _by_token(place, placement.tokens, rest)
    chosen = _by_token(experts, placement.tokens, rest)
    size = max(1, len(slots) // len(placement.extents))
    for rank in range(slots.shape[1]):
        (token,) = np.nonzero(slots[:, rank] >= 0)
        yield rank, (token, token // size, chosen[token, rank], slots[token, rank])


@meaning("dispatch")
def dispatch(x: Array, experts: Array, place: Array) -> Array:
    """Return the tokens, each in the slots that its choices were given.

    An empty slot under a capacity holds zeros.  Beyond a ragged extent there is nothing: NaN.
    """
    placement = _placement(place)
    rest = tuple(a for a in x.axes if a not in placement.tokens)
    source = _by_token(x, placement.tokens, rest)
    empty = poison(x.data) if placement.is_ragged else x.data.dtype.type(0)
    rows = np.full((*placement.extents.shape, placement.slots, *source.shape[1:]), empty)
    for _, (token, group, expert, slot) in _routes(experts, place):
        rows[group, expert, slot] = source[token]
    return Array(rows, ("group", "expert", "slot", *rest))


@meaning("combine")
def combine(rows: Array, experts: Array, place: Array, gates: Array) -> Array:
    """Return each token's sum over its choices of gate times row; a dropped one adds nothing."""
    placement = _placement(place)
    rest = tuple(a for a in rows.axes if a not in ("group", "expert", "slot"))
    source = rows.to(("group", "expert", "slot", *rest))
    (choice,) = (a for a in gates.axes if a not in placement.tokens)
    weights = _by_token(gates, placement.tokens, (choice,))
    total = np.zeros((len(weights), *source.shape[3:]))
    for rank, (token, group, expert, slot) in _routes(experts, place):
        weight = weights[token, rank].reshape(-1, *[1] * len(rest))
        total[token] += weight * source[group, expert, slot]
    outer = tuple(a for a in place.axes if a in placement.tokens)
    shape = [place.size(a) for a in placement.tokens]
    result = Array(total.reshape(*shape, *total.shape[1:]), (*placement.tokens, *rest))
    return Array(result.to((*outer, *rest)), (*outer, *rest))


def poison(data: Data) -> float | int | bool:
    """Return what stands where nothing is: NaN, or the least integer, or False."""
    if data.dtype.kind == "f":
        return float("nan")
    return NOTHING if data.dtype.kind == "i" else False


def poisoned(x: Array, slot: str, placement: Placement) -> Array:
    """Return `x` with nothing beyond the extents of its ragged axis `slot`.

    A value that lost its group or expert axis, or part of one, is returned as it is.
    """
    where = ("group", "expert", slot)
    shape = (*placement.extents.shape, placement.slots)
    if not set(where) <= set(x.axes) or tuple(x.size(a) for a in where) != shape:
        return x
    beyond = np.arange(placement.slots) >= placement.extents[..., None]
    data = np.where(Array(beyond, where).to(x.axes), poison(x.data), x.data)
    return replace(x, data=data.astype(x.data.dtype))
