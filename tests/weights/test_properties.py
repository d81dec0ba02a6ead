"""Random expressions: what every one of them obeys."""

import zlib
from math import prod

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.testing.weights import whole_naively
from moecc.types import BF16, DTYPES, F16, F32, F64, PRED, Axis, TensorType
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.evaluate import Evaluator, evaluate
from moecc.weights.expr import Full, Source
from moecc.weights.movement import (
    I32,
    Concat,
    Index,
    Merge,
    Permutation,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Take,
    Tile,
)
from moecc.weights.simplify import simplify
from moecc.weights.text import parse_expr

NAMES = ("expert", "mlp", "embed", "a", "b", "c", "d")
FLOATS = (BF16, F16, F32, F64, DTYPES["f8e5m2"])
FACTORS = (1.0, 2.0, 0.5, -4.0, 3.0, 2.0**0.5, 0.0)


def read(name, start=0, stop=None):
    """Read a source whose name spells its type; the values include zeros and subnormals."""
    dtype, *sizes = name.split(",")
    shape = tuple(map(int, sizes[:-1]))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 4, shape)
    values = np.where(rng.random(shape) < 0.2, rng.choice([0.0, -0.0, 2.0**-16], shape), values)
    made = values.astype(np.float32).astype(DTYPES[dtype].numpy)
    return made[start:stop] if shape else made


def source(type, salt):
    return Source(",".join([type.dtype.name, *map(str, type.shape), f"s{salt}"]), type)


@st.composite
def types(draw, dtypes=FLOATS, most=3):
    names = draw(st.permutations(NAMES))[: draw(st.integers(0, most))]
    axes = tuple(Axis(n, draw(st.integers(1, 4))) for n in names)
    return TensorType(draw(st.sampled_from(dtypes)), axes)


@st.composite
def leaves(draw, type):
    """Draw a leaf of `type`, cast where that takes it."""
    key = draw(st.integers(0, 2)) << 100
    if type.dtype is PRED:
        if not type.axes or draw(st.integers(0, 4)) == 0:
            return Full(draw(st.integers(0, 1)), type)
        axis = draw(st.sampled_from(type.axes))
        return Subset(type, axis.name, draw(st.integers(0, int(str(axis.size)))), key)
    kind = draw(st.integers(0, 7))
    f32 = type.with_dtype(F32)
    drawn = source(type, kind)
    if kind == 4:
        return Full(draw(st.sampled_from((0.0, -0.0, 1.0, 1 + 2**-9, -2.0))), type)
    if kind == 5:
        drawn = Normal(f32, 0.5, key, draw(st.sampled_from((0.0, 1.0))))
    if kind == 6:
        drawn = TruncatedNormal(f32, 0.5, key, 2.0)
    if kind == 7:
        drawn = Uniform(f32, -0.5, 1.0, key)
    return drawn if drawn.type == type else Cast(drawn, type.dtype)


def fresh(draw, x):
    return draw(st.sampled_from([n for n in (*NAMES, "e", "f", "g", "h") if n not in x.type]))


def part_of(draw, type):
    """Draw a type with some of the axes of `type`, in another order."""
    axes = draw(st.permutations(type.axes))
    return type.with_axes(axes[: draw(st.integers(0, len(axes)))])


@st.composite
def grown(draw, x):
    """Draw one node on top of `x`."""
    options = ["tile", "stack", "scale", "cast", "add", "mul", "minimum", "select"]
    if x.type.axes:
        options += [
            "concat",
            "index",
            "slice",
            "split",
            "merge",
            "rename",
            "permute",
            "moment",
            "take",
        ] * 2
    kind = draw(st.sampled_from(options))
    if kind in ("tile", "stack"):
        at = draw(st.integers(0, x.type.rank))
        if kind == "tile":
            return Tile(x, fresh(draw, x), draw(st.integers(1, 4)), at)
        others = draw(st.lists(leaves(x.type) | st.just(x), max_size=2))
        return Stack((x, *others), fresh(draw, x), at)
    if kind in ("add", "mul", "minimum", "select"):
        return draw(combined(x, kind))
    if kind == "scale":
        return Scale(x, draw(st.sampled_from(FACTORS)))
    if kind == "cast":
        return Cast(x, draw(st.sampled_from(FLOATS)))
    if kind == "moment":
        mask = draw(leaves(part_of(draw, x.type).with_dtype(PRED))) if draw(st.booleans()) else None
        names = part_of(draw, x.type).names
        return Moment(draw(st.sampled_from(("mean", "std"))), x, mask, names)
    return draw(moved(x, kind))


@st.composite
def combined(draw, x, kind):
    y = draw(leaves(part_of(draw, x.type).with_dtype(draw(st.sampled_from(FLOATS)))))
    if kind == "select":
        mask = draw(leaves(part_of(draw, x.type).with_dtype(PRED)))
        return Select(mask, x, y) if draw(st.booleans()) else Select(mask, y, x)
    node = {"add": Add, "mul": Mul, "minimum": Minimum}[kind]
    return node(x, y) if draw(st.booleans()) else node(y, x)


