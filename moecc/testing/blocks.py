"""Steps that append a whole block of a Transformer: feed-forward, attention, experts."""

from __future__ import annotations

from collections.abc import Iterable

from moecc.ir.graph import Value
from moecc.ir.ops import OPS
from moecc.testing.arithmetic import UNARY, emit_function, emit_norm
from moecc.testing.growth import Growth, Step, mixable_fixed, token_width
from moecc.testing.places import rotate
from moecc.testing.sparse import emit_mixture
from moecc.types.tensor import Axis

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
    whole, head_dim = Axis("heads", heads * width), Axis("head_dim", width)
    into = (("head", heads), ("head_dim", width))
    q, k, v = (
        g.emit(
            "split",
            g.emit("contract", x, g.param(f"w_{n}", (whole, axis), dtype), over=axis.name),
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
    return g.emit("contract", merged, g.param("w_o", (axis, whole), dtype), over="heads")


BLOCKS: tuple[Step, ...] = (feed_forward, attention, experts)
"""The blocks, from simple to complex."""
