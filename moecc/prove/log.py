"""The log of a proof, as ``docs/proof-log.md`` defines it: a table of terms, and steps."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from fractions import Fraction
from math import isinf

from moecc.ir.graph import Graph
from moecc.ir.text import print_graph
from moecc.prove.lemmas import Step
from moecc.support.untyped import JsonDict
from moecc.terms.term import (
    Abstraction,
    Application,
    Monomial,
    OpenMonomial,
    Polynomial,
    Var,
)

SCHEMA = "moecc.proof/1"


def log_of(
    before: Graph,
    after: Graph,
    steps: Iterable[Step],
    *,
    exact: bool,
    rolled: bool,
    fractions: bool,
) -> JsonDict:
    """Return the log of a proof as a JSON object.

    Args:
      before: the first graph.
      after: the second graph.
      steps: of the proof, in their order.
      exact: whether it is a proof of equal bits.
      rolled: whether repetition is read as a function of its body.
      fractions: whether constants are the simplest numbers that their floats are to 15 digits.
    """
    table = _Table()
    rows = [[s.lemma, table.row(s.term), [table.parameter(p) for p in s.parameters]] for s in steps]
    return {
        "schema": SCHEMA,
        "exact": exact,
        "rolled": rolled,
        "fractions": fractions,
        "before": digest(before),
        "after": digest(after),
        "terms": table.rows,
        "steps": rows,
    }


def digest(graph: Graph) -> str:
    """Return the SHA-256 of a graph's text."""
    return hashlib.sha256(print_graph(graph).encode()).hexdigest()


class _Table:
    """Terms as rows of JSON, each after those that it refers to by their numbers."""

    def __init__(self) -> None:
        self.rows: list[object] = []
        self._numbers: dict[object, int] = {}

    def row(self, term: object) -> int:
        """Return the number of the row of a term, which is added if there is none."""
        if term not in self._numbers:
            row = self._row(term)
            self._numbers[term] = len(self.rows)
            self.rows.append(row)
        return self._numbers[term]

    def parameter(self, value: object) -> object:
        """Return a parameter of a lemma: a number, a word, or the row of a term."""
        return value if isinstance(value, int | str) else {"term": self.row(value)}

    def _row(self, term: object) -> list[object]:
        match term:
            case Var():
                name = f"{term.name}.{term.level}" if term.level else term.name
                return ["variable", name, term.size]
            case Application():
                attrs = [attribute(a) for a in term.head.attrs]
                functions = [self.row(a) for a in term.abstractions]
                arguments = [self.row(p) for p in term.arguments]
                return ["apply", term.head.name, attrs, functions, arguments]
            case Abstraction():
                return ["function", [self.row(v) for v in term.variables], self.row(term.body)]
            case Monomial() | OpenMonomial():
                bound = [self.row(v) for v in term.bound]
                return ["product", bound, [self.row(f) for f in term.factors]]
            case Polynomial():
                pairs = [(Fraction(c), self.row(m)) for m, c in term.terms]
                return ["sum", [[str(c), m] for c, m in pairs]]
        raise TypeError(f"{term!r} is no term")


def attribute(value: Hashable) -> object:
    """Return an attribute of a head in JSON: tuples as lists, infinities as words."""
    if isinstance(value, tuple):
        return [attribute(v) for v in value]
    if isinstance(value, float) and isinf(value):
        return "inf" if value > 0 else "-inf"
    return value if isinstance(value, int | float | str | None) else str(value)
