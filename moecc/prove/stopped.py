"""Stopped twins: values without a gradient are functions of sources of their own.

A gradient sees more than values: a graph is a function f(W, W̄) of its sources W and of their
stopped twins W̄, which have the same values and no gradient.  Two graphs that are the same function
of both have the same values and, where they are differentiable, the same gradients.  A frozen
parameter has no gradient: it is read through its twin.
"""

from __future__ import annotations

from dataclasses import replace

from moecc.analysis import trainable
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.terms.tensor import Tensor
from moecc.terms.term import (
    INTEGRAL,
    Algebra,
    Application,
    Factor,
    Head,
    Polynomial,
    Var,
)

STOPPED = "stopped"
LEAVES = frozenset({"source", "family", "weight", "weights", "carry"})


def stopped(x: Tensor) -> Tensor:
    """Return the tensor as a function of the stopped twins of its sources."""
    return replace(x, body=stopped_body(x.algebra, x.body, {}), slots=None)


def stopped_body(algebra: Algebra, body: Polynomial, memo: dict[object, Polynomial]) -> Polynomial:
    """Return a polynomial as a function of stopped twins."""
    if body not in memo:
        parts = [algebra.zero]
        for monomial, coefficient in body.terms:
            bound, factors = algebra.opened(monomial)
            twins = [_factor(algebra, f, memo) for f in factors]
            product = algebra.multiply(algebra.one, *twins, over=bound)
            parts.append(algebra.scale(product, coefficient))
        memo[body] = algebra.add(*parts)
    return memo[body]


def _factor(algebra: Algebra, factor: Factor, memo: dict[object, Polynomial]) -> Polynomial:
    if isinstance(factor, Var):
        return algebra.index(factor)
    if factor.head.name in INTEGRAL:
        # Integers have no gradient: they are their own twins.
        return algebra.lone(factor)
    abstractions = []
    for abstraction in factor.abstractions:
        if not abstraction.free:
            abstractions.append(abstraction)
            continue
        fresh = [algebra.fresh(v) for v in abstraction.variables]
        inner = stopped_body(algebra, algebra.enter(abstraction, fresh), memo)
        abstractions.append(algebra.abstract(fresh, inner))
    arguments = [stopped_body(algebra, p, memo) for p in factor.arguments]
    return algebra.apply(_head(factor), abstractions, arguments)


def _head(factor: Application) -> Head:
    """Return the head over stopped twins, in place of closed functions or of elements."""
    is_leaf = factor.head.name in LEAVES
    has_closed = any(not a.free for a in factor.abstractions)
    # The last attribute: a tensor of a checkpoint may have any name, "stopped", too.
    if not (is_leaf or has_closed) or factor.head.attrs[-1:] == (STOPPED,):
        return factor.head
    return Head(factor.head.name, (*factor.head.attrs, STOPPED))


def frozen_parameters(graph: Graph) -> list[str]:
    """Return the names of the frozen parameters that have a gradient and are read."""
    return [
        name
        for name, is_trained in trainable(graph).items()
        if not is_trained and graph.params[name].type.dtype.is_float and graph.params[name].users
    ]


def without_frozen_gradients(graph: Graph) -> Graph | None:
    """Return a copy that stops the gradients of frozen parameters; None if all are trained."""
    if all(trainable(graph).values()):
        return None
    copy = clone(graph)
    builder = Builder(copy, before=next(iter(copy)))
    for name in frozen_parameters(graph):
        value = copy.params[name]
        users = list(value.users)
        twin = builder.stop_gradient(value)
        for user in users:
            user.replace_operand(value, twin)
    return copy
