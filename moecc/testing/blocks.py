"""Steps that append a whole block of a Transformer: feed-forward, attention, experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from moecc.ir.conventions import GATES, Gates, convention
from moecc.ir.graph import Value
from moecc.ir.moe import SlotOptions, emit_hash_routing, emit_priority, emit_rescaled
from moecc.ir.operation import OPS
from moecc.ir.ops.routing import Policy
from moecc.ir.ops.slots import Using
from moecc.testing.growth import Growth, Step, mixable_fixed, symbolic, token_width
from moecc.testing.steps import UNARY, emit_function, emit_norm, rotate
from moecc.types import I32, KEY, PRED, Axis, TensorType

# Mixtures of experts for random graphs: every way to choose experts and to give slots.

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
    for index, node in enumerate(g.graph):
        if index >= since:
            g.values += node.results
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
    further: dict[Using, Value] = {}
    _give_mask(g, x, further)
    return chosen, weights, _slots(g, x, expert, chosen, further)


def _by_expert(g: Growth, x: Value, axis: Axis, expert: Axis) -> Choice:
    """Experts choose tokens."""
    b, further = g.builder, dict[Using, Value]()
    _give_mask(g, x, further)
    scores = b.softmax(_logits(g, x, axis, expert), axis="expert")
    factor, least, groups = g.pick((1.0, 0.5, 2.0)), g.pick((1, 2)), _groups(g)
    return b.expert_choice(
        scores,
        *further.values(),
        tokens=_tokens(x),
        experts=_size(expert),
        capacity_factor=factor,
        minimum=least,
        using=("mask",) if further else (),
        groups=groups.get("groups", 1),
        group_size=groups.get("group_size", 0),
    )


def _logits(g: Growth, x: Value, axis: Axis, expert: Axis) -> Value:
    router = g.param("w_router", (expert, axis), x.type.dtype)
    return g.builder.contract(x, router, over=axis.name, name="router")


def _slots(
    g: Growth, x: Value, expert: Axis, chosen: Value, further: Mapping[Using, Value]
) -> Value:
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
    tokens, using = _tokens(x), tuple(further)
    return g.builder.assign_slots(
        chosen, *further.values(), tokens=tokens, experts=_size(expert), using=using, **assignment
    )


def _given(g: Growth, logits: Value, gates: Value) -> dict[Using, Value]:
    """Return what the slots are given beside the experts: often nothing."""
    further: dict[Using, Value] = {}
    b = g.builder
    # A policy is about choices after the first.
    has_further = gates.type["choice"].size != 1
    if g.chance(60 if has_further else 15):
        policy: Policy = g.pick((*POLICIES, "threshold", "random"))
        numbers = [b.random_uniform(g.input("key", TensorType(KEY)), gates)]
        if policy != "random":
            numbers = []
        further["keep"] = b.keep_choices(
            gates, *numbers, policy=policy, threshold=g.pick((0.5, 0.2))
        )
    if g.chance(25):
        further["priority"] = emit_priority(b, logits)
    _give_mask(g, logits, further)
    return further


def _give_mask(g: Growth, like: Value, further: dict[Using, Value]) -> None:
    """Give at times a mask of the tokens of `like`."""
    if g.chance(30):
        further["mask"] = g.input("mask", TensorType(PRED, tuple(symbolic(like.type))))


def _groups(g: Growth) -> SlotOptions:
    ways: tuple[SlotOptions, ...] = ({"groups": 1}, {"groups": 2}, {"group_size": 2})
    return g.pick(ways)


def _tokens(x: Value) -> tuple[str, ...]:
    return tuple(a.name for a in symbolic(x.type))


def _size(axis: Axis) -> int:
    return int(str(axis.size))


ROUTING_AXES = {"group", "expert", "slot", "choice"}
ATTENTION_AXES = {"heads", "head", "head_dim", "kv_seq"}
ACTIVATIONS = tuple(name for name in UNARY if not OPS[name].linear)
"""What may stand between the products of a feed-forward block, whatever is in the table."""


def feed_forward(g: Growth) -> None:
    """Append a feed-forward block, gated or not, with biases or not, with or without residual."""
    since = len(g.values)
    x = g.find_float(lambda t: bool(mixable_fixed(t)))
    if x is None:
        return
    axis = g.pick(mixable_fixed(x.type))
    normed = emit_norm(g, x, axis) if g.chance(60) else x
    expert = [x.type["expert"]] if "expert" in x.type and axis.name != "expert" else []
    y = emit_ffn(g, normed, axis, expert)
    if g.chance(60):
        g.emit("add", x, y)
    g.tap(since)


def emit_ffn(g: Growth, x: Value, axis: Axis, batch: Iterable[Axis] = ()) -> Value:
    """Append contract, activation, contract from `axis` to an inner axis and back.

    Args:
      g: the graph that grows.
      x: what the block reads.
      axis: the axis of `x` that it works along.
      batch: axes that the weights share with `x`, such as ``expert``.
    """
    batch, dtype = tuple(batch), x.type.dtype
    inner = g.new_axis("mlp", x.type)
    shapes = {"up": (*batch, inner, axis), "down": (*batch, axis, inner)}
    if g.chance(30):
        shapes = {"up": (*batch, axis, inner), "down": (*batch, inner, axis)}

    def project(name: str, value: Value, over: Axis) -> Value:
        axes = shapes["down" if name == "w_down" else "up"]
        return g.emit("contract", value, g.param(name, axes, dtype), over=over.name)

    is_gated, has_bias = g.chance(60), g.chance(40)
    hidden = project("w_gate" if is_gated else "w_up", x, axis)
    if has_bias and g.chance(60):
        hidden = g.emit("add", hidden, g.param("b_up", (*batch, inner), dtype))
    hidden = emit_function(g, hidden, ACTIVATIONS)
    if is_gated:
        up = project("w_up", x, axis)
        pair = (hidden, up) if g.chance(70) else (up, hidden)
        hidden = g.emit("mul", *pair)
    y = project("w_down", hidden, inner)
    if has_bias:
        y = g.emit("add", y, g.param("b_down", (*batch, axis), dtype))
    # As granular experts and residual multipliers do.
    return g.emit("scale", y, by=g.pick((2.0, 0.5, 3.0))) if g.chance(25) else y


def experts(g: Growth) -> None:
    """Append a mixture of experts: router, choices, slots, lifted feed-forward block, combine."""
    since = len(g.values)
    x = g.find_float(lambda t: token_width(t) is not None)
    axis = token_width(x.type) if x is not None else None
    if x is None or axis is None or ROUTING_AXES & set(x.type.names):
        return
    y = emit_mixture(g, x, axis, emit_ffn)
    if g.chance(60):
        g.emit("add", x, y)
    g.tap(since)


def attention(g: Growth) -> None:
    """Append self-attention, causal or not, with rotary positions or not."""
    since = len(g.values)
    x = g.find_float(lambda t: token_width(t) is not None and {"batch", "seq"} <= set(t.names))
    axis = token_width(x.type) if x is not None else None
    if x is None or axis is None or ATTENTION_AXES & set(x.type.names):
        return
    y = emit_attention(g, x, axis)
    if g.chance(60):
        g.emit("add", x, y)
    g.tap(since)


def emit_attention(g: Growth, x: Value, axis: Axis) -> Value:
    """Append multi-head self-attention of `x`, ``[batch, seq, embed]``, along ``seq``."""
    dtype = x.type.dtype
    heads, width = g.pick((2, 1, 3)), g.pick((2, 4))
    merged_axis, head_dim = Axis("heads", heads * width), Axis("head_dim", width)
    into = (("head", heads), ("head_dim", width))
    q, k, v = (
        g.emit(
            "split",
            g.emit("contract", x, g.param(f"w_{n}", (merged_axis, axis), dtype), over=axis.name),
            axis="heads",
            into=into,
        )
        for n in "qkv"
    )
    positions = g.emit("positions", x, axis="seq")
    if g.chance(50):
        q, k = (rotate(g, part, positions, head_dim) for part in (q, k))
    k, v = (g.emit("rename", part, axis="seq", to="kv_seq") for part in (k, v))
    scores = g.emit("scale", g.emit("contract", q, k, over="head_dim"), by=width**-0.5)
    if g.chance(60):
        keys = g.emit("rename", positions, axis="seq", to="kv_seq")
        window = g.pick((0, 1, 2, None))
        seen = (
            g.emit("same_segment", positions, keys)
            if window is None
            else g.emit("causal", positions, keys, window=window)
        )
        scores = g.emit("mask", scores, seen)
    weights = g.emit("softmax", scores, axis="kv_seq")
    mixed = g.emit("contract", weights, v, over="kv_seq")
    merged = g.emit("merge", mixed, axes=("head", "head_dim"), into="heads")
    return g.emit("contract", merged, g.param("w_o", (axis, merged_axis), dtype), over="heads")


BLOCKS: tuple[Step, ...] = (feed_forward, attention, experts)
"""The blocks, from simple to complex."""
