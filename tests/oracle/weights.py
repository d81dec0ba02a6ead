"""Pairs of graphs that differ in the expression of a weight, or in how the graph reads one."""

from __future__ import annotations

from math import prod

from moecc.errors import InputError
from moecc.ir import Graph
from moecc.ir.builder import Builder
from moecc.ir.structure import clone
from moecc.types import BF16, F32, F64, I32, PRED, Axis, TensorType
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.expr import Expr, Full, Source, walk
from moecc.weights.movement import (
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

from .pairs import Pair
from .sound_edits import Rng, pick
from .sound_weights import same_weight
from .wrong_edits import swapped_axes, with_slip

NAMES = ("a", "b", "c")


def leaf(type: TensorType, rng: Rng) -> Expr:
    """Return a leaf of a type: a source, a constant or a draw."""
    if type.dtype is PRED:
        if not type.axes:
            return Full(float(rng.integers(2)), type)
        axis = pick(rng, type.axes)
        return Subset(type, axis.name, int(rng.integers(0, int(axis.size) + 1)), 1 << 100)
    f32, key = type.with_dtype(F32), int(rng.integers(3)) << 100
    shape = "x".join(map(str, type.shape))
    drawn: Expr = Source(f"w{rng.integers(3)}_{shape}_{'_'.join(type.names)}_{type.dtype}", type)
    match int(rng.integers(9)):
        case 5:
            return Full(pick(rng, (0.0, 1.0, -2.0, 1 + 2**-9)), type)
        case 6:
            drawn = Normal(f32, 0.5, key, pick(rng, (0.0, 1.0)))
        case 7:
            drawn = TruncatedNormal(f32, 0.5, key, 2.0)
        case 8:
            drawn = Uniform(f32, -0.5, 1.0, key)
    return drawn if drawn.type == type else Cast(drawn, type.dtype)


def grown(x: Expr, rng: Rng) -> Expr:
    """Return one node on top of `x`."""
    axes = x.type.axes
    kinds = ["tile", "stack", "scale", "cast", "add", "mul", "minimum", "select", "concat"]
    kinds += ["index", "slice", "split", "merge", "rename", "permute", "moment", "take"] * 2
    kind = pick(rng, kinds if axes else kinds[:8])
    name = pick(rng, [n for n in (*NAMES, "d", "e") if n not in x.type])
    part = x.type.with_axes([a for a in axes if rng.random() < 0.6])
    match kind:
        case "tile":
            return Tile(x, name, int(rng.integers(1, 4)), int(rng.integers(len(axes) + 1)))
        case "stack":
            others = [pick(rng, (x, leaf(x.type, rng))) for _ in range(int(rng.integers(3)))]
            return Stack((x, *others), name, int(rng.integers(len(axes) + 1)))
        case "scale":
            return Scale(x, pick(rng, (0.5, -1.0, 3.0, 1 / 3)))
        case "cast":
            return Cast(x, pick(rng, (F32, F64, BF16)))
        case "add" | "mul" | "minimum":
            node = {"add": Add, "mul": Mul, "minimum": Minimum}[kind]
            pair = (x, leaf(part.with_dtype(pick(rng, (F32, BF16))), rng))
            return node(*(pair if rng.random() < 0.5 else pair[::-1]))
        case "select":
            return Select(leaf(part.with_dtype(PRED), rng), x, leaf(part, rng))
    axis = pick(rng, axes)
    size = int(axis.size)
    start = int(rng.integers(size))
    stop = int(rng.integers(start + 1, size + 1))
    match kind:
        case "concat":
            return Concat((Slice(x, axis.name, start, stop), x), axis.name)
        case "index":
            return Index(x, axis.name, start)
        case "slice":
            return Slice(x, axis.name, start, stop)
        case "split":
            first = pick(rng, [n for n in range(1, size + 1) if size % n == 0])
            return Split(x, axis.name, ((name, first), (axis.name, size // first)))
        case "merge":
            at = int(rng.integers(len(axes)))
            names = x.type.names[at : int(rng.integers(at + 1, len(axes) + 1))]
            return Merge(x, names, pick(rng, (name, names[0])))
        case "rename":
            return Rename(x, axis.name, name)
        case "permute":
            return Permute(x, tuple(map(str, rng.permutation(x.type.names))))
        case "take":
            order = Permutation(TensorType(I32, (axis,)), int(rng.integers(3)))
            return Take(x, axis.name, Slice(order, axis.name, start, stop))
    names = tuple(a.name for a in axes if rng.random() < 0.6)
    mask = leaf(part.with_dtype(PRED), rng) if rng.random() < 0.3 else None
    return Moment(pick(rng, ("mean", "std")), x, mask, names)


def expression(rng: Rng) -> Expr:
    """Return a random expression of a float type."""
    axes = tuple(Axis(n, int(rng.integers(1, 4))) for n in NAMES[: int(rng.integers(1, 4))])
    x = leaf(TensorType(pick(rng, (F32, F32, BF16)), axes), rng)
    for _ in range(int(rng.integers(1, 6))):
        try:
            y = grown(x, rng)
        except (InputError, ValueError):
            continue
        if prod(y.type.shape) <= 200 and y.type.rank <= 5:
            x = y
    return x


def graph_of(weight: Expr) -> Graph:
    """Return a graph that returns a parameter, and its product with an input."""
    graph = Graph()
    type = weight.type.with_dtype(F32)
    x = graph.input("x", type)
    w = graph.param("w", type, weight)
    graph.set_output("y", Builder(graph).mul(x, w))
    return graph


def from_weight(seed: int, rng: Rng) -> Pair | None:
    """Change a part of the expression of a weight, in a right or in a wrong way."""
    weight = expression(rng)
    before = graph_of(weight)
    pair = Pair(before, clone(before), seed=seed)
    changed = weight
    for _ in range(int(rng.integers(1, 4))):
        part = pick(rng, walk(changed))
        try:
            equal = same_weight(part, rng)
        except (InputError, ValueError):
            continue
        if equal.type == part.type:
            changed = _with_part(changed, part, equal)
            pair.edits.append("same_weight")
    if rng.random() < 0.5:
        part = pick(rng, walk(changed))
        try:
            slip = swapped_axes(part, rng) if rng.random() < 0.4 else with_slip(part, rng)
        except (InputError, ValueError):
            slip = part
        if slip is not part and slip.type == part.type:
            pair.right = graph_of(changed)
            changed = _with_part(changed, part, slip)
            pair.edits.append("wrong_weight")
            pair.is_sound = False
    if changed is weight or changed.type != weight.type:
        return None
    pair.after.params["w"].weight = changed
    return pair


def _with_part(weight: Expr, part: Expr, replacement: Expr) -> Expr:
    if part is weight:
        return replacement
    # An interned part stands everywhere at once; what replaces it contains it.
    changed: dict[Expr, Expr] = {}
    for x in walk(weight):
        rebuilt = x.with_operands(*(changed[y] for y in x.operands))
        changed[x] = replacement if x is part else rebuilt
    return changed[weight]
