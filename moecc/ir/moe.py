"""The routing around an expert block, shared by imported models and passes.

A mixture-of-experts layer is the router's product, ``route``, ``assign_slots``, ``dispatch``, the
expert's own operations lifted over the expert axis, and ``combine``.  Families and passes use the
same functions, so that an upcycled graph and the graph read back from its checkpoint are the same
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Required, TypedDict, Unpack

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.conventions import Gates, convention
from moecc.ir.graph import Node, Value
from moecc.ir.ops.routing import RouteOp
from moecc.ir.ops.slots import Convention, Order, Rounding, Slots, Using
from moecc.types import Axis

Finish = Callable[[Value], Value]
"""Combines the experts' output rows into tokens."""

SlotOperands = Callable[[Value, Value, Value], Mapping[Using, Value]]
"""Makes further operands of ``assign_slots``, by word, from logits, experts and gates."""


class BoundOptions(TypedDict, total=False):
    """How tokens are cut into groups, and how a capacity becomes a whole number."""

    groups: int
    group_size: int
    rounding: Rounding
    minimum: int
    multiple: int
    cap: bool


class ExpertChoiceOptions(BoundOptions):
    """Attributes of ``expert_choice`` beside the axes and numbers that its operands decide."""

    capacity_factor: Required[float]


class SlotOptions(BoundOptions, total=False):
    """Attributes of ``assign_slots`` beside the axes and numbers that its operands decide."""

    slots: Slots
    capacity_factor: float
    convention: Convention
    order: Order


def emit_routing(
    builder: Builder,
    x: Value,
    router_weight: Value,
    *,
    experts: int,
    top_k: int,
    gates: Gates = "renormalised",
    scale: float = 1.0,
    tokens: tuple[str, ...] = ("batch", "seq"),
    operands: SlotOperands | None = None,
    bias: Value | None = None,
    shift: Value | None = None,
    floor: float = 0.0,
    weighs_inputs: bool = False,
    limit: tuple[int, int] = (1, 1),
    **assignment: Unpack[SlotOptions],
) -> tuple[Value, Finish]:
    """Route `x` to `experts` experts; return their rows and the function that combines them.

    Args:
      builder: where operations are appended.
      x: the tokens, ``[*tokens, embed]``.
      router_weight: ``[expert, embed]``.
      experts: the number of experts, at least `top_k`.
      top_k: experts per token.
      gates: the gate convention, see ``route``.
      scale: a factor on the gates.
      tokens: the axes of `x` that number tokens, outermost first.
      operands: makes the operands of ``assign_slots`` after the experts: keep, priority, mask.
      bias: ``[expert]``, added for the choice and not for the gates (loss-free balancing).
      shift: ``[expert]``, added to the logits.
      floor: what is added to the sum that sigmoids are divided by.
      weighs_inputs: whether gates multiply what experts read, in place of what they return.
      limit: how many equal groups experts are in, and in how many of them a token chooses.
      assignment: further attributes of ``assign_slots``: slots, groups, capacity_factor and so on.

    Returns:
      The rows, ``[group, expert, slot, embed]``, and a function from the experts' output rows to
      ``[*tokens, embed]``; it emits ``combine`` at the builder's position when called.

    Raises:
      InputError: operands or attributes are inconsistent.
    """
    over = tuple(n for n in router_weight.type.names if n in x.type and n not in tokens)
    left = [a for a in router_weight.type.axes if a.name not in over]
    if [(a.name, a.size) for a in left] != [("expert", experts)]:
        raise InputError(
            "the router has one row per expert",
            where=f"%{router_weight.name}",
            expected=f"an axis expert={experts} besides those of the tokens, {x.type}",
            found=str(router_weight.type),
        )
    logits = builder.contract(x, router_weight, over=over, precision="f32", name="router")
    if shift is not None:
        logits = builder.add(logits, shift)
    if limit[0] != limit[1]:
        bias = emit_group_bias(builder, logits, bias, gates, limit)
    biases = () if bias is None else (bias,)
    using: tuple[Literal["bias"], ...] = ("bias",) if biases else ()
    if not floor:
        chosen, weights = builder.route(
            logits, *biases, top_k=top_k, gates=gates, scale=scale, using=using
        )
    else:
        chosen, weights = builder.route(logits, *biases, top_k=top_k, gates="sigmoid", using=using)
        total = builder.sum(weights, axes="choice")
        least = builder.constant(value=floor, dtype=weights.type.dtype.name)
        weights = builder.div(weights, builder.add(total, least))
        weights = weights if scale == 1 else builder.scale(weights, by=scale)
    more = operands(logits, chosen, weights) if operands is not None else {}
    return emit_chosen(
        builder, x, chosen, weights, experts=experts, tokens=tokens, operands=more,
        weighs_inputs=weighs_inputs, **assignment,
    )  # fmt: skip


