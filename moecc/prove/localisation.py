"""The node at which two graphs part, for messages: a heuristic that no proof rests on.

Both graphs are walked side by side from an output whose values differ.  A value of the second graph
that is needed for a value of the first is right; of the others that stand where the first graph
has another value, the first is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from moecc.ir.graph import Node, Value, where
from moecc.ir.traits import RowMove
from moecc.prove.evaluation import Terms, shown
from moecc.prove.mesh import Parting
from moecc.prove.stopped import LEAVES, STOPPED
from moecc.terms.tensor import Tensor
from moecc.terms.term import (
    INTEGRAL,
    Application,
    Factor,
    Monomial,
    Polynomial,
    Var,
    is_integral,
)

Pair = tuple[Value, Value]
"""A value of the first graph, and a value of the second that stands in its place."""


def first_difference(name: str, outputs: Pair, old: Terms, new: Terms) -> Parting:
    """Return the first node of the second graph that stands for another value of the first.

    Args:
      name: the output that differs.
      outputs: its value in each graph.
      old: the terms of the first graph.
      new: the terms of the second.
    """
    walk = _ParallelWalk(outputs, old, new)
    if walk.returns_another():
        text = f"{_shown(outputs[1])}, returned as %{name}"
        return text, shown(old[outputs[0]], new[outputs[1]])
    twin, first = walk.first()
    suspects = {_first_lost_row(first, old, new)}
    if not _is_one_step(twin, first, old, new):
        suspects.add(walk.first_stranger(first))
    results = (v for node in first.graph for v in node.results)
    suspect = next((v for v in results if v in suspects), first)
    if suspect in walk.twins:
        twin, first = walk.twins[suspect], suspect
    return _shown(suspect), shown(old[twin], new[first])


def _shown(value: Value) -> str:
    return where(value.node) if value.node is not None else f"%{value.name}"


class _ParallelWalk:
    """Two graphs, walked side by side from an output.

    Attributes:
      old: the terms of the first graph.
      new: the terms of the second.
      values: all values of the first graph.
      right: the values of the second graph that one of the first is computed from.
      memo: outlines of factors.
      twins: the value of the first graph in whose place a wrong one of the second stands.
    """

    def __init__(self, outputs: Pair, old: Terms, new: Terms) -> None:
        self.old, self.new = old, new
        self.values = {_key(t) for t in old.values()}
        self.outputs = outputs
        self.memo: dict[Factor, int] = {}
        self.right: set[Value] = set()
        self.twins = {outputs[1]: outputs[0]}
        visited, stack = {outputs}, [outputs]
        while stack:
            for pair in _aligned(*stack.pop(), old, new):
                if self._is_equal(pair):
                    # A value that is equal at its start alone shows nothing of its operands.
                    if _key(old[pair[0]]) == _key(new[pair[1]]):
                        self.right.add(pair[1])
                elif pair not in visited:
                    visited.add(pair)
                    stack.append(pair)
        for node in reversed([*outputs[1].graph]):
            if not self.right.isdisjoint(node.results):
                self.right.update(node.operands)

    def returns_another(self) -> bool:
        """Return whether the output of the second graph is another right value."""
        key = _key(self.new[self.outputs[1]])
        old, new = ([_key(t) for t in terms.values()] for terms in (self.old, self.new))
        return old.count(key) >= new.count(key)

    def _is_equal(self, pair: Pair) -> bool:
        a, b = self.old[pair[0]], self.new[pair[1]]
        if _key(a) == _key(b) or _is_alike(a, b):
            return True
        is_routed = a.names == b.names and a.has("slot") and a.has("expert")
        is_grown = is_routed and a.axis("expert") != b.axis("expert")
        return is_grown and _outline(a.body, self.memo) == _outline(b.body, self.memo)

    def first(self) -> Pair:
        """Return the first value of the second graph that is wrong, and its twin before it."""
        twins, stack = self.twins, [self.outputs]
        while stack:
            for a, b in _aligned(*stack.pop(), self.old, self.new):
                if b in twins or b.node is None or b in self.right or self._is_equal((a, b)):
                    continue
                if _key(self.new[b]) in self.values and not _is_at_one_place(a.node, b.node):
                    continue
                if b.type.dtype.kind == "int" and self.old[a].axes != self.new[b].axes:
                    # Choices of more experts.
                    continue
                twins[b] = a
                stack.append((a, b))
        results = (v for node in self.outputs[1].graph for v in node.results)
        first = next((v for v in results if v in twins), self.outputs[1])
        return twins[first], first

    def first_stranger(self, value: Value) -> Value | None:
        """Return the first value towards `value` with an outline that the first graph lacks."""
        outlines = {v: _outline(t.body, self.memo) for v, t in self.old.items()}
        old_outlines = {*outlines.values()}
        summands = {part for outline in old_outlines for part, _ in outline}
        for candidate in _upstream_rows(value):
            body = self.new[candidate].body
            node = candidate.node
            assert node is not None
            source = node.operands[0] if node.op.moves is RowMove.TO_SLOTS else candidate
            if source in self.right or _key(self.new[source]) in self.values:
                continue
            outline = self._outline(candidate)
            if outline not in old_outlines and not (
                _is_piecewise(body) and {part for part, _ in outline} <= summands
            ):
                return self._unlike_operand(candidate, outlines)
        return None

    def _unlike_operand(self, stranger: Value, outlines: dict[Value, Outline]) -> Value:
        """Return the operand that makes a node unlike its twin in the layer before, or `stranger`.

        Weights are no values of nodes: a wrong one is named by its user.
        """
        node = stranger.node
        assert node is not None
        for twin in (v.node for v in outlines if _is_at_one_place(v.node, node)):
            assert twin is not None
            expected = {outlines[v] for v in twin.operands}
            unlike = [v for v in node.operands if self._outline(v) not in expected]
            if len(node.operands) == 1:
                # The outline of its operand leaves out a factor, that of the result does not.
                unlike = node.operands
            if len(unlike) == 1 and (len(node.operands) == 1 or len(expected) > 1):
                operand = unlike[0]
                return stranger if operand.node is None or operand in self.right else operand
        return stranger

    def _outline(self, value: Value) -> Outline:
        return _outline(self.new[value].body, self.memo)


def _key(tensor: Tensor) -> tuple[frozenset[Var], Polynomial]:
    return frozenset(tensor.axes), tensor.body


def _is_one_step(before: Value, after: Value, old: Terms, new: Terms) -> bool:
    """Return whether two values are results of one operation on operands of the same axes."""
    a, b = before.node, after.node
    if a is None or b is None or a.op is not b.op:
        return False
    return [old[v].axes for v in a.operands] == [new[v].axes for v in b.operands]


def _is_at_one_place(before: Node | None, after: Node | None) -> bool:
    """Return whether two nodes do one thing in one layer."""
    if before is None or after is None:
        return False
    return before.op is after.op and before.loc == after.loc


def _aligned(before: Value, after: Value, old: Terms, new: Terms) -> Iterator[Pair]:
    """Yield pairs of operands of two values that stand for one another.

    Operands that are equal in another order are no difference.  Of nodes of two operations, one is
    taken to be added: its operand is compared with the other.
    """
    a, b = before.node, after.node
    if a is None or b is None:
        return
    if a.op is b.op and a.attrs == b.attrs and len(a.operands) == len(b.operands):
        left, strangers = [*a.operands], []
        for operand in b.operands:
            twin = next((v for v in left if _key(old[v]) == _key(new[operand])), None)
            if twin is None:
                strangers.append(operand)
            else:
                left.remove(twin)
                yield twin, operand
        yield from zip(left, strangers, strict=True)
        return
    x, y = _main_operand(a), _main_operand(b)
    if x is not None and x.node is not None and x.node.op is b.op:
        yield x, after
    elif y is not None and y.node is not None and y.node.op is a.op:
        yield before, y


def _main_operand(node: Node) -> Value | None:
    """Return the only operand of a node that is computed, or None."""
    computed = [v for v in node.operands if v.node is not None and v.node.operands]
    return computed[0] if len(computed) == 1 else None


def _is_alike(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal at the start of axes of two sizes, up to a factor."""
    if a.names != b.names or a.axes == b.axes:
        return False
    pairs = zip(a.axes, b.axes, strict=True)
    start = {v.name: a.algebra.zero for v, w in pairs if v is not w}
    parts = (t.moved(t.without(*start), start) for t in (a, b))
    return len({_up_to_a_factor(part) for part in parts}) == 1


