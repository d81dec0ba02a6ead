"""The lemmas: equations of terms, one function each, used from left to right.

A lemma is a function of a term and of parameters.  It checks its conditions and returns the other
side of the equation, in normal form, or None where they do not hold.  Parameters come from a
generator of candidates beside it; a log has the ones that were used, so that a checker applies
lemmas and never searches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise, permutations
from typing import Any, Literal

from moecc.prove.generalise import generalise
from moecc.prove.occurrences import Occurrences, index_of_all, outline
from moecc.prove.stopped import stopped_body
from moecc.terms.tensor import inverse_size, let
from moecc.terms.term import (
    INDICATORS,
    Abstraction,
    Algebra,
    Application,
    Coefficient,
    Cut,
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
    """

    name: str
    apply: Apply
    candidates: Candidates
    rearranges: bool


APPLICATIONS: dict[str, list[Lemma]] = {}
"""Lemmas of applications, by head."""
MONOMIALS: list[Lemma] = []
"""Lemmas of monomials whose bound variables are fresh."""
SUMS: list[Lemma] = []
"""Lemmas of polynomials of several monomials."""


def _once(_algebra: Algebra, _term: object) -> Iterable[tuple[object, ...]]:
    return ((),)


def of_application(
    name: str, *heads: str, candidates: Candidates = _once, rearranges: bool = False
) -> Callable[[Apply], Apply]:
    """Register a lemma on applications of some heads."""

    def register(apply: Apply) -> Apply:
        for head in heads:
            APPLICATIONS.setdefault(head, []).append(Lemma(name, apply, candidates, rearranges))
        return apply

    return register


def of_monomial(name: str, candidates: Candidates = _once) -> Callable[[Apply], Apply]:
    """Register a lemma on monomials."""

    def register(apply: Apply) -> Apply:
        MONOMIALS.append(Lemma(name, apply, candidates, False))
        return apply

    return register


def of_sum(name: str, candidates: Candidates = _once) -> Callable[[Apply], Apply]:
    """Register a lemma on polynomials."""

    def register(apply: Apply) -> Apply:
        SUMS.append(Lemma(name, apply, candidates, name == "quotient and remainder"))
        return apply

    return register


@dataclass(frozen=True)
class Step:
    """A use of a lemma: the term that it was used on, and its parameters."""

    lemma: str
    term: Application | OpenMonomial | Polynomial
    parameters: tuple[object, ...]


LARGE = 200
"""Above this weight a sum is named when it becomes a factor, which bounds the work on terms."""

MANY_TERMS = 12
"""A sum of more terms is named when something is added to it: residual streams are sums."""


