"""Lemmas of indices, names, slots, stacks, choices and functions.

A lemma is a function of a term and of parameters; `moecc.prove.rules` says how it is used.  Its
docstring is its statement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from moecc.prove.occurrences import index_of_all
from moecc.prove.rules import (
    apart,
    number_at,
    of_application,
    of_sum,
    without,
)
from moecc.prove.stopped import stopped_body
from moecc.terms.tensor import inverse_size, let, quotient, remainder
from moecc.terms.term import (
    Abstraction,
    Algebra,
    Application,
    Factor,
    Head,
    Monomial,
    OpenMonomial,
    Polynomial,
    Var,
    bounds,
    is_integral,
)

# Indices.


def _divided(
    algebra: Algebra, index: Polynomial, by: int
) -> tuple[Polynomial, Polynomial, int] | None:
    """Return A, B and k with index = by · A + B and k · by ≤ B < (k + 1) · by."""
    if not is_integral(index):
        return None
    quotient = algebra.polynomial({m: int(c) // by for m, c in index.terms if int(c) % by == 0})
    remaining = algebra.polynomial({m: c for m, c in index.terms if int(c) % by})
    low, high = bounds(remaining)
    if low == float("-inf") or high == float("inf") or low // by != high // by:
        return None
    return quotient, remaining, int(low // by)


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
    remaining = apart(algebra, polynomial, part.terms[0][0], quotient.terms[0][0])
    return algebra.add(remaining, algebra.scale(remainder.arguments[0], coefficient))


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


def content_of(algebra: Algebra, body: Polynomial) -> tuple[Polynomial, Polynomial] | None:
    """Return c and a with body = c · a, for a positive number or a root c other than 1."""
    coefficients = {abs(Fraction(c)) for _, c in body.terms}
    if len(coefficients) == 1 and coefficients != {1}:
        by = coefficients.pop()
        return algebra.number(by), algebra.scale(body, 1 / by)
    for root in body.terms[0][0].factors if body.terms else ():
        is_root = isinstance(root, Application) and root.head.name == "root"
        if is_root and all(root in m.factors for m, _ in body.terms):
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
    content = content_of(algebra, application.arguments[0])
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
    group, expert, position = application.arguments
    slot = position.factor
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
    position, *parts = application.arguments
    if all(p is parts[0] for p in parts):
        return parts[0]
    at = position.constant
    return parts[int(at)] if at is not None and 0 <= at < len(parts) else None


@of_application("places within a stack", "stack", rearranges=True)
def places_in_stack(algebra: Algebra, application: Application) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is that of aₘ … aₖ at place i − m, if m ≤ i ≤ k."""
    position, *parts = application.arguments
    low, high = bounds(position)
    if not is_integral(position) or low < 0 or high >= len(parts) or high + 1 - low == len(parts):
        return None
    reachable = parts[int(low) : int(high) + 1]
    at = algebra.subtract(position, algebra.number(low))
    return algebra.apply(Head("stack", (len(reachable),)), (), [at, *reachable])


def _periods(_: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    parts = application.arguments[1:]
    for period in range(2, len(parts) // 2 + 1):
        if len(parts) % period == 0 and parts[0] is parts[period]:
            yield (period,)


@of_application("stack with a period", "stack", candidates=_periods, rearranges=True)
def periodic_stack(algebra: Algebra, application: Application, period: int) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is that of a₀ … aₚ₋₁ at i mod p, if it repeats so."""
    position, *parts = application.arguments
    low, high = bounds(position)
    if not is_integral(position) or low < 0 or high >= len(parts):
        return None
    if any(part is not parts[at % period] for at, part in enumerate(parts)):
        return None
    at = algebra.apply(Head("mod", (period,)), (), [position])
    return algebra.apply(Head("stack", (period,)), (), [at, *parts[:period]])


@of_application("stack of sources", "stack", rearranges=True)
def stack_of_sources(algebra: Algebra, application: Application) -> Polynomial | None:
    """The stack of sources at the same indices is a family of sources at one more index."""
    position, *parts = application.arguments
    factors = [p.factor for p in parts]
    sources = [f for f in factors if isinstance(f, Application) and f.head.name == "source"]
    if len(sources) != len(parts) or len({(f.arguments, f.head.attrs[1:]) for f in sources}) > 1:
        return None
    names = tuple(f.head.attrs[0] for f in sources)
    if len(set(names)) < len(names):
        return None
    head = Head("family", (names, *sources[0].head.attrs[1:]))
    return algebra.apply(head, (), [position, *sources[0].arguments])


def _generalised(algebra: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    position = algebra.fresh(number_at(application))
    body = generalise(algebra, algebra.index(position), application.arguments[1:])
    if body is not None:
        yield (algebra.abstract([position], body),)


@of_application("stack by its members", "stack", candidates=_generalised, rearranges=True)
def stack_by_members(
    algebra: Algebra, application: Application, function: Abstraction
) -> Polynomial | None:
    """The stack of a₀ … aₙ at place i is f(i) if f(j) = aⱼ for every j."""
    position, *parts = application.arguments
    low, high = bounds(position)
    if not is_integral(position) or low < 0 or high >= len(parts):
        return None
    for at, part in enumerate(parts):
        if algebra.instantiate(function, [algebra.number(at)]) is not part:
            return None
    return algebra.instantiate(function, [position])


@of_application("member of a family", "family", "weights", rearranges=True)
def member_of_family(algebra: Algebra, application: Application) -> Polynomial | None:
    """A family of sources, or of other leaves, at a number is the source, or the leaf."""
    position, *indices = application.arguments
    at, names = position.constant, application.head.attrs[0]
    assert isinstance(names, tuple)
    # A number out of range stands under an indicator that is 0.
    if at is None or at not in range(len(names)):
        return None
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
    """The share of each of n equal scores is 1/n, and that of one score is 1."""
    (scores,) = application.abstractions
    (variable,) = scores.variables
    is_equal = variable not in scores.body.free or variable.size == 1
    return inverse_size(algebra, variable) if is_equal else None


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
    is_softmax = str(application.head.attrs[2]).startswith("softmax")
    if is_softmax and len(scores) > 1 and scores[1] is not None:
        position = algebra.fresh(size // by)
        scores[1] = algebra.abstract(
            [position], algebra.scale(algebra.enter(scores[1], [position]), by)
        )
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
    size, top_k, score = application.head.attrs
    if score not in ("softmax", "sigmoid"):
        return None
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
    if score not in ("softmax", "sigmoid") or not biases:
        return None
    if not isinstance(top_k, int) or count < top_k or places[-1] >= len(biases):
        return None
    least = min(biases[i] for i in places)
    if any(b > least - 1 for i, b in enumerate(biases) if i not in places):
        return None
    position = algebra.fresh(count)
    at = algebra.scale(algebra.index(position), step)
    functions = [
        algebra.abstract([position], algebra.instantiate(a, [at])) for a in application.abstractions
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
