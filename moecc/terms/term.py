"""Terms in index notation, in normal form and hash-consed.

The value of a tensor at its indices is a *polynomial*: a sum of monomials, each a rational number
times a sum over bound indices of a product of factors.  A factor is an index variable or an
*application*: a head (a source, a function, an indicator …) of abstractions and of polynomials.
An index is a polynomial, too.

Equal terms are one object, bound variables included: a binder's variables are named by the height
of their scope, in an order that does not depend on names.  A scope is only ever entered with fresh
variables, so nothing is captured.  Naming may fail to make two equal terms one object where
variables are symmetric; it never makes one object of two different terms.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product
from math import factorial, inf, prod
from typing import Literal, NamedTuple
from zlib import crc32

Coefficient = int | Fraction
Size = int | str
"""The size of an axis: a number, or the name of a variable that is at least 1."""


class Head(NamedTuple):
    """What an application applies: a name, and everything else that its meaning depends on."""

    name: str
    attrs: tuple[Hashable, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.attrs[:1])])


@lru_cache(maxsize=10_000)
def _stable_hash(value: object) -> int:
    """Return a hash of names and numbers that is the same in every process: terms are ordered."""
    return crc32(repr(value).encode("utf-8", "surrogatepass"))


class Var:
    """An index variable, which runs from 0 to below its size.

    Attributes:
      name: the axis, or the name of a fresh or a bound variable.
      size: its exclusive upper bound.
      level: the height of its scope, for a bound variable; 0 for a free one.
    """

    __slots__ = ("free", "level", "name", "shape", "size", "weight")

    def __init__(self, name: str, size: Size, level: int) -> None:
        self.name, self.size, self.level = name, size, level
        self.free: tuple[Var, ...] = (self,)
        self.shape: int = _stable_hash(("index", size))
        self.weight: int = 1

    def __repr__(self) -> str:
        return f"{self.name}.{self.level}" if self.level else self.name


class Abstraction:
    """A polynomial as a function of index variables, which are bound in it."""

    __slots__ = ("body", "free", "level", "shape", "variables", "weight")

    def __init__(self, variables: tuple[Var, ...], body: Polynomial) -> None:
        self.variables, self.body = variables, body
        self.free: tuple[Var, ...] = tuple(v for v in body.free if v not in variables)
        self.level: int = max((v.level for v in variables), default=body.level) if self.free else 0
        self.shape: int = hash((tuple(v.shape for v in variables), body.shape))
        self.weight: int = 1 + (body.weight if self.free else 0)

    def __repr__(self) -> str:
        # What is closed has been seen before, and may be a whole model.
        if not self.free and self.body.free:
            return f"f{self.body.serial}"
        names = " ".join(f"{v!r}<{v.size}" for v in self.variables)
        return f"(λ{names}. {self.body!r})"


class Application:
    """A head, applied to abstractions and to polynomials; a factor of monomials."""

    __slots__ = ("abstractions", "arguments", "free", "head", "level", "serial", "shape", "weight")

    def __init__(
        self,
        head: Head,
        abstractions: tuple[Abstraction, ...],
        arguments: tuple[Polynomial, ...],
        serial: int,
    ) -> None:
        self.head, self.abstractions, self.arguments = head, abstractions, arguments
        self.serial = serial
        parts: tuple[Abstraction | Polynomial, ...] = (*abstractions, *arguments)
        self.free: tuple[Var, ...] = tuple(dict.fromkeys(v for p in parts for v in p.free))
        self.level: int = max((p.level for p in parts), default=0)
        self.shape: int = hash((_stable_hash(head), tuple(p.shape for p in parts)))
        self.weight: int = 1 + sum(p.weight for p in parts)

    def __repr__(self) -> str:
        parts = ", ".join(map(repr, (*self.abstractions, *self.arguments)))
        return f"{self.head}({parts})"


Factor = Var | Application


class Monomial:
    """A sum over bound variables of a product of factors."""

    __slots__ = ("bound", "factors", "free", "level", "serial", "shape", "weight")

    def __init__(self, bound: tuple[Var, ...], factors: tuple[Factor, ...], serial: int) -> None:
        self.bound, self.factors, self.serial = bound, factors, serial
        free = dict.fromkeys(v for f in factors for v in f.free)
        self.free: tuple[Var, ...] = tuple(v for v in free if v not in bound)
        self.level: int = max([*(f.level for f in factors), *(v.level for v in bound)], default=0)
        self.shape: int = hash((len(bound), *(v.shape for v in bound), *(f.shape for f in factors)))
        self.weight: int = 1 + sum(f.weight for f in factors)

    def __repr__(self) -> str:
        sums = "".join(f"Σ{v!r}<{v.size} " for v in self.bound)
        return f"{sums}{'·'.join(map(repr, self.factors)) or '1'}"


class Polynomial:
    """A sum of monomials with coefficients other than 0."""

    __slots__ = ("free", "level", "serial", "shape", "terms", "weight")

    def __init__(self, terms: tuple[tuple[Monomial, Coefficient], ...], serial: int) -> None:
        self.terms, self.serial = terms, serial
        self.free: tuple[Var, ...] = tuple(dict.fromkeys(v for m, _ in terms for v in m.free))
        self.level: int = max((m.level for m, _ in terms), default=0)
        self.shape: int = hash(tuple((m.shape, c) for m, c in terms))
        self.weight: int = sum(m.weight for m, _ in terms)

    def __repr__(self) -> str:
        if not self.terms:
            return "0"
        return " + ".join(repr(m) if c == 1 else f"{c}·{m!r}" for m, c in self.terms)

    @property
    def constant(self) -> Coefficient | None:
        """The number that this is, or None."""
        if not self.terms:
            return 0
        monomial, coefficient = self.terms[0]
        return coefficient if len(self.terms) == 1 and not monomial.factors else None

    @property
    def factor(self) -> Factor | None:
        """The only factor of this, if it is a factor and nothing else."""
        if len(self.terms) != 1:
            return None
        monomial, coefficient = self.terms[0]
        lone = coefficient == 1 and not monomial.bound and len(monomial.factors) == 1
        return monomial.factors[0] if lone else None

    @property
    def variable(self) -> Var | None:
        """The variable that this is, or None."""
        return self.factor if isinstance(self.factor, Var) else None


Substitution = Mapping[Var, Polynomial]


MOST_TERMS = 3_000_000
"""An algebra builds no more terms: a model of 32 layers takes 60,000."""


class TooManyTerms(Exception):
    """The terms of two graphs are too large to be compared."""


class OpenMonomial(NamedTuple):
    """A monomial whose bound variables are fresh, which rules of monomials read and return."""

    coefficient: Coefficient
    bound: tuple[Var, ...]
    factors: tuple[Factor, ...]


class Algebra:
    """Builds terms, each in normal form: arithmetic here, and rewriting by `rules`.

    Args:
      rules: rewrites applications, monomials and polynomials into equal ones.

    Attributes:
      fractions: whether floats are read as the simplest numbers that they are near: 0.4 is 2/5.
      memo: facts about terms, for rules that compute them once.
    """

    def __init__(self, rules: Rules | None = None, *, fractions: bool = False) -> None:
        self.rules = rules or Rules()
        self.fractions = fractions
        self._variables: dict[tuple[str, Size, int], Var] = {}
        self._applications: dict[tuple[object, ...], Application] = {}
        self._monomials: dict[tuple[object, ...], Monomial] = {}
        self._polynomials: dict[tuple[object, ...], Polynomial] = {}
        self._abstractions: dict[tuple[object, ...], Abstraction] = {}
        self._results: dict[Application, Polynomial] = {}
        self.memo: dict[object, object] = {}
        self._fresh = 0
        self._serial = 0
        self.zero = self.polynomial({})
        self.one = self.number(1)

    # Leaves.

    def axis(self, name: str, size: Size) -> Var:
        """Return the free variable of an axis."""
        return self._variable(name, size, 0)

    def fresh(self, like: Var | Size) -> Var:
        """Return a variable that occurs nowhere, with the size of `like`."""
        self._fresh += 1
        # No axis has a name that begins with a digit.
        return self._variable(str(self._fresh), like.size if isinstance(like, Var) else like, 0)

    def _variable(self, name: str, size: Size, level: int) -> Var:
        key = (name, size, level)
        if key not in self._variables:
            self._variables[key] = Var(name, size, level)
        return self._variables[key]

    def number(self, value: Coefficient | float) -> Polynomial:
        """Return a constant; a float is the rational number that it is, or the simplest near it."""
        if self.fractions and isinstance(value, float):
            return self._simplest(value)
        exact = _simple(Fraction(value))
        return self.polynomial({self._monomial((), ()): exact} if exact else {})

    def _simplest(self, value: float) -> Polynomial:
        """Return the simplest fraction, or root of one, that is a float up to its last two bits."""
        exact = Fraction(value)
        for denominator in (1, 10, 100, 1000, 10_000):
            near = exact.limit_denominator(denominator)
            if near and abs(near - exact) <= abs(exact) / 2**51:
                return self.number(near)
        square = (exact * exact).limit_denominator(1000)
        if square and abs(square - exact * exact) <= exact * exact / 2**50:
            root = self.apply(Head("root", (square.numerator, square.denominator)))
            return self.scale(root, 1 if value > 0 else -1)
        return self.number(exact)

    def size(self, size: Size) -> Polynomial:
        """Return a size as a number."""
        return self.number(size) if isinstance(size, int) else self.apply(Head("size", (size,)))

    def index(self, variable: Var) -> Polynomial:
        """Return a variable as a polynomial."""
        return self.polynomial({self._monomial((), (variable,)): 1})

    # Construction.

    def apply(
        self,
        head: Head,
        abstractions: Sequence[Abstraction] = (),
        arguments: Sequence[Polynomial] = (),
    ) -> Polynomial:
        """Return a head applied, in normal form."""
        application = self._application(head, tuple(abstractions), tuple(arguments))
        if application not in self._results:
            rewritten = self.rules.of_application(self, application)
            lone = self.polynomial({self._monomial((), (application,)): 1})
            self._results[application] = lone if rewritten is None else rewritten
        return self._results[application]

    def abstract(self, variables: Sequence[Var], body: Polynomial) -> Abstraction:
        """Return `body` as a function of free variables."""
        level = body.level + 1
        named = [self._variable(f"λ{i}", v.size, level) for i, v in enumerate(variables)]
        renamed = self.rename(body, dict(zip(variables, named, strict=True)))
        key = (tuple(named), renamed)
        if key not in self._abstractions:
            self._abstractions[key] = Abstraction(tuple(named), renamed)
        return self._abstractions[key]

    def instantiate(self, abstraction: Abstraction, arguments: Sequence[Polynomial]) -> Polynomial:
        """Return the body of an abstraction at indices."""
        pairs = zip(abstraction.variables, arguments, strict=True)
        return self.substitute(abstraction.body, dict(pairs))

    def add(self, *polynomials: Polynomial) -> Polynomial:
        """Return the sum."""
        terms: dict[Monomial, Coefficient] = {}
        for polynomial in polynomials:
            for monomial, coefficient in polynomial.terms:
                terms[monomial] = terms.get(monomial, 0) + coefficient
        total = self.polynomial(terms)
        rewritten = self.rules.of_polynomial(self, total) if len(total.terms) > 1 else None
        return total if rewritten is None else rewritten

    def scale(self, polynomial: Polynomial, by: Coefficient) -> Polynomial:
        """Return the product with a number."""
        return self.polynomial({m: c * by for m, c in polynomial.terms})

    def subtract(self, a: Polynomial, b: Polynomial) -> Polynomial:
        """Return the difference."""
        return self.add(a, self.scale(b, -1))

    def multiply(self, *polynomials: Polynomial, over: Sequence[Var] = ()) -> Polynomial:
        """Return the sum of the product over free variables, which are bound in the result."""
        if not over and len(polynomials) == 1:
            return polynomials[0]
        totals = []
        for terms in product(*(p.terms for p in polynomials)):
            bound, factors = list(over), list[Factor]()
            for monomial, _ in terms:
                inner_bound, inner_factors = self.opened(monomial)
                bound += inner_bound
                factors += inner_factors
            coefficient = prod((c for _, c in terms), start=1)
            opened = OpenMonomial(coefficient, tuple(bound), tuple(factors))
            totals.append(self.monomial(opened))
        return totals[0] if len(totals) == 1 else self.add(*totals)

    def opened(self, monomial: Monomial) -> tuple[tuple[Var, ...], tuple[Factor, ...]]:
        """Return the bound variables, fresh, and the factors of a monomial."""
        if not monomial.bound:
            return (), monomial.factors
        fresh = {v: self.fresh(v) for v in monomial.bound}
        return tuple(fresh.values()), tuple(self._renamed(f, fresh, {}) for f in monomial.factors)

    def monomial(self, opened: OpenMonomial) -> Polynomial:
        """Return a monomial, whose bound variables are fresh, in normal form."""
        if not opened.coefficient:
            return self.zero
        rewritten = self.rules.of_monomial(self, opened)
        if rewritten is not None:
            return rewritten
        return self.polynomial({self._closed(opened.bound, opened.factors): opened.coefficient})

    def _closed(self, bound: tuple[Var, ...], factors: tuple[Factor, ...]) -> Monomial:
        """Return the monomial with its bound variables named by their scope."""
        if not bound:
            return self._monomial((), factors)
        level = 1 + max(f.level for f in factors) if factors else 1
        candidates = [
            self._monomial(
                tuple(names.values()), tuple(self._renamed(f, names, {}) for f in factors)
            )
            for order in _orders(bound, factors)
            for names in ({v: self._variable(f"σ{i}", v.size, level) for i, v in enumerate(order)},)
        ]
        return min(candidates, key=lambda m: m.serial)

    # Substitution.

    def substitute(self, polynomial: Polynomial, values: Substitution) -> Polynomial:
        """Return the polynomial with free variables replaced, in normal form."""
        pairs = ((v, p.variable) for v, p in values.items())
        names = {v: w for v, w in pairs if w is not None and w.size == v.size}
        new = {*names.values()}
        if len(new) == len(values) and not new.intersection(polynomial.free):
            return self.rename(polynomial, names)
        return self._substituted(polynomial, values, {})

    def _substituted(
        self, polynomial: Polynomial, values: Substitution, memo: dict[object, Polynomial]
    ) -> Polynomial:
        if not any(v in values for v in polynomial.free):
            return polynomial
        if polynomial not in memo:
            parts = []
            for monomial, coefficient in polynomial.terms:
                bound, factors = self.opened(monomial)
                replaced = [self._replaced(f, values, memo) for f in factors]
                parts.append(self.scale(self.multiply(*replaced, over=bound), coefficient))
            memo[polynomial] = parts[0] if len(parts) == 1 else self.add(*parts)
        return memo[polynomial]

    def replace(self, factor: Factor, values: Substitution) -> Polynomial:
        """Return a factor with free variables replaced, in normal form."""
        return self._replaced(factor, values, {})

    def lone(self, factor: Factor) -> Polynomial:
        """Return a factor as a polynomial."""
        return self.polynomial({self._monomial((), (factor,)): 1})

    def exchange(
        self, polynomial: Polynomial, values: Mapping[Application, Polynomial]
    ) -> Polynomial:
        """Return a polynomial with applications, which have free variables, replaced in it."""
        parts = [self.zero]
        for monomial, coefficient in polynomial.terms:
            bound, factors = self.opened(monomial)
            changed = [self._exchanged(f, values) for f in factors]
            parts.append(self.scale(self.multiply(self.one, *changed, over=bound), coefficient))
        return self.add(*parts)

    def _exchanged(self, factor: Factor, values: Mapping[Application, Polynomial]) -> Polynomial:
        if isinstance(factor, Var) or not any(set(k.free) <= {*factor.free} for k in values):
            return self.lone(factor)
        if factor in values:
            return values[factor]
        abstractions = []
        for abstraction in factor.abstractions:
            if not abstraction.free:
                abstractions.append(abstraction)
                continue
            fresh = [self.fresh(v) for v in abstraction.variables]
            body = self.exchange(self.enter(abstraction, fresh), values)
            abstractions.append(self.abstract(fresh, body))
        arguments = [self.exchange(p, values) for p in factor.arguments]
        return self.apply(factor.head, abstractions, arguments)

    def _replaced(
        self, factor: Factor, values: Substitution, memo: dict[object, Polynomial]
    ) -> Polynomial:
        if isinstance(factor, Var):
            value = values.get(factor)
            return self.index(factor) if value is None else value
        if not any(v in values for v in factor.free):
            return self.lone(factor)
        if factor not in memo:
            memo[factor] = self.apply(
                factor.head,
                [self._within(a, values, memo) for a in factor.abstractions],
                [self._substituted(a, values, memo) for a in factor.arguments],
            )
        return memo[factor]

    def _within(
        self, abstraction: Abstraction, values: Substitution, memo: dict[object, Polynomial]
    ) -> Abstraction:
        if not any(v in values for v in abstraction.free):
            return abstraction
        fresh = [self.fresh(v) for v in abstraction.variables]
        body = self.enter(abstraction, fresh)
        return self.abstract(fresh, self._substituted(body, values, memo))

    def enter(self, abstraction: Abstraction, variables: Sequence[Var]) -> Polynomial:
        """Return the body of an abstraction with free variables in place of the bound ones."""
        names = dict(zip(abstraction.variables, variables, strict=True))
        return self.rename(abstraction.body, names)

    def rename(self, polynomial: Polynomial, names: Mapping[Var, Var]) -> Polynomial:
        """Return the polynomial with free variables renamed to others of the same sizes."""
        return self._renamed_polynomial(polynomial, names, {})

    def _renamed(
        self, factor: Factor, names: Mapping[Var, Var], memo: dict[object, Polynomial]
    ) -> Factor:
        if isinstance(factor, Var):
            return names.get(factor, factor)
        if not any(v in names for v in factor.free):
            return factor
        abstractions = []
        for a in factor.abstractions:
            # A closed function may bind a variable that has the name of one around it.
            if not any(v in names for v in a.free):
                abstractions.append(a)
                continue
            body = self._renamed_polynomial(a.body, names, memo)
            key = (a.variables, body)
            if key not in self._abstractions:
                self._abstractions[key] = Abstraction(a.variables, body)
            abstractions.append(self._abstractions[key])
        arguments = tuple(self._renamed_polynomial(p, names, memo) for p in factor.arguments)
        return self._application(factor.head, tuple(abstractions), arguments)

    def _renamed_polynomial(
        self, polynomial: Polynomial, names: Mapping[Var, Var], memo: dict[object, Polynomial]
    ) -> Polynomial:
        if not any(v in names for v in polynomial.free):
            return polynomial
        if polynomial not in memo:
            terms: dict[Monomial, Coefficient] = {}
            for monomial, coefficient in polynomial.terms:
                factors = tuple(self._renamed(f, names, memo) for f in monomial.factors)
                renamed = self._monomial(monomial.bound, factors)
                terms[renamed] = terms.get(renamed, 0) + coefficient
            memo[polynomial] = self.polynomial(terms)
        return memo[polynomial]

    # Hash-consing.

    def sums_by_serial(self) -> dict[int, Polynomial]:
        """Return every polynomial by its serial number."""
        return {p.serial: p for p in self._polynomials.values()}

    def _application(
        self,
        head: Head,
        abstractions: tuple[Abstraction, ...],
        arguments: tuple[Polynomial, ...],
    ) -> Application:
        key = (head, abstractions, arguments)
        if key not in self._applications:
            self._serial += 1
            if self._serial > MOST_TERMS:
                raise TooManyTerms(f"more than {MOST_TERMS:,} terms")
            self._applications[key] = Application(head, abstractions, arguments, self._serial)
        return self._applications[key]

    def _monomial(self, bound: tuple[Var, ...], factors: tuple[Factor, ...]) -> Monomial:
        ordered = tuple(sorted(factors, key=_order_of_factors)) if len(factors) > 1 else factors
        key = (bound, ordered)
        if key not in self._monomials:
            self._serial += 1
            self._monomials[key] = Monomial(bound, ordered, self._serial)
        return self._monomials[key]

    def polynomial(self, terms: Mapping[Monomial, Coefficient]) -> Polynomial:
        """Return a sum of monomials, as it is."""
        ordered = tuple(
            sorted(
                ((m, _simple(c)) for m, c in terms.items() if c),
                key=lambda term: (term[0].shape, term[0].serial),
            )
        )
        if ordered not in self._polynomials:
            self._serial += 1
            self._polynomials[ordered] = Polynomial(ordered, self._serial)
        return self._polynomials[ordered]


Cut = Literal["name", "group"]
"""How a sum becomes one part of a term: under a name, or in parentheses."""


class Rules:
    """Equations, each used from left to right; this base has none."""

    def cut(self, body: Polynomial, role: Literal["factor", "summand"]) -> Cut | None:
        """Return how a polynomial becomes a factor of a product or a part of a sum; None: as it is.

        Both sides of an equation are cut alike, so this decides what is proved, not what is true.
        """
        return None

    def of_application(self, algebra: Algebra, application: Application) -> Polynomial | None:
        """Return the normal form of an application, or None if it is normal."""
        return None

    def of_monomial(self, algebra: Algebra, opened: OpenMonomial) -> Polynomial | None:
        """Return the normal form of a monomial, or None if it is normal."""
        return None

    def of_polynomial(self, algebra: Algebra, polynomial: Polynomial) -> Polynomial | None:
        """Return the normal form of a polynomial, or None if it is normal."""
        return None


def _simple(value: Coefficient) -> Coefficient:
    return int(value) if isinstance(value, Fraction) and value.denominator == 1 else value


def _order_of_factors(factor: Factor) -> tuple[int, int, str, int]:
    if isinstance(factor, Var):
        return (factor.shape, 0, factor.name, factor.level)
    return (factor.shape, factor.serial, "", 0)


_MOST_ORDERS = 24


def _orders(bound: tuple[Var, ...], factors: tuple[Factor, ...]) -> Iterable[tuple[Var, ...]]:
    """Yield the orders of bound variables that their occurrences do not tell apart."""
    if len(bound) == 1:
        return [bound]
    ranks = dict.fromkeys(bound, 0)
    for _ in range(3):
        signatures = {v: _signature(v, factors, ranks) for v in bound}
        distinct = {s: i for i, s in enumerate(sorted(set(signatures.values())))}
        ranks = {v: distinct[s] for v, s in signatures.items()}
        if len(distinct) == len(bound):
            break
    groups: dict[int, list[Var]] = {}
    for variable in bound:
        groups.setdefault(ranks[variable], []).append(variable)
    ordered = [groups[rank] for rank in sorted(groups)]
    if prod(factorial(len(g)) for g in ordered) > _MOST_ORDERS:
        return [tuple(v for g in ordered for v in g)]
    choices = product(*(permutations(g) for g in ordered))
    return [tuple(v for g in choice for v in g) for choice in choices]


def _signature(
    variable: Var, factors: tuple[Factor, ...], ranks: Mapping[Var, int]
) -> tuple[object, ...]:
    occurrences = sorted(
        (f.shape, f.free.index(variable), tuple(ranks.get(v, -1) for v in f.free))
        for f in factors
        if variable in f.free
    )
    return (ranks[variable], str(variable.size), tuple(occurrences))


# Ranges of integers.


Bound = Coefficient | float
"""A number, or ±∞ as a float."""


def bounds(polynomial: Polynomial) -> tuple[Bound, Bound]:
    """Return the least and the greatest value of a polynomial of indices; infinite if unknown."""
    # Whole numbers, not floats: a float is none of the numbers beyond 2⁵³ that i64 has.
    low: Bound = 0
    high: Bound = 0
    for monomial, coefficient in polynomial.terms:
        if monomial.bound or len(monomial.factors) > 1:
            return (-inf, inf)
        ends = (1, 1) if not monomial.factors else factor_bounds(monomial.factors[0])
        pair = sorted(coefficient * end for end in ends)
        low, high = low + pair[0], high + pair[1]
    return (low, high)


def factor_bounds(factor: Factor) -> tuple[Bound, Bound]:
    """Return the least and the greatest value of an index; infinite if unknown."""
    if isinstance(factor, Var):
        return (0, factor.size - 1 if isinstance(factor.size, int) else inf)
    name, attrs = factor.head
    if name in INDICATORS:
        return (0, 1)
    if name == "mod":
        return (0, int(str(attrs[0])) - 1)
    if name == "div":
        ends, divisor = bounds(factor.arguments[0]), int(str(attrs[0]))
        low, high = (e if isinstance(e, float) else e // divisor for e in ends)  # ∞ // n is NaN
        return (low, high)
    if name in CHOICES:
        return (0, int(str(attrs[0])) - 1)
    return (-inf, inf)


INDICATORS = frozenset({"range", "equal", "at_least_0", "placed", "occupied", "holds"})
"""Heads whose values are 0 and 1."""

CHOICES = frozenset({"experts", "permutation", "hashed_expert", "row"})
"""Heads whose values are integers from 0 to below their first attribute."""


def is_integral(polynomial: Polynomial) -> bool:
    """Return whether every value of a polynomial is certainly an integer."""
    return all(
        isinstance(c, int) and all(isinstance(f, Var) or f.head.name in INTEGRAL for f in m.factors)
        for m, c in polynomial.terms
    )


INTEGRAL = (
    INDICATORS
    | CHOICES
    | {"mod", "div", "shard", "within", "integer", "token_of", "group_of", "slot_of"}
)
"""Heads whose values are integers."""