@dataclass
class Lemmas(Rules):
    """All lemmas, with a record of their uses.

    Attributes:
      exact: whether only lemmas are used of which both sides are the same bits.
      counts: how often each was used.
      steps: the uses, each after those that its right side rests on, and cuts among them.
      cuts: how polynomials were cut, by role.
    """

    exact: bool = False
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
        """Return what the first lemma that applies says."""
        return self._first(APPLICATIONS.get(application.head.name, ()), algebra, application)

    def of_monomial(self, algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
        """Return what the first lemma that applies says."""
        if not opened.bound and len(opened.factors) < 2:
            return None
        return self._first(MONOMIALS, algebra, opened)

    def of_polynomial(self, algebra: Algebra, polynomial: Polynomial) -> Polynomial | None:
        """Return what the first lemma that applies says."""
        return self._first(SUMS, algebra, polynomial)

    def _first(
        self,
        lemmas: Iterable[Lemma],
        algebra: Algebra,
        term: Application | OpenMonomial | Polynomial,
    ) -> Polynomial | None:
        for lemma in lemmas:
            if self.exact and not lemma.rearranges:
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


# Indices.


def _divided(
    algebra: Algebra, index: Polynomial, by: int
) -> tuple[Polynomial, Polynomial, int] | None:
    """Return A, B and k with index = by · A + B and k · by ≤ B < (k + 1) · by."""
    if not is_integral(index):
        return None
    quotient = algebra.polynomial({m: int(c) // by for m, c in index.terms if int(c) % by == 0})
    rest = algebra.polynomial({m: c for m, c in index.terms if int(c) % by})
    low, high = bounds(rest)
    if low == float("-inf") or high == float("inf") or low // by != high // by:
        return None
    return quotient, rest, int(low // by)


@of_application("quotient", "div", rearranges=True)
def quotient_of_sum(algebra: Algebra, application: Application) -> Polynomial | None:
    """⌊(n·a + b) / n⌋ = a + k for integers a, b with k·n ≤ b < (k + 1)·n."""
    divided = _divided(algebra, application.arguments[0], number_at(application))
    return None if divided is None else algebra.add(divided[0], algebra.number(divided[2]))


@of_application("quotient of a quotient", "div", rearranges=True)
def quotient_of_quotient(algebra: Algebra, application: Application) -> Polynomial | None:
    """⌊⌊a / m⌋ / n⌋ = ⌊a / (m·n)⌋."""
    inner = application.arguments[0].factor
    if not isinstance(inner, Application) or inner.head.name != "div":
        return None
    by = number_at(inner) * number_at(application)
    return algebra.apply(Head("div", (by,)), (), inner.arguments)


@of_application("remainder", "mod", rearranges=True)
def remainder_of_sum(algebra: Algebra, application: Application) -> Polynomial | None:
    """(n·a + b) mod n = b − k·n for integers a, b with k·n ≤ b < (k + 1)·n."""
    by = number_at(application)
    divided = _divided(algebra, application.arguments[0], by)
    if divided is None:
        return None
    return algebra.subtract(divided[1], algebra.number(divided[2] * by))


def _remainders(_algebra: Algebra, polynomial: Polynomial) -> Iterator[tuple[object, ...]]:
    for monomial, _ in polynomial.terms:
        if len(monomial.factors) == 1 and not monomial.bound:
            factor = monomial.factors[0]
            if isinstance(factor, Application) and factor.head.name == "mod":
                yield (factor,)


@of_sum("quotient and remainder", _remainders)
def quotient_and_remainder(
    algebra: Algebra, polynomial: Polynomial, remainder: Application
) -> Polynomial | None:
    """The parts of a division are the whole: n·⌊a / n⌋ + a mod n = a."""
    by = number_at(remainder)
    quotient = algebra.apply(Head("div", (by,)), (), remainder.arguments)
    coefficients = dict(polynomial.terms)
    part = algebra.lone(remainder)
    coefficient = coefficients[part.terms[0][0]]
    if quotient.factor is None or coefficients.get(quotient.terms[0][0]) != coefficient * by:
        return None
    rest = _apart(algebra, polynomial, part.terms[0][0], quotient.terms[0][0])
    return algebra.add(rest, algebra.scale(remainder.arguments[0], coefficient))


@of_application("range", "range", rearranges=True)
def certain_range(algebra: Algebra, application: Application) -> Polynomial | None:
    """[a ≤ i < b] is 1 or 0 where the bounds of i say so."""
    start, stop = number_at(application), number_at(application, 1)
    low, high = bounds(application.arguments[0])
    if start <= low and high < stop:
        return algebra.one
    return algebra.zero if high < start or low >= stop else None


@of_application("comparison", "at_least_0", rearranges=True)
def certain_comparison(algebra: Algebra, application: Application) -> Polynomial | None:
    """[i ≥ 0] is 1 or 0 where the bounds of i say so."""
    low, high = bounds(application.arguments[0])
    if low >= 0:
        return algebra.one
    return algebra.zero if high < 0 else None


@of_application("equality", "equal", rearranges=True)
def certain_equality(algebra: Algebra, application: Application) -> Polynomial | None:
    """[i = 0] is 1 where i is 0, and 0 where its bounds exclude 0."""
    low, high = bounds(application.arguments[0])
    if low == high == 0:
        return algebra.one
    return algebra.zero if low > 0 or high < 0 else None


@of_application("equality of opposites", "equal", rearranges=True)
def opposite_equality(algebra: Algebra, application: Application) -> Polynomial | None:
    """[i = 0] = [−i = 0]."""
    index = application.arguments[0]
    opposite = algebra.scale(index, -1)
    if index.serial < opposite.serial:
        return None
    return algebra.apply(application.head, (), [opposite])


# Names.


@of_application("parentheses", "group", rearranges=True)
def parentheses(algebra: Algebra, application: Application) -> Polynomial | None:
    """(a) = a for a single term a."""
    body = application.arguments[0]
    return body if len(body.terms) < 2 else None


def _content(algebra: Algebra, body: Polynomial) -> tuple[Polynomial, Polynomial] | None:
    """Return c and a with body = c · a, for a positive number or a root c other than 1."""
    coefficients = {abs(Fraction(c)) for _, c in body.terms}
    if len(coefficients) == 1 and coefficients != {1}:
        by = coefficients.pop()
        return algebra.number(by), algebra.scale(body, 1 / by)
    common = set.intersection(*({*m.factors} for m, _ in body.terms)) if body.terms else set()
    for root in common:
        if isinstance(root, Application) and root.head.name == "root":
            parts = []
            for monomial, coefficient in body.terms:
                bound, factors = algebra.opened(monomial)
                opened = OpenMonomial(coefficient, bound, factors)
                parts.append(algebra.monomial(without(opened, root)))
            return algebra.lone(root), algebra.add(*parts)
    return None


@of_application("common factor", "group", "relu", "square")
def common_factor(algebra: Algebra, application: Application) -> Polynomial | None:
    """f(c·a) = c·f(a) for a positive number or root c, of parentheses and relu; c² of a square."""
    content = _content(algebra, application.arguments[0])
    if content is None:
        return None
    by, inner = content
    times = (by, by) if application.head.name == "square" else (by,)
    return algebra.multiply(*times, algebra.apply(application.head, (), [inner]))


def _rows(algebra: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    """Yield once if a row's place is replaced by another that is no variable."""
    (named,) = application.abstractions
    pairs = zip(named.variables, application.arguments, strict=True)
    moved = frozenset(v for v, p in pairs if p.variable is None)
    if moved and any(row <= moved for row in index_of_all(algebra, named.body).rows):
        yield ()


@of_application("name", "let", candidates=_rows, rearranges=True)
def unfold(algebra: Algebra, application: Application) -> Polynomial | None:
    """(λi. a)(t) = a[i := t]."""
    (named,) = application.abstractions
    body = algebra.instantiate(named, application.arguments)
    return let(algebra, stopped_body(algebra, body, {}) if application.head.attrs else body)


# Slots.


@of_application("slot of a choice", "token_of", "occupied")
def own_slot(algebra: Algebra, application: Application) -> Polynomial | None:
    """The token in the slot of a choice is the token of the choice, and the slot is occupied.

    An assignment gives choice c of token t, where it gives it a slot, the slot p(t, c) of expert
    e(t, c) in group g(t), and no slot twice: token(g(t), e(t, c), p(t, c)) = t.
    """
    group, expert, place = application.arguments
    slot = place.factor
    if not isinstance(slot, Application) or slot.head.name != "own_slot":
        return None
    is_token = application.head.name == "token_of"
    key = application.head.attrs[1:] if is_token else application.head.attrs
    if slot.head.attrs != key or slot.abstractions != application.abstractions:
        return None
    tokens = slot.arguments[:-1]
    if group is not algebra.apply(Head("group_of", key), slot.abstractions, tokens):
        return None
    if expert is not algebra.instantiate(slot.abstractions[0], slot.arguments):
        return None
    return slot.arguments[number_at(application)] if is_token else algebra.one


# Stacks.


@of_application("place in a stack", "stack", rearranges=True)
def place_in_stack(algebra: Algebra, application: Application) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is aᵢ, and a if all are a."""
    place, *parts = application.arguments
    if all(p is parts[0] for p in parts):
        return parts[0]
    at = place.constant
    return parts[int(at)] if at is not None else None


@of_application("places within a stack", "stack", rearranges=True)
def places_in_stack(algebra: Algebra, application: Application) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is that of aₘ … aₖ at place i − m, if m ≤ i ≤ k."""
    place, *parts = application.arguments
    low, high = bounds(place)
    if not is_integral(place) or low < 0 or high >= len(parts) or high + 1 - low == len(parts):
        return None
    reachable = parts[int(low) : int(high) + 1]
    at = algebra.subtract(place, algebra.number(low))
    return algebra.apply(Head("stack", (len(reachable),)), (), [at, *reachable])


def _periods(_: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    parts = application.arguments[1:]
    for period in range(2, len(parts) // 2 + 1):
        if len(parts) % period == 0 and parts[0] is parts[period]:
            yield (period,)


@of_application("stack with a period", "stack", candidates=_periods, rearranges=True)
def periodic_stack(algebra: Algebra, application: Application, period: int) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is that of a₀ … aₚ₋₁ at i mod p, if it repeats so."""
    place, *parts = application.arguments
    low, high = bounds(place)
    if not is_integral(place) or low < 0 or high >= len(parts):
        return None
    if any(part is not parts[at % period] for at, part in enumerate(parts)):
        return None
    at = algebra.apply(Head("mod", (period,)), (), [place])
    return algebra.apply(Head("stack", (period,)), (), [at, *parts[:period]])


@of_application("stack of sources", "stack", rearranges=True)
def stack_of_sources(algebra: Algebra, application: Application) -> Polynomial | None:
    """The stack of sources at the same indices is a family of sources at one more index."""
    place, *parts = application.arguments
    factors = [p.factor for p in parts]
    sources = [f for f in factors if isinstance(f, Application) and f.head.name == "source"]
    if len(sources) != len(parts) or len({(f.arguments, f.head.attrs[1:]) for f in sources}) > 1:
        return None
    names = tuple(f.head.attrs[0] for f in sources)
    if len(set(names)) < len(names):
        return None
    head = Head("family", (names, *sources[0].head.attrs[1:]))
    return algebra.apply(head, (), [place, *sources[0].arguments])


def _generalised(algebra: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    place = algebra.fresh(number_at(application))
    body = generalise(algebra, algebra.index(place), application.arguments[1:])
    if body is not None:
        yield (algebra.abstract([place], body),)


@of_application("stack by its members", "stack", candidates=_generalised, rearranges=True)
def stack_by_members(
    algebra: Algebra, application: Application, function: Abstraction
) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is f(i) if f(j) = aⱼ for every j."""
    place, *parts = application.arguments
    low, high = bounds(place)
    if not is_integral(place) or low < 0 or high >= len(parts):
        return None
    for at, part in enumerate(parts):
        if algebra.instantiate(function, [algebra.number(at)]) is not part:
            return None
    return algebra.instantiate(function, [place])


@of_application("member of a family", "family", "weights", rearranges=True)
def member_of_family(algebra: Algebra, application: Application) -> Polynomial | None:
    """A family of sources, or of other leaves, at a number is the source, or the leaf."""
    place, *indices = application.arguments
    at = place.constant
    if at is None:
        return None
    names = application.head.attrs[0]
    assert isinstance(names, tuple)
    name = "source" if application.head.name == "family" else "weight"
    return algebra.apply(Head(name, (names[int(at)], *application.head.attrs[1:])), (), indices)


# Shares of a whole, and choices.


def _once_each(algebra: Algebra, function: Abstraction, by: int) -> Abstraction | None:
    """Return g with f(n·q + r) = g(q) for all r below n, or None if there is none."""
    (variable,) = function.variables
    if not isinstance(variable.size, int) or variable.size % by or by < 2:
        return None
    outer, inner = algebra.fresh(variable.size // by), algebra.fresh(by)
    index = algebra.add(algebra.scale(algebra.index(outer), by), algebra.index(inner))
    body = algebra.instantiate(function, [index])
    return None if inner in body.free else algebra.abstract([outer], body)


def _divisors(algebra: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    """Yield the numbers by which the first function divides its variable."""
    function = application.abstractions[0]
    (variable,) = function.variables
    divided = index_of_all(algebra, function.body).divided
    yield from ((by,) for by in sorted({n for v, n in divided if v is variable}))


@of_application("equal shares", "share")
def equal_shares(algebra: Algebra, application: Application) -> Polynomial | None:
    """The share of each of n equal scores is 1/n."""
    (scores,) = application.abstractions
    (variable,) = scores.variables
    return inverse_size(algebra, variable) if variable not in scores.body.free else None


@of_application("shares of repeated scores", "share", candidates=_divisors)
def repeated_shares(algebra: Algebra, application: Application, by: int) -> Polynomial | None:
    """The share of scores that come n times each is 1/n of the share among them once."""
    scores = _once_each(algebra, application.abstractions[0], by)
    if scores is None:
        return None
    at = algebra.apply(Head("div", (by,)), (), application.arguments)
    return algebra.scale(algebra.apply(application.head, [scores], [at]), Fraction(1, by))


@of_application("best of equal scores", "experts")
def best_of_equal(algebra: Algebra, application: Application) -> Polynomial | None:
    """Of equal scores the k best are the first k, in their order."""
    if any(a.variables[0] in a.body.free for a in application.abstractions):
        return None
    return application.arguments[0]


@of_application("best of repeated scores", "experts", candidates=_divisors)
def best_of_repeated(algebra: Algebra, application: Application, by: int) -> Polynomial | None:
    """The k·n best of scores that come n times each are the k best, each with its n copies.

    Copies are neighbours, and a tie takes the lowest index: choice c is n·e(⌊c/n⌋) + c mod n, for
    the k best e of the scores once.  A softmax gives each copy 1/n of the share, so a bias that is
    added to it counts n times.
    """
    size, top_k = number_at(application), number_at(application, 1)
    scores = [_once_each(algebra, a, by) for a in application.abstractions]
    if top_k % by or any(s is None for s in scores):
        return None
    if application.head.attrs[2] == "softmax" and len(scores) > 1 and scores[1] is not None:
        place = algebra.fresh(size // by)
        scores[1] = algebra.abstract([place], algebra.scale(algebra.enter(scores[1], [place]), by))
    (choice,) = application.arguments
    head = Head("experts", (size // by, top_k // by, *application.head.attrs[2:]))
    group = algebra.apply(Head("div", (by,)), (), [choice])
    expert = algebra.apply(head, [s for s in scores if s is not None], [group])
    copy = algebra.apply(Head("mod", (by,)), (), [choice])
    return algebra.add(algebra.scale(expert, by), copy)


@of_application("a bias of all scores", "experts")
def constant_bias(algebra: Algebra, application: Application) -> Polynomial | None:
    """The k best by σ(aᵢ) + b are the k best by aᵢ, for an increasing score σ."""
    if len(application.abstractions) != 2:
        return None
    logits, bias = application.abstractions
    if bias.variables[0] in bias.body.free:
        return None
    size, top_k, _ = application.head.attrs
    return algebra.apply(Head("experts", (size, top_k, "logits")), [logits], application.arguments)


def _undominated(algebra: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    """Yield the step a and the count n of the places 0, a … (n − 1)·a of the largest biases."""
    if len(application.abstractions) != 2:
        return
    biases = _constants(algebra, application.abstractions[1])
    if biases and min(biases) < max(biases):
        places = [i for i, b in enumerate(biases) if b > max(biases) - 1]
        step = places[1] - places[0] if len(places) > 1 else 1
        if places == [i * step for i in range(len(places))]:
            yield (step, len(places))


def _constants(algebra: Algebra, function: Abstraction) -> list[Fraction]:
    """Return the values of a function of an index if all are numbers, else nothing."""
    (variable,) = function.variables
    if not isinstance(variable.size, int):
        return []
    values = [algebra.instantiate(function, [algebra.number(i)]) for i in range(variable.size)]
    numbers = [v.constant for v in values]
    return [Fraction(n) for n in numbers if n is not None] if None not in numbers else []


@of_application("best of undominated scores", "experts", candidates=_undominated)
def best_of_undominated(
    algebra: Algebra, application: Application, step: int, count: int
) -> Polynomial | None:
    """The k best of scores in (0, 1) with biases are among those with the largest biases.

    That is so if there are n ≥ k of them and their biases are greater than every other's by at
    least 1.  At places 0, a, 2·a … the k best of all are a times the k best of these.
    """
    _, top_k, score = application.head.attrs
    biases = _constants(algebra, application.abstractions[1])
    places = range(0, step * count, step)
    if not biases or not isinstance(top_k, int) or count < top_k or places[-1] >= len(biases):
        return None
    least = min(biases[i] for i in places)
    if any(b > least - 1 for i, b in enumerate(biases) if i not in places):
        return None
    place = algebra.fresh(count)
    at = algebra.scale(algebra.index(place), step)
    functions = [
        algebra.abstract([place], algebra.instantiate(a, [at])) for a in application.abstractions
    ]
    if score == "softmax":
        # The score of a place reads all logits, and its order is that of the logits alone.
        bias = functions[1]
        if bias.variables[0] in bias.body.free:
            return None
    head = Head("experts", (count, top_k, score))
    return algebra.scale(algebra.apply(head, functions, application.arguments), step)


# Functions.

AT_ZERO = {
    **dict.fromkeys(("silu", "gelu", "gelu_tanh", "relu", "tanh", "square"), Fraction(0)),
    "sigmoid": Fraction(1, 2),
    "exp": Fraction(1),
}


@of_application("function at 0", *AT_ZERO)
def function_at_zero(algebra: Algebra, application: Application) -> Polynomial | None:
    """σ(0) = ½, exp(0) = 1, and 0 for functions through the origin."""
    if application.arguments[0] is not algebra.zero:
        return None
    return algebra.number(AT_ZERO[application.head.name])


@of_application("sparsemixer of equal scores", "gate")
def sparsemixer_of_equal(algebra: Algebra, application: Application) -> Polynomial | None:
    """Choice c among N equal scores has the gate 1/(N − c), for c of 0 and 1."""
    logits = application.abstractions[0]
    (variable,) = logits.variables
    (choice,) = application.arguments
    size = variable.size
    if application.head.attrs != ("sparsemixer",) or variable in logits.body.free:
        return None
    low, high = bounds(choice)
    if not isinstance(size, int) or low < 0 or high > min(1, size - 1):
        return None
    gates = []
    for at in range(int(high) + 1):
        chosen = algebra.subtract(choice, algebra.number(at))
        holds = algebra.apply(Head("equal"), (), [chosen])
        gates.append(algebra.scale(holds, Fraction(1, size - at)))
    return algebra.add(*gates)


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
    """1/(c·a) = 1/c · 1/a for a number c other than 0."""
    (body,) = application.arguments
    if body.constant is not None:
        return algebra.number(1 / Fraction(body.constant)) if body.constant else None
    if len(body.terms) > 1 or body.terms[0][1] == 1:
        return None
    by = 1 / Fraction(body.terms[0][1])
    return algebra.scale(algebra.apply(application.head, (), [algebra.scale(body, by)]), by)


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
    if any(v in f.free for v in bound for f in remaining):
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


def _bijections(algebra: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for choice in Occurrences.of(algebra, opened.factors).choices:
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
    for choice in Occurrences.of(algebra, opened.factors).choices:
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
    yield from sorted(((v, n) for v, n in divided if v in opened.bound), key=lambda d: d[1])


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
    if outer in occurrences.other or inner in occurrences.other:
        return None
    for part in map(dict, occurrences.linear):
        if part.get(outer, 0) != part.get(inner, 0) * inner.size:
            return None
    fresh = algebra.fresh(outer.size * inner.size)
    values = {outer: algebra.zero, inner: algebra.index(fresh)}
    return replaced(algebra, opened, values, (fresh,))


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
    rest = _apart(algebra, polynomial, first, second)
    return algebra.add(rest, algebra.scale(joined, coefficient))


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
    rest = _apart(algebra, polynomial, first, second)
    return algebra.add(rest, algebra.scale(joined, coefficient))


def _apart(algebra: Algebra, polynomial: Polynomial, *gone: Monomial) -> Polynomial:
    """Return a polynomial without some of its monomials."""
    return algebra.polynomial({m: c for m, c in polynomial.terms if m not in gone})


def _but(factors: tuple[Factor, ...], at: int) -> tuple[Factor, ...]:
    return (*factors[:at], *factors[at + 1 :])
