"""The graph rewrite: one dense block becomes routing, lifted experts, and a shared expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moecc.analysis import FFNBlock
from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_shared_gate
from moecc.ir.structure import weight_of
from moecc.rewrite import P, fits
from moecc.types import Axis, tensor
from moecc.weights.arithmetic import mean_over
from moecc.weights.expr import Expr, Full
from moecc_passes.upcycle.routers import (
    UpcycleRecipe,
    branched,
    emit_router,
    lifted,
    scaled,
    shared_part,
)

# An extra dense feed-forward sublayer beside a sparse one (ST-MoE, section 5 and Table 16).
#
# It has the shape of the dense block, its own norm and residual, and its last matrix is zero: it
# adds exactly nothing until it is trained.


SCALED = P.scale(P.any())
SUM = P.add(P.any(), P.any())


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream around a block.

    Attributes:
      before: the stream that the sublayer adds to.
      after: the stream after the sublayer.
      norm: the norm through which the block reads; None if norms follow the sum.
      sum: the node that adds the block to the stream.
    """

    before: Value
    after: Value
    norm: Node | None
    sum: Node


def surroundings(block: FFNBlock) -> ResidualStream | str:
    """Return the residual stream around `block`, or why no sublayer can be added to it."""
    total = block.output.only_user
    while match := fits(SCALED, total):
        total = match.root.result.only_user
    if total is None or not fits(SUM, total):
        return "nothing adds its output to a residual stream"
    norm = block.x.node
    if norm is not None and norm.op.is_norm and norm.operands[0] in total.operands:
        return ResidualStream(norm.operands[0], total.result, norm, total)
    if block.x not in total.operands:
        return "its output is added to another value than its input"
    behind = total.result.only_user
    is_normed = behind is not None and behind.op.is_norm
    after = behind.result if behind is not None and is_normed else total.result
    return ResidualStream(block.x, after, None, total)


def _add_sublayer(graph: Graph, block: FFNBlock, where: str) -> None:
    """Emit a copy of a dense block ``before`` or ``after`` it; call it before erasing the block."""
    around = surroundings(block)
    assert not isinstance(around, str), "checked before anything was changed"
    stream = around.before if where == "before" else around.after
    users = [(n, i) for n in stream.users for i, v in enumerate(n.operands) if v is stream]
    if where == "before":
        mine = {*block.nodes, around.sum, around.norm}
        users = [(n, i) for n, i in users if n in mine]
    # The first node that must read the new stream; None if only outputs do.
    readers = {n for n, _ in users}
    following = next((n for n in graph.walk(stream.node) if n in readers), None)
    head, _, last = block.loc.rpartition(".")
    loc = f"{head}.extra_{last}" if head else f"extra_{last or 'ffn'}"
    builder = Builder(graph, loc=loc, origin="upcycle/extra-ffn", before=following)

    def copy(param: Value, weight: Expr | None = None) -> Value:
        weight = weight or weight_of(param, param.name)
        return graph.param(graph.fresh(f"{param.name}.extra"), param.type, weight, loc=loc)

    x, norm = stream, around.norm
    if norm is not None:
        # A gain may be computed from a parameter, as Gemma's is, which is one more.
        nodes, image = [*_sources_of(norm.operands[1:]), norm], {norm.operands[0]: stream}
        for value in (v for node in nodes for v in node.operands):
            if value.is_param and value not in image:
                image[value] = copy(value)
        x = _emit(builder, nodes, image, at_loc=True)[norm.result]
    image = {block.x: x}
    for param in block.params:
        is_zero = param is block.down.operands[1] or param is block.output_bias
        zeros = Full(0.0, weight_of(param, param.name).type)
        image[param] = copy(param, zeros if is_zero else None)
    sublayer = _emit(builder, block.nodes, image, at_loc=True)[block.output]
    total = builder.add(stream, sublayer)
    for node, index in users:
        node.set_operand(index, total)


def _sources_of(values: Iterable[Value]) -> list[Node]:
    """Return the nodes that values are computed by, each after those that it reads."""
    nodes: list[Node] = []
    left = [value.node for value in values]
    while left:
        node = left.pop()
        if node is not None:
            nodes.append(node)
            left += [value.node for value in node.operands]
    # The last time that a node was met is behind all that read it.
    return list(dict.fromkeys(reversed(nodes)))


