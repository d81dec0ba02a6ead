"""The values of a graph in index notation."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.operand import Attrs
from moecc.ir.ops.repetition import ScanOp, repetitions
from moecc.ir.text import format_attrs
from moecc.prove.stopped import stopped
from moecc.terms.tensor import Tensor, pointwise, stacked
from moecc.terms.term import (
    Abstraction,
    Algebra,
    Application,
    Head,
    Monomial,
    Polynomial,
    Size,
    Var,
)
from moecc.types import DType, Extent, TensorType, is_lossless
from moecc.weights.draws import Draw
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Aligned, Stack

Terms = dict[Value, Tensor]


class Evaluation:
    """Evaluates graphs in one algebra, so that equal values are one object.

    Attributes:
      algebra: builds the terms.
      exact: whether only operations that rearrange elements mean more than their names.
      rolled: whether repetition is a function of its body, and not run after run.
      weights: the terms of weight expressions, which graphs share.
      results: the terms of operations on equal operands, which layers and graphs share.
      sizes: those of axes that are others in graphs that are evaluated from now on.
    """

    def __init__(self, algebra: Algebra, *, exact: bool = False, rolled: bool = False) -> None:
        self.algebra, self.exact, self.rolled = algebra, exact, rolled
        self.weights: dict[Expr, Tensor] = {}
        self.results: dict[tuple[Hashable, ...], Sequence[Tensor]] = {}
        self.sizes: dict[Size, Size] = {}
        self._evaluated: list[tuple[Graph, Terms]] = []

    def evaluate(self, graph: Graph) -> Terms:
        """Return the term of every input, used parameter and result of a graph, once evaluated."""
        for evaluated, values in self._evaluated:
            if evaluated is graph:
                return values
        terms: Terms = {v: self._input(v) for v in graph.inputs.values()}
        for value in graph.params.values():
            if value.users:
                terms[value] = self._parameter(value)
        self._run(graph, terms)
        self._evaluated.append((graph, terms))
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
            return self.sizes.get(size, size)
        tensor = terms[setter_of(size)]
        if tensor.slots is None:
            # Slots without a meaning: equal terms, equal extents.
            return f"{size.kind} of term {tensor.body.serial}"
        return tensor.slots.sizes[0 if size.kind == "groups" else 2]

    def leaf(self, name: str, type: TensorType) -> Tensor:
        """Return a tensor that may have any values."""
        axes = self._axes(type, {})
        head = {"int": "integer", "bool": "holds"}.get(type.dtype.kind, "source")
        # A tensor of a checkpoint has no such mark, whatever its name is.
        attrs = (name, str(type.dtype), tuple(v.size for v in axes), "value")
        body = self.algebra.apply(Head(head, attrs), (), [self.algebra.index(v) for v in axes])
        return Tensor(self.algebra, axes, body, dtype=type.dtype)

    def _input(self, value: Value) -> Tensor:
        return self.leaf(f"input {value.name}", value.type)

    def _parameter(self, value: Value) -> Tensor:
        if value.weight is None:
            return self.leaf(f"parameter {value.name}", value.type)
        tensor = self._weight(value.weight)
        return replace(self._cast(tensor, value.type.dtype), dtype=value.type.dtype)

    def _cast(self, tensor: Tensor, dtype: DType) -> Tensor:
        if tensor.dtype is not None and is_lossless(tensor.dtype, dtype):
            return tensor
        return pointwise("cast", (str(tensor.dtype), str(dtype)), (tensor,))

    def _weight(self, weight: Expr) -> Tensor:
        """Return the term of an expression, computed once for every part that graphs share."""
        stack = [weight]
        while stack:
            expr = stack[-1]
            if expr in self.weights:
                stack.pop()
                continue
            if isinstance(expr, Stack) and (tensor := self._alike(expr)) is not None:
                self.weights[expr] = tensor
                continue
            missing = [x for x in expr.operands if x not in self.weights]
            stack += missing
            if not missing:
                operands = [self.weights[x] for x in expr.operands]
                self.weights[expr] = self._expression(expr, operands)
        return self.weights[weight]

    def _alike(self, stack: Stack) -> Tensor | None:
        """Return a stack of expressions that differ in their leaves alone, without stacking terms.

        It is one of them, over families of leaves at one more index.
        """
        columns = [_leaves(x) for x in stack.xs]
        if len({shape for shape, _ in columns}) > 1 or len(columns) < 2:
            return None
        number = self.algebra.fresh(len(columns))
        leaves: list[Tensor] = []
        for row in zip(*(leaves for _, leaves in columns), strict=True):
            family = self._family(row, number)
            if family is None:
                return None
            leaves.append(family)
        body = self._over(stack.xs[0], iter(leaves))
        new = self.algebra.axis(stack.axis, number.size)
        moved = self.algebra.substitute(body.body, {number: self.algebra.index(new)})
        axes = (*body.axes[: stack.position], new, *body.axes[stack.position :])
        return replace(body, axes=axes, body=moved, dtype=stack.type.dtype)

    def _family(self, leaves: Sequence[Expr], number: Var) -> Tensor | None:
        """Return leaves, all different or all the same, as a function of their number."""
        first, algebra = leaves[0], self.algebra
        if all(x is first for x in leaves):
            return self._weight(first)
        names = tuple(x.name if isinstance(x, Source) else str(x) for x in leaves)
        if not isinstance(first, Source | Draw) or len(set(names)) < len(names):
            return None
        axes = self._axes(first.type, {})
        indices = [algebra.index(v) for v in (number, *axes)]
        head = Head("weights", (names, ()))
        if isinstance(first, Source):
            head = Head("family", (names, str(first.type.dtype), first.type.shape))
        return Tensor(algebra, axes, algebra.apply(head, (), indices), dtype=first.type.dtype)

    def _over(self, expr: Expr, leaves: Iterator[Tensor]) -> Tensor:
        """Return the term of an expression over other leaves, in their order."""
        if not expr.operands:
            return next(leaves)
        return self._expression(expr, [self._over(x, leaves) for x in expr.operands])

    def _expression(self, expr: Expr, operands: Sequence[Tensor]) -> Tensor:
        if self.exact and not expr.rearranges:
            return expr.uninterpreted(self.algebra, *operands)
        return expr.term(self.algebra, *operands)

    # Nodes.

    def _results(self, node: Node, terms: Terms) -> Sequence[Tensor]:
        operands = [terms[v] for v in node.operands]
        if node.body is not None:
            return self._repeated(node, node.body, operands)
        values = ((t.axes, t.body, t.finite, t.slots, t.dtype) for t in operands)
        key = (node.op.name, self._text(node, node.attrs), *values)
        if key not in self.results:
            axes = [self._axes(v.type, terms) for v in node.results]
            results = self.computed(node, operands, node.attrs, axes)
            self.results[key] = [self._resized(x) for x in results]
        return self.results[key]

    def _resized(self, x: Tensor) -> Tensor:
        """Return slots with as many of them as `sizes` says."""
        if x.slots is None or x.slots.sizes[2] not in self.sizes:
            return x
        sizes = (*x.slots.sizes[:2], self.sizes[x.slots.sizes[2]])
        return replace(x, slots=replace(x.slots, sizes=sizes))

    def computed(
        self, node: Node, operands: Sequence[Tensor], attrs: Attrs, axes: Sequence[tuple[Var, ...]]
    ) -> Sequence[Tensor]:
        """Return the results of a node by the meaning of its operation, or without one.

        Args:
          node: the node, without a body.
          operands: maybe shards of its operands.
          attrs: its attributes, maybe those with which a device runs it.
          axes: those of its results.
        """
        # Of an operation of the user's own nothing is believed but what the log states.
        is_own = node.op.source is not None
        if node.op.blocks_gradient and not self.exact and not is_own:
            return [stopped(operands[0])]
        meaning = None if is_own else node.op.term
        is_defined = meaning is not None and (
            node.op.rearranges or (not self.exact and all(t.finite for t in operands))
        )
        if meaning is not None and (
            is_defined or (_OF_INFINITE & {node.op.name} and not self.exact)
        ):
            results = meaning(self.algebra, operands, attrs)
            return results if isinstance(results, tuple) else (results,)
        text = self._text(node, attrs)
        if node.op.elementwise and not self.exact:
            if is_own:
                return self._own_elementwise(node, operands, text, axes)
            name = f"{node.op.name} of infinite" if meaning is not None else node.op.name
            result = pointwise(name, [text] if text else [], operands)
            finite = result.finite or node.op.name in _BOUNDED
            return [replace(result, axes=axes[0], finite=finite)]
        return self._uninterpreted(node, operands, text, axes)

    @staticmethod
    def _own_elementwise(
        node: Node, operands: Sequence[Tensor], text: str, layouts: Sequence[tuple[Var, ...]]
    ) -> Sequence[Tensor]:
        """Return functions of one element of each operand, which only their author knows."""
        name = f"operation {node.op.name}"  # never the head of a lemma
        read = [*([text] if text else []), *(str(t.dtype) for t in operands)]
        keys = [[*read, value.index, str(value.type.dtype)] for value in node.results]
        return [
            replace(pointwise(name, key, operands), axes=axes)
            for key, axes in zip(keys, layouts, strict=True)
        ]

    @staticmethod
    def _text(node: Node, attrs: Attrs) -> str:
        """Return the attributes; and the name of what only another program can compute."""
        text = format_attrs(node.op, attrs).strip()
        return f"{text} %{node.result.name}" if node.op.opaque else text

    def _repeated(self, node: Node, body: Graph, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the results of a scan: its body, once for each position of the axis."""
        attrs = ScanOp.of_node(node)
        axis, runs = repetitions(node.attrs)
        end = attrs.carries + attrs.stacked
        if self.rolled:
            return self._folded(node, body, operands)
        carried, collected = list(operands[: attrs.carries]), []
        for at in range(runs):
            position = {axis: self.algebra.number(at)}
            slices = [x.moved(x.without(axis), position) for x in operands[attrs.carries : end]]
            results = self._body(body, (*carried, *slices, *operands[end:]))
            carried = list(results[: attrs.carries])
            collected.append(results[attrs.carries :])
        stacks = [stacked(parts, axis) for parts in zip(*collected, strict=True)]
        return [*carried, *stacks]

    def _body(self, body: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of a body for its inputs."""
        pairs = zip(body.inputs.values(), inputs, strict=True)
        terms: Terms = {v: replace(x, dtype=v.type.dtype) for v, x in pairs}
        self._run(body, terms)
        return [terms[v] for v in body.terminator.operands]

    def _folded(self, node: Node, body: Graph, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the results of a scan as functions of its initial carries and of its body.

        The body is evaluated once, with a variable for the number of the run and with unknown
        carries, so two scans are equal if they start alike and do alike in every run.
        """
        attrs, algebra = ScanOp.of_node(node), self.algebra
        axis, runs = repetitions(node.attrs)
        count, end = attrs.carries, attrs.carries + attrs.stacked
        run = algebra.fresh(runs)
        starts_finite = all(o.finite for o in operands)
        carried = [_carry(x, i, starts_finite) for i, x in enumerate(operands[:count])]
        position = {axis: algebra.index(run)}
        slices = [x.moved(x.without(axis), position) for x in operands[count:end]]
        results = self._body(body, (*carried, *slices, *operands[end:]))
        starts = [x.closed() for x in operands[:count]]
        steps = [
            algebra.abstract([run, *start.axes], x.body)
            for start, x in zip(carried, results, strict=False)
        ]
        finite = all(x.finite for x in (*operands, *results))
        if starts_finite and not finite:
            raise InputError("a scan makes infinite values of finite ones")
        finals = []
        for i, start in enumerate(carried):
            indices = [algebra.index(v) for v in start.axes]
            final = algebra.apply(Head("repeat", (runs, "carry", i)), [*starts, *steps], indices)
            finals.append(Tensor(algebra, start.axes, final, finite))
        new = algebra.axis(axis, runs)
        for x in results[count:]:
            function = algebra.abstract([run, *x.axes], x.body)
            indices = [algebra.index(v) for v in (new, *x.axes)]
            head = Head("repeat", (runs, "each"))
            element = algebra.apply(head, [*starts, *steps, function], indices)
            finals.append(Tensor(algebra, (new, *x.axes), element, finite))
        return finals

    def _uninterpreted(
        self, node: Node, operands: Sequence[Tensor], text: str, layouts: Sequence[tuple[Var, ...]]
    ) -> Sequence[Tensor]:
        """Return uninterpreted functions of all elements of the operands, named by a key."""
        # Of an operation of the user's own it is sampled up to rounding.
        in_bits = node.op.name not in _OF_SIGNED_ZEROS and node.op.source is None
        if node.op.commutative and len(operands) == 2 and (in_bits or not self.exact):
            operands = sorted(operands, key=lambda t: (t.closed().body.serial, t.names))
        functions = [t.closed() for t in operands]
        finite = all(t.finite for t in operands)
        layout = tuple((t.names, str(t.dtype)) for t in operands)
        results = []
        for value, axes in zip(node.results, layouts, strict=True):
            key = (value.index, text, layout, str(value.type.dtype), *axes)
            names = tuple((v.name, v.size) if isinstance(v, Var) else v for v in key)
            # Never the head of a lemma: `div` and `equal` are operations, and functions of indices.
            head = Head(f"operation {node.op.name}", names)
            body = self.algebra.apply(head, functions, [self.algebra.index(v) for v in axes])
            results.append(Tensor(self.algebra, axes, body, finite))
        return results


_OF_INFINITE = frozenset({"cast", "softmax", "max", "logsumexp", "mask", "route"})
"""Operations whose meaning holds for infinite elements, too."""


_OF_SIGNED_ZEROS = frozenset({"maximum", "minimum"})
"""Functions whose operands may be exchanged but for bits: that of 0 and −0 is either of them."""


_BOUNDED = frozenset({"sigmoid", "tanh", "normal_cdf"})
"""Functions whose results are finite even of infinite elements."""


def _carry(start: Tensor, number: int, finite: bool) -> Tensor:
    """Return the unknown tensor of a carry at the beginning of any run."""
    algebra, indices = start.algebra, [start.algebra.index(v) for v in start.axes]
    sizes = tuple(v.size for v in start.axes)
    body = algebra.apply(Head("carry", (number, sizes)), (), indices)
    return Tensor(algebra, start.axes, body, finite, dtype=start.dtype)


def _leaves(expr: Expr) -> tuple[object, list[Expr]]:
    """Return all of an expression but its leaves, whose types it has, and its leaves in order."""
    if not expr.operands:
        return (type(expr), expr.type), [expr]
    parts = [_leaves(x) for x in expr.operands]
    # The term of an order that aligns neurons has its text for a name, leaves included.
    outer = str(expr) if isinstance(expr, Aligned) else expr.outline
    return (type(expr), outer, *(p[0] for p in parts)), [x for p in parts for x in p[1]]


_LONGEST = 400

Term = Var | Abstraction | Application | Monomial | Polynomial


def shown(a: Tensor, b: Tensor) -> tuple[str, str]:
    """Return the elements of two tensors that differ as texts, shortened, which differ, too.

    A text leaves out attributes, the end of what is long, and what a numbered name stands for.
    Where two are alike but for it, they are those of the only part that differs, as far as there
    is one, with its attributes.
    """
    if a.body is b.body:
        return _axes(a), _axes(b)
    terms: tuple[Term, Term] = a.body, b.body
    while len({re.sub(r"\bf\d+\b", "f", _text(term)) for term in terms}) == 1:
        parts = _only_difference(*terms)
        if parts is None:
            return _in_full(terms[0]), _in_full(terms[1])
        terms = parts
    return _text(terms[0]), _text(terms[1])


def _axes(tensor: Tensor) -> str:
    return f"[{', '.join(map(_in_full, tensor.axes))}]"


def _text(term: Term) -> str:
    text = repr(term) if term.weight < _LONGEST else f"<{term.weight} factors>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _in_full(term: Term) -> str:
    if isinstance(term, Application):
        head = " ".join(map(str, (term.head.name, *term.head.attrs)))
        return head + _text(term).removeprefix(str(term.head))
    return f"{term!r}<{term.size}" if isinstance(term, Var) else _text(term)


def _only_difference(a: Term, b: Term) -> tuple[Term, Term] | None:
    """Return the only parts in which two terms differ; None where they themselves do."""
    (frame_a, parts_a), (frame_b, parts_b) = _parts(a), _parts(b)
    if frame_a != frame_b or len(parts_a) != len(parts_b):
        return None
    parts = [(x, y) for x, y in zip(parts_a, parts_b, strict=True) if x is not y]
    return parts[0] if len(parts) == 1 else None


def _parts(term: Term) -> tuple[object, Sequence[Term]]:
    """Return what a term is beside its parts, and these."""
    match term:
        case Polynomial():
            return [c for _, c in term.terms], [m for m, _ in term.terms]
        case Monomial():
            return [v.size for v in term.bound], term.factors
        case Application():
            return term.head, [*term.abstractions, *term.arguments]
        case Abstraction():
            return [v.size for v in term.variables], [term.body]
    return term, ()
