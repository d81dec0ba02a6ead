"""The values of a graph in index notation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.ops.repetition import ScanOp, repetitions
from moecc.prove.stopped import stopped
from moecc.terms.tensor import Tensor, pointwise, stacked
from moecc.terms.term import Algebra, Head, Size, Var
from moecc.types import DType, Extent, TensorType, is_lossless
from moecc.weights.expr import Expr, walk

Terms = dict[Value, Tensor]


class Evaluation:
    """Evaluates graphs in one algebra, so that equal values are one object.

    Attributes:
      algebra: builds the terms.
      exact: whether only operations that rearrange elements mean more than their names.
      weights: the terms of weight expressions, which graphs share.
    """

    def __init__(self, algebra: Algebra, *, exact: bool = False) -> None:
        self.algebra, self.exact = algebra, exact
        self.weights: dict[Expr, Tensor] = {}

    def evaluate(self, graph: Graph) -> Terms:
        """Return the term of every input, used parameter and result of a graph."""
        terms: Terms = {v: self._input(v) for v in graph.inputs.values()}
        for value in graph.params.values():
            if value.users:
                terms[value] = self._parameter(value)
        self._run(graph, terms)
        return terms

    def _run(self, graph: Graph, terms: Terms) -> None:
        """Add the results of all nodes of a graph to `terms`."""
        for node in graph:
            for value, tensor in zip(node.results, self._results(node, terms), strict=True):
                terms[value] = replace(tensor, dtype=value.type.dtype)

    # Leaves.

    def _axes(self, type: TensorType, terms: Terms) -> tuple[Var, ...]:
        return tuple(self.algebra.axis(a.name, self._size(a.size, terms)) for a in type.axes)

    def _size(self, size: int | str | Extent, terms: Terms) -> Size:
        if not isinstance(size, Extent):
            return size
        tensor = terms[setter_of(size)]
        if tensor.slots is None:
            # Slots without a meaning: equal terms, equal extents.
            return f"{size.kind} of term {tensor.body.serial}"
        return tensor.slots.sizes[0 if size.kind == "groups" else 2]

    def _leaf(self, name: str, type: TensorType) -> Tensor:
        axes = self._axes(type, {})
        head = {"int": "integer", "bool": "holds"}.get(type.dtype.kind, "source")
        attrs = (name, str(type.dtype), tuple(v.size for v in axes))
        body = self.algebra.apply(Head(head, attrs), (), [self.algebra.index(v) for v in axes])
        return Tensor(self.algebra, axes, body, dtype=type.dtype)

    def _input(self, value: Value) -> Tensor:
        return self._leaf(f"input {value.name}", value.type)

    def _parameter(self, value: Value) -> Tensor:
        if value.weight is None:
            return self._leaf(f"parameter {value.name}", value.type)
        tensor = self._weight(value.weight)
        return replace(self._cast(tensor, value.type.dtype), dtype=value.type.dtype)

    def _cast(self, tensor: Tensor, dtype: DType) -> Tensor:
        if tensor.dtype is not None and is_lossless(tensor.dtype, dtype):
            return tensor
        return pointwise("cast", (str(tensor.dtype), str(dtype)), (tensor,))

    def _weight(self, weight: Expr) -> Tensor:
        for expr in walk(weight):
            if expr not in self.weights:
                operands = [self.weights[x] for x in expr.operands]
                self.weights[expr] = expr.term(self.algebra, *operands)
        return self.weights[weight]

    # Nodes.

    def _results(self, node: Node, terms: Terms) -> Sequence[Tensor]:
        operands = [terms[v] for v in node.operands]
        if node.body is not None:
            return self._repeated(node, node.body, operands)
        if node.op.blocks_gradient and not self.exact:
            return [stopped(operands[0])]
        meaning = node.op.term
        is_defined = meaning is not None and (
            node.op.rearranges or (not self.exact and all(t.finite for t in operands))
        )
        if meaning is not None and (
            is_defined or (_OF_INFINITE & {node.op.name} and not self.exact)
        ):
            results = meaning(self.algebra, operands, node.attrs)
            return results if isinstance(results, tuple) else (results,)
        if node.op.elementwise and not self.exact:
            name = f"{node.op.name} of infinite" if meaning is not None else node.op.name
            result = pointwise(name, _attributes(node), operands)
            finite = result.finite or node.op.name in _BOUNDED
            return [replace(result, axes=self._axes(node.result.type, terms), finite=finite)]
        return self._uninterpreted(node, operands, terms)

    def _repeated(self, node: Node, body: Graph, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the results of a scan: its body, once for each position of the axis."""
        attrs = ScanOp.of_node(node)
        axis, runs = repetitions(node.attrs)
        end = attrs.carries + attrs.stacked
        carried, collected = list(operands[: attrs.carries]), []
        for at in range(runs):
            position = {axis: self.algebra.number(at)}
            slices = [x.moved(x.without(axis), position) for x in operands[attrs.carries : end]]
            inputs = (*carried, *slices, *operands[end:])
            terms: Terms = {
                v: replace(x, dtype=v.type.dtype)
                for v, x in zip(body.inputs.values(), inputs, strict=True)
            }
            self._run(body, terms)
            results = [terms[v] for v in body.terminator.operands]
            carried = results[: attrs.carries]
            collected.append(results[attrs.carries :])
        stacks = [stacked(parts, axis) for parts in zip(*collected, strict=True)]
        return [*carried, *stacks]

    def _uninterpreted(
        self, node: Node, operands: Sequence[Tensor], terms: Terms
    ) -> Sequence[Tensor]:
        """Return functions of all elements of the operands, of which only the key is known."""
        functions = [t.closed() for t in operands]
        finite = all(t.finite for t in operands)
        layout = tuple((t.names, str(t.dtype)) for t in operands)
        results = []
        for value in node.results:
            axes = self._axes(value.type, terms)
            key = (value.index, *_attributes(node), layout, str(value.type.dtype), *axes)
            names = tuple((v.name, v.size) if isinstance(v, Var) else v for v in key)
            # Never the head of a lemma: `div` and `equal` are operations, and functions of indices.
            head = Head(f"operation {node.op.name}", names)
            body = self.algebra.apply(head, functions, [self.algebra.index(v) for v in axes])
            results.append(Tensor(self.algebra, axes, body, finite))
        return results


_OF_INFINITE = frozenset({"softmax", "max", "logsumexp", "mask", "route"})
"""Operations whose meaning holds for infinite elements, too."""


_BOUNDED = frozenset({"sigmoid", "tanh", "normal_cdf"})
"""Functions whose results are finite even of infinite elements."""


def _attributes(node: Node) -> tuple[Hashable, ...]:
    return tuple((k, v) for k, v in sorted(node.attrs.items()))
