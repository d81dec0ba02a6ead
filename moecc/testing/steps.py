"""The steps that append one operation, or the few that it needs to be defined everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.ir.graph import Value
from moecc.ir.operation import OPS
from moecc.ir.traits import Domain
from moecc.testing.growth import Growth, Step, fixed, is_within, mixable, mixable_fixed
from moecc.types import BF16, F32, I32, KEY, Axis, TensorType

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
    table = g.param("bias", [Axis("bucket", count), g.new_axis("head", at.type)], g.dtype)
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