@st.composite
def moved(draw, x, kind):
    axis = draw(st.sampled_from(x.type.axes))
    name, size = axis.name, int(str(axis.size))
    if kind == "index":
        return Index(x, name, draw(st.integers(0, size - 1)))
    if kind == "slice":
        start = draw(st.integers(0, size - 1))
        return Slice(x, name, start, draw(st.integers(start + 1, size)))
    if kind == "take":
        order = Permutation(TensorType(I32, (axis,)), draw(st.integers(0, 3)))
        start = draw(st.integers(0, size - 1))
        return Take(x, name, Slice(order, name, start, draw(st.integers(start + 1, size))))
    if kind == "concat":
        parts = [Slice(x, name, i, i + 1) for i in range(size)] + [x, draw(leaves(x.type))]
        chosen = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=3))
        return Concat(tuple(chosen), name)
    if kind == "rename":
        return Rename(x, name, draw(st.sampled_from((fresh(draw, x), name))))
    if kind == "permute":
        return Permute(x, tuple(draw(st.permutations(x.type.names))))
    if kind == "split":
        first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        new = draw(st.permutations([n for n in (*NAMES, "e") if n not in x.type or n == name]))
        return Split(x, name, ((new[0], first), (new[1], size // first)))
    start = draw(st.integers(0, x.type.rank - 1))
    axes = x.type.names[start : draw(st.integers(start + 1, x.type.rank))]
    return Merge(x, axes, draw(st.sampled_from((fresh(draw, x), axes[0], axes[-1]))))


@st.composite
def exprs(draw, most=7):
    x = draw(leaves(draw(types())))
    for _ in range(draw(st.integers(0, most))):
        y = draw(grown(x))
        if prod(y.type.shape) <= 400 and y.type.rank <= 6:
            x = y
    return x


@st.composite
def movements(draw):
    """Draw a long chain of nodes that only move, over a source."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, 3))]
    sizes = st.sampled_from((2, 3, 4, 6))
    x = source(TensorType(BF16, tuple(Axis(n, draw(sizes)) for n in names)), 0)
    kinds = (
        "index", "slice", "split", "merge", "permute", "rename", "tile", "restack", "undo", "take"
    )  # fmt: skip
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=10)):
        if not x.type.axes:
            break
        y = x
        if kind == "tile":
            y = Tile(x, fresh(draw, x), draw(st.integers(2, 3)), draw(st.integers(0, x.type.rank)))
        elif kind == "restack":
            axis = draw(st.sampled_from(x.type.axes))
            parts = [Index(x, axis.name, i) for i in range(int(str(axis.size)))]
            start = draw(st.integers(0, len(parts) - 1))
            parts = parts[start : draw(st.integers(start + 1, len(parts)))]
            y = Stack(tuple(parts), draw(st.sampled_from((axis.name, fresh(draw, x)))), 0)
        elif kind == "undo" and isinstance(x, Split | Merge) and "u" not in str(x.type.names):
            y = undone(x)
        elif kind != "undo":
            y = draw(moved(x, kind))
        if prod(y.type.shape) <= 400 and y.type.rank <= 6:
            x = y
    return x


def undone(x):
    if isinstance(x, Split):
        return Merge(x, tuple(name for name, _ in x.into), x.axis)
    sizes = ((name, int(str(x.x.type[name].size))) for name in x.axes)
    return Split(x, x.into, tuple((f"u{i}", size) for i, (_, size) in enumerate(sizes)))


def naive(e):
    """Evaluate as the oracle does."""
    return whole_naively(e, read)


def whole(e):
    """Evaluate as it stands; what overflows is no case."""
    try:
        return Evaluator(read).block(e, tuple((0, n) for n in e.type.shape))
    except InputError:
        assume(False)
        raise


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(exprs() | movements())
def test_the_evaluator_agrees_with_whole_arrays(e):
    assert same(whole(e), naive(e))


@given(exprs() | movements())
def test_simplifying_changes_no_byte(e):
    simple = simplify(e)
    assert simple.type == e.type
    assert same(whole(simple), whole(e))
    assert simplify(simple) is simple


@given(exprs() | movements(), st.data())
def test_a_box_is_a_box_of_the_whole(e, data):
    box = []
    for size in e.type.shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start, size))))
    full = whole(e)
    for x in (e, simplify(e)):
        part = Evaluator(read).block(x, tuple(box))
        assert same(part, full[tuple(slice(*ends) for ends in box)])


@given(exprs(), st.sampled_from(FLOATS))
def test_the_type_asked_for_is_rounded_to_once(e, dtype):
    expected = whole(Cast(e, dtype))
    assert same(evaluate(e, read, dtype), expected)


@given(exprs())
def test_text_comes_back(e):
    text = str(e)
    assert "\n" not in text
    padded = f"  {text} @layers.3"
    parsed, end = parse_expr(padded)
    assert parsed is e
    assert padded[end:] == " @layers.3"
