"""The graph rewrite: one dense block becomes routing, lifted experts, and a shared expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moecc.analysis.ffn import FFNBlock
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_shared_gate
from moecc.types.tensor import Axis, TensorType, tensor
from moecc.weights.branches import mean_over
from moecc.weights.expr import Expr, Full, Source
from moecc_passes.upcycle.lift import Division, branched, lifted, scaled, shared_part
from moecc_passes.upcycle.routers import Router
from moecc_passes.upcycle.sublayer import DenseCopy

Perturb = Callable[[str, Expr, Expr], Expr]
"""Makes copies differ: from a parameter's name, its dense weight, and its lifted weight."""


@dataclass(frozen=True)
class Recipe:
    """All inputs of the rewrite of a block.

    Attributes:
      division: how the neurons are divided.
      router: how tokens are routed to the experts.
      factors: the factor of each parameter of the experts.
      perturb: makes copies differ; takes the name of a parameter, its dense and its lifted weight.
      expert_bias: ``multiplicative`` (ones) or ``additive`` (zeros): a vector for each expert on
        the hidden value before the last matrix (ST-MoE, Appendix C); ``none``.
      extra_ffn: whether a dense sublayer is added ``before`` or ``after``; ``none``.
      shared_gate: ``sigmoid`` if the shared expert has a gate, ``none`` if not.
      models: the models that the copies come from, one each; empty if all are of the source.
    """

    division: Division
    router: Router
    factors: Mapping[Value, float]
    perturb: Perturb
    expert_bias: str = "none"
    extra_ffn: str = "none"
    shared_gate: str = "sigmoid"
    models: tuple[str, ...] = ()

    def lifted(self, dense: Expr, *, is_last: bool) -> Expr:
        """Return a dense weight, that of the last matrix or another, lifted over the experts."""
        if self.models:
            return branched(dense, self.division, self.models, is_last=is_last)
        return lifted(dense, self.division, is_last=is_last)


def rewrite_block(graph: Graph, block: FFNBlock, recipe: Recipe) -> None:
    """Replace `block` by its sparse version, and erase parameters that become unused."""
    if recipe.extra_ffn != "none":
        DenseCopy.of(block).emit(graph, recipe.extra_ffn)
    names = {p: p.name for p in block.params}
    leaving = [p for p in names if p.users.keys() <= set(block.nodes)]
    for param in leaving:
        graph.rename(param, graph.fresh(f"{param.name}.dense"))
    # All inputs of the block, constants included, are defined before its last node.
    builder = Builder(graph, loc=block.loc, origin="upcycle/lift", before=block.nodes[-1])
    rows, finish = recipe.router.emit(builder, block, _name(block.loc))
    last = block.down.operands[1]
    experts = {p: _expert_param(graph, p, names[p], recipe, is_last=p is last) for p in names}
    output = finish(_experts(builder, block, recipe, {block.x: rows, **experts}))
    if recipe.division.shared:
        output = builder.add(output, _shared(builder, block, names, recipe))
    block.output.replace_by(output)
    for node in reversed(block.nodes):
        node.erase()
    for param in leaving:
        graph.erase_param(param.name)


def average_rest(graph: Graph, models: Sequence[str]) -> None:
    """Make every parameter but those of experts the mean over `models`, each as often as listed."""
    for param in graph.params.values():
        weight = _weight(param, param.name)
        if "expert" not in param.type:
            param.weight = mean_over(weight, models)


def _experts(builder: Builder, block: FFNBlock, recipe: Recipe, image: dict[Value, Value]) -> Value:
    """Emit the lifted block on the rows, with the experts' bias before its last matrix."""
    at = block.nodes.index(block.down)
    hidden = block.down.operands[0]
    _emit(builder, block.nodes[:at], image)
    if recipe.expert_bias != "none":
        is_product = recipe.expert_bias == "multiplicative"
        type = hidden.type.with_axes(
            (Axis("expert", recipe.division.experts), Axis(block.inner, recipe.division.width))
        )
        name = builder.graph.fresh(f"{_name(block.loc)}.expert_bias")
        weight = Full(1.0 if is_product else 0.0, type)
        bias = builder.graph.param(name, type, weight, loc=block.loc)
        add_or_mul = builder.mul if is_product else builder.add
        image[hidden] = add_or_mul(image[hidden], bias)
    return _emit(builder, block.nodes[at:], image)[block.output]


def _name(loc: str) -> str:
    """Return a value name derived from the location `loc`."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", loc) or "ffn"


def _expert_param(graph: Graph, param: Value, name: str, recipe: Recipe, *, is_last: bool) -> Value:
    """Add the experts' parameter for a dense one, under the dense one's name."""
    dense = _weight(param, name)
    experts = recipe.perturb(name, dense, recipe.lifted(dense, is_last=is_last))
    experts = scaled(experts, recipe.factors.get(param, 1.0))
    axes = param.type.with_axes(_with_experts(param.type, recipe.division))
    return graph.param(graph.fresh(name), axes, experts, loc=param.loc)


def _weight(param: Value, name: str) -> Expr:
    # A parameter without a weight expression is the tensor of its name.
    plain = tensor(param.type.dtype, **{a.name: a.size for a in param.type})
    return Source(name, plain) if param.weight is None else param.weight


def _with_experts(type: TensorType, division: Division) -> list[Axis]:
    sizes = [Axis(a.name, division.width) if a.name == division.inner else a for a in type.axes]
    return [Axis("expert", division.experts), *sizes]


def _emit(builder: Builder, nodes: Sequence[Node], image: dict[Value, Value]) -> dict[Value, Value]:
    """Emit `nodes` again, the same operations on the images of their operands."""
    loc = builder.loc
    for node in nodes:
        builder.loc = node.loc
        names = tuple(v.name for v in node.results)
        operands = (image.get(v, v) for v in node.operands)
        made = builder.node(node.op.name, *operands, names=names, **node.attrs)
        image.update(zip(node.results, made.results, strict=True))
    builder.loc = loc
    return image


def _shared(builder: Builder, block: FFNBlock, names: Mapping[Value, str], recipe: Recipe) -> Value:
    """Emit the shared expert on the first neurons, gated by sigmoid(0) = ½ and doubled for it.

    Without a gate it is added as it is.
    """
    graph, division = builder.graph, recipe.division
    is_gated = recipe.shared_gate == "sigmoid"
    made: dict[Value, Value] = {}
    for param in block.params:
        if param is block.output_bias:
            continue
        name = graph.fresh(f"{names[param]}.shared")
        sizes = [
            Axis(a.name, division.shared) if a.name == division.inner else a
            for a in param.type.axes
        ]
        is_last = param is block.down.operands[1]
        part = shared_part(_weight(param, names[param]), division, is_last=is_last)
        if is_last and is_gated:
            part = scaled(part, 2.0)
        made[param] = graph.param(name, param.type.with_axes(sizes), part, loc=block.loc)
    # The experts' gates already add up the output bias, so it is not added here.
    nodes = block.nodes if block.output_bias is None else block.nodes[:-1]
    shared = _emit(builder, nodes, {block.x: block.x, **made})[block.down.result]
    if not is_gated:
        return shared
    gate_type = tensor(block.x.type.dtype, **{block.outer: block.embed})
    gate = graph.param(
        graph.fresh(f"{_name(block.loc)}.shared_gate.weight"), gate_type,
        Full(0.0, gate_type), loc=block.loc,
    )  # fmt: skip
    return emit_shared_gate(builder, block.x, gate, shared)