def rewrite_block(
    graph: Graph, block: FFNBlock, recipe: UpcycleRecipe, rewritten: dict[tuple[Value, str], Value]
) -> None:
    """Replace `block` by its sparse version, and erase parameters that become unused.

    Args:
      graph: the graph.
      block: the block.
      recipe: how it is rewritten.
      rewritten: what parameters of earlier blocks became, ``experts`` or ``shared``; layers that
        share parameters (ALBERT's) share these. It is added to.

    Raises:
      InputError: layers that share parameters would get experts of their own.
    """
    item, division = recipe.item, recipe.division
    if item.extra_ffn != "none":
        _add_sublayer(graph, block, item.extra_ffn)
    names = {p: p.name for p in block.params}
    leaving = [p for p in names if p.users.keys() <= set(block.nodes)]
    for param in leaving:
        graph.rename(param, graph.fresh(f"{param.name}.dense"))
    # All inputs of the block, constants included, are defined before its last node.
    builder = Builder(graph, loc=block.loc, origin="upcycle/lift", before=block.nodes[-1])
    prefix = re.sub(r"[^A-Za-z0-9_.\-]", "_", block.loc) or "ffn"
    rows, finish = emit_router(builder, block, recipe, prefix)
    image, expert = {block.x: rows}, Axis("expert", division.experts)
    for param, name in names.items():
        # The experts' parameter has the name of the dense one.
        dense, is_last = weight_of(param, name), param is block.down.operands[1]
        if item.models:
            weight = branched(dense, division, item.models, is_last=is_last)
        else:
            weight = lifted(dense, division, is_last=is_last)
        weight = scaled(recipe.perturb(name, dense, weight), recipe.factors.get(param, 1.0))
        type = param.type.with_axes([expert, *_resized(param, block.inner, division.width)])
        earlier = rewritten.get((param, "experts"))
        if earlier is not None and (earlier.weight, earlier.type) != (weight, type):
            raise InputError(
                "layers share this parameter, and each would get experts of its own",
                where=f"{block.loc}: %{name}",
                hint="split=index, or no split, keeps the layers alike",
            )
        image[param] = earlier or graph.param(graph.fresh(name), type, weight, loc=param.loc)
        rewritten[param, "experts"] = image[param]
    at, hidden = block.nodes.index(block.down), block.down.operands[0]
    _emit(builder, block.nodes[:at], image)
    if item.expert_bias != "none":
        # A vector for each expert on the hidden value, ones or zeros (ST-MoE, Appendix C).
        is_product = item.expert_bias == "multiplicative"
        type = hidden.type.with_axes((expert, Axis(block.inner, division.width)))
        fresh, ones = graph.fresh(f"{prefix}.expert_bias"), Full(1.0 if is_product else 0.0, type)
        bias = graph.param(fresh, type, ones, loc=block.loc)
        image[hidden] = (builder.mul if is_product else builder.add)(image[hidden], bias)
    output = finish(_emit(builder, block.nodes[at:], image)[block.output])
    if division.shared:
        output = builder.add(output, _shared(builder, block, names, recipe, prefix, rewritten))
    block.output.replace_by(output)
    for node in reversed(block.nodes):
        node.erase()
    for param in leaving:
        graph.erase_param(param.name)
        if image[param].name != names[param]:
            graph.rename(image[param], names[param])


def average_rest(graph: Graph, models: Sequence[str]) -> None:
    """Make every parameter but those of experts the mean over `models`, each as often as listed."""
    for param in graph.params.values():
        weight = weight_of(param, param.name)
        if "expert" not in param.type:
            param.weight = mean_over(weight, models)


def _resized(param: Value, inner: str, width: int) -> list[Axis]:
    return [Axis(a.name, width) if a.name == inner else a for a in param.type.axes]


def _emit(
    builder: Builder, nodes: Sequence[Node], image: dict[Value, Value], *, at_loc: bool = False
) -> dict[Value, Value]:
    """Emit `nodes` again, the same operations on the images of their operands.

    With `at_loc`, they have the builder's location and fresh names.
    """
    loc = builder.loc
    for node in nodes:
        builder.loc = loc if at_loc else node.loc
        names = () if at_loc else tuple(v.name for v in node.results)
        operands = [image.get(v) or (_constant(builder, v) if at_loc else v) for v in node.operands]
        copy = builder.node(node.op.name, *operands, names=names, **node.attrs)
        image.update(zip(node.results, copy.results, strict=True))
    builder.loc = loc
    return image


def _constant(builder: Builder, value: Value) -> Value:
    """Emit again a constant that a block reads: it may be defined later."""
    assert value.node is not None, "a block reads only constants from outside"
    return builder.node(value.node.op.name, names=(), **value.node.attrs).result


def _shared(
    builder: Builder,
    block: FFNBlock,
    names: Mapping[Value, str],
    recipe: UpcycleRecipe,
    prefix: str,
    rewritten: dict[tuple[Value, str], Value],
) -> Value:
    """Emit the shared expert on the first neurons, gated by sigmoid(0) = ½ and doubled for it.

    Without a gate it is added as it is.
    """
    graph, division = builder.graph, recipe.division
    is_gated = recipe.item.shared_gate == "sigmoid"
    image = {block.x: block.x}
    for param in block.params:
        if param is block.output_bias:
            continue
        is_last = param is block.down.operands[1]
        part = shared_part(weight_of(param, names[param]), division, is_last=is_last)
        if is_last and is_gated:
            part = scaled(part, 2.0)
        type = param.type.with_axes(_resized(param, block.inner, division.shared))
        if (param, "shared") not in rewritten:
            fresh = graph.fresh(f"{names[param]}.shared")
            rewritten[param, "shared"] = graph.param(fresh, type, part, loc=block.loc)
        image[param] = rewritten[param, "shared"]
    # The experts' gates already add up the output bias, so it is not added here.
    nodes = block.nodes if block.output_bias is None else block.nodes[:-1]
    shared = _emit(builder, nodes, image)[block.down.result]
    if not is_gated:
        return shared
    type = tensor(block.x.type.dtype, **{block.outer: block.embed})
    fresh = graph.fresh(f"{prefix}.shared_gate.weight")
    gate = graph.param(fresh, type, Full(0.0, type), loc=block.loc)
    return emit_shared_gate(builder, block.x, gate, shared)
