"""Lemmas of sums: over indices, of sums, and of products with indicators, sizes and roots.

A lemma is a function of a term and of parameters; `moecc.prove.rules` says how it is used.  Its
docstring is its statement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise, permutations

from moecc.prove.occurrences import Occurrences, outline
from moecc.prove.rules import (
    apart,
    applications,
    number_at,
    of_monomial,
    of_sum,
    replaced,
    without,
)
from moecc.terms.term import (
    INDICATORS,
    Algebra,
    Application,
    Coefficient,
    Factor,
    Head,
    Monomial,
    OpenMonomial,
    Polynomial,
    Var,
    is_integral,
)

# Sums over indices.


def _repeated_indicators(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    if len(set(opened.factors)) < len(opened.factors):
        for factor, count in Counter(opened.factors).items():
            if count > 1 and isinstance(factor, Application) and factor.head.name in INDICATORS:
                yield (factor,)


@of_monomial("indicators are idempotent", _repeated_indicators)
def idempotent(algebra: Algebra, opened: OpenMonomial, indicator: Application) -> Polynomial | None:
    """[p]·[p] = [p]."""
    if opened.factors.count(indicator) < 2 or indicator.head.name not in INDICATORS:
        return None
    return algebra.monomial(without(opened, indicator))


def _roots(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    if len(set(opened.factors)) < len(opened.factors):
        yield from ((f,) for f in applications(opened, "root") if opened.factors.count(f) > 1)


@of_monomial("square of a root", _roots)
def square_of_root(algebra: Algebra, opened: OpenMonomial, root: Application) -> Polynomial | None:
    """√r · √r = r."""
    if opened.factors.count(root) < 2 or root.head.name != "root":
        return None
    square = Fraction(number_at(root), number_at(root, 1))
    return algebra.scale(algebra.monomial(without(opened, root, root)), square)


def _inverse_sizes(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    yield from ((f,) for f in applications(opened, "inverse_size"))


@of_monomial("a size over itself", _inverse_sizes)
def cancelled_size(
    algebra: Algebra, opened: OpenMonomial, inverse: Application
) -> Polynomial | None:
    """N · 1/n = 1 for a size n, which is at least 1."""
    for size in applications(opened, "size"):
        if size.head.attrs == inverse.head.attrs:
            return algebra.monomial(without(opened, inverse, size))
    return None


def _bound(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    yield from ((v,) for v in opened.bound)


@of_monomial("sum of a constant", _bound)
def constant_sum(algebra: Algebra, opened: OpenMonomial, variable: Var) -> Polynomial | None:
    """Σᵢ a = n·a for i below n, where a does not depend on i."""
    if any(variable in f.free for f in opened.factors):
        return None
    bound = tuple(v for v in opened.bound if v is not variable)
    inner = algebra.monomial(opened._replace(bound=bound))
    return algebra.multiply(inner, algebra.size(variable.size))


@of_monomial("sum of one element", _bound)
def sum_of_one(algebra: Algebra, opened: OpenMonomial, variable: Var) -> Polynomial | None:
    """Σᵢ f(i) = f(0) for i below 1."""
    return replaced(algebra, opened, {variable: algebra.zero}) if variable.size == 1 else None


def _shared(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for share in applications(opened, "share"):
        variable = share.arguments[0].variable
        if variable in opened.bound:
            yield (share, variable)


@of_monomial("shares add up", _shared)
def shares_add_up(
    algebra: Algebra, opened: OpenMonomial, share: Application, variable: Var
) -> Polynomial | None:
    """Σᵢ share(i) = 1 over all i."""
    (scores,) = share.abstractions
    remaining = without(opened, share)
    if share.arguments[0].variable is not variable or variable in scores.free:
        return None
    if scores.variables[0].size != variable.size:
        return None
    if any(variable in f.free for f in remaining.factors):
        return None
    bound = tuple(v for v in opened.bound if v is not variable)
    return algebra.monomial(remaining._replace(bound=bound))


POSITIVE = frozenset({"share", "sigmoid", "exp", "size", "inverse_size"})
"""Heads of which every value is positive."""


def _inverses(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for inverse in applications(opened, "inverse"):
        body = inverse.arguments[0]
        count = len(body.terms[0][0].bound) if len(body.terms) == 1 else -1
        yield from ((inverse, *chosen) for chosen in permutations(opened.bound, max(count, 0)))


@of_monomial("a positive sum over itself", _inverses)
def cancelled_sum(
    algebra: Algebra, opened: OpenMonomial, inverse: Application, *bound: Var
) -> Polynomial | None:
    """Σᵢ a(i) · 1/Σᵢ a(i) = 1 for positive a."""
    (body,) = inverse.arguments
    if len(body.terms) != 1 or body.terms[0][1] != 1:
        return None
    monomial = body.terms[0][0]
    positive = all(isinstance(f, Application) and f.head.name in POSITIVE for f in monomial.factors)
    if not positive or len(bound) != len(monomial.bound):
        return None
    names = dict(zip(monomial.bound, bound, strict=True))
    if any(v.size != w.size for v, w in names.items()):
        return None
    gone = [algebra.rename(algebra.lone(f), names).factor for f in monomial.factors]
    remaining = list(without(opened, inverse).factors)
    for factor in gone:
        if factor is None or factor not in remaining:
            return None
        remaining.remove(factor)
    if any(v in f.free for v in bound for f in (*remaining, inverse)):
        return None
    left = tuple(v for v in opened.bound if v not in bound)
    return algebra.monomial(OpenMonomial(opened.coefficient, left, tuple(remaining)))


def _points(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for equal in applications(opened, "equal"):
        yield from ((equal, v) for v in equal.arguments[0].free if v in opened.bound)


@of_monomial("sum at a point", _points)
def sum_at_point(
    algebra: Algebra, opened: OpenMonomial, equal: Application, variable: Var
) -> Polynomial | None:
    """Σᵢ [i = t]·f(i) = [0 ≤ t < n]·f(t) for i below n, and an integer t."""
    index, lone = equal.arguments[0], algebra.index(variable)
    coefficient = dict(index.terms).get(lone.terms[0][0], 0)
    if abs(coefficient) != 1 or not isinstance(variable.size, int):
        return None
    point = algebra.subtract(lone, algebra.scale(index, coefficient))
    if variable in point.free or not is_integral(point):
        return None
    inside = algebra.apply(Head("range", (0, variable.size)), (), [point])
    inner = replaced(algebra, without(opened, equal), {variable: point})
    return algebra.multiply(inside, inner)


def _ranges(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for range_ in applications(opened, "range"):
        yield from ((range_, v) for v in range_.arguments[0].free if v in opened.bound)


@of_monomial("sum over a range", _ranges)
def sum_over_range(
    algebra: Algebra, opened: OpenMonomial, range_: Application, variable: Var
) -> Polynomial | None:
    """Σᵢ [a ≤ i + c < b]·f(i) is the sum of f over the i of the range."""
    size, index = variable.size, range_.arguments[0]
    shift = algebra.subtract(index, algebra.index(variable)).constant
    if not isinstance(shift, int) or not isinstance(size, int):
        return None
    low = max(number_at(range_) - shift, 0)
    high = min(number_at(range_, 1) - shift, size)
    if high <= low:
        return algebra.zero
    fresh = algebra.fresh(high - low)
    value = algebra.add(algebra.index(fresh), algebra.number(low))
    return replaced(algebra, without(opened, range_), {variable: value}, (fresh,))


def _choices(algebra: Algebra, opened: OpenMonomial) -> list[Application]:
    return sorted(Occurrences.of(algebra, opened.factors).choices, key=lambda c: c.serial)


def _bijections(algebra: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for choice in _choices(algebra, opened):
        if choice.arguments[0].variable in opened.bound:
            yield (choice, choice.arguments[0].variable)


@of_monomial("sum over a bijection", _bijections)
def sum_over_bijection(
    algebra: Algebra, opened: OpenMonomial, choice: Application, variable: Var
) -> Polynomial | None:
    """Σᵢ f(π(i)) = Σᵢ f(i) for a permutation π, as the n best of n are."""
    name, size = choice.head.name, variable.size
    if name not in ("experts", "permutation") or number_at(choice) != size:
        return None
    if name == "experts" and number_at(choice, 1) != size:
        return None
    if any(variable in a.free for a in choice.abstractions):
        return None
    fresh = algebra.fresh(variable)
    named = {choice: algebra.index(fresh)}
    parts = [algebra.exchange(algebra.lone(f), named) for f in opened.factors]
    if any(variable in p.free for p in parts):
        return None
    bound = (*(v for v in opened.bound if v is not variable), fresh)
    return algebra.scale(algebra.multiply(*parts, over=bound), opened.coefficient)


MOST_PLACES = 64


def _stacked(algebra: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for choice in _choices(algebra, opened):
        variable = choice.arguments[0].variable
        if choice.head.name == "stack" and variable in opened.bound:
            yield (variable,)


@of_monomial("sum over places of a stack", _stacked)
def sum_over_places(algebra: Algebra, opened: OpenMonomial, variable: Var) -> Polynomial | None:
    """Σᵢ f(i) = f(0) + … + f(n − 1) for i below a number n."""
    if not isinstance(variable.size, int) or variable.size > MOST_PLACES:
        return None
    places = [algebra.number(at) for at in range(variable.size)]
    return algebra.add(*(replaced(algebra, opened, {variable: at}) for at in places))


def _divided_variables(algebra: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    divided = Occurrences.of(algebra, opened.factors).divided
    inside = [(v, n) for v, n in divided if v in opened.bound]
    yield from sorted(inside, key=lambda d: (d[1], opened.bound.index(d[0])))


@of_monomial("split a sum", _divided_variables)
def split_sum(algebra: Algebra, opened: OpenMonomial, variable: Var, by: int) -> Polynomial | None:
    """Σᵢ f(i) = Σ_q Σ_r f(n·q + r) for i below m·n, q below m and r below n."""
    if not isinstance(variable.size, int) or variable.size % by:
        return None
    outer, inner = algebra.fresh(variable.size // by), algebra.fresh(by)
    value = algebra.add(algebra.scale(algebra.index(outer), by), algebra.index(inner))
    return replaced(algebra, opened, {variable: value}, (outer, inner))


def _pairs(algebra: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    if len(opened.bound) < 2:
        return
    linear = {
        v
        for part in Occurrences.of(algebra, opened.factors).linear
        if len(part) > 1
        for v, _ in part
    }
    yield from permutations([v for v in opened.bound if v in linear], 2)


@of_monomial("merge sums", _pairs)
def merge_sums(algebra: Algebra, opened: OpenMonomial, outer: Var, inner: Var) -> Polynomial | None:
    """Σ_q Σ_r f(n·q + r) = Σᵢ f(i) for r below n, q below m and i below m·n."""
    if not isinstance(outer.size, int) or not isinstance(inner.size, int):
        return None
    occurrences = Occurrences.of(algebra, opened.factors)
    if outer in occurrences.nonlinear or inner in occurrences.nonlinear:
        return None
    for part in map(dict, occurrences.linear):
        if part.get(outer, 0) != part.get(inner, 0) * inner.size:
            return None
    fresh = algebra.fresh(outer.size * inner.size)
    values = {outer: algebra.zero, inner: algebra.index(fresh)}
    return replaced(algebra, opened, values, (fresh,))


def _ends(algebra: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    """Yield variables with the numbers at which ranges within functions cut them into equal parts.

    Unequal parts come of padding, and go where a matrix is 0.
    """
    pairs = Occurrences.of(algebra, opened.factors).ends
    for variable in opened.bound:
        ends = sorted(end for v, end in pairs if v is variable and end > 0)
        size = variable.size
        if not ends or not isinstance(size, int) or size % ends[0]:
            continue
        if {*range(ends[0], size, ends[0])} <= {*ends}:
            yield variable, ends[0]


@of_monomial("cut a sum", _ends)
def cut_sum(algebra: Algebra, opened: OpenMonomial, variable: Var, at: int) -> Polynomial | None:
    """Σ_{i<m} f(i) = Σ_{i<n} f(i) + Σ_{i<m−n} f(n + i) for n between 0 and m."""
    if not isinstance(variable.size, int) or not 0 < at < variable.size:
        return None
    first, second = algebra.fresh(at), algebra.fresh(variable.size - at)
    beyond = algebra.add(algebra.index(second), algebra.number(at))
    return algebra.add(
        replaced(algebra, opened, {variable: algebra.index(first)}, (first,)),
        replaced(algebra, opened, {variable: beyond}, (second,)),
    )


# Sums of sums.

_Part = tuple[Monomial, int]
"""A monomial, and which of its sums is meant; −1: the summand alone."""


def _neighbours(algebra: Algebra, polynomial: Polynomial) -> Iterator[tuple[object, ...]]:
    groups: dict[object, list[Monomial]] = {}
    for monomial, coefficient in polynomial.terms:
        groups.setdefault((coefficient, outline(algebra, monomial)), []).append(monomial)
    for members in groups.values():
        for first, second in permutations(members, 2) if len(members) > 1 else ():
            for at, variable in enumerate(first.bound):
                if isinstance(variable.size, int):
                    yield (first, at, second, -1)
                    yield from ((first, at, second, then) for then in range(len(second.bound)))


@of_sum("join sums", _neighbours)
def join_sums(
    algebra: Algebra, polynomial: Polynomial, first: Monomial, at: int, second: Monomial, then: int
) -> Polynomial | None:
    """Σ_{i<m} f(i) + Σ_{i<n} f(m + i) = Σ_{i<m+n} f(i), and f(m) for the sum of one element."""
    bound, factors = algebra.opened(first)
    variable = bound[at]
    length = 1 if then < 0 else second.bound[then].size
    if not isinstance(variable.size, int) or not isinstance(length, int):
        return None
    next_bound, next_factors = algebra.opened(second)
    start, remaining = algebra.number(variable.size), next_bound
    if then >= 0:
        start = algebra.add(start, algebra.index(next_bound[then]))
        remaining = tuple(v for i, v in enumerate(next_bound) if i != then)
    opened = OpenMonomial(1, bound, factors)
    continued = replaced(algebra, opened, {variable: start})
    summand = algebra.multiply(*map(algebra.lone, next_factors), over=remaining)
    if continued is not summand:
        return None
    fresh = algebra.fresh(variable.size + length)
    joined = replaced(algebra, opened, {variable: algebra.index(fresh)}, (fresh,))
    coefficient = dict(polynomial.terms)[first]
    if dict(polynomial.terms)[second] != coefficient:
        return None
    others = apart(algebra, polynomial, first, second)
    return algebra.add(others, algebra.scale(joined, coefficient))


def _neighbouring_ranges(algebra: Algebra, polynomial: Polynomial) -> Iterator[tuple[object, ...]]:
    ranges: dict[object, list[tuple[int, int, Monomial, int]]] = {}
    for monomial, coefficient in polynomial.terms:
        for at, factor in enumerate(monomial.factors):
            if isinstance(factor, Application) and factor.head.name == "range":
                left = (*monomial.factors[:at], *monomial.factors[at + 1 :])
                key = (coefficient, monomial.bound, left, factor.arguments)
                ends = (number_at(factor), number_at(factor, 1))
                ranges.setdefault(key, []).append((*ends, monomial, at))
    for members in ranges.values():
        for a, b in pairwise(sorted(members, key=lambda r: r[:2])):
            yield (a[2], a[3], b[2], b[3])


@of_sum("join ranges", _neighbouring_ranges)
def join_ranges(
    algebra: Algebra, polynomial: Polynomial, first: Monomial, at: int, second: Monomial, then: int
) -> Polynomial | None:
    """[a ≤ i < b]·f + [b ≤ i < c]·f = [a ≤ i < c]·f."""
    low, high = first.factors[at], second.factors[then]
    if not isinstance(low, Application) or not isinstance(high, Application):
        return None
    if low.arguments != high.arguments or number_at(low, 1) != number_at(high):
        return None
    if first.bound != second.bound or _but(first.factors, at) != _but(second.factors, then):
        return None
    coefficients: dict[Monomial, Coefficient] = dict(polynomial.terms)
    coefficient = coefficients[first]
    if coefficients[second] != coefficient:
        return None
    bound, factors = algebra.opened(first)
    inner = factors[at]
    assert isinstance(inner, Application)
    wide = algebra.apply(Head("range", (number_at(low), number_at(high, 1))), (), inner.arguments)
    joined = algebra.multiply(*map(algebra.lone, _but(factors, at)), wide, over=bound)
    others = apart(algebra, polynomial, first, second)
    return algebra.add(others, algebra.scale(joined, coefficient))


def _but(factors: tuple[Factor, ...], at: int) -> tuple[Factor, ...]:
    return (*factors[:at], *factors[at + 1 :])
