"""Builds a routed layer anew: with other experts, or as one dense block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.types.tensor import Axis
from moecc.weights.arithmetic import Add, Scale
from moecc.weights.expr import Expr
from moecc.weights.movement import Stack
from moecc_passes.resize.anatomy import EXPERT, Anatomy, members
from moecc_passes.resize.dormant import Dormant

Regroup = Callable[[list[Expr]], list[Expr]]
"""From the weights of the experts to those of the new experts."""


def scaled(weight: Expr, factor: float) -> Expr:
    """Return `weight` times `factor`."""
    return weight if factor == 1 else Scale(weight, factor)


def mean(weights: Sequence[Expr]) -> Expr:
    """Return the mean of several weights; of equal ones, the very one."""
    if len(set(weights)) == 1:
        return weights[0]
    return Scale(reduce(Add, weights), 1 / len(weights))


def resize(
    graph: Graph,
    part: Anatomy,
    regroup: Regroup,
    top_k: int,
    factor: float = 1.0,
    bias_factor: float = 1.0,
    dormant: Dormant | None = None,
) -> None:
    """Replace the experts of a layer.

    Args:
      graph: the graph, changed in place.
      part: the layer.
      regroup: makes the weights of the new experts, and the rows of the router.
      top_k: the experts that a token goes to.
      factor: what the experts' last matrix and a bias after it are multiplied by.
      bias_factor: what a bias that takes part in the choice alone is multiplied by.
      dormant: which of the new experts no token goes to.
    """
    image: dict[Value, Value] = {}
    for param in part.params:
        parts = regroup(members(param))
        if part.is_last(param):
            parts = [scaled(weight, factor) for weight in parts]
        elif param in part.route.operands:
            parts = [scaled(weight, bias_factor) for weight in parts]
        if dormant is not None:
            parts = dormant.changed(param, part.is_last(param), parts)
        sizes = [Axis(a.name, len(parts) if a.name == EXPERT else a.size) for a in param.type]
        position = param.type.names.index(EXPERT)
        weight = Stack(tuple(parts), EXPERT, position)
        image[param] = _replacement(graph, param, sizes, weight)
        count = len(parts)
    attrs = {node: _resized(node, count) for node in part.nodes}
    attrs[part.route] = {"top_k": top_k}
    attrs[part.layer.assigner] = {"experts": count}
    output = _emit(_builder(graph, part), part.nodes, image, attrs)[part.layer.combine.result]
    _take_place(graph, part, output)


def _resized(node: Node, count: int) -> Mapping[str, object]:
    """Return the axes that a node makes, if an attribute names them; experts are `count` there."""
    into = node.attrs.get("into")
    if not isinstance(into, tuple):
        return {}
    return {"into": tuple((name, count if name == EXPERT else size) for name, size in into)}


def make_dense(graph: Graph, part: Anatomy, weight_of: Callable[[Value, bool], Expr]) -> None:
    """Replace a layer by its experts' operations on every token.

    Args:
      graph: the graph, changed in place.
      part: the layer.
      weight_of: makes the weight of the dense parameter from that of the experts, and from whether
        it is the last matrix or after it.
    """
    rows = part.layer.dispatch.result
    image = {rows: part.x}
    for param in part.params:
        if param.users.keys().isdisjoint(part.body):
            continue
        weight = weight_of(param, part.is_last(param))
        image[param] = _replacement(graph, param, list(weight.type), weight)
    made = _emit(_builder(graph, part), part.body, image, {})
    _take_place(graph, part, made[part.layer.combine.operands[0]])


def _builder(graph: Graph, part: Anatomy) -> Builder:
    loc = part.layer.combine.loc
    return Builder(graph, loc=loc, origin="resize", before=part.layer.combine)


def _replacement(graph: Graph, param: Value, axes: Sequence[Axis], weight: Expr) -> Value:
    """Add a parameter under the name of `param`, which gets another one."""
    name = param.name
    graph.rename(param, graph.fresh(f"{name}.old"))
    return graph.param(name, param.type.with_axes(list(axes)), weight, loc=param.loc)


def _emit(
    builder: Builder,
    nodes: Sequence[Node],
    image: dict[Value, Value],
    attrs: Mapping[Node, Mapping[str, object]],
) -> dict[Value, Value]:
    """Emit `nodes` again on the images of their operands, some with other attributes."""
    for node in nodes:
        builder.loc = node.loc
        operands = (image.get(v, v) for v in node.operands)
        names = tuple(v.name for v in node.results)
        changed = {**node.attrs, **attrs.get(node, {})}
        made = builder.node(node.op.name, *operands, names=names, **changed)
        image.update(zip(node.results, made.results, strict=True))
    return image


def _take_place(graph: Graph, part: Anatomy, output: Value) -> None:
    part.layer.combine.result.replace_by(output)
    for node in reversed(part.nodes):
        node.erase()
    for param in part.params:
        if not param.users:
            graph.erase_param(param.name)
