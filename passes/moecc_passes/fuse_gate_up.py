"""The pass ``fuse-gate-up``: fuse gate and up, of a dense block or of experts, into one product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.contraction import ContractOp
from moecc.ir.structure import replace_value
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves
from moecc.rewrite.pattern import P, fits
from moecc.types import Axis
from moecc.weights.movement import Concat

# Fuse sibling contractions: gate and up, of one value, whose results meet in one down matrix.
#
# The rewrite of the pass ``fuse-gate-up``, in the core so that backends can apply it too. Siblings
# contract the same value, each with its own parameter, over the same axes and to the same new axis,
# and meet, element by element, in a value whose new axis a further parameter contracts. Query, key
# and value are therefore no siblings, nor are routers.

PROJECTION = P.contract(P.any("x"), P.param("w"), over=P.attr("over"))
"""A contraction of a value with a parameter."""


@dataclass(frozen=True)
class Siblings:
    """Contractions of one value that can be fused.

    Attributes:
      nodes: the contractions, in the order of the graph; each has one new axis, `axis`.
      axis: the axis along which the matrices are concatenated.
    """

    nodes: tuple[Node, ...]
    axis: str

    @property
    def params(self) -> tuple[Value, ...]:
        """The matrices, in the order of `nodes`."""
        return tuple(node.operands[1] for node in self.nodes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of `axis`, in the order of `nodes`."""
        return tuple(int(str(param.type[self.axis].size)) for param in self.params)


@dataclass(frozen=True)
class Fusion:
    """A parameter that replaces several, for callers that hold the values of those.

    Attributes:
      param: the new parameter's name.
      parts: the names of the replaced parameters, in order; they no longer exist.
      axis: the axis along which their values are concatenated.
    """

    param: str
    parts: tuple[str, ...]
    axis: str


def find_siblings(graph: Graph, *, need_weights: bool = True) -> list[Siblings]:
    """Return the sibling contractions of `graph`, in order; a contraction is in at most one group.

    Excluded are parameters that are also read elsewhere, of different types on disk, with axes in
    different orders, or sharded along the concatenated axis: a shard of the whole is not the
    concatenation of the shards of the parts.

    Args:
      graph: a graph.
      need_weights: whether parameters without a weight expression are excluded too.  A caller that
        concatenates their values itself (see `Fusion`) does not need expressions.
    """
    order = {node: i for i, node in enumerate(graph)}
    groups: list[Siblings] = []
    grouped: set[Node] = set()
    for down in graph:
        for group in _groups(down, order):
            axis = _fusable_axis(group, need_weights)
            if axis is not None and grouped.isdisjoint(group):
                groups.append(Siblings(tuple(group), axis))
                grouped.update(group)
    return groups


def fuse_siblings(graph: Graph, *, origin: str, need_weights: bool = True) -> list[Fusion]:
    """Fuse each group of siblings into one contraction, in place, and return the fusions.

    Before::

        %a = contract %n, %gate {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %u = contract %n, %up {over=embed} : f32[batch=B, seq=S, mlp=1536]

    After::

        %f = contract %n, %gate.fused {over=embed} : f32[batch=B, seq=S, mlp=3072]
        %a = slice %f {axis=mlp, start=0, stop=1536} : f32[batch=B, seq=S, mlp=1536]
        %u = slice %f {axis=mlp, start=1536, stop=3072} : f32[batch=B, seq=S, mlp=1536]

    Args:
      graph: changed in place.
      origin: the pass and rewrite, for the new nodes.
      need_weights: see `find_siblings`.
    """
    fused: dict[str, Value] = {}
    fusions = []
    for siblings in find_siblings(graph, need_weights=need_weights):
        first = siblings.params[0]
        axis, width = siblings.axis, sum(siblings.sizes)
        type = first.type.with_axes(Axis(axis, width) if a.name == axis else a for a in first.type)
        weights = tuple(p.weight for p in siblings.params if p.weight is not None)
        weight = Concat(weights, axis) if weights else None
        fused_param = graph.param(graph.fresh(f"{first.name}.fused"), type, weight, loc=first.loc)
        parts = tuple(param.name for param in siblings.params)
        _replace(graph, siblings, fused_param, origin)
        fused |= dict.fromkeys(parts, fused_param)
        fusions.append(Fusion(fused_param.name, parts, siblings.axis))
    # Put each new parameter at the position of the first that it replaces, and erase those.
    order = dict.fromkeys(fused.get(name, value) for name, value in graph.params.items())
    for name in fused:
        graph.erase_param(name)
    graph.order_params(order)
    return fusions


