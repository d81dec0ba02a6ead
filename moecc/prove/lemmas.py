"""The lemmas: equations of terms, one function each, used from left to right.

A lemma is registered by its name for the terms that it may apply to: applications by their head,
monomials, or polynomials.  It returns the other side of the equation, in normal form, or None where
its conditions do not hold.  Each use is counted and logged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from math import gcd

from moecc.prove.stopped import stopped_body
from moecc.terms.tensor import inverse_size, let
from moecc.terms.term import (
    INDICATORS,
    Abstraction,
    Algebra,
    Application,
    Coefficient,
    Factor,
    Head,
    Monomial,
    OpenMonomial,
    Polynomial,
    Rules,
    Var,
    bounds,
    is_integral,
)

OfApplication = Callable[[Algebra, Application], Polynomial | None]
OfMonomial = Callable[[Algebra, OpenMonomial], Polynomial | None]
OfPolynomial = Callable[[Algebra, Polynomial], Polynomial | None]

APPLICATIONS: dict[str, list[tuple[str, OfApplication]]] = {}
MONOMIALS: list[tuple[str, OfMonomial]] = []
POLYNOMIALS: list[tuple[str, OfPolynomial]] = []
MOVEMENT: set[str] = set()
"""The lemmas that only rearrange indices."""


def of_application(
    name: str, *heads: str, movement: bool = False
) -> Callable[[OfApplication], OfApplication]:
    """Register a lemma on applications of some heads."""

    def register(lemma: OfApplication) -> OfApplication:
        for head in heads:
            APPLICATIONS.setdefault(head, []).append((name, lemma))
        if movement:
            MOVEMENT.add(name)
        return lemma

    return register


def of_monomial(name: str) -> Callable[[OfMonomial], OfMonomial]:
    """Register a lemma on monomials."""

    def register(lemma: OfMonomial) -> OfMonomial:
        MONOMIALS.append((name, lemma))
        return lemma

    return register


def of_polynomial(name: str) -> Callable[[OfPolynomial], OfPolynomial]:
    """Register a lemma on sums."""

    def register(lemma: OfPolynomial) -> OfPolynomial:
        POLYNOMIALS.append((name, lemma))
        return lemma

    return register


@dataclass
class Lemmas(Rules):
    """All lemmas, with a record of their uses.

    Attributes:
      counts: how often each was used.
      steps: each use: the lemma, and both sides of its equation.
      movement_alone: whether only lemmas that rearrange indices are used.
    """

    movement_alone: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    steps: list[tuple[str, object, object]] = field(default_factory=list)

    def record(self, name: str, before: object, after: object) -> None:
        """Count and log a use of a lemma."""
        self.counts[name] += 1
        self.steps.append((name, before, after))

    def of_application(self, algebra: Algebra, application: Application) -> Polynomial | None:
        """Return what the first lemma that applies says."""
        for name, lemma in APPLICATIONS.get(application.head.name, ()):
            if self.movement_alone and name not in MOVEMENT:
                continue
            equal = lemma(algebra, application)
            if equal is not None:
                self.record(name, application, equal)
                return equal
        return None

    def of_monomial(self, algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
        """Return what the first lemma that applies says."""
        if self.movement_alone or (not opened.bound and len(opened.factors) < 2):
            return None
        for name, lemma in MONOMIALS:
            equal = lemma(algebra, opened)
            if equal is not None:
                self.record(name, opened, equal)
                return equal
        return None

    def of_polynomial(self, algebra: Algebra, polynomial: Polynomial) -> Polynomial | None:
        """Return what the first lemma that applies says."""
        for name, lemma in POLYNOMIALS:
            if self.movement_alone and name not in MOVEMENT:
                continue
            equal = lemma(algebra, polynomial)
            if equal is not None:
                self.record(name, polynomial, equal)
                return equal
        return None


# Occurrences of variables.


def parts_of(factor: Factor) -> Iterator[Polynomial]:
    """Yield the polynomials within a factor, bodies of abstractions included."""
    if isinstance(factor, Application):
        yield from (a.body for a in factor.abstractions)
        yield from factor.arguments


def applications_in(factors: tuple[Factor, ...], variable: Var) -> Iterator[Application]:
    """Yield the applications within factors in which a variable occurs, each once."""
    stack, visited = list(factors), set[Application]()
    while stack:
        factor = stack.pop()
        if isinstance(factor, Var) or variable not in factor.free or factor in visited:
            continue
        visited.add(factor)
        yield factor
        for part in parts_of(factor):
            stack += [f for m, _ in part.terms for f in m.factors]


def linear_parts(
    factors: tuple[Factor, ...], variables: tuple[Var, ...]
) -> list[tuple[Coefficient, ...]] | None:
    """Return the coefficients of variables wherever they occur, or None if one is not linear."""
    found: list[tuple[Coefficient, ...]] = []
    stack: list[Factor] = list(factors)
    visited = set[Factor]()
    while stack:
        factor = stack.pop()
        if not any(v in factor.free for v in variables) or factor in visited:
            continue
        visited.add(factor)
        if isinstance(factor, Var):
            return None
        for part in parts_of(factor):
            if not any(v in part.free for v in variables):
                continue
            coefficients: dict[Factor, Coefficient] = {}
            for monomial, coefficient in part.terms:
                if not monomial.bound and len(monomial.factors) == 1:
                    lone = monomial.factors[0]
                    if lone in variables:
                        coefficients[lone] = coefficient
                        continue
                stack += monomial.factors
            if coefficients:
                found.append(tuple(coefficients.get(v, 0) for v in variables))
    return found


def replaced(
    algebra: Algebra, opened: OpenMonomial, gone: Var, value: Polynomial, new: tuple[Var, ...] = ()
) -> Polynomial:
    """Return a monomial with a bound variable replaced, and perhaps other variables bound."""
    parts = [
        algebra.substitute(algebra.multiply(lone(algebra, f)), {gone: value})
        for f in opened.factors
    ]
    bound = (*(v for v in opened.bound if v is not gone), *new)
    return algebra.scale(algebra.multiply(*parts, over=bound), opened.coefficient)


def lone(algebra: Algebra, factor: Factor) -> Polynomial:
    """Return a factor as a polynomial."""
    if isinstance(factor, Var):
        return algebra.index(factor)
    return algebra.apply(factor.head, factor.abstractions, factor.arguments)


def without(opened: OpenMonomial, *factors: Factor) -> OpenMonomial:
    """Return a monomial without some of its factors, each dropped once."""
    left = list(opened.factors)
    for factor in factors:
        left.remove(factor)
    return opened._replace(factors=tuple(left))


def attribute(application: Application, at: int = 0) -> int:
    """Return a whole number among the attributes of a head."""
    value = application.head.attrs[at]
    assert isinstance(value, int)
    return value


# Indices.


def _divided(
    algebra: Algebra, index: Polynomial, by: int
) -> tuple[Polynomial, Polynomial, int] | None:
    """Return A and B with index = by · A + B, and the k with B in [k · by, (k + 1) · by)."""
    if not is_integral(index):
        return None
    multiples = {m: int(c) // by for m, c in index.terms if int(c) % by == 0}
    remaining = [(m, int(c)) for m, c in index.terms if int(c) % by]
    quotient = algebra.add(
        *(algebra.scale(one(algebra, m), c) for m, c in multiples.items()), algebra.zero
    )
    rest = algebra.add(*(algebra.scale(one(algebra, m), c) for m, c in remaining), algebra.zero)
    low, high = bounds(rest)
    if low == float("-inf") or high == float("inf") or low // by != high // by:
        return None
    return quotient, rest, int(low // by)


def one(algebra: Algebra, monomial: Monomial) -> Polynomial:
    """Return a monomial as a polynomial."""
    bound, factors = algebra.opened(monomial)
    return algebra.multiply(*(lone(algebra, f) for f in factors), algebra.one, over=bound)


@of_application("quotient", "div", movement=True)
def quotient_of_sum(algebra: Algebra, application: Application) -> Polynomial | None:
    """⌊(n·a + b) / n⌋ = a + k for integers a, b with k·n ≤ b < (k + 1)·n."""
    divided = _divided(algebra, application.arguments[0], attribute(application))
    if divided is None:
        return _nested_quotient(algebra, application)
    return algebra.add(divided[0], algebra.number(divided[2]))


def _nested_quotient(algebra: Algebra, application: Application) -> Polynomial | None:
    """⌊⌊a / m⌋ / n⌋ = ⌊a / (m·n)⌋."""
    inner = application.arguments[0].factor
    if not isinstance(inner, Application) or inner.head.name != "div":
        return None
    by = attribute(inner) * attribute(application)
    return algebra.apply(Head("div", (by,)), (), inner.arguments)


@of_application("remainder", "mod", movement=True)
def remainder_of_sum(algebra: Algebra, application: Application) -> Polynomial | None:
    """(n·a + b) mod n = b − k·n for integers a, b with k·n ≤ b < (k + 1)·n."""
    by = attribute(application)
    divided = _divided(algebra, application.arguments[0], by)
    if divided is None:
        return None
    return algebra.subtract(divided[1], algebra.number(divided[2] * by))


@of_polynomial("quotient and remainder")
def quotient_and_remainder(algebra: Algebra, polynomial: Polynomial) -> Polynomial | None:
    """The parts of a division are the whole: n·⌊a / n⌋ + a mod n = a."""
    terms = {m.factors[0]: c for m, c in polynomial.terms if not m.bound and len(m.factors) == 1}
    for factor, coefficient in terms.items():
        if not isinstance(factor, Application) or factor.head.name != "mod":
            continue
        by = attribute(factor)
        quotient = algebra.apply(Head("div", (by,)), (), factor.arguments).factor
        if quotient is not None and terms.get(quotient) == coefficient * by:
            whole = algebra.scale(factor.arguments[0], coefficient)
            gone = [algebra.scale(lone(algebra, f), -terms[f]) for f in (factor, quotient)]
            return algebra.add(polynomial, *gone, whole)
    return None


@of_application("range", "range", movement=True)
def certain_range(algebra: Algebra, application: Application) -> Polynomial | None:
    """[a ≤ i < b] is 1 or 0 where the bounds of i say so."""
    start, stop = attribute(application), attribute(application, 1)
    low, high = bounds(application.arguments[0])
    if start <= low and high < stop:
        return algebra.one
    return algebra.zero if high < start or low >= stop else None


@of_application("comparison", "at_least_0", movement=True)
def certain_comparison(algebra: Algebra, application: Application) -> Polynomial | None:
    """[i ≥ 0] is 1 or 0 where the bounds of i say so."""
    low, high = bounds(application.arguments[0])
    if low >= 0:
        return algebra.one
    return algebra.zero if high < 0 else None


@of_application("equality", "equal", movement=True)
def certain_equality(algebra: Algebra, application: Application) -> Polynomial | None:
    """[i = 0] is 1 where i is 0, 0 where its bounds exclude 0; and [i = 0] = [−i = 0]."""
    index = application.arguments[0]
    low, high = bounds(index)
    if low == high == 0:
        return algebra.one
    if low > 0 or high < 0:
        return algebra.zero
    if index.constant is None and index.terms[0][1] < 0:
        return algebra.apply(application.head, (), [algebra.scale(index, -1)])
    return None


# Names.


@of_application("parentheses", "group", movement=True)
def parentheses(algebra: Algebra, application: Application) -> Polynomial | None:
    """(a) = a for a single term a."""
    body = application.arguments[0]
    return body if len(body.terms) < 2 else None


@of_application("name", "let", movement=True)
def unfold(algebra: Algebra, application: Application) -> Polynomial | None:
    """(λi. a)(t) = a[i := t]."""
    (named,) = application.abstractions
    variables = [p.variable for p in application.arguments]
    if all(v is not None for v in variables) and len(set(variables)) == len(variables):
        return None
    pairs = zip(named.variables, application.arguments, strict=True)
    moved = [v for v, p in pairs if p.variable is None]
    if not any(_is_row(a, moved) for a in _applications(named.body)):
        return None
    body = algebra.instantiate(named, application.arguments)
    return let(algebra, stopped_body(algebra, body, {}) if application.head.attrs else body)


def _applications(body: Polynomial) -> Iterator[Application]:
    stack, visited = [body], set[Polynomial]()
    while stack:
        polynomial = stack.pop()
        for monomial, _ in polynomial.terms:
            for factor in monomial.factors:
                if isinstance(factor, Application):
                    yield factor
                    for part in parts_of(factor):
                        if part not in visited and part.free:
                            visited.add(part)
                            stack.append(part)


def _is_row(application: Application, moved: list[Var]) -> bool:
    """Return whether an application is the token of a row whose indices are among `moved`."""
    if application.head.name not in ("token_of", "occupied"):
        return False
    return all(p.variable in moved for p in application.arguments)


# Slots.


@of_application("slot of a choice", "token_of", "occupied")
def own_slot(algebra: Algebra, application: Application) -> Polynomial | None:
    """The token in the slot of a choice is the token of the choice, and the slot is occupied.

    For an assignment of slots that gives choice c of token t the slot p(t, c) of expert e(t, c) in
    group g(t), and no slot twice: token(g(t), e(t, c), p(t, c)) = t.
    """
    slot = application.arguments[2].factor
    if not isinstance(slot, Application) or slot.head.name != "own_slot":
        return None
    key = application.head.attrs
    axis: int | None = None
    if application.head.name == "token_of":
        number, *key_rest = key
        assert isinstance(number, int)
        axis, key = number, tuple(key_rest)
    if slot.head.attrs != key or slot.abstractions != application.abstractions:
        return None
    *tokens, _ = slot.arguments
    group = algebra.apply(Head("group_of", key), application.abstractions, tokens)
    expert = algebra.instantiate(application.abstractions[0], slot.arguments)
    if application.arguments[0] is not group or application.arguments[1] is not expert:
        return None
    return algebra.one if axis is None else tokens[axis]


# Stacks.


@of_application("place in a stack", "stack", movement=True)
def place_in_stack(algebra: Algebra, application: Application) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is aᵢ, and a if all are a."""
    place, *parts = application.arguments
    if all(p is parts[0] for p in parts):
        return parts[0]
    at = place.constant
    return parts[int(at)] if at is not None else None


