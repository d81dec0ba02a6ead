"""Edits of weight expressions that keep the function."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.ir import Node, Value
from moecc.types import F64, Axis, TensorType
from moecc.weights.arithmetic import Add, Cast, Scale
from moecc.weights.expr import Expr
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)

from .sound_edits import Rng, before, maker, new_name, pick, replace, sound


def weights_of(node: Node) -> list[Value]:
    """Return the parameters that `node` uses, with a weight expression."""
    return [v for v in node.operands if v.is_param and v.weight is not None]


def same_weight(weight: Expr, rng: Rng) -> Expr:
    type = weight.type
    axes = [a for a in type.axes if isinstance(a.size, int)]
    way = pick(
        rng, ("scale", "cast", "permute", "rename", "stack", "slice", "split", "tile", "add")
    )
    if way == "scale":
        return Scale(Scale(weight, 0.5), 2.0)
    if way == "cast":
        return Cast(Cast(weight, F64), type.dtype)
    if way == "tile":
        count = int(rng.integers(1, 4))
        return Index(Tile(weight, "copy_", count), "copy_", int(rng.integers(count)))
    if not axes or not type.dtype.is_float:
        raise InputError("no axis")
    axis = pick(rng, axes)
    size = int(axis.size)
    if way == "add":
        return Add(Scale(weight, 0.5), Scale(weight, 0.5))
    if way == "permute":
        order = tuple(rng.permutation(type.names))
        return Permute(Permute(weight, tuple(map(str, order))), type.names)
    if way == "rename":
        return Rename(Rename(weight, axis.name, "other_"), "other_", axis.name)
    if way == "stack" and axis is type.axes[0]:
        return Stack(tuple(Index(weight, axis.name, i) for i in range(size)), axis.name)
    if way == "slice" and size > 1:
        cut = int(rng.integers(1, size))
        return Concat(
            (Slice(weight, axis.name, 0, cut), Slice(weight, axis.name, cut, size)), axis.name
        )
    if way == "split":
        part = pick(rng, [d for d in range(1, size + 1) if size % d == 0])
        cut_weight = Split(weight, axis.name, (("outer_", part), ("inner_", size // part)))
        return Merge(cut_weight, ("outer_", "inner_"), axis.name)
    raise InputError("not this way")


@sound()
def write_a_weight_otherwise(node: Node, rng: Rng) -> bool:
    """A weight expression becomes another one of the same bytes, or of the same numbers."""
    params = weights_of(node)
    if not params:
        return False
    param = pick(rng, params)
    assert param.weight is not None
    param.weight = same_weight(param.weight, rng)
    return True


@sound()
def tile_a_weight(node: Node, rng: Rng) -> bool:
    """A parameter becomes one of several copies, which the graph picks."""
    params = [v for v in weights_of(node) if not v.type.is_sharded]
    if not params or node.graph.params.get(params[0].name) is not params[0]:
        return False
    param = pick(rng, params)
    graph, count = node.graph, int(rng.integers(1, 4))
    name = new_name(param.type, "copy")
    assert param.weight is not None
    weight = Tile(param.weight, name, count)
    type = TensorType(param.type.dtype, (Axis(name, count), *param.type.axes))
    tiled = graph.param(graph.fresh("tiled"), type, weight, loc=param.loc)
    picked = before(node).index(tiled, axis=name, at=int(rng.integers(count)))
    for number, operand in enumerate(node.operands):
        if operand is param:
            node.set_operand(number, picked)
    return True


@sound()
def permute_a_weight(node: Node, rng: Rng) -> bool:
    """A parameter has its axes in another order."""
    params = [v for v in weights_of(node) if len(v.type.axes) > 1 and not v.type.is_sharded]
    if not params or node.graph.params.get(params[0].name) is not params[0]:
        return False
    param, graph = pick(rng, params), node.graph
    order = tuple(map(str, rng.permutation(param.type.names)))
    type = param.type.with_axes(param.type[n] for n in order)
    permuted = graph.param(
        graph.fresh("permuted"), type, Permute(param.weight, order), loc=param.loc
    )
    value = before(node).broadcast(permuted, param)
    for number, operand in enumerate(node.operands):
        if operand is param:
            node.set_operand(number, value)
    return True


@sound("scale")
def scale_in_the_weight(node: Node, rng: Rng) -> bool:
    """A factor of a product moves into the expression of its weight."""
    product = maker(node.operands[0], "contract")
    if product is None or product.result.only_user is not node:
        return False
    for at, w in enumerate(product.operands):
        if w.weight is not None and w.weight.type.dtype.is_float and w.is_param:
            graph = node.graph
            weight = Scale(w.weight, node.attrs["by"])
            scaled = graph.param(graph.fresh("scaled"), w.type, weight, loc=w.loc)
            product.set_operand(at, scaled)
            return replace(node, product.result)
    return False