def _groups(down: Node, order: dict[Node, int]) -> Iterator[list[Node]]:
    """Yield the contractions that meet in the operand of `down`, grouped by their input."""
    projection = fits(PROJECTION, down)
    if projection is None or len(projection.attr("over")) != 1:
        return
    (inner,) = projection.attr("over")
    groups: dict[object, list[Node]] = {}
    for node in _projections_to(projection.value("x"), inner):
        attrs = ContractOp.of_node(node)
        key = (node.operands[0], attrs.over, attrs.precision)
        groups.setdefault(key, []).append(node)
    for group in groups.values():
        if len(group) > 1:
            yield sorted(group, key=order.__getitem__)


def _projections_to(value: Value, inner: str) -> list[Node]:
    """Return the contractions to the axis `inner` that feed `value` element by element."""
    ends: list[Node] = []
    seen: set[Node] = set()
    stack = [value]
    while stack:
        node = stack.pop().node
        if node is None or node in seen:
            continue
        seen.add(node)
        if fits(PROJECTION, node):
            if inner in node.operands[1].type:
                ends.append(node)
        elif node.op.elementwise and inner in node.result.type:
            stack.extend(v for v in node.operands if inner in v.type)
    return ends


def _fusable_axis(group: list[Node], need_weights: bool) -> str | None:
    """Return the axis along which the matrices of `group` can be concatenated, or None."""
    params = [node.operands[1] for node in group]
    x, over = group[0].operands[0], ContractOp.of_node(group[0]).over
    added = [n for n in params[0].type.names if n not in over and n not in x.type]
    if len(added) != 1 or len(set(params)) != len(params):
        return None
    axis = added[0]
    if any(len(p.users) != 1 or p.type[axis].mesh for p in params):
        return None
    if len({p.type for p in params}) != 1:
        return None
    return axis if _weights_agree(params, need_weights) else None


def _weights_agree(params: list[Value], need_weights: bool) -> bool:
    """Return whether one expression can hold the values of all the parameters."""
    weights = [p.weight for p in params]
    if None in weights:
        return not need_weights and not any(weights)
    return len({w.type.dtype for w in weights if w is not None}) == 1


def _replace(graph: Graph, siblings: Siblings, param: Value, origin: str) -> None:
    """Replace the siblings by one contraction and its slices."""
    first, axis = siblings.nodes[0], siblings.axis
    builder = Builder(graph, loc=first.loc, origin=origin, before=first)
    attrs = ContractOp.of_node(first)
    product = builder.contract(
        first.operands[0], param, over=attrs.over, precision=attrs.precision, name="fused"
    )
    parts: list[Value] = []
    start = 0
    for node, size in zip(siblings.nodes, siblings.sizes, strict=True):
        builder.loc = node.loc
        parts.append(builder.slice(product, axis=axis, start=start, stop=start + size))
        start += size
    for node, part in zip(siblings.nodes, parts, strict=True):
        name = node.result.name
        replace_value(node.result, part)
        node.erase()
        # A replacement takes over the name of the value, so that the text differs less.
        graph.rename(part, name)


@dataclass(frozen=True)
class FuseGateUpPass(Pass):
    """Contract a value once, with the concatenated matrices of gate and up, and split the result.

    One large product is faster than two half as large.  Where the matrices cannot become one (a
    parameter that something else reads too, element types that differ on disk, an axis that is
    sharded, no weight expression) nothing is changed and nothing is said.  A graph of this form
    is for running: no family has such a layer, so export before it, and lay it on its mesh before
    it, too: what is cut along the neurons then stays two products.

    Before::

        param %gate : f32[mlp=1536, embed=576] = source("gate" : bf16[mlp=1536, embed=576])
        param %up : f32[mlp=1536, embed=576] = source("up" : bf16[mlp=1536, embed=576])
        %a = contract %n, %gate {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %u = contract %n, %up {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %s = silu %a : f32[batch=B, seq=S, mlp=1536]
        %m = mul %s, %u : f32[batch=B, seq=S, mlp=1536]
        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=576]

    After::

        param %gate.fused : f32[mlp=3072, embed=576] = concat(source("gate" : …), …, axis=mlp)
        %fused = contract %n, %gate.fused {over=embed} : f32[batch=B, seq=S, mlp=3072]
        %a = slice %fused {axis=mlp, start=0, stop=1536} : f32[batch=B, seq=S, mlp=1536]
        %u = slice %fused {axis=mlp, start=1536, stop=3072} : f32[batch=B, seq=S, mlp=1536]
        …

    It is not bit-exact: a product of another shape adds in another order.
    """

    name = "fuse-gate-up"
    summary = "fuse the gate and up products of a block"
    preserves = Preserves("reassociation", "a product of another shape adds in another order")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Fuse all siblings."""
        fusions = fuse_siblings(graph, origin=f"{self.name}/concatenate")
        parts = sum(len(fusion.parts) for fusion in fusions)
        stats = {"products-fused": parts, "products-made": len(fusions)}
        return PassResult(bool(fusions), len(fusions), stats)