@of_application("stack of sources", "stack", movement=True)
def stack_of_sources(algebra: Algebra, application: Application) -> Polynomial | None:
    """The stack of sources at the same indices is a family of sources at one more index."""
    place, *parts = application.arguments
    factors = [p.factor for p in parts]
    sources = [f for f in factors if isinstance(f, Application) and f.head.name == "source"]
    if len(sources) != len(parts) or len({f.arguments for f in sources}) > 1:
        return None
    if len({f.head.attrs[1:] for f in sources}) > 1:
        return None
    names = tuple(f.head.attrs[0] for f in sources)
    head = Head("family", (names, *sources[0].head.attrs[1:]))
    return algebra.apply(head, (), [place, *sources[0].arguments])


@of_application("member of a family", "family", movement=True)
def member_of_family(algebra: Algebra, application: Application) -> Polynomial | None:
    """A family of sources at a number is the source."""
    place, *indices = application.arguments
    at = place.constant
    if at is None:
        return None
    names = application.head.attrs[0]
    assert isinstance(names, tuple)
    return algebra.apply(Head("source", (names[int(at)], *application.head.attrs[1:])), (), indices)


# Shares of a whole, and choices.


def _repeats(algebra: Algebra, function: Abstraction) -> tuple[int, Abstraction] | None:
    """Return n and g with f(i) = g(⌊i / n⌋) and n above 1, or None if there are none."""
    (variable,) = function.variables
    if variable not in function.body.free:
        return None
    fresh = algebra.fresh(variable)
    body = algebra.enter(function, [fresh])
    factors = tuple(f for m, _ in body.terms for f in m.factors)
    sizes = {
        attribute(a)
        for a in applications_in(factors, fresh)
        if a.head.name == "div" and a.arguments[0].variable is fresh
    }
    size = variable.size
    if not isinstance(size, int):
        return None
    for by in sorted(sizes):
        if size % by:
            continue
        outer = algebra.fresh(size // by)
        index = algebra.scale(algebra.index(outer), by)
        # f(n·q + r) must not depend on r, for r in [0, n).
        inner = algebra.fresh(by)
        at = algebra.substitute(body, {fresh: algebra.add(index, algebra.index(inner))})
        if inner not in at.free:
            return by, algebra.abstract([outer], at)
    return None


@of_application("equal shares", "share")
def equal_shares(algebra: Algebra, application: Application) -> Polynomial | None:
    """The share of each of n equal scores is 1/n."""
    (scores,) = application.abstractions
    (variable,) = scores.variables
    if variable in scores.body.free:
        return None
    return inverse_size(algebra, variable)


@of_application("shares of repeated scores", "share")
def repeated_shares(algebra: Algebra, application: Application) -> Polynomial | None:
    """The share of scores that come n times each is 1/n of the share among them once."""
    repeated = _repeats(algebra, application.abstractions[0])
    if repeated is None:
        return None
    by, scores = repeated
    at = algebra.apply(Head("div", (by,)), (), application.arguments)
    share = algebra.apply(application.head, [scores], [at])
    return algebra.scale(share, Fraction(1, by))


@of_application("best of equal scores", "experts")
def best_of_equal(algebra: Algebra, application: Application) -> Polynomial | None:
    """Of equal scores the k best are the first k, in their order."""
    if any(a.variables[0] in a.body.free for a in application.abstractions):
        return None
    return application.arguments[0]


@of_application("best of repeated scores", "experts")
def best_of_repeated(algebra: Algebra, application: Application) -> Polynomial | None:
    """The k·n best of scores that come n times each are the k best, each with its n copies.

    Copies are neighbours, and a tie takes the lowest index: choice c is n·e(⌊c/n⌋) + c mod n, for
    the k best e of the scores once.
    """
    size, top_k = attribute(application), attribute(application, 1)
    repeated = [_repeats(algebra, a) for a in application.abstractions]
    factors = [r[0] for r in repeated if r is not None]
    if len(factors) != len(repeated):
        return None
    by = gcd(*factors)
    if by == 1 or top_k % by or any(f != by for f in factors):
        return None
    scores = [r[1] for r in repeated if r is not None]
    choice = application.arguments[0]
    head = Head("experts", (size // by, top_k // by, *application.head.attrs[2:]))
    group = algebra.apply(head, scores, [algebra.apply(Head("div", (by,)), (), [choice])])
    copy = algebra.apply(Head("mod", (by,)), (), [choice])
    return algebra.add(algebra.scale(group, by), copy)


# Sums.


@of_monomial("indicators are idempotent")
def idempotent(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """[p]·[p] = [p]."""
    for factor, count in Counter(opened.factors).items():
        if count > 1 and isinstance(factor, Application) and factor.head.name in INDICATORS:
            return algebra.monomial(without(opened, factor))
    return None


@of_monomial("a size over itself")
def cancelled_size(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """N · 1/n = 1 for a size n, which is at least 1."""
    applications = [f for f in opened.factors if isinstance(f, Application)]
    sizes = {f.head.attrs: f for f in applications if f.head.name == "size"}
    for factor in applications:
        if factor.head.name == "inverse_size" and factor.head.attrs in sizes:
            return algebra.monomial(without(opened, factor, sizes[factor.head.attrs]))
    return None


@of_monomial("sum of a constant")
def constant_sum(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σᵢ a = n·a for i below n, where a does not depend on i."""
    for variable in opened.bound:
        if any(variable in f.free for f in opened.factors):
            continue
        bound = tuple(v for v in opened.bound if v is not variable)
        inner = algebra.monomial(opened._replace(bound=bound))
        return algebra.multiply(inner, algebra.size(variable.size))
    return None


@of_monomial("sum of one element")
def sum_of_one(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σᵢ f(i) = f(0) for i below 1."""
    for variable in opened.bound:
        if variable.size == 1:
            return replaced(algebra, opened, variable, algebra.zero)
    return None


@of_monomial("shares add up")
def shares_add_up(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σᵢ share(i) = 1 over all i."""
    for variable in opened.bound:
        occurrences = [f for f in opened.factors if variable in f.free]
        share = occurrences[0] if len(occurrences) == 1 else None
        if not isinstance(share, Application):
            continue
        if share.head.name != "share" or share.arguments[0].variable is not variable:
            continue
        (scores,) = share.abstractions
        if variable in scores.free or scores.variables[0].size != variable.size:
            continue
        bound = tuple(v for v in opened.bound if v is not variable)
        return algebra.monomial(without(opened._replace(bound=bound), share))
    return None


@of_monomial("sum at a point")
def sum_at_point(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σᵢ [i = t]·f(i) = [0 ≤ t < n]·f(t) for i below n."""
    for factor in opened.factors:
        if not isinstance(factor, Application) or factor.head.name != "equal":
            continue
        index = factor.arguments[0]
        for monomial, coefficient in index.terms:
            if abs(coefficient) != 1 or monomial.bound or len(monomial.factors) != 1:
                continue
            variable = monomial.factors[0]
            if not isinstance(variable, Var) or variable not in opened.bound:
                continue
            if not isinstance(variable.size, int):
                continue
            signed = algebra.scale(algebra.index(variable), coefficient)
            point = algebra.scale(algebra.subtract(index, signed), -coefficient)
            if variable in point.free or not is_integral(point):
                continue
            inside = algebra.apply(Head("range", (0, variable.size)), (), [point])
            inner = replaced(algebra, without(opened, factor), variable, point)
            return algebra.multiply(inside, inner)
    return None


@of_monomial("sum over a range")
def sum_over_range(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σᵢ [a ≤ i + c < b]·f(i) is the sum of f over the i of the range."""
    for factor in opened.factors:
        if not isinstance(factor, Application) or factor.head.name != "range":
            continue
        index = factor.arguments[0]
        inner = [v for v in index.free if v in opened.bound]
        if len(inner) != 1:
            continue
        variable = inner[0]
        shift, size = algebra.subtract(index, algebra.index(variable)).constant, variable.size
        if not isinstance(shift, int) or not isinstance(size, int):
            continue
        low = max(attribute(factor) - shift, 0)
        high = min(attribute(factor, 1) - shift, size)
        if high <= low:
            return algebra.zero
        fresh = algebra.fresh(high - low)
        value = algebra.add(algebra.index(fresh), algebra.number(low))
        return replaced(algebra, without(opened, factor), variable, value, (fresh,))
    return None


@of_monomial("sum over a bijection")
def sum_over_bijection(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σᵢ f(π(i)) = Σᵢ f(i) for a permutation π, as the n best of n are."""
    for variable in opened.bound:
        occurrences = tuple(f for f in opened.factors if variable in f.free)
        for application in applications_in(occurrences, variable):
            name = application.head.name
            if name not in ("experts", "permutation") or attribute(application) != variable.size:
                continue
            if name == "experts" and attribute(application, 1) != variable.size:
                continue
            if application.arguments[0].variable is not variable:
                continue
            if any(variable in a.free for a in application.abstractions):
                continue
            fresh = algebra.fresh(variable)
            named = {application: algebra.index(fresh)}
            parts = [_exchanged(algebra, lone(algebra, f), named) for f in opened.factors]
            if any(variable in p.free for p in parts):
                continue
            bound = (*(v for v in opened.bound if v is not variable), fresh)
            return algebra.scale(algebra.multiply(*parts, over=bound), opened.coefficient)
    return None


def _exchanged(
    algebra: Algebra, polynomial: Polynomial, values: dict[Application, Polynomial]
) -> Polynomial:
    """Return a polynomial with applications replaced, in normal form."""
    parts = []
    for monomial, coefficient in polynomial.terms:
        bound, factors = algebra.opened(monomial)
        changed = [_exchanged_factor(algebra, f, values) for f in factors]
        parts.append(
            algebra.scale(algebra.multiply(*changed, algebra.one, over=bound), coefficient)
        )
    return algebra.add(*parts, algebra.zero)


def _exchanged_factor(
    algebra: Algebra, factor: Factor, values: dict[Application, Polynomial]
) -> Polynomial:
    if isinstance(factor, Var) or not factor.free:
        return lone(algebra, factor)
    if factor in values:
        return values[factor]
    abstractions = []
    for abstraction in factor.abstractions:
        fresh = [algebra.fresh(v) for v in abstraction.variables]
        body = _exchanged(algebra, algebra.enter(abstraction, fresh), values)
        abstractions.append(algebra.abstract(fresh, body))
    arguments = [_exchanged(algebra, p, values) for p in factor.arguments]
    return algebra.apply(factor.head, abstractions, arguments)


@of_monomial("split a sum")
def split_sum(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σᵢ f(i) = Σ_q Σ_r f(n·q + r) for i below m·n, q below m and r below n."""
    for variable in opened.bound:
        if not isinstance(variable.size, int):
            continue
        occurrences = tuple(f for f in opened.factors if variable in f.free)
        sizes = sorted(
            attribute(a)
            for a in applications_in(occurrences, variable)
            if a.head.name in ("div", "mod") and a.arguments[0].variable is variable
        )
        for by in sizes:
            if variable.size % by:
                continue
            outer, inner = algebra.fresh(variable.size // by), algebra.fresh(by)
            scaled = algebra.scale(algebra.index(outer), by)
            value = algebra.add(scaled, algebra.index(inner))
            return replaced(algebra, opened, variable, value, (outer, inner))
    return None


@of_monomial("merge sums")
def merge_sums(algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
    """Σ_q Σ_r f(n·q + r) = Σᵢ f(i) for r below n, q below m and i below m·n."""
    for inner in opened.bound:
        for outer in opened.bound:
            if inner is outer or not isinstance(inner.size, int):
                continue
            if not isinstance(outer.size, int):
                continue
            coefficients = linear_parts(opened.factors, (outer, inner))
            if not coefficients or any(q != r * inner.size for q, r in coefficients):
                continue
            fresh = algebra.fresh(outer.size * inner.size)
            values = {outer: algebra.zero, inner: algebra.index(fresh)}
            parts = [algebra.substitute(lone(algebra, f), values) for f in opened.factors]
            bound = (*(v for v in opened.bound if v not in (outer, inner)), fresh)
            return algebra.scale(algebra.multiply(*parts, over=bound), opened.coefficient)
    return None


@of_polynomial("join sums")
def join_sums(algebra: Algebra, polynomial: Polynomial) -> Polynomial | None:
    """Σ_{i<m} f(i) + Σ_{i<n} f(m + i) = Σ_{i<m+n} f(i), and f(m) for the sum of one element."""
    groups: dict[object, list[tuple[Monomial, Coefficient]]] = {}
    for monomial, coefficient in polynomial.terms:
        heads = sorted(f.head.name for f in monomial.factors if isinstance(f, Application))
        groups.setdefault((coefficient, tuple(heads)), []).append((monomial, coefficient))
    for members in groups.values():
        for first, coefficient in members if len(members) > 1 else ():
            for second, _ in members:
                if first is second or not first.bound:
                    continue
                joined = _joined(algebra, first, second)
                if joined is not None:
                    parts = [algebra.scale(one(algebra, m), -coefficient) for m in (first, second)]
                    return algebra.add(polynomial, *parts, algebra.scale(joined, coefficient))
    return None


def _joined(algebra: Algebra, first: Monomial, second: Monomial) -> Polynomial | None:
    """Return the sum of two monomials if the second goes on where a sum of the first ends."""
    bound, factors = algebra.opened(first)
    for variable in bound:
        size = variable.size
        if not isinstance(size, int):
            continue
        others = tuple(v for v in bound if v is not variable)
        body = [lone(algebra, f) for f in factors]
        for length, value in _continuations(algebra, second, size):
            at = {variable: value[0]}
            shifted = algebra.multiply(*(algebra.substitute(p, at) for p in body), over=others)
            if shifted is value[1]:
                fresh = algebra.fresh(size + length)
                at = {variable: algebra.index(fresh)}
                parts = [algebra.substitute(p, at) for p in body]
                return algebra.multiply(*parts, over=(*others, fresh))
    return None


def _continuations(
    algebra: Algebra, second: Monomial, start: int
) -> Iterator[tuple[int, tuple[Polynomial, Polynomial]]]:
    """Yield for each sum of `second` its length, the index that runs on, and the summand there."""
    yield 1, (algebra.number(start), one(algebra, second))
    bound, factors = algebra.opened(second)
    for variable in bound:
        if isinstance(variable.size, int):
            others = tuple(v for v in bound if v is not variable)
            summand = algebra.multiply(*(lone(algebra, f) for f in factors), over=others)
            index = algebra.add(algebra.index(variable), algebra.number(start))
            yield variable.size, (index, summand)


@of_polynomial("join ranges")
def join_ranges(algebra: Algebra, polynomial: Polynomial) -> Polynomial | None:
    """[a ≤ i < b]·f + [b ≤ i < c]·f = [a ≤ i < c]·f."""
    ranges: dict[object, list[tuple[int, int, Monomial, Application, Coefficient]]] = {}
    for monomial, coefficient in polynomial.terms:
        for factor in monomial.factors:
            if isinstance(factor, Application) and factor.head.name == "range":
                left = list(monomial.factors)
                left.remove(factor)
                key = (coefficient, monomial.bound, tuple(left), factor.arguments)
                ends = (attribute(factor), attribute(factor, 1))
                ranges.setdefault(key, []).append((*ends, monomial, factor, coefficient))
    for members in ranges.values():
        for a, b in pairwise(sorted(members, key=lambda r: r[:2])):
            if a[1] != b[0]:
                continue
            bound, factors = algebra.opened(a[2])
            at = a[2].factors.index(a[3])
            wide = Head("range", (a[0], b[1]))
            both = factors[at]
            assert isinstance(both, Application)
            parts = [lone(algebra, f) for i, f in enumerate(factors) if i != at]
            parts.append(algebra.apply(wide, (), both.arguments))
            joined = algebra.scale(algebra.multiply(*parts, over=bound), a[4])
            gone = [algebra.scale(one(algebra, r[2]), -r[4]) for r in (a, b)]
            return algebra.add(polynomial, *gone, joined)
    return None


@of_application("masks compose", "mask")
def composed_masks(algebra: Algebra, application: Application) -> Polynomial | None:
    """mask(mask(a, p), q) = mask(a, p·q) for one filler, and mask(a, 1) = a."""
    body, keep = application.arguments
    if keep is algebra.one:
        return body
    inner = body.factor
    if not isinstance(inner, Application) or inner.head != application.head:
        return None
    both = algebra.multiply(inner.arguments[1], keep)
    return algebra.apply(application.head, (), [inner.arguments[0], both])


@of_application("inverse", "inverse")
def inverse_of_multiple(algebra: Algebra, application: Application) -> Polynomial | None:
    """1/(c·a) = 1/c · 1/a for a number c other than 0 and 1."""
    (body,) = application.arguments
    if body.constant is not None:
        return algebra.number(1 / Fraction(body.constant)) if body.constant else None
    if len(body.terms) > 1 or body.terms[0][1] == 1:
        return None
    by = 1 / Fraction(body.terms[0][1])
    return algebra.scale(algebra.apply(application.head, (), [algebra.scale(body, by)]), by)
