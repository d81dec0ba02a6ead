"""The table of lemmas, equations of terms that are used from left to right, and their use.

A lemma is a function of a term and of parameters.  It checks its conditions and returns the other
side of the equation, in normal form, or None where they do not hold.  Parameters come from a
generator of candidates beside it; a log has the ones that were used, so that a checker applies
lemmas and never searches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from moecc.terms.term import (
    Algebra,
    Application,
    Cut,
    Factor,
    Monomial,
    OpenMonomial,
    Polynomial,
    Rules,
    Var,
)

Apply = Callable[..., Polynomial | None]
"""From the algebra, a term and parameters to what the term equals."""

Candidates = Callable[[Algebra, Any], Iterable[tuple[object, ...]]]
"""From a term to parameters that a lemma may hold for."""


@dataclass(frozen=True)
class Lemma:
    """A lemma of the table.

    Attributes:
      name: as in counts and logs.
      apply: the equation; its docstring is the statement.
      candidates: the parameters to try.
      rearranges: whether both sides are the same number, bit for bit.
      of_shards: whether it is used in proofs about devices alone.
    """

    name: str
    apply: Apply
    candidates: Candidates
    rearranges: bool
    of_shards: bool = False


APPLICATIONS: dict[str, list[Lemma]] = {}
"""Lemmas of applications, by head."""
MONOMIALS: list[Lemma] = []
"""Lemmas of monomials whose bound variables are fresh."""
SUMS: list[Lemma] = []
"""Lemmas of polynomials of several monomials."""


def _once(_algebra: Algebra, _term: object) -> Iterable[tuple[object, ...]]:
    return ((),)


def of_application(
    name: str,
    *heads: str,
    candidates: Candidates = _once,
    rearranges: bool = False,
    of_shards: bool = False,
) -> Callable[[Apply], Apply]:
    """Register a lemma on applications of some heads."""

    def register(apply: Apply) -> Apply:
        lemma = Lemma(name, apply, candidates, rearranges, of_shards)
        for head in heads:
            APPLICATIONS.setdefault(head, []).append(lemma)
        return apply

    return register


def of_monomial(
    name: str, candidates: Candidates = _once, *, of_shards: bool = False
) -> Callable[[Apply], Apply]:
    """Register a lemma on monomials."""

    def register(apply: Apply) -> Apply:
        MONOMIALS.append(Lemma(name, apply, candidates, False, of_shards))
        return apply

    return register


def of_sum(
    name: str, candidates: Candidates = _once, *, of_shards: bool = False
) -> Callable[[Apply], Apply]:
    """Register a lemma on polynomials."""

    def register(apply: Apply) -> Apply:
        rearranges = name == "quotient and remainder"
        SUMS.append(Lemma(name, apply, candidates, rearranges, of_shards))
        return apply

    return register


@dataclass(frozen=True)
class Step:
    """A use of a lemma: the term that it was used on, and its parameters."""

    lemma: str
    term: Application | OpenMonomial | Polynomial
    parameters: tuple[object, ...]


LARGE = 400
"""Above this weight a sum is named when it becomes a factor, which bounds the work on terms.

A name hides that slices of a sum are one sum: activations with parameters, as xIELU, weigh 200 to
400. From 500 on proofs of the matrix (60 drawn runs) took 2.6 times as long, and one was lost.
"""

MANY_TERMS = 12
"""A sum of more terms is named when something is added to it: residual streams are sums."""


@dataclass
class Lemmas(Rules):
    """All lemmas, with a record of their uses.

    Attributes:
      exact: whether only lemmas are used whose two sides have the same bits.
      of_shards: whether lemmas for proofs about devices are used, too.
      counts: how often each was used.
      steps: the uses, each after those that its right side rests on, and cuts among them.
      cuts: how polynomials were cut, by role.
    """

    exact: bool = False
    of_shards: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    steps: list[Step] = field(default_factory=list)
    cuts: dict[tuple[Polynomial, str], Cut | None] = field(default_factory=dict)

    def cut(self, body: Polynomial, role: Literal["factor", "summand"]) -> Cut | None:
        """Return how a polynomial becomes a part of a term, which its size decides."""
        key = (body, role)
        if key not in self.cuts:
            choice: Cut | None = None
            if role == "summand":
                choice = "name" if len(body.terms) > MANY_TERMS else None
            elif len(body.terms) > 1:
                choice = "name" if body.weight > LARGE else "group"
            self.cuts[key] = choice
            if choice is not None:
                self.steps.append(Step(f"cut {role}", body, (choice,)))
        return self.cuts[key]

    def of_application(self, algebra: Algebra, application: Application) -> Polynomial | None:
        """Return the other side of the first lemma that applies, or None."""
        return self._first(APPLICATIONS.get(application.head.name, ()), algebra, application)

    def of_monomial(self, algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
        """Return the other side of the first lemma that applies, or None."""
        if not opened.bound and len(opened.factors) < 2:
            return None
        # A lemma is of the product alone: what it adds up is the same with any coefficient.
        equal = self._first(MONOMIALS, algebra, opened._replace(coefficient=1))
        return None if equal is None else algebra.scale(equal, opened.coefficient)

    def of_polynomial(self, algebra: Algebra, polynomial: Polynomial) -> Polynomial | None:
        """Return the other side of the first lemma that applies, or None."""
        return self._first(SUMS, algebra, polynomial)

    def _first(
        self,
        lemmas: Iterable[Lemma],
        algebra: Algebra,
        term: Application | OpenMonomial | Polynomial,
    ) -> Polynomial | None:
        for lemma in lemmas:
            is_left_out = lemma.of_shards and not self.of_shards
            if is_left_out or (self.exact and not lemma.rearranges):
                continue
            for parameters in lemma.candidates(algebra, term):
                equal = lemma.apply(algebra, term, *parameters)
                if equal is not None:
                    self.counts[lemma.name] += 1
                    self.steps.append(Step(lemma.name, term, parameters))
                    return equal
        return None


# Small parts of lemmas.


def replaced(
    algebra: Algebra,
    opened: OpenMonomial,
    values: dict[Var, Polynomial],
    new: tuple[Var, ...] = (),
) -> Polynomial:
    """Return a monomial with bound variables replaced, and perhaps other variables bound."""
    parts = [algebra.replace(f, values) for f in opened.factors]
    bound = (*(v for v in opened.bound if v not in values), *new)
    return algebra.scale(algebra.multiply(algebra.one, *parts, over=bound), opened.coefficient)


def without(opened: OpenMonomial, *factors: Factor) -> OpenMonomial:
    """Return a monomial without some of its factors, each dropped once."""
    left = list(opened.factors)
    for factor in factors:
        left.remove(factor)
    return opened._replace(factors=tuple(left))


def number_at(application: Application, at: int = 0) -> int:
    """Return a whole number among the attributes of a head."""
    value = application.head.attrs[at]
    assert isinstance(value, int)
    return value


def one(algebra: Algebra, monomial: Monomial) -> Polynomial:
    """Return a monomial as a polynomial."""
    return algebra.polynomial({monomial: 1})


def applications(opened: OpenMonomial, name: str) -> Iterator[Application]:
    """Yield the factors that apply a head of this name."""
    for factor in opened.factors:
        if isinstance(factor, Application) and factor.head.name == name:
            yield factor


def apart(algebra: Algebra, polynomial: Polynomial, *gone: Monomial) -> Polynomial:
    """Return a polynomial without some of its monomials."""
    return algebra.polynomial({m: c for m, c in polynomial.terms if m not in gone})
