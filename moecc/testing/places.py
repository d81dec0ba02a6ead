"""Steps in which it matters where an element stands: indices, positions, random numbers."""

from __future__ import annotations

from moecc.ir.graph import Value
from moecc.testing.arithmetic import BINARY
from moecc.testing.growth import Growth, mixable, mixable_fixed
from moecc.types.dtypes import F32, I32, KEY
from moecc.types.tensor import Axis, TensorType


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
    table = g.param("bias", [Axis("bucket", count), g.new_axis("head", at.type)], g.dtype)
    g.emit("embedding", table, at, axis="bucket")


def numbers(g: Growth) -> None:
    """Add random numbers, or multiply by them; the key is an input, or made of one."""
    x = g.find_float(lambda t: not t.ragged)
    if x is None:
        return
    made = drawn(g, x)
    g.emit(g.pick(("add", "mul")), x, made)


def drawn(g: Growth, like: Value) -> Value:
    """Append random numbers with the type of `like`."""
    if g.chance(50):
        return g.emit("random_uniform", key(g), like, low=g.pick((0.0, 0.5, -1.0)), high=1.5)
    return g.emit("random_normal", key(g), like, std=g.pick((1.0, 0.5)))


def key(g: Growth) -> Value:
    """Return a key: one that is there, a new input, or one folded from either."""
    found = g.find(lambda v: v.type == TensorType(KEY)) if g.chance(50) else None
    source = found or g.input("key", TensorType(KEY))
    return g.emit("fold_key", source, by=g.pick((0, 1, 7))) if g.chance(50) else source
