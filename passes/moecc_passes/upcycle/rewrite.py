"""The graph rewrite: one dense block becomes routing, lifted experts, and a shared expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moecc.analysis import FFNBlock
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_shared_gate
from moecc.rewrite import P, fits
from moecc.types import Axis, TensorType, tensor
from moecc.weights.branches import mean_over
from moecc.weights.expr import Expr, Full, Source
from moecc_passes.upcycle.lift import Division, branched, lifted, scaled, shared_part
from moecc_passes.upcycle.routers import Router

# An extra dense feed-forward sublayer beside a sparse one (ST-MoE, section 5 and Table 16).
#
# It has the shape of the dense block, its own norm and residual, and its last matrix is zero:
# it adds exactly nothing until it is trained.


@dataclass(frozen=True)
class Surroundings:
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


def surroundings(block: FFNBlock) -> Surroundings | str:
    """Return the residual stream around `block`, or why no sublayer can be added to it."""
    total = _sum_after(block.output)
    if total is None:
        return "nothing adds its output to a residual stream"
    norm = block.x.node
    if norm is not None and norm.op.is_norm and norm.operands[0] in total.operands:
        return Surroundings(norm.operands[0], total.result, norm, total)
    if block.x not in total.operands:
        return "its output is added to another value than its input"
    behind = total.result.only_user
    is_normed = behind is not None and behind.op.is_norm
    after = behind.result if behind is not None and is_normed else total.result
    return Surroundings(block.x, after, None, total)


def _sum_after(output: Value) -> Node | None:
    """Return the node that adds `output`, possibly scaled, to another value."""
    user = output.only_user
    while found := fits(SCALED, user):
        user = found.root.result.only_user
    return user if fits(SUM, user) else None


SCALED = P.scale(P.any())
SUM = P.add(P.any(), P.any())


def extra_location(loc: str) -> str:
    """Return the location of the extra sublayer beside the block at `loc`."""
    head, _, last = loc.rpartition(".")
    return f"{head}.extra_{last}" if head else f"extra_{last or 'ffn'}"


@dataclass(frozen=True)
class DenseCopy:
    """The original dense block: enough to emit it again beside its sparse version.

    Attributes:
      block: the block, before it is rewritten.
      around: the residual stream around it.
      weights: the weights of its parameters, and of its norm's, by their names.
    """

    block: FFNBlock
    around: Surroundings
    weights: dict[Value, Expr]

    @classmethod
    def of(cls, block: FFNBlock) -> DenseCopy:
        """Return the copy of `block`, which must have a residual stream around it."""
        around = surroundings(block)
        assert not isinstance(around, str), "checked before anything was changed"
        vectors = around.norm.operands[1:] if around.norm else ()
        made = (v for node in _made_by(vectors) for v in node.operands)
        params = [*block.params, *vectors, *made]
        return cls(block, around, {p: _weight(p) for p in params if p.is_param})

    def emit(self, graph: Graph, where: str) -> None:
        """Emit the sublayer ``before`` or ``after`` the block; call it before erasing the block."""
        stream = self.around.before if where == "before" else self.around.after
        users = [(n, i) for n in stream.users for i, v in enumerate(n.operands) if v is stream]
        if where == "before":
            mine = {*self.block.nodes, self.around.sum, self.around.norm}
            users = [(n, i) for n, i in users if n in mine]
        builder = Builder(
            graph,
            loc=extra_location(self.block.loc),
            origin="upcycle/extra-ffn",
            before=_following(graph, stream, users),
        )
        total = builder.add(stream, self._block(builder, self._normed(builder, stream)))
        for node, index in users:
            node.set_operand(index, total)

    def _normed(self, builder: Builder, stream: Value) -> Value:
        norm = self.around.norm
        if norm is None:
            return stream
        # A gain may be computed from a parameter, as Gemma's is, which is one more.
        nodes, image = [*_made_by(norm.operands[1:]), norm], {norm.operands[0]: stream}
        for node in nodes:
            for value in node.operands:
                if value not in image:
                    image[value] = self._param(builder, value, self.weights[value])
            operands = (image[v] for v in node.operands)
            again = builder.node(node.op.name, *operands, names=(), **node.attrs)
            image.update(zip(node.results, again.results, strict=True))
        return image[norm.result]

    def _block(self, builder: Builder, x: Value) -> Value:
        image: dict[Value, Value] = {self.block.x: x}
        zero = {self.block.down.operands[1], self.block.output_bias}
        for param in self.block.params:
            weight = self.weights[param]
            made = Full(0.0, weight.type) if param in zero else weight
            image[param] = self._param(builder, param, made)
        for node in self.block.nodes:
            operands = [image.get(v) or self._constant(builder, v) for v in node.operands]
            again = builder.node(node.op.name, *operands, names=(), **node.attrs)
            image.update(zip(node.results, again.results, strict=True))
        return image[self.block.output]

    def _constant(self, builder: Builder, value: Value) -> Value:
        """Emit again a constant that the block reads: it may be defined later."""
        node = value.node
        assert node is not None, "a block reads only constants from outside"
        return builder.node(node.op.name, names=(), **node.attrs).result

    def _param(self, builder: Builder, param: Value, weight: Expr) -> Value:
        name = builder.graph.fresh(f"{param.name}.extra")
        return builder.graph.param(name, param.type, weight, loc=builder.loc)


def _made_by(values: Iterable[Value]) -> list[Node]:
    """Return the nodes that values are computed by, each after those that it reads."""
    found: list[Node] = []
    left = [value.node for value in values]
    while left:
        node = left.pop()
        if node is not None:
            found.append(node)
            left += [value.node for value in node.operands]
    # The last time that a node was met is behind all that read it.
    return list(dict.fromkeys(reversed(found)))


def _following(graph: Graph, stream: Value, users: list[tuple[Node, int]]) -> Node | None:
    """Return the first node that must read the new stream; None if only outputs do."""
    concerned = {n for n, _ in users}
    return next((n for n in graph.walk(stream.node) if n in concerned), None)


def _weight(param: Value) -> Expr:
    if param.weight is not None:
        return param.weight
    axes = tuple(Axis(a.name, a.size) for a in param.type.axes)
    return Source(param.name, TensorType(param.type.dtype, axes))


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
        weight = _rewrite_weight(param, param.name)
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
    dense = _rewrite_weight(param, name)
    experts = recipe.perturb(name, dense, recipe.lifted(dense, is_last=is_last))
    experts = scaled(experts, recipe.factors.get(param, 1.0))
    axes = param.type.with_axes(_with_experts(param.type, recipe.division))
    return graph.param(graph.fresh(name), axes, experts, loc=param.loc)


def _rewrite_weight(param: Value, name: str) -> Expr:
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
        part = shared_part(_rewrite_weight(param, names[param]), division, is_last=is_last)
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
