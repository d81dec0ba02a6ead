"""A function whose values are given terms: the search behind the lemma of stacks."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.terms.tensor import quotient, remainder
from moecc.terms.term import (
    Abstraction,
    Algebra,
    Application,
    Factor,
    Head,
    Monomial,
    Polynomial,
    Var,
)


def generalise(
    algebra: Algebra, number: Polynomial, parts: Sequence[Polynomial]
) -> Polynomial | None:
    """Return a term of `number` that may be each of `parts` at its number, or None.

    The parts must differ in constants of indices and in names of sources alone.
    """
    if all(p is parts[0] for p in parts):
        return parts[0]
    unit = algebra.one.terms[0][0]
    numbers = [dict(p.terms).get(unit, 0) for p in parts]
    others = [algebra.subtract(p, algebra.number(n)) for p, n in zip(parts, numbers, strict=True)]
    if all(p is others[0] for p in others) and all(isinstance(n, int) for n in numbers):
        at = _progression(algebra, number, [int(n) for n in numbers])
        return None if at is None else algebra.add(others[0], at)
    if len({len(p.terms) for p in parts}) > 1:
        return None
    columns = [
        sorted(p.terms, key=lambda t: (_names_apart(algebra, t[0]), str(t[1]))) for p in parts
    ]
    sums = []
    for row in zip(*columns, strict=True):
        coefficients = {c for _, c in row}
        product = _product(algebra, number, [m for m, _ in row])
        if len(coefficients) > 1 or product is None:
            return None
        sums.append(algebra.scale(product, coefficients.pop()))
    return algebra.add(*sums)


def _names_apart(algebra: Algebra, monomial: Monomial) -> str:
    heads = sorted(f.head.name for f in monomial.factors if isinstance(f, Application))
    return " ".join([str(len(monomial.bound)), *heads])


def _progression(algebra: Algebra, number: Polynomial, numbers: Sequence[int]) -> Polynomial | None:
    """Return a · ⌊(place mod p) / r⌋ + b with these values, or None."""
    count = len(numbers)
    for period in range(1, count + 1):
        if any(numbers[i] != numbers[i % period] for i in range(count)):
            continue
        runs = [r for r in range(1, period + 1) if period % r == 0]
        run = max(r for r in runs if all(numbers[i] == numbers[i - i % r] for i in range(period)))
        step = numbers[run] - numbers[0] if run < period else 0
        if any(numbers[i] != numbers[0] + step * (i // run) for i in range(period)):
            return None
        inner = number if period == count else remainder(algebra, number, period)
        at = algebra.scale(quotient(algebra, inner, run), step)
        return algebra.add(at, algebra.number(numbers[0]))
    return None


def _product(
    algebra: Algebra, number: Polynomial, monomials: Sequence[Monomial]
) -> Polynomial | None:
    first = monomials[0]
    sizes = {(tuple(v.size for v in m.bound), len(m.factors)) for m in monomials}
    if len(sizes) > 1:
        return None
    shared = [algebra.fresh(v) for v in first.bound]
    columns = []
    for monomial in monomials:
        names = dict(zip(monomial.bound, shared, strict=True))
        renamed = [algebra.rename(algebra.lone(f), names).factor for f in monomial.factors]
        factors = [f for f in renamed if f is not None]
        columns.append(sorted(factors, key=_head_of))
    parts = [_factor(algebra, number, row) for row in zip(*columns, strict=True)]
    generalised = [p for p in parts if p is not None]
    if len(generalised) < len(parts):
        return None
    return algebra.multiply(algebra.one, *generalised, over=shared)


def _head_of(factor: Factor) -> str:
    # With the name of a source: what follows in a part's order depends on hashes of its indices.
    return str(factor.head) if isinstance(factor, Application) else factor.name


def _factor(algebra: Algebra, number: Polynomial, factors: Sequence[Factor]) -> Polynomial | None:
    if all(f is factors[0] for f in factors):
        return algebra.lone(factors[0])
    applications = [f for f in factors if isinstance(f, Application)]
    if len(applications) < len(factors):
        return None
    first = applications[0]
    arguments = []
    for row in zip(*(f.arguments for f in applications), strict=False):
        argument = generalise(algebra, number, row)
        if argument is None:
            return None
        arguments.append(argument)
    if {f.head for f in applications} == {first.head}:
        functions = []
        for column in zip(*(f.abstractions for f in applications), strict=True):
            function = _function(algebra, number, column)
            if function is None:
                return None
            functions.append(function)
        return algebra.apply(first.head, functions, arguments)
    is_source = all(f.head.name == "source" for f in applications)
    if not is_source or len({f.head.attrs[1:] for f in applications}) > 1:
        return None
    names = [f.head.attrs[0] for f in applications]
    distinct = tuple(dict.fromkeys(names))
    at = _progression(algebra, number, [distinct.index(n) for n in names])
    if at is None:
        distinct, at = tuple(names), number
    return algebra.apply(Head("family", (distinct, *first.head.attrs[1:])), (), [at, *arguments])


def _function(
    algebra: Algebra, number: Polynomial, functions: Sequence[Abstraction]
) -> Abstraction | None:
    if all(f is functions[0] for f in functions):
        return functions[0]
    if len({tuple(v.size for v in f.variables) for f in functions}) > 1:
        return None
    shared: list[Var] = [algebra.fresh(v) for v in functions[0].variables]
    body = generalise(algebra, number, [algebra.enter(f, shared) for f in functions])
    return None if body is None else algebra.abstract(shared, body)