# Rows: what experts compute of tokens.


def _upstream_rows(value: Value) -> list[Value]:
    """Return the values that a value is computed from, choices and slots excluded, in order."""
    upstream = {value}
    for node in reversed([*value.graph]):
        if not upstream.isdisjoint(node.results):
            upstream.update(node.operands[:1] if node.op.moves is not None else node.operands)
    upstream.discard(value)
    return [v for n in value.graph for v in n.results if v in upstream]


def _first_lost_row(combined: Value, old: Terms, new: Terms) -> Value | None:
    """Return the first of the rows that are combined which no token has in the first graph.

    The row of a token's best choice is compared with values of the token, as where experts are
    copies of a block, and with such rows of the first graph.  None where rows have other axes than
    these, as slices of neurons, or all are there.
    """
    node = combined.node
    if node is None or node.op.moves is not RowMove.TO_TOKENS or len(node.operands) < 4:
        return None
    slot = new[node.operands[0]].axis("slot")
    assignments = [t for t in old.values() if t.slots is not None]
    best = {_best_expert(t) for t in assignments}
    if best and any(_best_expert(new[v]) not in best for v in node.operands if new[v].slots):
        choice = node.operands[1]
        is_comparable = any(t.axes == new[choice].axes for t in assignments)
        keys = {_key(t) for t in old.values()}
        lost = (v for v in (*_upstream_rows(choice), choice) if _key(new[v]) not in keys)
        return next(lost, None) if is_comparable else None
    values = {_up_to_a_factor(t) for t in _by_token(old).values()}
    layouts = {axes for axes, _ in values}
    rows = _by_token(new)
    for value in _upstream_rows(combined):
        is_moved = value.node is None or value.node.op.moves is not None
        if slot in new[value].axes and not is_moved:
            key = _up_to_a_factor(rows[value])
            if key not in values:
                return value if key[0] in layouts else None
    return None


