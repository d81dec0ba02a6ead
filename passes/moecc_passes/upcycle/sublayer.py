"""An extra dense feed-forward sublayer beside a sparse one (ST-MoE, section 5 and Table 16).

It has the shape of the dense block, its own norm and residual, and its last matrix is zero:
it adds exactly nothing until it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moecc.analysis.ffn import FFNBlock
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.rewrite import P, fits
from moecc.types.tensor import Axis, TensorType
from moecc.weights.expr import Expr, Full, Source


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
