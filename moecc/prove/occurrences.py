"""Where index variables occur in terms, computed once for each term."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from moecc.terms.term import (
    Abstraction,
    Algebra,
    Application,
    Coefficient,
    Factor,
    Monomial,
    Polynomial,
    Var,
)

Linear = frozenset[tuple[Var, Coefficient]]
"""The coefficients of the variables of an index."""


@dataclass(frozen=True)
class Occurrences:
    """The occurrences of free variables.

    Attributes:
      linear: for each index, the coefficients of the variables that are terms of it.
      nonlinear: the variables that occur otherwise than as a term of an index.
      divided: variables with the numbers by which indices divide them.
      ends: variables with the numbers at which ranges of them begin and end.
      choices: the applications that choose by a variable alone, stacks included.
      rows: the places of rows: variables for group, expert and slot.
    """

    linear: frozenset[Linear] = frozenset()
    nonlinear: frozenset[Var] = frozenset()
    divided: frozenset[tuple[Var, int]] = frozenset()
    ends: frozenset[tuple[Var, int]] = frozenset()
    choices: frozenset[Application] = frozenset()
    rows: frozenset[frozenset[Var]] = frozenset()

    @classmethod
    def of(cls, algebra: Algebra, factors: Iterable[Factor]) -> Occurrences:
        """Return the occurrences in a product of factors."""
        parts = [_of_factor(algebra, f) for f in factors]
        return parts[0] if len(parts) == 1 else _union(parts)


_NONE = Occurrences()
_CHOOSING = frozenset({"experts", "permutation", "stack"})
_ROWS = frozenset({"token_of", "occupied"})


def index_of_all(algebra: Algebra, polynomial: Polynomial) -> Occurrences:
    """Return the occurrences in a polynomial, which is read as an index."""
    if not polynomial.free:
        return _NONE
    memo = algebra.memo
    if polynomial not in memo:
        coefficients: dict[Var, Coefficient] = {}
        parts = []
        for monomial, coefficient in polynomial.terms:
            lone = monomial.factors[0] if len(monomial.factors) == 1 else None
            if isinstance(lone, Var) and not monomial.bound:
                coefficients[lone] = coefficient
                continue
            inner = Occurrences.of(algebra, monomial.factors) if monomial.free else _NONE
            parts.append(_outside(inner, monomial.bound))
        if coefficients:
            parts.append(Occurrences(linear=frozenset([frozenset(coefficients.items())])))
        memo[polynomial] = parts[0] if len(parts) == 1 else _union(parts)
    result = memo[polynomial]
    assert isinstance(result, Occurrences)
    return result


def _of_factor(algebra: Algebra, factor: Factor) -> Occurrences:
    if isinstance(factor, Var):
        return Occurrences(nonlinear=frozenset([factor]))
    if not factor.free:
        return _NONE
    memo = algebra.memo
    if factor not in memo:
        parts = [index_of_all(algebra, p) for p in factor.arguments]
        parts += [_of_abstraction(algebra, a) for a in factor.abstractions if a.free]
        name, of_head = factor.head.name, _NONE
        variables = [p.variable for p in factor.arguments]
        if name in ("div", "mod") and variables[0] is not None:
            by = factor.head.attrs[0]
            assert isinstance(by, int)
            of_head = Occurrences(divided=frozenset([(variables[0], by)]))
        elif name == "range" and len(factor.free) == 1:
            of_head = Occurrences(ends=frozenset(_ends(algebra, factor)))
        elif name in _CHOOSING and variables[0] is not None:
            of_head = Occurrences(choices=frozenset([factor]))
        elif name in _ROWS:
            places = frozenset(v for v in variables if v is not None)
            if len(places) == len(variables):
                of_head = Occurrences(rows=frozenset([places]))
        memo[factor] = _union([*parts, of_head])
    result = memo[factor]
    assert isinstance(result, Occurrences)
    return result


def _ends(algebra: Algebra, range_: Application) -> Iterator[tuple[Var, int]]:
    """Yield the variable of a range of v + s with the numbers from which it is 1, and 0 again."""
    (variable,) = range_.free
    shift = algebra.subtract(range_.arguments[0], algebra.index(variable)).constant
    if isinstance(shift, int):
        for end in range_.head.attrs:
            assert isinstance(end, int)
            yield variable, end - shift


def _of_abstraction(algebra: Algebra, abstraction: Abstraction) -> Occurrences:
    return _outside(index_of_all(algebra, abstraction.body), abstraction.variables)


def _union(parts: list[Occurrences]) -> Occurrences:
    parts = [p for p in parts if p is not _NONE]
    if len(parts) < 2:
        return parts[0] if parts else _NONE
    return Occurrences(
        frozenset(chain.from_iterable(p.linear for p in parts)),
        frozenset(chain.from_iterable(p.nonlinear for p in parts)),
        frozenset(chain.from_iterable(p.divided for p in parts)),
        frozenset(chain.from_iterable(p.ends for p in parts)),
        frozenset(chain.from_iterable(p.choices for p in parts)),
        frozenset(chain.from_iterable(p.rows for p in parts)),
    )


def _outside(inner: Occurrences, bound: tuple[Var, ...]) -> Occurrences:
    """Return the occurrences without bound variables."""
    if not bound or inner is _NONE:
        return inner
    linear = (frozenset((v, c) for v, c in part if v not in bound) for part in inner.linear)
    return Occurrences(
        frozenset(part for part in linear if part),
        inner.nonlinear.difference(bound),
        frozenset(d for d in inner.divided if d[0] not in bound),
        frozenset(e for e in inner.ends if e[0] not in bound),
        frozenset(c for c in inner.choices if not any(v in bound for v in c.free)),
        frozenset(r for r in inner.rows if not r.intersection(bound)),
    )


def outline(algebra: Algebra, monomial: Monomial) -> int:
    """Return a hash that monomials share which differ in indices and sizes alone."""
    return hash(tuple(sorted(_outline(algebra, f) for f in monomial.factors)))


def _outline(algebra: Algebra, factor: Factor) -> int:
    if isinstance(factor, Var):
        return 1
    key = ("outline", factor)
    if key not in algebra.memo:
        parts = [
            hash(a) if not a.free else _outline_of(algebra, a.body) for a in factor.abstractions
        ]
        parts += [_outline_of(algebra, p) for p in factor.arguments]
        algebra.memo[key] = hash((factor.head, tuple(parts)))
    result = algebra.memo[key]
    assert isinstance(result, int)
    return result


def _outline_of(algebra: Algebra, polynomial: Polynomial) -> int:
    if all(
        not m.bound and (not m.factors or (len(m.factors) == 1 and isinstance(m.factors[0], Var)))
        for m, _ in polynomial.terms
    ):
        return 2
    return hash(tuple(sorted(outline(algebra, m) for m, _ in polynomial.terms)))
