"""Lemmas of shards: indices, sums and slots of a part of a value, as one device has it.

An axis of an open size B that is cut into p shards has shards of the size ``B/p``.  A lemma is a
function of a term and of parameters; `moecc.prove.rules` says how it is used.  Its docstring is its
statement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from moecc.prove.rules import (
    apart,
    applications,
    number_at,
    of_application,
    of_monomial,
    of_sum,
    without,
)
from moecc.terms.term import (
    Abstraction,
    Algebra,
    Application,
    Head,
    OpenMonomial,
    Polynomial,
    Size,
    Var,
    bounds,
    is_integral,
)

# Sizes.


def shard_size(size: Size, parts: int) -> Size | None:
    """Return the size of each of so many shards, or None where they are no equal parts."""
    if isinstance(size, int):
        return None if size % parts else size // parts
    base, count = open_shard(size)
    return size if parts == 1 else f"{base}/{count * parts}"


def joined_size(size: Size, parts: int) -> Size | None:
    """Return the size of so many shards together, or None where these are more than there are."""
    if isinstance(size, int):
        return size * parts
    base, count = open_shard(size)
    if count % parts:
        return None
    return base if count == parts else f"{base}/{count // parts}"


def open_shard(size: str) -> tuple[str, int]:
    """Return the open size that this is a shard of, and the number of shards."""
    base, _, count = size.partition("/")
    return base, int(count or 1)


def times_size(algebra: Algebra, index: Polynomial, size: Size) -> Polynomial:
    """Return an index times a size."""
    if isinstance(size, int):
        return algebra.scale(index, size)
    return algebra.multiply(index, algebra.size(size))


@of_application("size of a shard", "size", "inverse_size", of_shards=True)
def size_of_shard(algebra: Algebra, application: Application) -> Polynomial | None:
    """B/p is 1/p · B, and its inverse p · 1/B."""
    base, count = open_shard(str(application.head.attrs[0]))
    if count == 1:
        return None
    by = Fraction(1, count) if application.head.name == "size" else count
    return algebra.scale(algebra.apply(Head(application.head.name, (base,))), by)


# Indices.


@of_application("multiples apart", "div", "mod", of_shards=True)
def multiples_apart(algebra: Algebra, application: Application) -> Polynomial | None:
    """⌊(n·a + b) / n⌋ = a + ⌊b / n⌋ and (n·a + b) mod n = b mod n for integers a and b."""
    index, by = application.arguments[0], number_at(application)
    if not is_integral(index):
        return None
    multiple = algebra.polynomial({m: c // by for m, c in index.terms if c % by == 0})
    remaining = algebra.polynomial({m: c for m, c in index.terms if c % by})
    if not multiple.terms or not remaining.terms:
        return None
    inner = algebra.apply(application.head, (), [remaining])
    return algebra.add(multiple, inner) if application.head.name == "div" else inner


def _sized_remainders(_algebra: Algebra, polynomial: Polynomial) -> Iterator[tuple[object, ...]]:
    for monomial, _ in polynomial.terms:
        if len(monomial.factors) == 2 and not monomial.bound:
            heads = [f.head.name if isinstance(f, Application) else "" for f in monomial.factors]
            if sorted(heads) == ["mod", "size"]:
                yield (monomial.factors[heads.index("mod")], monomial.factors[heads.index("size")])


@of_sum("quotient and remainder of a size", _sized_remainders, of_shards=True)
def sized_remainder(
    algebra: Algebra, polynomial: Polynomial, remainder: Application, size: Application
) -> Polynomial | None:
    """B·n·⌊a / n⌋ + B·(a mod n) = B·a for an open size B."""
    by, open_size = number_at(remainder), algebra.lone(size)
    quotient = algebra.apply(Head("div", (by,)), (), remainder.arguments)
    parts = [algebra.multiply(open_size, p) for p in (algebra.lone(remainder), quotient)]
    coefficients = dict(polynomial.terms)
    monomials = [p.terms[0][0] for p in parts]
    first, second = (coefficients.get(m) for m in monomials)
    if quotient.factor is None or first is None or second != first * by:
        return None
    product = algebra.multiply(open_size, remainder.arguments[0])
    return algebra.add(apart(algebra, polynomial, *monomials), algebra.scale(product, first))


# In an axis of an open size, i is the place ``within`` of the shard number ``shard``.


def number_of_shard(algebra: Algebra, index: Polynomial, size: str) -> Polynomial:
    """Return the number of the shard of an open size in which an index lies."""
    return algebra.apply(Head("shard", open_shard(size)), (), [index])


def place_in_shard(algebra: Algebra, index: Polynomial, size: str) -> Polynomial:
    """Return the place of an index within its shard of an open size."""
    return algebra.apply(Head("within", open_shard(size)), (), [index])


@of_application("place in a shard", "shard", "within", of_shards=True)
def place_within_shard(algebra: Algebra, application: Application) -> Polynomial | None:
    """B/p · a + b lies at place b of shard a, for an integer a and an index b below B/p."""
    shard, position = parts_of_place(algebra, application)
    base, count = application.head.attrs
    if not is_integral(shard) or not _is_below_shard(position, str(base), int(str(count))):
        return None
    return shard if application.head.name == "shard" else position


def parts_of_place(algebra: Algebra, application: Application) -> tuple[Polynomial, Polynomial]:
    """Return a and b, for an index B/p · a + b in an axis of B that is cut into p shards."""
    base, count = application.head.attrs
    assert isinstance(base, str)
    assert isinstance(count, int)
    size = algebra.apply(Head("size", (base,))).factor
    numbers, place = [algebra.zero], algebra.zero
    for monomial, coefficient in application.arguments[0].terms:
        if size in monomial.factors and not monomial.bound:
            opened = OpenMonomial(coefficient * count, (), monomial.factors)
            assert isinstance(size, Application)
            numbers.append(algebra.monomial(without(opened, size)))
        else:
            term = algebra.polynomial({monomial: coefficient})
            place = algebra.add(place, term)
    return algebra.add(*numbers), place


def _is_below_shard(place: Polynomial, base: str, count: int) -> bool:
    if not place.terms:
        return True
    match place.factor:
        case Var(size=size):
            return size == f"{base}/{count}"
        case Application(head=head):
            return head == Head("within", (base, count))
    return False


def _places(algebra: Algebra, polynomial: Polynomial) -> Iterator[tuple[object, ...]]:
    for monomial, _ in polynomial.terms:
        for factor in monomial.factors:
            if isinstance(factor, Application) and factor.head.name == "within":
                yield (factor,)


@of_sum("shard and place", _places, of_shards=True)
def shard_and_place(
    algebra: Algebra, polynomial: Polynomial, place: Application
) -> Polynomial | None:
    """B/p · shard(i) + within(i) = i."""
    base, count = place.head.attrs
    lone = algebra.lone(place).terms[0][0]
    coefficients = dict(polynomial.terms)
    coefficient = coefficients.get(lone)
    number = algebra.apply(Head("shard", place.head.attrs), (), place.arguments)
    start = algebra.multiply(number, algebra.size(f"{base}/{count}"))
    if coefficient is None or len(start.terms) != 1:
        return None
    monomial, part = start.terms[0]
    if coefficients.get(monomial) != coefficient * part:
        return None
    others = apart(algebra, polynomial, lone, monomial)
    return algebra.add(others, algebra.scale(place.arguments[0], coefficient))


# Functions.


@of_application("either order", "maximum", "minimum", of_shards=True)
def either_order(algebra: Algebra, application: Application) -> Polynomial | None:
    """max(a, b) = max(b, a), and so for the least."""
    first, second = application.arguments
    if first.serial <= second.serial:
        return None
    return algebra.apply(application.head, (), [second, first])


# Sums.


def _sharded_sums(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for inner in opened.bound:
        if isinstance(inner.size, str) and "/" in inner.size:
            yield from ((v, inner) for v in opened.bound if isinstance(v.size, int))


@of_monomial("merge shards", _sharded_sums, of_shards=True)
def merge_shards(
    algebra: Algebra, opened: OpenMonomial, outer: Var, inner: Var
) -> Polynomial | None:
    """Σ_q Σ_r f(n·q + r) = Σᵢ f(i) for r below the size n of a shard, q below m, i below m·n."""
    if not isinstance(inner.size, str) or not isinstance(outer.size, int):
        return None
    size = joined_size(inner.size, outer.size)
    if size is None:
        return None
    fresh = algebra.fresh(size)
    start = times_size(algebra, algebra.index(outer), inner.size)
    values = {inner: algebra.subtract(algebra.index(fresh), start)}
    parts = [algebra.replace(f, values) for f in opened.factors]
    if any(outer in p.free for p in parts):
        return None
    bound = (*(v for v in opened.bound if v not in (outer, inner)), fresh)
    return algebra.scale(algebra.multiply(*parts, over=bound), opened.coefficient)


def _sharded_ranges(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for range_ in applications(opened, "range"):
        yield from ((range_, v) for v in range_.arguments[0].free if v in opened.bound)


@of_monomial("range in shards", _sharded_ranges, of_shards=True)
def range_in_shards(
    algebra: Algebra, opened: OpenMonomial, range_: Application, variable: Var
) -> Polynomial | None:
    """Σᵥ [0 ≤ e − n·v < n]·f = [0 ≤ e < n·m]·f for v below m; e and f do not depend on v."""
    start, size = number_at(range_), number_at(range_, 1)
    index = algebra.add(range_.arguments[0], algebra.scale(algebra.index(variable), size))
    remaining = without(opened, range_)
    if start or not isinstance(variable.size, int) or not is_integral(index):
        return None
    if variable in index.free or any(variable in f.free for f in remaining.factors):
        return None
    bound = tuple(v for v in opened.bound if v is not variable)
    inside = algebra.apply(Head("range", (0, size * variable.size)), (), [index])
    parts = map(algebra.lone, remaining.factors)
    return algebra.scale(algebra.multiply(inside, *parts, over=bound), opened.coefficient)


# Slots.


def _placed_ranges(_: Algebra, opened: OpenMonomial) -> Iterator[tuple[object, ...]]:
    for range_ in applications(opened, "range"):
        yield from ((range_, placed) for placed in applications(opened, "placed"))


@of_monomial("a placed choice has an expert", _placed_ranges, of_shards=True)
def placed_has_expert(
    algebra: Algebra, opened: OpenMonomial, range_: Application, placed: Application
) -> Polynomial | None:
    """placed(t, c) · [0 ≤ e(t, c) < E] = placed(t, c) for E experts."""
    experts = algebra.instantiate(placed.abstractions[0], placed.arguments)
    if number_at(range_) or f"experts={number_at(range_, 1)}" not in placed.head.attrs:
        return None
    if placed.head.name != "placed" or range_.arguments[0] is not experts:
        return None
    return algebra.monomial(without(opened, range_))


def note_shards(
    algebra: Algebra, shards: Sequence[Abstraction], shard: Polynomial, whole: Sequence[Abstraction]
) -> None:
    """Note that functions of tokens are others at the tokens of a shard, for *slots of a shard*."""
    algebra.memo["shards", tuple(shards)] = (shard, *whole)


def _noted(algebra: Algebra, application: Application) -> Iterator[tuple[object, ...]]:
    noted = algebra.memo.get(("shards", application.abstractions))
    if isinstance(noted, tuple):
        yield noted


@of_application(
    "slots of a shard",
    "slot_of", "own_slot", "placed", "group_of", "token_of", "occupied", "group_sum",
    candidates=_noted, of_shards=True,
)  # fmt: skip
def slots_of_shard(
    algebra: Algebra, application: Application, shard: Polynomial, *functions: Abstraction
) -> Polynomial | None:
    """Groups are apart: those of a shard of the outermost token axis are a shard of the groups.

    Let the axis of tokens have n·p tokens in G·p groups, and A′(t, …) = A(n·s + t, …) for a shard s
    below p, with n tokens in G groups.  For A′ and n the slot of a choice of token t is that for A
    and n·p of token n·s + t; its group is that less G·s, the token of a row in group g is that in
    group G·s + g less n·s, and the sum of group g is that of group G·s + g.
    """
    inner, outer = application.abstractions[0].variables[0], functions[0].variables[0]
    name, attrs = application.head
    key = attrs[1:] if name == "token_of" else attrs
    groups = [str(a).removeprefix("groups=") for a in key if str(a).startswith("groups=")]
    in_groups = int(groups[0]) if groups else 1
    low, high = bounds(shard)
    parts = int(high) + 1 if high < float("inf") else 0
    if any(str(a).startswith("group_size=") for a in key) or low < 0 or not is_integral(shard):
        return None
    if parts < 2 or shard_size(outer.size, parts) != inner.size:
        return None
    start = times_size(algebra, shard, inner.size)
    pairs = zip(application.abstractions, functions, strict=True)
    if not all(_is_shifted(algebra, a, b, start) for a, b in pairs):
        return None
    first_group = algebra.scale(shard, in_groups)
    whole_key = _key_of_whole(key, f"groups={in_groups * parts}", outer.size)
    by_group = name in ("token_of", "occupied", "group_sum")
    first, *arguments = application.arguments
    moved = [algebra.add(first, first_group if by_group else start), *arguments]
    head = Head(name, (*attrs[: len(attrs) - len(key)], *whole_key))
    result = algebra.apply(head, functions, moved)
    if name == "group_of":
        return algebra.subtract(result, first_group)
    return algebra.subtract(result, start) if name == "token_of" and attrs[0] == 0 else result


def _is_shifted(
    algebra: Algebra, shard: Abstraction, whole: Abstraction, start: Polynomial
) -> bool:
    """Return whether a function of tokens is another at the tokens from `start` on."""
    sizes = ([v.size for v in f.variables[1:]] for f in (shard, whole))
    if len(shard.variables) != len(whole.variables) or next(sizes) != next(sizes):
        return False
    variables = [algebra.fresh(v) for v in shard.variables]
    first, *others = map(algebra.index, variables)
    at_whole = algebra.instantiate(whole, [algebra.add(start, first), *others])
    return algebra.enter(shard, variables) is at_whole


def _key_of_whole(key: tuple[object, ...], groups: str, tokens: Size) -> tuple[object, ...]:
    """Return the attributes of an assignment with another number of groups, and of tokens."""
    texts = [a for a in key if not str(a).startswith("groups=")]
    experts = [i for i, a in enumerate(texts) if str(a).startswith("experts=")]
    if not experts:  # a sum of groups
        return (groups, *texts)
    at = experts[0] + 1
    sizes = next(i for i in range(at, len(texts)) if "=" not in str(texts[i]))
    return (*texts[:at], groups, *texts[at:sizes], tokens, *texts[sizes + 1 :])
