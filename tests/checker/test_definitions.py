"""What the checker's definitions say of operations is what they are in NumPy: numbers for both."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import moecc_check
import moecc_check_graphs
import numpy as np
import pytest
from moecc_backends.reference import ReferenceBackend

from moecc.ir.text import print_graph
from moecc.terms.term import Algebra, Head, Polynomial, Var
from moecc.weights.evaluate import evaluate
from moecc.weights.text import parse_expr

from ..ir.operations import Function, sample  # noqa: TID252
from ..prove.test_meanings import DEFINED, UNINTERPRETED, Arrays  # noqa: TID252
from ..prove.test_weight_meanings import EXPRESSIONS, Sources, X  # noqa: TID252

ORDERED = f'take({X}, mlp=source("order" : i32[mlp=4]))'
TABLE = moecc_check.read_table()


class Translation:
    """Makes terms of the prover from terms of the checker, by which numbers are computed."""

    def __init__(self, checker: Any) -> None:
        self.checker, self.algebra = checker, Algebra()
        self.variables: dict[Any, Var] = {}

    def variable(self, v: Any) -> Var:
        """Return the prover's variable."""
        if v not in self.variables:
            self.variables[v] = self.algebra.fresh(v.size)
        return self.variables[v]

    def total(self, term: Any) -> Polynomial:
        """Return the prover's polynomial."""
        parts = []
        for c, monomial in self.checker.terms(term):
            bound, factors = self.checker.entered(monomial)
            over = [self.variable(v) for v in bound]
            inner = self.algebra.multiply(
                self.algebra.number(1), *map(self.factor, factors), over=over
            )
            parts.append(self.algebra.scale(inner, c))
        return self.algebra.add(self.algebra.zero, *parts)

    def factor(self, factor: Any) -> Polynomial:
        """Return a factor as a polynomial."""
        if factor.node.kind == "variable":
            return self.algebra.index(self.variable(factor.vars[0]))
        head, attrs, functions, arguments = self.checker.applied(factor)
        opened = [self.checker.entered(f) for f in functions]
        inner = [
            self.algebra.abstract([self.variable(v) for v in bound], self.total(body))
            for bound, body in opened
        ]
        return self.algebra.apply(Head(head, attrs), inner, list(map(self.total, arguments)))


@pytest.mark.parametrize("name", [n for n in DEFINED if n not in UNINTERPRETED])
def test_a_definition_is_the_reference(name: str) -> None:
    node = sample(name)
    algebra = moecc_check.Algebra(*TABLE)
    graph = moecc_check_graphs.graph_of(print_graph(node.graph))
    tensors = moecc_check_graphs.Evaluation(algebra, False).evaluate(graph, {})
    translation = Translation(algebra)
    data = Function(node).inputs(3)
    arrays = dict(ReferenceBackend().compile(node.graph).trace({}, data))
    model = Arrays(node, arrays, data)
    for value in node.results:
        tensor, expected = tensors[f"%{value.name}"], arrays[value]
        body = translation.total(tensor.body)
        for at in product(*map(range, expected.data.shape)):
            places = dict(zip(expected.axes, at, strict=True))
            env = {translation.variable(v): places[v.name] for v in tensor.axes}
            right = float(expected.data[at])
            if not math.isnan(right):  # or it is beyond a ragged extent
                number = model.value(body, env)
                assert math.isclose(number, right, rel_tol=1e-9, abs_tol=1e-12), (value, at)


@pytest.mark.parametrize("text", [*EXPRESSIONS, ORDERED])
def test_a_weight_is_what_it_evaluates_to(text: str) -> None:
    rng = np.random.default_rng(5)
    shapes = {"x": (4, 3), "y": (4, 3), "v": (4,)}
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    arrays["order"] = np.array([2, 0, 3, 1], np.int32)
    expr, _ = parse_expr(text)
    expected = evaluate(expr, lambda name, start=0, stop=None: arrays[name][start:stop])
    algebra = moecc_check.Algebra(*TABLE)
    written = moecc_check_graphs.Expression(text)
    tensor = moecc_check_graphs.Evaluation(algebra, False).weight(written)
    assert tuple(v.name for v in tensor.axes) == expr.type.names
    assert tensor.dtype == expr.type.dtype.name
    translation, model = Translation(algebra), Sources(arrays)
    body = translation.total(tensor.body)
    for at in product(*map(range, expected.shape)):
        places = zip(map(translation.variable, tensor.axes), at, strict=True)
        assert np.isclose(model.value(body, dict(places)), expected[at], rtol=1e-6), (text, at)


def test_an_operation_without_a_definition_is_a_function_of_all_operands() -> None:
    defined = {name for kind, name in TABLE[0] if kind == "operation"}
    assert {*DEFINED} - UNINTERPRETED - defined == TABLE[1]["elementwise"] - defined
