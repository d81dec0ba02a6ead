"""Steps that append one operation, or the few that it needs to be defined everywhere."""

from __future__ import annotations

from typing import Any

from moecc.ir.dtypes import BF16, F32, I32
from moecc.ir.graph import Value
from moecc.ir.types import Axis, TensorType
from moecc.testing.growth import Growth, Step, fixed, is_within, mixable, mixable_fixed

UNARY = ("relu", "neg", "silu", "tanh", "square", "sigmoid", "gelu", "gelu_tanh", "stop_gradient")
BINARY = ("add", "mul", "sub", "maximum", "minimum")


def unary(g: Growth) -> None:
    """Apply a function to each element."""
    x = g.find_float()
    if x is None:
        return
    if g.chance(30):
        g.emit("scale", x, by=g.pick((2.0, 1.0, 0.5, 0.0, -1.0)))
        return
    g.emit(g.pick(UNARY), x)


def binary(g: Growth) -> None:
    """Combine a value with one whose axes lie within its own, or with a parameter."""
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
    name = g.pick(("exp", "log", "rsqrt", "div"))
    if name == "exp":
        g.emit("exp", g.emit("tanh", x))
        return
    one = g.constant(1.0, x.type.dtype)
    positive = g.emit("add", g.emit("square", x), one)
    if name == "div":
        y = g.find_within(x.type) or x
        g.emit("div", y, positive)
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
    rest = [a for a in fixed(x.type) if a not in over]
    shared = [a for a in rest if g.chance(90 if a.name == "expert" else 15)]
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
    whole = int(str(axis.size))
    outer = g.pick([d for d in range(1, whole + 1) if whole % d == 0])
    names = g.new_axis("head", x.type).name, g.new_axis("head_dim", x.type).name
    g.emit("split", x, axis=axis.name, into=((names[0], outer), (names[1], whole // outer)))


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
        one = g.constant(g.pick((1.0, 3.0)), I32)
        at = g.emit(g.pick(BINARY), at, one)
    if g.chance(50):
        g.emit("cast", at, dtype=g.dtype.name)


def cast(g: Growth) -> None:
    """Change the element type."""
    x = g.find(lambda v: v.type.dtype.kind != "key")
    if x is not None:
        g.emit("cast", x, dtype=g.pick((F32, g.dtype, BF16)).name)


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
    attrs: dict[str, Any] = {"axis": axis.name, "size": axis.size, "scaling": scaling}
    if scaling != "default":
        attrs |= {"factor": 4.0, "original_context": 64}
    tables = g.builder.node("rope", positions, theta=g.pick((10000.0, 500.0)), **attrs).results
    if x.type.dtype != F32:
        tables = tuple(g.emit("cast", t, dtype=x.type.dtype.name) for t in tables)
    return g.emit("rotate", x, *tables, axis=axis.name)


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
)
"""The steps, from simple to complex."""
