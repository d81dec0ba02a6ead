"""The steps that append one operation, or a whole block: feed-forward, attention, experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from moecc.ir.conventions import GATES, Gates, convention
from moecc.ir.graph import Value
from moecc.ir.moe import SlotOptions, emit_hash_routing, emit_priority, emit_rescaled
from moecc.ir.operation import OPS
from moecc.ir.ops.routing import Policy
from moecc.ir.ops.slots import Using
from moecc.ir.traits import Domain
from moecc.testing.growth import (
    Growth,
    Step,
    fixed,
    is_within,
    mixable,
    mixable_fixed,
    symbolic,
    token_width,
)
from moecc.types import BF16, F32, I32, KEY, PRED, Axis, TensorType

# Steps that compute: element by element, along an axis, or over one.


def _functions(operands: int) -> dict[str, Domain]:
    """Return the functions of `operands` numbers in the table that need no attribute."""
    rows = (row for row in OPS.values() if row.liftable and not row.attrs)
    return {row.name: row.domain for row in rows if len(row.operands) == operands}


def _everywhere(functions: dict[str, Domain]) -> tuple[str, ...]:
    return tuple(name for name, domain in functions.items() if domain is Domain.REAL)


UNARY = _everywhere(_functions(1))
BINARY = _everywhere(_functions(2))
FORMULAS = ("mul(a, tanh(logaddexp(a, 0.0)))", "logaddexp(a, 0.0)", "maximum(a, mul(a, 0.125))")
"""Functions without an operation of their own: Mish, softplus, a leaky rectifier."""

GUARDED = {n: d for n, d in (_functions(1) | _functions(2)).items() if d is not Domain.REAL}


def unary(g: Growth) -> None:
    """Apply a function to each element."""
    x = g.find_float()
    if x is None:
        return
    if g.chance(30):
        g.emit("scale", x, by=g.pick((2.0, 1.0, 0.5, 0.0, -1.0)))
        return
    emit_function(g, x, UNARY)


def emit_function(g: Growth, x: Value, names: Sequence[str]) -> Value:
    """Append one of the functions `names` of `x`, or at times a formula."""
    if g.chance(10):
        return g.emit("pointwise", x, function=g.pick(FORMULAS))
    return g.emit(g.pick(names), x)


def binary(g: Growth) -> None:
    """Combine a value with one whose axes are among its own, or with a parameter."""
    x = g.find_float()
    if x is None:
        return
    y = _companion(g, x)
    pair = (x, y) if g.chance(70) else (y, x)
    g.emit(g.pick(BINARY), *pair)


def _companion(g: Growth, x: Value) -> Value:
    """Return something to combine `x` with element by element."""
    if g.chance(50):
        axes = [a for a in fixed(x.type) if g.chance(60)]
        return g.param("b", axes, x.type.dtype)
    if g.chance(20):
        return g.constant(g.pick((1.0, 0.0, 2.0, -0.5)), x.type.dtype)
    return g.find_within(x.type) or x


def guarded(g: Growth) -> None:
    """Apply a function that is not defined everywhere, where it is defined."""
    x = g.find_float()
    if x is None:
        return
    name = g.pick(tuple(GUARDED))
    if GUARDED[name] is Domain.MODERATE:
        g.emit(name, g.emit("tanh", x))
        return
    unit = g.constant(1.0, x.type.dtype)
    positive = g.emit("add", g.emit("square", x), unit)
    if len(OPS[name].operands) == 2:
        y = g.find_within(x.type) or x
        g.emit(name, y, positive)
        return
    g.emit(name, positive)


def contract(g: Growth) -> None:
    """Contract a value with a parameter over a fixed axis, or two."""
    x = g.find_float(lambda t: bool(mixable_fixed(t)))
    if x is None:
        return
    over = [g.pick(mixable_fixed(x.type))]
    if g.chance(15):
        over = list(dict.fromkeys([*over, g.pick(mixable_fixed(x.type))]))
    free = [a for a in fixed(x.type) if a not in over]
    shared = [a for a in free if g.chance(90 if a.name == "expert" else 15)]
    new = [] if g.chance(10) else [g.new_axis(g.pick(("mlp", "embed", "vocab")), x.type)]
    axes = [*shared, *new, *over] if g.chance(70) else [*over, *shared, *new]
    w = g.param("w", axes, x.type.dtype)
    g.emit("contract", x, w, over=tuple(a.name for a in over))


def contract_pair(g: Growth) -> None:
    """Contract two values that share an axis."""
    x = g.find_float(lambda t: bool(mixable(t)))
    if x is None:
        return
    type, over = x.type, g.pick(mixable(x.type))

    def fits(t: TensorType) -> bool:
        return (
            t.dtype == type.dtype
            and over in mixable(t)
            and all(type.by_name.get(a.name, a) == a for a in t.axes)
            and len({*t.names, *type.names}) <= 6
        )

    y = g.find_float(fits) or x
    g.emit("contract", x, y, over=over.name)


def windows(g: Growth) -> None:
    """Convolve a value along a fixed axis with a parameter, over another or none."""
    x = g.find_float(lambda t: bool(mixable_fixed(t)))
    if x is None:
        return
    along = g.pick(mixable_fixed(x.type))
    others = [a for a in mixable_fixed(x.type) if a != along]
    over = [g.pick(others)] if others and g.chance(70) else []
    tap, output = g.new_axis("tap", x.type), g.new_axis("mlp", x.type)
    taps = 1 + g.choices.below(int(str(along.size)))
    w = g.param("w", [output, *over, Axis(tap.name, taps)], x.type.dtype)
    g.emit(
        "convolve",
        x,
        w,
        over=tuple(a.name for a in over),
        along=along.name,
        taps=tap.name,
        stride=g.pick((1, 2, 3)),
        padding=g.pick((0, 1)),
    )


def norm(g: Growth) -> None:
    """Normalise along a fixed axis."""
    x = g.find_float(lambda t: bool(mixable_fixed(t)))
    if x is not None:
        emit_norm(g, x, g.pick(mixable_fixed(x.type)))


def emit_norm(g: Growth, x: Value, axis: Axis) -> Value:
    """Append one of the normalisations of `x` along `axis`."""
    eps = g.pick((1e-6, 1e-5, 1e-2))
    scale = g.param("g", [axis], x.type.dtype)
    if g.chance(40):
        bias = g.param("b", [axis], x.type.dtype)
        return g.emit("layer_norm", x, scale, bias, axis=axis.name, eps=eps)
    return g.emit("rms_norm", x, scale, axis=axis.name, eps=eps)


def reduce(g: Growth) -> None:
    """Reduce over an axis, or two, or make them a distribution."""
    x = g.find_float(lambda t: bool(mixable(t)))
    if x is None:
        return
    name = g.pick(("sum", "mean", "max", "softmax", "logsumexp"))
    axes = [g.pick(mixable(x.type)).name]
    if name == "softmax":
        g.emit(name, x, axis=axes[0])
        return
    if g.chance(25):
        axes = list(dict.fromkeys([*axes, g.pick(mixable(x.type)).name]))
    g.emit(name, x, axes=tuple(axes))


def compare(g: Growth) -> None:
    """Compare, then select or mask by the result."""
    x = g.find_float()
    if x is None:
        return
    keep = g.emit(g.pick(("less", "equal")), x, _companion(g, x))
    if g.chance(50):
        g.emit("mask", x, keep, fill=g.pick((0.0, -1.0, 3.0)))
        return
    g.emit("select", keep, x, _companion(g, x))


def cast(g: Growth) -> None:
    """Change the element type."""
    x = g.find(lambda v: v.type.dtype.kind != "key")
    if x is not None:
        g.emit("cast", x, dtype=g.pick((F32, g.dtype, BF16)).name)


# Steps that name, cut, join and repeat axes, and compute nothing.


def rename(g: Growth) -> None:
    """Rename an axis."""
    x = g.find(lambda v: bool(mixable(v.type)))
    if x is None:
        return
    to = g.new_axis(g.pick(("mlp", "embed", "kv_seq", "head")), x.type)
    g.emit("rename", x, axis=g.pick(mixable(x.type)).name, to=to.name)


def split(g: Growth) -> None:
    """Cut an axis of fixed size in two."""
    x = g.find(lambda v: bool(mixable_fixed(v.type)))
    if x is None:
        return
    axis = g.pick(mixable_fixed(x.type))
    size = int(str(axis.size))
    outer = g.pick([d for d in range(1, size + 1) if size % d == 0])
    names = g.new_axis("head", x.type).name, g.new_axis("head_dim", x.type).name
    g.emit("split", x, axis=axis.name, into=((names[0], outer), (names[1], size // outer)))


def merge(g: Growth) -> None:
    """Make one axis of two or three of fixed size."""
    x = g.find(lambda v: len(mixable_fixed(v.type)) > 1)
    if x is None:
        return
    axes = list(dict.fromkeys(g.pick(mixable_fixed(x.type)).name for _ in range(3)))
    into = axes[0] if g.chance(30) else g.new_axis("embed", x.type).name
    g.emit("merge", x, axes=tuple(axes), into=into)


def broadcast(g: Growth) -> None:
    """Repeat a value along the axes of another."""
    like = g.find(lambda v: bool(v.type.axes))
    if like is None:
        return
    x = g.find(lambda v: is_within(v.type, like.type))
    if x is not None:
        g.emit("broadcast", x, like)


def slice_(g: Growth) -> None:
    """Take a range of an axis of fixed size."""
    x = g.find(lambda v: bool(mixable_fixed(v.type)))
    if x is None:
        return
    axis = g.pick(mixable_fixed(x.type))
    start = g.choices.below(int(str(axis.size)))
    stop = start + 1 + g.choices.below(int(str(axis.size)) - start)
    g.emit("slice", x, axis=axis.name, start=start, stop=stop)


# Steps in which it matters where an element stands: indices, positions, random numbers.


def lookup(g: Growth) -> None:
    """Look rows up in a table, or mark indices along a new axis."""
    ids = g.find(_is_index)
    if ids is None or g.chance(30):
        ids = g.input("ids", TensorType(I32, g.tokens))
    vocab = g.new_axis("vocab", ids.type)
    if g.chance(30):
        g.emit("one_hot", ids, into=((vocab.name, vocab.size),))
        return
    embed = g.new_axis("embed", ids.type)
    table = g.param("table", [vocab, embed], g.dtype)
    g.emit("embedding", table, ids, axis=vocab.name)


def _is_index(value: Value) -> bool:
    return value.type.dtype == I32 and value.node is None


def count(g: Growth) -> None:
    """Number an axis, and compute with the numbers."""
    x = g.find(lambda v: bool(mixable(v.type)))
    if x is None:
        return
    at = g.emit("positions", x, axis=g.pick(mixable(x.type)).name)
    if g.chance(40):
        number = g.constant(g.pick((1.0, 3.0)), I32)
        at = g.emit(g.pick(BINARY), at, number)
    if g.chance(50):
        g.emit("cast", at, dtype=g.dtype.name)


def rotary(g: Growth) -> None:
    """Rotate along an axis, by the positions along another, with one of the scalings."""
    x = g.find_float(lambda t: bool(_pairs(t)) and len(mixable(t)) > 1)
    if x is None:
        return
    axis = g.pick(_pairs(x.type))
    along = g.pick([a for a in mixable(x.type) if a != axis])
    rotate(g, x, g.emit("positions", x, axis=along.name), axis)


def _pairs(type: TensorType) -> list[Axis]:
    return [a for a in mixable_fixed(type) if int(str(a.size)) % 2 == 0]


def rotate(g: Growth, x: Value, positions: Value, axis: Axis) -> Value:
    """Append the rotation of `x` along `axis` by `positions`."""
    scaling = g.pick(("default", "linear", "llama3", "yarn", "dynamic"))
    if scaling == "dynamic" and axis.size == 2:
        scaling = "default"
    attrs: dict[str, object] = {"axis": axis.name, "size": axis.size, "scaling": scaling}
    if scaling != "default":
        attrs |= {"factor": 4.0, "original_context": 64}
    theta = g.pick((10000.0, 500.0))
    tables = g.builder.node("rope", positions, names=(), theta=theta, **attrs).results
    if x.type.dtype != F32:
        tables = tuple(g.emit("cast", t, dtype=x.type.dtype.name) for t in tables)
    return g.emit("rotate", x, *tables, axis=axis.name)


def buckets(g: Growth) -> None:
    """Look up a bias by the distance of two positions, as T5 does."""
    x = g.find(lambda v: bool(mixable(v.type)))
    if x is None:
        return
    axis = g.pick(mixable(x.type)).name
    queries = g.emit("positions", x, axis=axis)
    keys = g.emit("rename", queries, axis=axis, to="seq" if axis == "kv_seq" else "kv_seq")
    half, both = g.pick((1, 2, 4)), g.chance(50)
    count = 4 * half if both else 2 * half
    # The exact buckets end at half, so that distances of a few tokens reach the others.
    at = g.emit(
        "relative_buckets",
        queries,
        keys,
        buckets=count,
        max_distance=half + g.pick((1, 2, 9)),
        bidirectional=both,
    )
    heads = g.new_axis("head", at.type)
    if g.chance(25):
        row = g.emit("signed_buckets", queries, keys, buckets=8, max_distance=g.pick((0, 4, 5)))
        g.emit("one_hot", row, into=((g.new_axis("bucket", row.type).name, 8),))
    if g.chance(25):
        g.emit("alibi", queries, keys, axis=heads.name, size=heads.size)
    table = g.param("bias", [Axis("bucket", count), heads], g.dtype)
    g.emit("embedding", table, at, axis="bucket")


def numbers(g: Growth) -> None:
    """Add random numbers, or multiply by them; the key is an input, or made of one."""
    x = g.find_float(lambda t: not t.ragged)
    if x is None:
        return
    noise = drawn(g, x)
    g.emit(g.pick(("add", "mul")), x, noise)


def drawn(g: Growth, like: Value) -> Value:
    """Append random numbers with the type of `like`."""
    if g.chance(50):
        return g.emit("random_uniform", key(g), like, low=g.pick((0.0, 0.5, -1.0)), high=1.5)
    return g.emit("random_normal", key(g), like, std=g.pick((1.0, 0.5)))


def key(g: Growth) -> Value:
    """Return a key: one that is there, a new input, or one folded from either."""
    existing = g.find(lambda v: v.type == TensorType(KEY)) if g.chance(50) else None
    source = existing or g.input("key", TensorType(KEY))
    return g.emit("fold_key", source, by=g.pick((0, 1, 7))) if g.chance(50) else source


SIMPLE: tuple[Step, ...] = (
    unary,
    binary,
    contract,
    norm,
    reduce,
    rename,
    split,
    merge,
    slice_,
    broadcast,
    compare,
    lookup,
    count,
    guarded,
    contract_pair,
    cast,
    rotary,
    numbers,
    buckets,
    windows,
    # There are many functions of one and two numbers, and each should be drawn now and then.
    unary,
    unary,
    binary,
)
"""The steps, from simple to complex."""


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
