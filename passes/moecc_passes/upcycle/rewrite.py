"""The graph rewrite: one dense block becomes routing, lifted experts, and a shared expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moecc.analysis.ffn import FFNBlock
from moecc.ir.builder import Builder
from moecc.ir.dtypes import F32
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_routing, emit_shared_gate
from moecc.ir.types import Axis, TensorType, tensor
from moecc.weights.expr import Expr, Full
from moecc_passes.upcycle.lift import Division, lifted, scaled, shared_part


@dataclass(frozen=True)
class Recipe:
    """Everything that the rewrite of a block needs to know.

    Attributes:
      division: how the neurons are divided.
      router: the router's weight, ``[expert, embed]``.
      top_k: experts per token.
      gates: the gate convention.
      gate_scale: what the gates are multiplied by.
      factors: what each matrix of the experts is multiplied by.
      bias_factor: what an output bias is multiplied by in every expert.
      perturb: makes copies differ; takes a parameter, its dense and its lifted weight.
      slots: the attributes of ``place``: slots, capacity_factor and so on.
    """

    division: Division
    router: Expr
    top_k: int
    gates: str
    gate_scale: float
    factors: Mapping[Value, float]
    bias_factor: float
    perturb: Callable[[Value, Expr, Expr], Expr]
    slots: Mapping[str, Any]


def rewrite_block(graph: Graph, block: FFNBlock, recipe: Recipe) -> None:
    """Replace `block` by its sparse version; parameters that nothing uses any more go."""
    old = block.params
    names = {p: p.name for p in old}
    for param in old:
        graph.rename(param, graph.fresh(f"{param.name}.dense"))
    builder = Builder(graph, loc=block.loc, origin="upcycle/lift", before=block.nodes[0])
    router = graph.param(
        graph.fresh(f"{block.loc}.router.weight"),
        _nominal(recipe.router),
        recipe.router,
        loc=block.loc,
    )
    tokens = tuple(n for n in block.x.type.names if n != block.outer)
    rows, finish = emit_routing(
        builder, block.x, router, experts=recipe.division.experts, top_k=recipe.top_k,
        gates=recipe.gates, scale=recipe.gate_scale, tokens=tokens, **recipe.slots,
    )  # fmt: skip
    experts = {p: _expert_param(graph, p, names[p], block, recipe) for p in old}
    output = finish(_emit(builder, block.nodes, {block.x: rows, **experts})[block.output])
    if recipe.division.shared:
        output = builder.add(output, _shared(builder, block, names, recipe))
    block.output.replace_by(output)
    for node in reversed(block.nodes):
        node.erase()
    for param in old:
        if param.users:
            graph.rename(param, names[param] if names[param] not in graph else param.name)
        else:
            graph.erase_param(param.name)


def _nominal(weight: Expr) -> TensorType:
    return weight.type.with_dtype(F32)


def _expert_param(graph: Graph, param: Value, name: str, block: FFNBlock, recipe: Recipe) -> Value:
    """Add the parameter of the experts that stands for a dense one, under the dense one's name."""
    factor = recipe.factors.get(param, 1.0)
    for up in block.ups:
        # A bias before the activation scales like the weight before it (lemma L3).
        if block.bias_of(up) is param:
            factor = recipe.factors.get(up.operands[1], 1.0)
    if param is block.output_bias:
        factor = recipe.bias_factor
    axes = param.type.with_axes(_with_experts(param.type, recipe.division))
    if param.weight is None:
        return graph.param(graph.fresh(name), axes, None, loc=param.loc)
    experts = lifted(param.weight, recipe.division)
    experts = scaled(recipe.perturb(param, param.weight, experts), factor)
    return graph.param(graph.fresh(name), axes, experts, loc=param.loc)


def _with_experts(type: TensorType, division: Division) -> list[Axis]:
    sizes = [Axis(a.name, division.width) if a.name == division.inner else a for a in type.axes]
    return [Axis("expert", division.experts), *sizes]


def _emit(builder: Builder, nodes: Sequence[Node], image: dict[Value, Value]) -> dict[Value, Value]:
    """Emit `nodes` again, the same operations on the images of their operands."""
    loc = builder.loc
    for node in nodes:
        builder.loc = node.loc
        names = tuple(v.name for v in node.results)
        operands = (image[v] for v in node.operands)
        made = builder.node(node.op.name, *operands, names=names, **node.attrs)
        image.update(zip(node.results, made.results, strict=True))
    builder.loc = loc
    return image


def _shared(builder: Builder, block: FFNBlock, names: Mapping[Value, str], recipe: Recipe) -> Value:
    """Emit the shared expert on the first neurons, gated by sigmoid(0) = ½ and doubled for it."""
    graph, division = builder.graph, recipe.division
    made: dict[Value, Value] = {}
    for param in block.params:
        if param is block.output_bias:
            continue
        name = graph.fresh(f"{names[param]}.shared")
        sizes = [
            Axis(a.name, division.shared) if a.name == division.inner else a
            for a in param.type.axes
        ]
        part = None if param.weight is None else shared_part(param.weight, division)
        if part is not None and param is block.down.operands[1]:
            part = scaled(part, 2.0)
        made[param] = graph.param(name, param.type.with_axes(sizes), part, loc=block.loc)
    # The experts' gates add up an output bias already, so it is not added here again.
    nodes = block.nodes if block.output_bias is None else block.nodes[:-1]
    shared = _emit(builder, nodes, {block.x: block.x, **made})[block.down.result]
    gate_type = tensor(block.x.type.dtype, **{block.outer: block.embed})
    gate = graph.param(
        graph.fresh(f"{block.loc}.shared_gate.weight"), gate_type,
        Full(0.0, gate_type), loc=block.loc,
    )  # fmt: skip
    return emit_shared_gate(builder, block.x, gate, shared)
