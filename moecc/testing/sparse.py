"""Mixtures of experts for random graphs: every way to choose experts and to give slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from moecc.ir.attributes import Gates, Policy, Using
from moecc.ir.gates import GATES, convention
from moecc.ir.graph import Value
from moecc.ir.mixtures import emit_hash_routing, emit_priority, emit_rescaled
from moecc.ir.moe import SlotOptions
from moecc.testing.growth import Growth, symbolic
from moecc.types.dtypes import I32, KEY, PRED
from moecc.types.tensor import Axis, TensorType

EmitBlock = Callable[[Growth, Value, Axis, Iterable[Axis]], Value]
"""Appends what the experts compute: from rows along an axis, with weights that share axes."""

POLICIES: tuple[Policy, ...] = get_args(Policy)

Choice = tuple[Value, Value, Value]
"""The experts of each token, their gates, and the slots."""


def emit_mixture(g: Growth, x: Value, axis: Axis, emit_block: EmitBlock) -> Value:
    """Append the routing of `x`, ``[batch, seq, embed]``, around a block along `axis`."""
    expert = Axis("expert", g.pick((2, 4, 1, 3)))
    ways = (_by_router, _by_router, _by_router, _by_hash, _by_expert)
    since = len(g.graph)
    experts, gates, slots = g.pick(ways)(g, x, axis, expert)
    if g.chance(15):
        gates = emit_rescaled(g.builder, gates, slots)
    rows = g.builder.dispatch(x, experts, slots)
    _note(g, since)
    y = g.builder.combine(emit_block(g, rows, axis, (expert,)), experts, slots, gates)
    g.values.append(y)
    if g.chance(30):
        g.emit("group_sum", gates if g.chance(50) else x, slots)
    return y


def _by_router(g: Growth, x: Value, axis: Axis, expert: Axis) -> Choice:
    """Tokens choose experts by logits, in one of the gate conventions, with or without a bias."""
    logits = _logits(g, x, axis, expert)
    gates: Gates = g.pick(GATES) if g.chance(60) else "renormalised"
    row = convention(gates)
    top_k = 1 + g.choices.below(min(_size(expert), row.max_top_k or 3))
    bias = [g.param("bias", (expert,), x.type.dtype)] if g.chance(25) else []
    if row.score is None:
        bias = []
    chosen, weights = g.builder.route(
        logits,
        *bias,
        top_k=top_k,
        gates=gates,
        scale=g.pick((1.0, 2.5)),
        using=("bias",) if bias else (),
    )
    return chosen, weights, _slots(g, x, expert, chosen, _given(g, logits, weights))


def _by_hash(g: Growth, x: Value, axis: Axis, expert: Axis) -> Choice:
    """The experts follow from the ids of tokens."""
    ids = g.input("ids", TensorType(I32, tuple(symbolic(x.type))))
    top_k = 1 + g.choices.below(min(_size(expert), 3))
    chosen, weights = emit_hash_routing(
        g.builder, ids, x, experts=_size(expert), top_k=top_k, seed=g.pick((0, 1, 5))
    )
    given: dict[Using, Value] = {}
    _give_mask(g, x, given)
    return chosen, weights, _slots(g, x, expert, chosen, given)


def _by_expert(g: Growth, x: Value, axis: Axis, expert: Axis) -> Choice:
    """Experts choose tokens."""
    b, given = g.builder, dict[Using, Value]()
    _give_mask(g, x, given)
    scores = b.softmax(_logits(g, x, axis, expert), axis="expert")
    factor, least, groups = g.pick((1.0, 0.5, 2.0)), g.pick((1, 2)), _groups(g)
    return b.expert_choice(
        scores,
        *given.values(),
        tokens=_tokens(x),
        experts=_size(expert),
        capacity_factor=factor,
        minimum=least,
        using=("mask",) if given else (),
        groups=groups.get("groups", 1),
        group_size=groups.get("group_size", 0),
    )


def _logits(g: Growth, x: Value, axis: Axis, expert: Axis) -> Value:
    router = g.param("w_router", (expert, axis), x.type.dtype)
    return g.builder.contract(x, router, over=axis.name, name="router")


def _slots(g: Growth, x: Value, expert: Axis, chosen: Value, given: Mapping[Using, Value]) -> Value:
    assignment: SlotOptions = {}
    if g.chance(50):
        assignment = {
            "slots": "capacity",
            "capacity_factor": g.pick((1.0, 0.5, 1.25, 0.75, 2.0)),
            "minimum": g.pick((1, 1, 2, 4)),
            "rounding": g.pick(("floor", "round", "ceil")),
            "convention": g.pick(("tokens", "assignments")),
            "multiple": g.pick((1, 2)),
        }
    assignment["order"] = g.pick(("choice", "token"))
    assignment.update(_groups(g))
    tokens, using = _tokens(x), tuple(given)
    return g.builder.assign_slots(
        chosen, *given.values(), tokens=tokens, experts=_size(expert), using=using, **assignment
    )


def _given(g: Growth, logits: Value, gates: Value) -> dict[Using, Value]:
    """Return what the slots are given beside the experts: often nothing."""
    made: dict[Using, Value] = {}
    b = g.builder
    # A policy is about choices after the first.
    has_further = gates.type["choice"].size != 1
    if g.chance(60 if has_further else 15):
        policy: Policy = g.pick((*POLICIES, "threshold", "random"))
        numbers = [b.random_uniform(g.input("key", TensorType(KEY)), gates)]
        if policy != "random":
            numbers = []
        made["keep"] = b.keep_choices(gates, *numbers, policy=policy, threshold=g.pick((0.5, 0.2)))
    if g.chance(25):
        made["priority"] = emit_priority(b, logits)
    _give_mask(g, logits, made)
    return made


def _give_mask(g: Growth, like: Value, given: dict[Using, Value]) -> None:
    """Give at times a mask of the tokens of `like`."""
    if g.chance(30):
        given["mask"] = g.input("mask", TensorType(PRED, tuple(symbolic(like.type))))


def _groups(g: Growth) -> SlotOptions:
    ways: tuple[SlotOptions, ...] = ({"groups": 1}, {"groups": 2}, {"group_size": 2})
    return g.pick(ways)


def _tokens(x: Value) -> tuple[str, ...]:
    return tuple(a.name for a in symbolic(x.type))


def _size(axis: Axis) -> int:
    return int(str(axis.size))


def _note(g: Growth, since: int) -> None:
    """Let later steps use the results of the nodes after the first `since`."""
    for index, node in enumerate(g.graph):
        if index >= since:
            g.values += node.results