def emit_group_bias(
    builder: Builder, logits: Value, bias: Value | None, gates: Gates, groups: tuple[int, int]
) -> Value:
    """Return the bias of the choice that keeps a token to its best groups: −∞ elsewhere.

    Groups are compared by their best expert under a softmax (DeepSeek-V2, arXiv 2405.04434,
    section 2.2.2), and by the sum of their two best under sigmoids (DeepSeek-V3, 2412.19437).

    Args:
      builder: where operations are appended.
      logits: ``[*tokens, expert]``.
      bias: ``[expert]``, added to the scores; None for none.
      gates: the gate convention, whose score is taken.
      groups: how many there are, and in how many of them a token chooses.
    """
    experts, (count, open_count) = _count(logits, "expert"), groups
    is_sigmoid = convention(gates).score == "sigmoid"
    scores = builder.sigmoid(logits) if is_sigmoid else builder.softmax(logits, axis="expert")
    if bias is None:
        added = builder.constant(value=0.0, dtype=logits.type.dtype.name)
    else:
        scores, added = builder.add(scores, bias), bias
    into = (("expert_group", count), ("member", experts // count))
    by_group = builder.split(scores, axis="expert", into=into)
    if is_sigmoid:
        best, _ = builder.route(by_group, top_k=2, gates="ones", axis="member", choice="best")
        hot = builder.sum(builder.one_hot(best, into=into[1:]), axes="best")
        strength = builder.sum(builder.mul(by_group, hot), axes="member")
    else:
        strength = builder.max(by_group, axes="member")
    chosen, _ = builder.route(
        strength, top_k=open_count, gates="ones", axis="expert_group", choice="open"
    )
    hot = builder.sum(builder.one_hot(chosen, into=into[:1]), axes="open")
    half = builder.constant(value=0.5, dtype=hot.type.dtype.name)
    is_open = builder.broadcast(builder.less(half, hot), by_group)
    is_open = builder.merge(is_open, axes=("expert_group", "member"), into="expert")
    return builder.mask(builder.broadcast(added, logits), is_open, name="group_bias")


def routing_bias_of(route: Node) -> Value | None:
    """Return the parameter that takes part in the choice of a ``route``, limited to groups or not.

    None if there is none.
    """
    bias = next(iter(route.operands[1:]), None)
    while bias is not None and not bias.is_param:
        bias = next(iter(bias.node.operands), None) if bias.node is not None else None
    return bias


def groups_of(route: Node) -> tuple[int, int]:
    """Return how many groups experts are in, and in how many of them a token chooses."""
    bias = next(iter(route.operands[1:]), None)
    if bias is None or bias.node is None:
        return 1, 1
    nodes = [v.node for v in bias.node.operands[1:] if v.node is not None]
    for node in nodes:
        if node.op.routes:
            attrs = RouteOp.of_node(node)
            return _count(node.operands[0], attrs.axis), attrs.top_k
        nodes += [v.node for v in node.operands if v.node is not None]
    return 1, 1


def emit_chosen(
    builder: Builder,
    x: Value,
    chosen: Value,
    gates: Value,
    *,
    experts: int,
    tokens: tuple[str, ...] = ("batch", "seq"),
    operands: Mapping[Using, Value] | None = None,
    weighs_inputs: bool = False,
    **assignment: Unpack[SlotOptions],
) -> tuple[Value, Finish]:
    """Assign slots to experts already chosen; return the rows and the function that combines them.

    Args:
      builder: where operations are appended.
      x: the tokens, ``[*tokens, embed]``.
      chosen: the experts of each token, ``[*tokens, choice]``.
      gates: the weights of their results, with the same axes.
      experts: the number of experts.
      tokens: the axes of `x` that number tokens, outermost first.
      operands: further operands of ``assign_slots``, by word.
      weighs_inputs: whether gates multiply what experts read, in place of what they return.
      assignment: further attributes of ``assign_slots``: slots, groups, capacity_factor and so on.
    """
    more = operands or {}
    slots = builder.assign_slots(
        chosen, *more.values(), tokens=tokens, experts=experts, using=tuple(more), **assignment
    )
    rows = builder.dispatch(x, chosen, slots)
    if weighs_inputs:
        rows = builder.weight_rows(rows, builder.dispatch_gates(gates, chosen, slots))

    def finish(rows_out: Value) -> Value:
        if weighs_inputs:
            return builder.combine_weighted(rows_out, chosen, slots)
        return builder.combine(rows_out, chosen, slots, gates)

    return rows, finish


def emit_shared_gate(builder: Builder, x: Value, gate_weight: Value, shared: Value) -> Value:
    """Return the output of a shared expert times sigmoid(x · gate), as Qwen2-MoE has it.

    Args:
      builder: where the operations go.
      x: the input of the shared expert, ``[batch, seq, embed]``.
      gate_weight: ``[embed]``.
      shared: its output, ``[batch, seq, embed]``.
    """
    gate = builder.sigmoid(builder.contract(x, gate_weight, over=gate_weight.type.names))
    return builder.mul(gate, shared)


# Building blocks of routing from operations of the table, for passes and hand-written models.
#
# Each function appends operations to a builder and returns their results.  Formulas are cited
# from their papers.


def emit_jitter(builder: Builder, x: Value, key: Value, width: float) -> Value:
    """Return `x` times uniform numbers on [1 − width, 1 + width) (Switch, Fedus et al. 2021)."""
    factor = builder.random_uniform(key, x, low=1 - width, high=1 + width, name="jitter")
    return builder.mul(x, factor)


def emit_dropout(builder: Builder, x: Value, key: Value, rate: float) -> Value:
    """Return `x` with a share `rate` of its elements zero and the rest scaled up to compensate."""
    uniform = builder.random_uniform(key, x)
    bound = builder.constant(value=rate, dtype=uniform.type.dtype.name)
    dropped = builder.less(uniform, bound)
    zero = builder.constant(value=0.0, dtype=x.type.dtype.name)
    return builder.select(dropped, zero, builder.scale(x, by=1 / (1 - rate)))


def emit_noise(builder: Builder, logits: Value, key: Value, std: float) -> Value:
    """Return `logits` plus normal noise of standard deviation `std` (Shazeer et al. 2017)."""
    return builder.add(logits, builder.random_normal(key, logits, std=std, name="noise"))


def emit_priority(builder: Builder, logits: Value) -> Value:
    """Return each token's largest probability, ``[*tokens]`` (V-MoE, Riquelme et al. 2021)."""
    probabilities = builder.softmax(logits, axis="expert")
    return builder.max(probabilities, axes="expert", name="priority")


def emit_rescaled(builder: Builder, gates: Value, slots: Value) -> Value:
    """Return the gates of the choices with a slot, scaled to the sum of all gates of the token.

    This is renormalisation after a drop: a token whose second expert was full gives all its weight
    to the first.  A token without any slot gets zeros.
    """
    none = builder.constant(value=-1.0, dtype="i32")
    kept_gates = builder.mask(gates, builder.less(none, slots), fill=0.0)
    total, left = (builder.sum(g, axes="choice") for g in (gates, kept_gates))
    zero, unit = (builder.constant(value=v, dtype=gates.type.dtype.name) for v in (0.0, 1.0))
    # Dividing by 1 where no gate is left keeps 0/0 out of the gradient, too.
    divisor = builder.select(builder.less(zero, left), left, unit)
    return builder.mul(kept_gates, builder.div(total, divisor))


def emit_prototypes(
    builder: Builder, logits: Value, prototypes: int, *, gates: Gates = "softmax"
) -> tuple[Value, Value]:
    """Return experts and gates of k groups of experts with top-1 routing each (M6-T, 2021).

    Args:
      builder: where operations are appended.
      logits: ``[*tokens, expert]``.
      prototypes: the number of groups; it divides the experts.
      gates: the gate convention within a group.

    Raises:
      InputError: the groups do not divide the experts.
    """
    experts = _count(logits, "expert")
    if prototypes < 1 or experts % prototypes:
        raise InputError(
            "the prototypes do not divide the experts",
            expected=f"a divisor of {experts}",
            found=str(prototypes),
        )
    each = experts // prototypes
    cut = builder.split(logits, axis="expert", into=(("choice", prototypes), ("expert", each)))
    local, weights = builder.route(cut, top_k=1, gates=gates, choice="first")
    step = builder.constant(value=float(each), dtype="i32")
    offset = builder.mul(builder.positions(cut, axis="choice"), step)
    chosen = builder.add(local, offset)
    axes = ("choice", "first")
    merged: list[Value] = [builder.merge(v, axes=axes, into="choice") for v in (chosen, weights)]
    return merged[0], merged[1]


def emit_hash_routing(
    builder: Builder, ids: Value, like: Value, *, experts: int, top_k: int, seed: int
) -> tuple[Value, Value]:
    """Return experts by the hash of each token's id, and equal gates that add up to one.

    Args:
      builder: where operations are appended.
      ids: ``[*tokens]``, integers.
      like: a value with the element type of the gates.
      experts: the number of experts.
      top_k: experts per token.
      seed: chooses the hash.
    """
    chosen = builder.hash_experts(ids, experts=experts, top_k=top_k, seed=seed)
    share = builder.constant(value=1 / top_k, dtype=like.type.dtype.name)
    gates = builder.broadcast(share, chosen, name="gates")
    return chosen, gates


def emit_expert_choice(
    builder: Builder,
    x: Value,
    router_weight: Value,
    *,
    tokens: Sequence[str],
    **attrs: Unpack[ExpertChoiceOptions],
) -> tuple[Value, Value, Value]:
    """Return experts, gates and slots where experts choose tokens (Zhou et al. 2022).

    Args:
      builder: where operations are appended.
      x: ``[*tokens, embed]``.
      router_weight: ``[expert, embed]``.
      tokens: the axes of `x` that number tokens, outermost first.
      attrs: of ``expert_choice``: capacity_factor, groups and so on.
    """
    over = tuple(n for n in router_weight.type.names if n in x.type)
    logits = builder.contract(x, router_weight, over=over, precision="f32")
    scores = builder.softmax(logits, axis="expert")
    experts = _count(scores, "expert")
    return builder.expert_choice(scores, tokens=tuple(tokens), experts=experts, **attrs)


def emit_unit(builder: Builder, x: Value, axis: str) -> Value:
    """Return `x` divided by its length along `axis`; 1e-6 is added to the squared length."""
    squared = builder.sum(builder.square(x), axes=axis)
    small = builder.constant(value=1e-6, dtype=x.type.dtype.name)
    return builder.mul(x, builder.rsqrt(builder.add(squared, small)))


def emit_soft_slots(
    builder: Builder,
    x: Value,
    slot_weight: Value,
    *,
    tokens: str = "seq",
    embed: str = "embed",
    like: Value | None = None,
) -> tuple[Value, Value]:
    """Return the rows of a soft mixture, and the weights that combine the experts' results.

    Every slot is a mean of all tokens of a sequence, every token a mean of all slots (Puigcerver
    et al. 2023); the paper's logits are of `emit_unit` of both, times a learned scale.  The result
    is the ``contract`` of the experts' results with the weights, over expert and slot.
    Not causal.

    Args:
      builder: where operations are appended.
      x: ``[batch, tokens, embed]``.
      slot_weight: ``[expert, slot, embed]``.
      tokens: the axis of the tokens that are mixed.
      embed: the axis of the model's width.
      like: computes the logits in place of `x`: a normalised `x`, for example.
    """
    logits = builder.contract(x if like is None else like, slot_weight, over=embed)
    rows = builder.contract(builder.softmax(logits, axis=tokens), x, over=tokens, name="rows")
    sizes = tuple((n, _count(logits, n)) for n in ("expert", "slot"))
    flat = builder.merge(logits, axes=("expert", "slot"), into="soft_slot")
    weights = builder.split(builder.softmax(flat, axis="soft_slot"), axis="soft_slot", into=sizes)
    return rows, weights


def _count(value: Value, name: str) -> int:
    axis: Axis | None = value.type.by_name.get(name)
    if axis is None or not isinstance(axis.size, int):
        raise InputError(f"there is no axis {name!r} of known size", found=str(value.type))
    return axis.size