def _best_expert(tensor: Tensor) -> Polynomial | None:
    """Return the expert of the first choice, for slots."""
    slots, algebra = tensor.slots, tensor.algebra
    if slots is None:
        return None
    return algebra.substitute(slots.experts, {slots.choice: algebra.zero})


def _by_token(terms: Terms) -> Terms:
    """Return values as functions of tokens; a row is that of the first choice of its token."""
    assignments = {t.slots.sizes: t.slots for t in terms.values() if t.slots is not None}
    values: Terms = {}
    for value, tensor in terms.items():
        sizes = tuple(v.size for v in tensor.axes if v.name in ("group", "expert", "slot"))
        slots = assignments.get(sizes) if tensor.has("slot") else None  # type: ignore[arg-type]
        if slots is not None:
            row = slots.place(tensor.algebra, tensor.algebra.zero)
            axes = (*slots.tokens, *tensor.without(*row))
            tensor = tensor.moved(axes, row)
        values[value] = tensor
    return values


def _up_to_a_factor(tensor: Tensor) -> tuple[frozenset[Var], Polynomial]:
    """Return the axes and the element of a tensor, without the number that it is multiplied by."""
    body = tensor.body
    if len(body.terms) == 1:
        body = tensor.algebra.scale(body, 1 / Fraction(body.terms[0][1]))
    return frozenset(tensor.axes), body


# Outlines: terms but for indices.

Outline = frozenset[tuple[int, Fraction]]
"""The summands of a term, their indices left out, each with its share of the first."""


def _outline(body: Polynomial, memo: dict[Factor, int]) -> Outline:
    """Return a key that terms share if they differ in indices, gates and a factor alone.

    A slice of a matrix has the outline of the matrix, and a row of an expert that of its token.
    """
    parts = sorted((_of_monomial(m, memo), Fraction(c)) for m, c in body.terms)
    return frozenset((part, c / parts[0][1]) for part, c in parts)


def _is_gate(factor: Factor) -> bool:
    """Return whether a factor is a share of several scores, by which rows may be multiplied."""
    return isinstance(factor, Application) and factor.head.name == "share"


def _is_piecewise(body: Polynomial) -> bool:
    return all(any(_is_integral(f) for f in m.factors) for m, _ in body.terms)


def _is_integral(factor: Factor) -> bool:
    return isinstance(factor, Var) or factor.head.name in INTEGRAL


def _of_monomial(monomial: Monomial, memo: dict[Factor, int]) -> int:
    factors = (f for f in monomial.factors if not _is_integral(f) and not _is_gate(f))
    return hash(tuple(sorted(_of_factor(f, memo) for f in factors)))


def _of_factor(factor: Factor, memo: dict[Factor, int]) -> int:
    if factor in memo:
        return memo[factor]
    assert isinstance(factor, Application)
    name, attrs = factor.head
    if name in LEAVES:
        names = attrs[0] if isinstance(attrs[0], tuple) else attrs[:1]
        memo[factor] = hash((frozenset(names), attrs[1:2], STOPPED in attrs))
    else:
        # What is closed is one object in both graphs.
        functions = (a if not a.free else _of_sum(a.body, memo) for a in factor.abstractions)
        arguments = (_of_sum(p, memo) for p in factor.arguments)
        memo[factor] = hash((factor.head, *functions, *arguments))
    return memo[factor]


def _of_sum(body: Polynomial, memo: dict[Factor, int]) -> int:
    if is_integral(body):
        return 0
    return hash(frozenset((_of_monomial(m, memo), c) for m, c in body.terms))
