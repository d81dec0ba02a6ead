"""moecc-check: an independent checker of proofs that two graphs are the same function.

    moecc-check PROOF BEFORE.moe AFTER.moe

It accepts (exit 0), or names the step, node or output that does not hold (exit 1). It shares no
code with the prover; docs/proof-log.md has the format and the definitions. All values are terms:

    sum       Σ c·m              rational numbers c, monomials m; an index is a sum, too
    product   Σ_{v…} f·f·…       a monomial: bound index variables, and factors
    factor    v, or head[attributes](functions; sums)
    function  λv…. sum

A term is a node and its free variables in order. A node has places instead of names, exists once,
and orders the parts of sums and products by structure alone: two terms are equal if they are one
node at the same variables, renaming touches no node, and nothing can be captured.

A log is advice. Where a node is built, it may name the lemma to use; the lemma is applied to what
is built, after its conditions are checked there. Nothing that a log says is believed, so a wrong
log can only be rejected.
"""

import hashlib
import json
import re
import struct
import sys
from collections import Counter
from fractions import Fraction
from itertools import count, pairwise
from itertools import product as choices_of
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = "moecc.proof/1"
INDICATORS = {"range", "equal", "at_least_0", "placed", "occupied", "holds"}  # 0 or 1
CHOICES = {"experts", "permutation", "hashed_expert"}  # from 0 to below their first attribute
INTEGERS = INDICATORS | CHOICES | {"mod", "div", "integer", "token_of", "group_of", "slot_of"}
POSITIVE = {"share", "sigmoid", "exp", "size", "inverse_size"}
LEAVES = {"source", "family", "weight", "weights", "carry"}  # have a twin that no gradient reaches


class Rejected(Exception):
    """The proof is not accepted: where, and why."""


def need(condition, reason):
    if not condition:
        raise Rejected(reason)


class Var(NamedTuple):
    """An index from 0 to below its size: a number, or the name of an open size of at least 1."""

    serial: int
    name: str
    size: Any


class Node:
    """The structure of a term: kind, label, parts with places of variables, sizes of the free."""

    __slots__ = ("kind", "label", "number", "parts", "sizes")

    def __init__(self, kind, label, parts, sizes, number):
        self.kind, self.label, self.parts, self.sizes = kind, label, parts, sizes
        self.number = number


class Term(NamedTuple):
    """A node at distinct variables."""

    node: Node
    vars: tuple


def loose(size):
    """Return a size without the tag of its assignment of slots, which free variables have."""
    return size.split(" ")[0] if isinstance(size, str) else size


def age(term):
    return term.node.number, [v.serial for v in term.vars]


def ordered(tagged, bound):
    """Return pairs of tags and terms in an order of structure: tags, nodes, shared variables.

    Colours of terms and of variables refine each other; a tie is broken by the age of free
    variables. Any order is right: it only decides whether equal terms are seen to be equal.
    """
    keys, marks = [(tag, t.node.number) for tag, t in tagged], [0] * len(tagged)
    if len(set(keys)) == len(keys):
        return sorted(tagged, key=lambda pair: (pair[0], pair[1].node.number))
    colour = {v: int(v in bound) for _, t in tagged for v in t.vars}
    while True:
        classes = 0
        while True:
            rows = [(*k, m, tuple(colour[v] for v in t.vars))
                    for k, m, (_, t) in zip(keys, marks, tagged, strict=True)]  # fmt: skip
            distinct = {key: i for i, key in enumerate(sorted(set(rows)))}
            rank = [distinct[key] for key in rows]
            places = {v: [] for v in colour}
            for r, (_, t) in zip(rank, tagged, strict=True):
                for i, v in enumerate(t.vars):
                    places[v].append((r, i))
            finer = {v: (colour[v], tuple(sorted(places[v]))) for v in colour}
            levels = {key: i for i, key in enumerate(sorted(set(finer.values())))}
            colour = {v: levels[key] for v, key in finer.items()}
            if len(distinct) + len(levels) == classes:
                break
            classes = len(distinct) + len(levels)
        groups = [[i for i, r in enumerate(rank) if r == g] for g in range(len(distinct))]
        tied = [g for g in groups if len({tagged[i][1] for i in g}) > 1]
        if not tied:
            return [tagged[i] for g in groups for i in g]
        ages = {i: [-1 if v in bound else v.serial for v in tagged[i][1].vars] for i in tied[0]}
        marks[min(tied[0], key=ages.get)] = 1 + max(marks)


class Algebra:
    """Builds terms, and takes the advice of a log for what is built."""

    def __init__(self):
        self.nodes, self.axes, self.results = {}, {}, {}
        self.advice, self.used, self.open = {}, set(), set()
        self.serial, self.exact, self.fractions = count(), False, False
        self.place = Node("place", None, (), (), -1)
        self.zero, self.one = self.sum({}), self.number(1)

    # Nodes, as they stand.

    def axis(self, name, size):
        return self.axes.setdefault((name, size), Var(next(self.serial), name, size))

    def fresh(self, size):
        return Var(next(self.serial), "_", size)

    def packed(self, kind, label, parts, bound=()):
        """Return a node of parts, in which `bound` are hidden, at the free variables."""
        hidden = {v: -1 - i for i, v in enumerate(bound)}
        free = {v: None for p in parts for v in p.vars if v not in hidden}
        places = {**{v: i for i, v in enumerate(free)}, **hidden}
        shape = tuple((p.node, tuple(places[v] for v in p.vars)) for p in parts)
        if (kind, label, shape) not in self.nodes:
            sizes = tuple(loose(v.size) for v in free)
            self.nodes[kind, label, shape] = Node(kind, label, shape, sizes, len(self.nodes))
        return Term(self.nodes[kind, label, shape], tuple(free))

    def parts(self, term, bound=()):
        """Return the parts of a term, with variables for the bound ones."""
        outer = term.vars
        return [Term(n, tuple(outer[i] if i >= 0 else bound[-1 - i] for i in places))
                for n, places in term.node.parts]  # fmt: skip

    def sum(self, terms):
        """Return Σ c·m, from a dictionary of monomials."""
        pairs = ordered([(c, m) for m, c in terms.items() if c], ())
        return self.packed("sum", tuple(c for c, _ in pairs), [m for _, m in pairs])

    def product(self, bound, factors):
        """Return Σ_bound of the product, and the order of bound variables and of factors."""
        row = [f for _, f in ordered([(0, f) for f in factors], set(bound))]
        seen = list(dict.fromkeys(v for f in row for v in f.vars))
        names = sorted(bound, key=lambda v: (seen.index(v) if v in seen else inf, str(v.size)))
        return self.packed("product", tuple(v.size for v in names), row, names), names, row

    def function(self, bound, body, is_let=False):
        sizes = tuple(loose(v.size) if is_let else v.size for v in bound)
        return self.packed("function", sizes, [body], bound)

    def application(self, head, attrs, functions, arguments):
        """Return a factor; names have the order of their variables, symmetric heads theirs."""
        if head == "let":
            bound, body = self.entered(functions[0])
            pairs = dict(zip(bound, arguments, strict=True))
            bound = [v for v in body.vars if v in pairs]
            functions, arguments = [self.function(bound, body, True)], [pairs[v] for v in bound]
        elif head in ("maximum", "minimum"):
            arguments = sorted(arguments, key=age)
        elif head == "equal" and not attrs and len(arguments) == 1:  # [a = 0] = [−a = 0]
            arguments = [min(arguments[0], self.scale(arguments[0], -1), key=age)]
        label = (head, attrs, len(functions))
        return self.packed("apply", label, [*functions, *arguments])

    # Views.

    def terms(self, total):
        return list(zip(total.node.label, self.parts(total), strict=True))

    def entered(self, term):
        """Return bound variables, fresh, and the body of a function or factors of a product."""
        bound = [self.fresh(s) for s in term.node.label]
        parts = self.parts(term, bound)
        return bound, parts[0] if term.node.kind == "function" else parts

    def applied(self, factor):
        """Return head, attributes, functions and arguments of a factor that has them."""
        if factor is None or factor.node.kind != "apply":
            return "", (), [], []
        (head, attrs, n), parts = factor.node.label, self.parts(factor)
        return head, attrs, parts[:n], parts[n:]

    def constant(self, total):
        if total == self.zero:
            return Fraction(0)
        terms = self.terms(total)
        is_number = len(terms) == 1 and (terms[0][1].node.label, terms[0][1].node.parts) == ((), ())
        return terms[0][0] if is_number else None

    def factor(self, total):
        """Return the factor that a sum is, or None."""
        terms = self.terms(total)
        if len(terms) != 1 or terms[0][0] != 1 or terms[0][1].node.label:
            return None
        factors = self.parts(terms[0][1])
        return factors[0] if len(factors) == 1 else None

    def variable(self, total):
        factor = self.factor(total)
        return factor.vars[0] if factor and factor.node.kind == "variable" else None

    # Values, for which advice is taken.

    def number(self, value):
        """Return a number; a float is what it is, or with `fractions` what it is near."""
        v = Fraction(value)
        if self.fractions and isinstance(value, float):
            for most in (1, 10, 100, 1_000, 10_000):
                near = v.limit_denominator(most)
                if near and abs(near - v) <= abs(v) / 2**51:
                    return self.number(near)
            square = (v * v).limit_denominator(1_000)
            if square and abs(square - v * v) <= v * v / 2**50:
                root = self.apply("root", (square.numerator, square.denominator))
                return self.scale(root, 1 if v > 0 else -1)
        return self.sum({self.product((), ())[0]: v})

    def lone(self, factor):
        return self.sum({self.product((), (factor,))[0]: Fraction(1)})

    def index(self, v):
        return self.lone(self.packed("variable", loose(v.size), [Term(self.place, (v,))]))

    def scale(self, total, by):
        return self.sum({m: c * Fraction(by) for c, m in self.terms(total)})

    def add(self, *totals):
        terms = Counter()
        for c, m in (pair for t in totals for pair in self.terms(t)):
            terms[m] += c
        result = self.sum(terms)
        return self.rewritten(result, result) if len(result.node.parts) > 1 else result

    def apply(self, head, attrs=(), functions=(), arguments=()):
        factor = self.application(head, tuple(attrs), functions, arguments)
        return self.rewritten(factor, self.lone(factor))

    def multiply(self, *totals, over=()):
        """Return the sum over free variables of the product of sums."""
        if len(totals) == 1 and not over:
            return totals[0]
        results = []
        for choice in choices_of(*map(self.terms, totals)):
            opened = [self.entered(m) for _, m in choice]
            bound = [*over, *(v for inner, _ in opened for v in inner)]
            factors = [f for _, row in opened for f in row]
            coefficient = prod((c for c, _ in choice), start=Fraction(1))
            results.append(self.monomial(bound, factors, coefficient))
        return results[0] if len(results) == 1 else self.add(*results)

    def monomial(self, bound, factors, coefficient=1):
        term = self.product(bound, factors)[0]
        plain = self.sum({term: Fraction(1)})
        is_long = bound or len(factors) > 1
        return self.scale(self.rewritten(term, plain) if is_long else plain, coefficient)

    def rewritten(self, term, plain):
        """Return what a lemma says of a term that is built, if there is advice for its node."""
        node = term.node
        if node not in self.advice:
            return plain
        if node not in self.results:
            step, lemma, parameters = self.advice[node]
            heads, moves, apply = LEMMAS[lemma]
            names = tuple(map(self.fresh, node.sizes))
            inner = Term(node, names)
            need(node not in self.open, f"step {step} ({lemma}) rests on itself")
            need(moves or not self.exact, f"step {step} ({lemma}) does not keep bits")
            need(heads == node.kind or self.applied(inner)[0] in heads.split(),
                 f"step {step} ({lemma}) is on another term")  # fmt: skip
            self.open.add(node)
            view = {"apply": self.applied, "sum": lambda t: (t,), "product": self.entered}
            result = apply(
                self, *view[node.kind](inner), *(p(inner) if callable(p) else p for p in parameters)
            )
            need(result is not None, f"step {step} ({lemma}): its conditions do not hold")
            self.results[node] = names, result
            self.used.add(step)
        names, result = self.results[node]
        renamed = dict(zip(names, term.vars, strict=True))
        return Term(result.node, tuple(renamed[v] for v in result.vars))

    # Substitution, which builds again from the inside out what it changes.

    def substitute(self, total, values, memo=None):
        """Return a sum with variables replaced by sums."""
        memo = {} if memo is None else memo
        if not any(v in values for v in total.vars):
            return total
        if total not in memo:
            new = [self.variable(values[v]) if v in values else v for v in total.vars]
            if None not in new and len(set(new)) == len(new) and all(
                loose(v.size) == loose(w.size) for v, w in zip(total.vars, new, strict=True)
            ):  # fmt: skip
                memo[total] = Term(total.node, tuple(new))
            else:
                memo[total] = self.changed(total, lambda f: self._replaced(f, values, memo))
        return memo[total]

    def _replaced(self, factor, values, memo):
        if not any(v in values for v in factor.vars):
            return self.lone(factor)
        if factor.node.kind == "variable":
            return values[factor.vars[0]]
        if factor not in memo:
            memo[factor] = self.rebuilt(factor, lambda t: self.substitute(t, values, memo))
        return memo[factor]

    def changed(self, total, change):
        """Return a sum whose factors become other sums."""
        results = []
        for coefficient, monomial in self.terms(total):
            bound, factors = self.entered(monomial)
            product = self.multiply(self.one, *map(change, factors), over=bound)
            results.append(self.scale(product, coefficient))
        return results[0] if len(results) == 1 else self.add(*results)

    def rebuilt(self, factor, change, mark=()):
        """Return an application whose arguments, and bodies of functions, become others."""
        head, attrs, functions, arguments = self.applied(factor)
        inner = []
        for function in functions:
            bound, body = self.entered(function)
            is_closed = not function.vars  # so it has no variable to replace
            inner.append(
                function if is_closed else self.function(bound, change(body), head == "let")
            )
        return self.apply(head, attrs + mark, inner, list(map(change, arguments)))

    def at(self, function, arguments):
        bound, body = self.entered(function)
        return self.substitute(body, dict(zip(bound, arguments, strict=True)))

    def stopped(self, total):
        """Return a sum over stopped twins of its sources; a closed function is marked as one."""

        def twin(factor):
            head, attrs, functions, _ = self.applied(factor)
            if not head or head in INTEGERS:
                return self.lone(factor)
            is_marked = head in LEAVES or any(not f.vars for f in functions)
            mark = ("stopped",) if is_marked and "stopped" not in attrs else ()
            return self.rebuilt(factor, self.stopped, mark)

        return self.changed(total, twin)

    # Names and cuts, which are always true.

    def let(self, total):
        """Return (λv. total)(v) for all v in it."""
        if total == self.zero or self.factor(total):
            return total
        arguments = list(map(self.index, total.vars))
        return self.apply("let", (), [self.function(total.vars, total, True)], arguments)

    def cut(self, total, role="factor"):
        step, _, (word,) = self.advice.get((total.node, role), (-1, "", ("",)))
        self.used.add(step)
        group = word == "group" and role == "factor"
        return (
            self.let(total)
            if word == "name"
            else self.apply("group", (), (), [total])
            if group
            else total
        )

    # Integers.

    def is_integral(self, total):
        factors = (f.node for _, m in self.terms(total) for f in self.entered(m)[1])
        heads = (f.kind == "variable" or f.label[0] in INTEGERS for f in factors)
        return all(c.denominator == 1 for c in total.node.label) and all(heads)

    def bounds(self, total):
        """Return the least and the greatest value of an index; infinite if unknown."""
        low = high = Fraction(0)
        for c, m in self.terms(total):
            bound, factors = self.entered(m)
            if bound or len(factors) > 1:
                return -inf, inf
            ends = sorted(c * end for end in (self._bounds(factors[0]) if factors else (1, 1)))
            low, high = low + ends[0], high + ends[1]
        return low, high

    def _bounds(self, factor):
        head, attrs, _, arguments = self.applied(factor)
        if not head:
            size = factor.vars[0].size
            return 0, size - 1 if isinstance(size, int) else inf
        if head in INDICATORS:
            return 0, 1
        if head == "mod" or head in CHOICES:
            return 0, attrs[0] - 1
        if head == "div":
            return tuple(e // attrs[0] if isfinite(e) else e for e in self.bounds(arguments[0]))
        return -inf, inf


# Lemmas: an equation each. What a lemma gets is the left side: head, attributes, functions and
# arguments of an application; a sum; or bound variables and factors of a product, and then the
# parameters: numbers, or places of bound variables, factors and monomials. It returns the right
# side, built, or None where a condition does not hold. `moves`: equal bit for bit.

LEMMAS = {}


def lemma(names, on, moves=False):
    def register(apply):
        LEMMAS.update(dict.fromkeys(names.split(" | "), (on, moves, apply)))
        return apply

    return register


def drop(items, *places):
    """Return a list without some places, and what was there."""
    chosen = [items[i] for i in places]
    left = [x for i, x in enumerate(items) if i not in [p % len(items) for p in places]]
    return [left, *chosen]


def without(a, total, *monomials):
    return a.sum({m: c for c, m in a.terms(total) if m not in monomials})


def summed(a, bound, factors, values, new=()):
    """Return Σ of a product with some bound variables replaced, and new ones bound."""
    parts = [a.substitute(a.lone(f), values) for f in factors]
    return a.multiply(a.one, *parts, over=[*(v for v in bound if v not in values), *new])


def depends(v, *terms):
    return any(v in t.vars for t in terms)


def inverse_size(a, size):
    return (
        a.number(Fraction(1, size)) if isinstance(size, int) else a.apply("inverse_size", (size,))
    )


@lemma("quotient | remainder", "div mod", True)
def quotient(a, head, attrs, _, arguments):
    """⌊(n·q + r) / n⌋ = q + k, and the remainder is r − k·n, for integers k·n ≤ r < (k + 1)·n."""
    (index,), n = arguments, attrs[0]
    q = a.sum({m: c / n for c, m in a.terms(index) if c % n == 0})
    r = a.sum({m: c for c, m in a.terms(index) if c % n})
    low, high = a.bounds(r)
    if not a.is_integral(index) or not isfinite(high - low) or low // n != high // n:
        return None
    return a.add(q, a.number(low // n)) if head == "div" else a.add(r, a.number(-(low // n) * n))


@lemma("quotient of a quotient", "div", True)
def quotient_of_quotient(a, _, attrs, functions, arguments):
    """⌊⌊i / m⌋ / n⌋ = ⌊i / (m·n)⌋."""
    head, inner, _, index = a.applied(a.factor(arguments[0]))
    return a.apply("div", (inner[0] * attrs[0],), (), index) if head == "div" else None


@lemma("quotient and remainder", "sum", True)
def quotient_and_remainder(a, total, at):
    """c·n·⌊i / n⌋ + c·(i mod n) = c·i."""
    c, monomial = a.terms(total)[at]
    head, (n,), _, arguments = a.applied(a.factor(a.sum({monomial: Fraction(1)})))
    quotient = a.scale(a.apply("div", (n,), (), arguments), c * n)
    ((by, other),) = a.terms(quotient)
    if head != "mod" or (by, other) not in a.terms(total) or other == monomial:
        return None
    return a.add(without(a, total, monomial, other), a.scale(arguments[0], c))


@lemma("range | comparison | equality", "range at_least_0 equal", True)
def certain(a, head, attrs, _, arguments):
    """[s ≤ i < t], [i ≥ 0] and [i = 0] are 1 or 0 where the bounds of i decide."""
    low, high = a.bounds(arguments[0])
    least, most = {"range": attrs, "at_least_0": (0, inf), "equal": (0, 0)}[head]
    if head == "range":
        yes, no = least <= low and high < most, high < least or low >= most
    else:
        yes, no = least <= low and (high <= most), high < least or low > most
    return a.one if yes else a.zero if no else None


@lemma("parentheses", "group", True)
def parentheses(a, _, attrs, functions, arguments):
    """(x) = x."""
    return arguments[0]


@lemma("name", "let", True)
def unfold(a, _, attrs, functions, arguments):
    """(λv. x)(t) = x[v := t], or its stopped twin."""
    body = a.at(functions[0], arguments)
    return a.let(a.stopped(body) if attrs else body)


@lemma("slot of a choice", "token_of occupied")
def slot_of_a_choice(a, head, attrs, functions, arguments):
    """token(g(t), e(t, c), p(t, c)) = t for the own slot p of a choice, and this is occupied."""
    group, expert, place = arguments
    key = attrs[1:] if head == "token_of" else attrs
    own, own_key, own_functions, at = a.applied(a.factor(place))
    if (own, own_key, own_functions) != ("own_slot", key, functions):
        return None
    if group != a.apply("group_of", key, functions, at[:-1]) or expert != a.at(functions[0], at):
        return None
    return at[attrs[0]] if head == "token_of" else a.one


@lemma("place in a stack", "stack", True)
def place_in_a_stack(a, _, attrs, functions, arguments):
    """The stack of x₀ … at place i is xᵢ, and x if all are x."""
    parts, at = arguments[1:], a.constant(arguments[0])
    if all(p == parts[0] for p in parts):
        return parts[0]
    return parts[int(at)] if at in range(len(parts)) else None


@lemma("places within a stack", "stack", True)
def places_within_a_stack(a, _, attrs, functions, arguments):
    """The stack of x₀ … at place i is that of xₘ … xₖ at i − m, for m ≤ i ≤ k."""
    (place, *parts), (low, high) = arguments, a.bounds(arguments[0])
    if not 0 <= low <= high < len(parts) or low.denominator * high.denominator > 1:
        return None
    inner = parts[int(low) : int(high) + 1]
    return a.apply("stack", (len(inner),), (), [a.add(place, a.number(-low)), *inner])


@lemma("stack by its members", "stack", True)
def stack_by_its_members(a, _, attrs, functions, arguments, function):
    """The stack of x₀ … at place i is f(i) if f(j) = xⱼ for every j."""
    (place, *parts), (low, high), f = arguments, a.bounds(arguments[0]), function(())
    is_same = (a.at(f, [a.number(j)]) == x for j, x in enumerate(parts))
    is_within = low >= 0 and high < len(parts) and a.is_integral(place)
    return a.at(f, [place]) if is_within and all(is_same) else None


@lemma("stack of sources", "stack", True)
def stack_of_sources(a, _, attrs, functions, arguments):
    """The stack of sources at the same indices is a family at one more index."""
    place, *parts = arguments
    sources = [a.applied(a.factor(p)) for p in parts]
    if len({(s[0], s[1][1:], tuple(s[3])) for s in sources}) > 1 or sources[0][0] != "source":
        return None
    names = tuple(s[1][0] for s in sources)
    return a.apply("family", (names, *sources[0][1][1:]), (), [place, *sources[0][3]])


@lemma("member of a family", "family weights", True)
def member_of_a_family(a, head, attrs, _, arguments):
    """A family at a number is its member."""
    names, at = attrs[0], a.constant(arguments[0])
    if at not in range(len(names)):
        return None
    name = "source" if head == "family" else "weight"
    return a.apply(name, (names[int(at)], *attrs[1:]), (), arguments[1:])


@lemma("equal shares", "share")
def equal_shares(a, _, attrs, functions, arguments):
    """The share of each of n equal scores is 1/n."""
    (v,), body = a.entered(functions[0])
    return None if depends(v, body) else inverse_size(a, v.size)


def once_each(a, function, n):
    """Return g with f(n·q + r) = g(q) for all r below n, or None."""
    (v,), _ = a.entered(function)
    if not isinstance(v.size, int) or n < 2 or v.size % n:
        return None
    q, r = a.fresh(v.size // n), a.fresh(n)
    body = a.at(function, [a.add(a.scale(a.index(q), n), a.index(r))])
    return None if depends(r, body) else a.function([q], body)


@lemma("shares of repeated scores", "share")
def repeated_shares(a, _, attrs, functions, arguments, n):
    """The share of scores that come n times each is 1/n of the share among them once."""
    once = once_each(a, functions[0], n)
    at = [a.apply("div", (n,), (), arguments)]
    return once and a.scale(a.apply("share", attrs, [once], at), Fraction(1, n))


@lemma("best of equal scores", "experts")
def best_of_equal(a, _, attrs, functions, arguments):
    """Of equal scores the k best are the first k: ties take the lowest index."""
    opened = map(a.entered, functions)
    return None if any(depends(v, body) for (v,), body in opened) else arguments[0]


@lemma("best of repeated scores", "experts")
def best_of_repeated(a, _, attrs, functions, arguments, n):
    """The k·n best of scores that come n times each are the k best, each with its n copies.

    A softmax gives a copy 1/n of the share, so that a bias added to it counts n times.
    """
    once = [once_each(a, f, n) for f in functions]
    if None in once or attrs[0] % n or attrs[1] % n:
        return None
    if attrs[2] == "softmax":
        opened = map(a.entered, once[1:])
        once[1:] = [a.function(i, a.scale(body, n)) for i, body in opened]
    head = (attrs[0] // n, attrs[1] // n, *attrs[2:])
    expert = a.apply("experts", head, once, [a.apply("div", (n,), (), arguments)])
    return a.add(a.scale(expert, n), a.apply("mod", (n,), (), arguments))


@lemma("a bias of all scores", "experts")
def bias_of_all(a, _, attrs, functions, arguments):
    """The k best by σ(xᵢ) + b are the k best by xᵢ, for an increasing score σ."""
    (v,), body = a.entered(functions[1])
    if depends(v, body) or len(functions) != 2:
        return None
    return a.apply("experts", (*attrs[:2], "logits"), functions[:1], arguments)


@lemma("best of undominated scores", "experts")
def best_of_undominated(a, _, attrs, functions, arguments, step, n):
    """Scores in (0, 1) with n ≥ k biases that exceed all others by 1 are the best, at step·i."""
    size, k, score = attrs
    biases = [a.constant(a.at(functions[1], [a.number(i)])) for i in range(size)]
    places = range(0, step * n, step)
    if len(functions) != 2 or None in biases or not (k <= n and step > 0 and places[-1] < size):
        return None
    least = min(biases[i] for i in places)
    if any(b > least - 1 for i, b in enumerate(biases) if i not in places):
        return None
    i = a.fresh(n)
    logits, bias = (a.at(f, [a.scale(a.index(i), step)]) for f in functions)
    if score != "sigmoid" and depends(i, bias):  # a share among the n is not that among all
        return None
    chosen = [a.function([i], logits), a.function([i], bias)]
    return a.scale(a.apply("experts", (n, k, score), chosen, arguments), step)


AT_ZERO = {**dict.fromkeys(["silu", "gelu", "gelu_tanh", "relu", "tanh", "square"], 0),
           "sigmoid": Fraction(1, 2), "exp": 1}  # fmt: skip


@lemma("function at 0", " ".join(AT_ZERO))
def function_at_0(a, head, attrs, _, arguments):
    """The values of functions at 0."""
    return a.number(AT_ZERO[head]) if arguments == [a.zero] else None


@lemma("sparsemixer of equal scores", "gate")
def sparsemixer_of_equal(a, _, attrs, functions, arguments):
    """Choice c of N equal scores has the gate 1/(N − c), for c of 0 and 1."""
    ((v,), body), (low, high) = a.entered(functions[0]), a.bounds(arguments[0])
    is_plain = attrs == ("sparsemixer",) and not depends(v, body) and isinstance(v.size, int)
    if not is_plain or low < 0 or high > min(1, v.size - 1) or not a.is_integral(arguments[0]):
        return None
    at = [a.apply("equal", (), (), [a.add(arguments[0], a.number(-j))]) for j in (0, 1)]
    gates = [a.scale(at[j], Fraction(1, v.size - j)) for j in range(int(high) + 1)]
    return a.add(*gates)


@lemma("common factor", "group relu square")
def common_factor(a, head, attrs, _, arguments):
    """f(c·x) = c·f(x) for parentheses and relu, c² of a square, a positive number or root c."""
    (body,), terms = arguments, a.terms(arguments[0])
    by, opened = {abs(c) for c, _ in terms}, [a.entered(m) for _, m in terms]
    roots = [f for f in opened[0][1] if a.applied(f)[0] == "root"] if opened else []
    roots = [r for r in roots if all(r in factors for _, factors in opened)]
    if len(by) == 1 and by != {1}:
        factor, inner = a.number(*by), a.scale(body, 1 / min(by))
    elif roots:
        left = [(bound, drop(row, row.index(roots[0]))[0]) for bound, row in opened]
        factor = a.lone(roots[0])
        inner = a.add(*(a.monomial(*p, c) for p, (c, _) in zip(left, terms, strict=True)))
    else:
        return None
    times = 2 if head == "square" else 1
    return a.multiply(*[factor] * times, a.apply(head, attrs, (), [inner]))


@lemma("square of a root", "product")
def square_of_a_root(a, bound, factors, at):
    """√r · √r = r."""
    left, root = drop(factors, at)
    head, attrs, _, _ = a.applied(root)
    if head != "root" or root not in left:
        return None
    return a.monomial(bound, drop(left, left.index(root))[0], Fraction(*attrs))


@lemma("masks compose", "mask")
def masks_compose(a, head, attrs, _, arguments):
    """mask(mask(x, p), q) = mask(x, p·q) for one filler, and mask(x, 1) = x."""
    body, keep = arguments
    inner = a.applied(a.factor(body))
    if keep == a.one:
        return body
    if inner[:2] != (head, attrs):
        return None
    return a.apply("mask", attrs, (), [inner[3][0], a.multiply(inner[3][1], keep)])


@lemma("inverse", "inverse")
def inverse(a, _, attrs, functions, arguments):
    """1/(c·x) = 1/c · 1/x for a number c other than 0."""
    ((c, _),) = a.terms(arguments[0])
    if a.constant(arguments[0]) is not None:
        return a.number(1 / c)
    return a.scale(a.apply("inverse", (), (), [a.scale(arguments[0], 1 / c)]), 1 / c)


@lemma("indicators are idempotent", "product")
def idempotent(a, bound, factors, at):
    """[p]·[p] = [p]."""
    left, indicator = drop(factors, at)
    is_twice = a.applied(indicator)[0] in INDICATORS and indicator in left
    return a.monomial(bound, left) if is_twice else None


@lemma("a size over itself", "product")
def size_over_itself(a, bound, factors, at):
    """A size n, which is at least 1, times 1/n is 1."""
    left, factor = drop(factors, at)
    head, attrs, _, _ = a.applied(factor)
    sizes = [i for i, f in enumerate(left) if a.applied(f)[:2] == ("size", attrs)]
    return a.monomial(bound, drop(left, sizes[0])[0]) if head == "inverse_size" and sizes else None


@lemma("a positive sum over itself", "product")
def positive_sum_over_itself(a, bound, factors, at, *over):
    """Σᵢ x(i) · 1/Σᵢ x(i) = 1 for positive x."""
    left, factor = drop(factors, at)
    head, _, _, arguments = a.applied(factor)
    ((c, monomial),) = a.terms(arguments[0])
    chosen = [bound[i] for i in over]
    if head != "inverse" or c != 1 or monomial.node.label != tuple(v.size for v in chosen):
        return None
    for f in a.parts(monomial, chosen):
        if a.applied(f)[0] not in POSITIVE or f not in left:
            return None
        left.remove(f)
    if len(set(chosen)) < len(chosen) or any(depends(v, *left) for v in chosen):
        return None
    return a.monomial([v for v in bound if v not in chosen], left)


@lemma("sum of a constant", "product")
def sum_of_a_constant(a, bound, factors, of):
    """Σᵢ x = n·x for i below n, where i is not in x."""
    left, v = drop(bound, of)
    size = a.number(v.size) if isinstance(v.size, int) else a.apply("size", (v.size,))
    return None if depends(v, *factors) else a.multiply(a.monomial(left, factors), size)


@lemma("sum of one element", "product")
def sum_of_one(a, bound, factors, of):
    """Σᵢ f(i) = f(0) for i below 1."""
    return summed(a, bound, factors, {bound[of]: a.zero}) if bound[of].size == 1 else None


@lemma("shares add up", "product")
def shares_add_up(a, bound, factors, at, of):
    """Σᵢ share(i) = 1 over all i."""
    (left, share), (others, v) = drop(factors, at), drop(bound, of)
    head, _, functions, arguments = a.applied(share)
    if head != "share" or a.variable(arguments[0]) != v or depends(v, *functions, *left):
        return None
    return a.monomial(others, left) if functions[0].node.label == (v.size,) else None


@lemma("sum at a point", "product")
def sum_at_a_point(a, bound, factors, at, of):
    """Σᵢ [i = t]·f(i) = [0 ≤ t < n]·f(t) for i below n, and an integer t without i."""
    (left, equal), v = drop(factors, at), bound[of]
    head, attrs, _, (index,) = a.applied(equal)
    sign = {m: c for c, m in a.terms(index)}.get(a.terms(a.index(v))[0][1])
    point = a.add(a.index(v), a.scale(index, -(sign or 0)))
    if (head, attrs) != ("equal", ()) or sign not in (1, -1) or not isinstance(v.size, int):
        return None
    if depends(v, point) or not a.is_integral(point):
        return None
    inside = a.apply("range", (0, v.size), (), [point])
    return a.multiply(inside, summed(a, bound, left, {v: point}))


@lemma("sum over a range", "product")
def sum_over_a_range(a, bound, factors, at, of):
    """Σᵢ [s ≤ i + c < t]·f(i) is the sum of f over the i of the range."""
    (left, inside), v = drop(factors, at), bound[of]
    head, (start, stop), _, (index,) = a.applied(inside)
    shift = a.constant(a.add(index, a.scale(a.index(v), -1)))
    if head != "range" or shift is None or shift.denominator > 1 or not isinstance(v.size, int):
        return None
    low, high = max(start - int(shift), 0), min(stop - int(shift), v.size)
    new = a.fresh(max(high - low, 1))
    values = {v: a.add(a.index(new), a.number(low))}
    return summed(a, bound, left, values, [new]) if low < high else a.zero


@lemma("sum over a bijection", "product")
def sum_over_a_bijection(a, bound, factors, choice, of):
    """Σᵢ f(π(i)) = Σᵢ f(i) for a permutation π, as the n best of n are."""
    (others, v), choice = drop(bound, of), choice(bound)
    head, attrs, functions, arguments = a.applied(choice)
    is_onto = {"permutation": attrs[:1], "experts": attrs[:2]}[head] in (
        (v.size,),
        (v.size, v.size),
    )
    if not is_onto or a.variable(arguments[0]) != v or depends(v, *functions):
        return None
    new = a.fresh(v.size)

    def exchanged(f):
        if f == choice:
            return a.index(new)
        is_inner = depends(v, f) and a.applied(f)[0]
        return a.rebuilt(f, lambda t: a.changed(t, exchanged)) if is_inner else a.lone(f)

    parts = list(map(exchanged, factors))
    return None if depends(v, *parts) else a.multiply(*parts, over=[*others, new])


@lemma("split a sum", "product")
def split_a_sum(a, bound, factors, of, n):
    """Σᵢ f(i) = Σ_q Σ_r f(n·q + r) for i below m·n, q below m and r below n."""
    v = bound[of]
    if not isinstance(v.size, int) or n < 1 or v.size % n:
        return None
    q, r = a.fresh(v.size // n), a.fresh(n)
    values = {v: a.add(a.scale(a.index(q), n), a.index(r))}
    return summed(a, bound, factors, values, (q, r))


@lemma("merge sums", "product")
def merge_sums(a, bound, factors, of, inner):
    """Σ_q Σ_r f(n·q + r) = Σᵢ f(i) for r below n, q below m and i below m·n."""
    q, r = bound[of], bound[inner]
    if q == r or not isinstance(q.size, int) or not isinstance(r.size, int):
        return None
    i = a.fresh(q.size * r.size)
    values = {q: a.zero, r: a.index(i)}
    both = {i: a.add(a.scale(a.index(q), r.size), a.index(r))}
    for f in map(a.lone, factors):  # a factor is one of n·q + r if it comes back from f(0, i)
        if a.substitute(a.substitute(f, values), both) != f:
            return None
    return summed(a, bound, factors, values, [i])


@lemma("join sums", "sum")
def join_sums(a, total, first, at, second, then):
    """Σ_{i<m} f(i) + Σ_{i<l} f(m + i) = Σ_{i<m+l} f(i), and f(m) for the sum of one element."""
    (c, monomial), (equal, following) = a.terms(total)[first], a.terms(total)[second]
    (bound, factors), (next_bound, next_factors) = a.entered(monomial), a.entered(following)
    v, start, length = bound[at], a.number(bound[at].size), 1
    if then >= 0:
        next_bound, w = drop(next_bound, then)
        start, length = a.add(start, a.index(w)), w.size
    if monomial == following or c != equal or not isinstance(length, int):
        return None
    summand = a.multiply(a.one, *map(a.lone, next_factors), over=next_bound)
    if summed(a, bound, factors, {v: start}) != summand:
        return None
    new = a.fresh(v.size + length)
    joined = summed(a, bound, factors, {v: a.index(new)}, [new])
    return a.add(without(a, total, monomial, following), a.scale(joined, c))


@lemma("join ranges", "sum")
def join_ranges(a, total, first, at, second, then):
    """[s ≤ i < t]·f + [t ≤ i < u]·f = [s ≤ i < u]·f."""
    (c, monomial), (equal, following) = a.terms(total)[first], a.terms(total)[second]
    (bound, factors), (_, next_factors) = a.entered(monomial), a.entered(following)
    left, inside = drop(factors, at)
    (low, (s, t), _, index), (high, (t2, u), _, _) = map(a.applied, (inside, next_factors[then]))
    neighbour = a.product(bound, [*left, a.application("range", (t, u), (), index)])[0]
    if (
        (low, high, t, c) != ("range", "range", t2, equal)
        or neighbour != following
        or not s <= t <= u
    ):
        return None
    joined = a.multiply(*map(a.lone, left), a.apply("range", (s, u), (), index), over=bound)
    return a.add(without(a, total, monomial, following), a.scale(joined, c))


# Logs.


def tag(total):
    """Return the name of an assignment of slots."""
    return f"{total.node.number} {[v.serial for v in total.vars]}"


def read_log(a, log):
    """Take the advice of a log: the lemma for a node, with its parameters as places."""
    rows = []  # a term or variable, with the orders of a product's bound variables and factors

    def frozen(value):
        match = re.fullmatch(r"(slots|groups) (\d+)", value) if isinstance(value, str) else None
        if match:
            return f"{match[1]} {tag(rows[int(match[2])][0])}"
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    for kind, *fields in log["terms"]:
        inner = [[], []]
        if kind == "variable":
            term = a.axis(*map(frozen, fields))
        elif kind == "sum":
            term = a.sum({rows[m][0]: Fraction(c) for c, m in fields[0]})
        elif kind == "product":
            bound, factors = ([rows[i][0] for i in part] for part in fields)
            factors = [a.factor(a.index(f)) if isinstance(f, Var) else f for f in factors]
            term, names, row = a.product(bound, factors)
            inner = [[(v, names.index(v)) for v in bound], [(f, row.index(f)) for f in factors]]
        elif kind == "apply":
            head, attrs, *parts = fields
            term = a.application(head, frozen(attrs), *([rows[i][0] for i in p] for p in parts))
        else:
            need(kind == "function", f"a row of unknown kind {kind!r}")
            term = a.function([rows[i][0] for i in fields[0]], rows[fields[1]][0])
        rows.append((term, *inner))

    def outside(term, subject, bound):
        """Return a term of the log as one of the variables of what is built."""
        places = {**{v: i for i, v in enumerate(subject.vars)}, **{v: -1 - i for v, i in bound}}
        where = [places[v] for v in term.vars]
        return lambda built: (
            lambda inner: Term(
                term.node, tuple(built.vars[i] if i >= 0 else inner[-1 - i] for i in where)
            )
        )

    for number, (name, row, given) in enumerate(log["steps"]):
        if name == "equality of opposites":
            continue  # one term here
        cut = name in ("cut factor", "cut summand")
        need(cut or name in LEMMAS, f"step {number}: no lemma is named {name!r}")
        (subject, bound, factors), places = rows[row], []
        entries = [rows[p["term"]] if isinstance(p, dict) else (p, [], []) for p in given]
        for at, (entry, _, _) in enumerate(entries):
            if name in ("join sums", "join ranges") and at % 2 and entry >= 0:
                entry = entries[at - 1][1 + (name == "join ranges")][entry][1]
            elif name in ("sum over a bijection", "stack by its members") and not at:
                entry = outside(entry, subject, bound)
            elif isinstance(entry, Var):
                entry = dict(bound)[entry]
            elif isinstance(entry, Term) and subject.node.kind == "product":
                entry = dict(factors)[entry]
            elif isinstance(entry, Term):
                is_factor = entry.node.kind == "apply"
                monomial = a.product((), (entry,))[0] if is_factor else entry
                entry = [m for _, m in a.terms(subject)].index(monomial)
            places.append(entry)
        key = (subject.node, name[4:]) if cut else subject.node
        a.advice.setdefault(key, (number, name, tuple(places)))


# Texts of graphs.

NAME = r"%[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:\{[0-9.]+\}[A-Za-z0-9_.\-]*)*"
TYPE = r"[a-z][a-z0-9]*\[[^\]\n]*\](?: unreduced\([^)\n]*\))?"
ATTRS = r'\{(?:[^{}"\n]|"(?:[^"\\\n]|\\.)*")*\}'
INPUT = re.compile(rf"input ({NAME}) : ({TYPE})")
PARAM = re.compile(rf"param ({NAME}) : ({TYPE})(?: = (.*?))?(?: @\S*)?")
OUTPUT = re.compile(rf"output (\S+) = ({NAME})")
LINE = re.compile(rf"({NAME}(?:, {NAME})*) = (\w+)((?: {NAME},?)*)(?: ({ATTRS}))?"
                  rf" : ({TYPE}(?:, {TYPE})*)(?: @\S*(?: by .*?)?)?( \{{)?")  # fmt: skip
ATTR = re.compile(r'\s*(\w+)\s*=\s*(\([^()]*\)|"(?:[^"\\]|\\.)*"|[^,()"\s]+)\s*(?:,|\Z)')


class Type(NamedTuple):
    """An element type, and axes: names with a number, a name, or a kind and a value's name."""

    dtype: str
    axes: tuple
    unreduced: str

    @classmethod
    def parse(cls, text):
        """Return a type; where its axes lie on devices is no part of it."""
        dtype, inner, unreduced = re.fullmatch(r"(\w+)\[(.*)\](.*)", text).groups()
        axes = []
        for part in filter(None, map(str.strip, inner.split(","))):
            name, size = re.fullmatch(r"(\w+)(?:@[\w*]+)?=(.*)", part).groups()
            extent = re.fullmatch(r"(\w+)\((%.*)\)", size)
            fixed = int(size) if size.isdigit() else size
            axes.append((name, extent.groups() if extent else fixed))
        return cls(dtype, tuple(axes), unreduced)


class Line(NamedTuple):
    """An operation of a graph."""

    results: list
    op: str
    operands: list
    text: str
    types: list
    attrs: dict
    body: Any

    def words(self, key):
        return words(self.attrs.get(key, ""))

    def word(self, key, default=""):
        text = self.attrs.get(key, default)
        return json.loads(text) if text.startswith('"') else text

    def int(self, key, default=None):
        return int(self.attrs.get(key, default))

    def real(self, key, default=None):
        """Return a number, infinities as words."""
        text = self.attrs.get(key, default)
        return text if text in ("inf", "-inf") else float(text)


class Graph(NamedTuple):
    """A graph: inputs, parameters with their expressions, operations, outputs."""

    inputs: dict
    params: dict
    lines: list
    outputs: dict


def words(text):
    return [w.strip() for w in text.strip("()").split(",") if w.strip()]


def sizes(text):
    return [(n.strip(), int(s)) for n, s in (w.split("=") for w in words(text))]


def read_graph(lines, end="}"):
    """Return the graph of an iterator's lines up to one."""
    graph = Graph({}, {}, [], {})
    for line in lines:
        text = line.strip()
        if line == end:
            return graph
        if match := INPUT.fullmatch(text):
            graph.inputs[match[1]] = Type.parse(match[2])
        elif match := PARAM.fullmatch(text):
            graph.params[match[1]] = Type.parse(match[2]), match[3]
        elif match := OUTPUT.fullmatch(text):
            graph.outputs[match[1]] = match[2]
        elif match := LINE.fullmatch(text):
            results, op, operands, attrs, types, brace = match.groups("")
            need(not ATTR.sub("", attrs[1:-1]).strip(), f"attributes {attrs}")
            indent = line[: len(line) - len(line.lstrip())]
            body = read_graph(lines, indent + "}") if brace else None
            types = list(map(Type.parse, re.findall(TYPE, types)))
            pairs = dict(ATTR.findall(attrs[1:-1]))
            operands = re.findall(NAME, operands)
            row = Line(results.split(", "), op, operands, attrs, types, pairs, body)
            graph.lines.append(row)
        else:
            need(text.startswith("attr "), f"no statement: {text[:100]}")  # a note has no meaning
    raise Rejected("the graph has no end")


class Expression:
    """The text of a weight expression, in its parts."""

    def __init__(self, text, at=0):
        match = re.compile(r"(\w+)\(").match(text, at)
        need(match, f"no weight expression: {text[at : at + 60]}")
        self.name, self.operands, self.words, self.keywords = match[1], [], [], {}
        self.type, spelled, self.end = None, [match[0]], match.end()
        if self.name == "each":
            head = re.compile(r"(\w+)=(\d+)\.\.(\d+)(?:\.\.(\d+))?, *").match(text, self.end)
            axis, low, high, step = head.groups()
            body = Expression(text, head.end())
            texts = (body.text.replace(f"{{{axis}}}", str(i))
                     for i in range(int(low), int(high) + 1, int(step or 1)))  # fmt: skip
            self.operands, self.end = list(map(Expression, texts)), body.end
            self.name, self.keywords = "stack", {"axis": axis}
        piece = re.compile(r'[\s,]*(?:(\w+)=)?("(?:[^"\\\n]|\\.)*"|\([^()]*\)(?:=\w+)?'
                           r"|[^\s,()\[\]]+(?:\[[^\]\n]*\])?)")  # fmt: skip
        while text[self.end] != ")":
            gap = re.compile(r"[\s,]*").match(text, self.end)
            if re.compile(r"\w+\(").match(text, gap.end()):
                self.operands.append(Expression(text, gap.end()))
                spelled += [gap[0], "_"]
                self.end = self.operands[-1].end
                continue
            match = piece.match(text, self.end)
            key, value = match.groups()
            if key:
                self.keywords[key] = value
            elif value.endswith("]"):
                self.type = Type.parse(value)
            elif value != ":":
                self.words.append(json.loads(value) if value.startswith('"') else value)
            spelled.append(match[0])
            self.end = match.end()
        self.end += 1
        self.text, self.spelled = text[at : self.end], "".join(spelled) + ")"
        self.leaves = [x for e in self.operands for x in e.leaves] or [self]
        kinds = tuple(e.kind for e in self.operands)
        self.kind = (self.spelled, *kinds) if kinds else (self.name, self.type)


def rounded(value, dtype):
    """Return a number as a type stores it; None where this checker does not round to it."""
    if dtype == "f64" or (dtype[0] in "iu" and value == int(value)):
        return value
    code, mask = {"f32": ("f", 0), "bf16": ("f", 0xFFFF), "f16": ("e", 0)}.get(dtype, ("", 0))
    if not code or (code == "e" and abs(value) > 65504):
        return None
    stored = struct.unpack("<" + code, struct.pack("<" + code, value))[0]
    is_short = not mask & int.from_bytes(struct.pack("<f", stored), "little")
    return stored if dtype == "f32" or (stored == value and is_short) else None


# Tensors and the definitions of operations.


class Tensor(NamedTuple):
    """A value at its indices: axes, element, whether it is certainly finite, type, slots."""

    axes: tuple
    body: Term
    finite: bool = True
    dtype: str = ""
    slots: Any = None

    def axis(self, name):
        return next(v for v in self.axes if v.name == name)

    def but(self, *names):
        return tuple(v for v in self.axes if v.name not in names)

    def put(self, old, *new):
        """Return the axes with others in place of one."""
        return tuple(w for v in self.axes for w in (new if v.name == old else (v,)))

    def new(self, **fields):
        return self._replace(**{"slots": None, **fields})


class Slots(NamedTuple):
    """An assignment of choices to slots, identified by a key and functions of tokens."""

    key: tuple
    functions: list
    tokens: tuple
    choice: Var
    experts: Term
    placed: Term
    ragged: bool
    sizes: tuple


def widest(*tensors):
    return max(tensors, key=lambda t: len(t.axes)).axes


def crossed(x, y):
    return (*x.axes, *y.but(*(v.name for v in x.axes)))


def is_lossless(old, new):
    wider = {"f8e4m3fn": "f16 bf16 f32 f64", "f8e5m2": "f16 bf16 f32 f64", "f16": "f32 f64",
             "bf16": "f32 f64", "f32": "f64"}  # fmt: skip
    return old == new or new in wider.get(old, "").split()


class Evaluation:
    """Evaluates graphs; a method named as an operation, but for `_`, is its definition."""

    def __init__(self, algebra, exact, rolled):
        self.a, self.exact, self.rolled, self.weights = algebra, exact, rolled, {}

    def at(self, x, values, axes):
        """Return x at indices, by names of axes."""
        named = {v: values[v.name] for v in x.axes if v.name in values}
        return x.new(axes=tuple(axes), body=self.a.substitute(x.body, named))

    def along(self, x, *names):
        return self.a.function([x.axis(n) for n in names], x.body)

    def closed(self, x):
        return self.a.function(x.axes, x.body)

    def indices(self, axes):
        return list(map(self.a.index, axes))

    def pointwise(self, name, attrs, *xs):
        body = self.a.apply(name, attrs, (), [x.body for x in xs])
        return Tensor(widest(*xs), body, all(x.finite for x in xs))

    def scaled(self, x, by):
        number = self.a.number(by)
        by = self.a.constant(number)
        product = self.a.multiply(number, x.body) if by is None else self.a.scale(x.body, by)
        return x.new(body=product)

    def times(self, *xs):
        return Tensor(widest(*xs), self.a.multiply(*(self.a.cut(x.body) for x in xs)))

    def quotient(self, index, by):
        return index if by == 1 else self.a.apply("div", (by,), (), [index])

    def remainder(self, index, by):
        return self.a.apply("mod", (by,), (), [index])

    def moved(self, x, axis, size, name=None, index=lambda i: i):
        """Return x at an index that is a function of a new axis."""
        new = self.a.axis(name or axis, size)
        return self.at(x, {axis: index(self.a.index(new))}, x.put(axis, new))

    def split(self, x, axis, into):
        new, position = [self.a.axis(n, s) for n, s in into], self.a.zero
        need(prod(s for _, s in into) == x.axis(axis).size, "a split into other sizes")
        for v in new:
            position = self.a.add(self.a.scale(position, v.size), self.a.index(v))
        return self.at(x, {axis: position}, x.put(axis, *new))

    def merge(self, x, axes, into):
        new = self.a.axis(into, prod(x.axis(n).size for n in axes))
        values, inner = {}, 1
        for name in reversed(axes):
            outer = self.quotient(self.a.index(new), inner)
            values[name] = self.remainder(outer, x.axis(name).size)
            inner *= x.axis(name).size
        return self.at(x, values, x.new(axes=x.but(*axes[1:])).put(axes[0], new))

    def slice(self, x, axis, start, stop):
        need(0 <= start < stop <= x.axis(axis).size, "a slice beyond an axis")
        return self.moved(
            x, axis, stop - start, index=lambda i: self.a.add(i, self.a.number(start))
        )

    def index(self, x, axis, at):
        need(0 <= at < x.axis(axis).size, "an index beyond an axis")
        return self.at(x, {axis: self.a.number(at)}, x.but(axis))

    def stack(self, xs, axis, position=0):
        new, first = self.a.axis(axis, len(xs)), xs[0].axes
        body = self.a.apply("stack", (len(xs),), (), [self.a.index(new), *(x.body for x in xs)])
        axes = (*first[:position], new, *first[position:])
        return Tensor(axes, body, all(x.finite for x in xs))

    def concat(self, xs, axis):
        ends = [0]
        for x in xs:
            ends.append(ends[-1] + x.axis(axis).size)
        new, bodies = self.a.axis(axis, ends[-1]), []
        for x, (start, stop) in zip(xs, pairwise(ends), strict=True):
            inside = self.a.apply("range", (start, stop), (), [self.a.index(new)])
            index = self.a.add(self.a.index(new), self.a.number(-start))
            bodies.append(self.a.multiply(inside, self.at(x, {axis: index}, ()).body))
        return Tensor(xs[0].put(axis, new), self.a.add(*bodies))

    def sums(self, *xs):
        return Tensor(widest(*xs), self.a.add(*(self.a.cut(x.body, "summand") for x in xs)))

    def chosen(self, condition, x, y):
        opposite = self.a.add(self.a.one, self.a.scale(condition.body, -1))
        pairs = (condition.body, x), (opposite, y)
        parts = (self.a.multiply(k, self.a.cut(t.body)) for k, t in pairs)
        return Tensor(widest(x, y, condition), self.a.add(*parts))

    def contracted(self, x, y, over):
        bound = {n: self.a.fresh(x.axis(n).size) for n in over}
        need(all(y.axis(n).size == v.size for n, v in bound.items()), "axes of other sizes")
        values = {n: self.a.index(v) for n, v in bound.items()}
        x, y = (self.at(t.new(body=self.a.cut(t.body)), values, t.but(*over)) for t in (x, y))
        return Tensor(crossed(x, y), self.a.multiply(x.body, y.body, over=[*bound.values()]))

    def total(self, x, names):
        bound = {n: self.a.fresh(x.axis(n).size) for n in names}
        x = self.at(x, {n: self.a.index(v) for n, v in bound.items()}, x.but(*names))
        return Tensor(x.axes, self.a.multiply(x.body, over=list(bound.values())))

    def cast_to(self, x, new):
        return x if is_lossless(x.dtype, new) else self.pointwise("cast", (x.dtype, new), x)

    def norm(self, head, n, x, scale):
        axis = n.word("axis")
        function = self.along(x.new(body=self.a.let(x.body)), axis)
        index = [self.a.index(x.axis(axis))]
        unit = self.a.apply(head, (n.real("eps", "1e-06"),), [function], index)
        return Tensor(x.axes, self.a.multiply(unit, self.a.cut(scale.body)))

    def reduced(self, name, x, axes):
        body = self.a.apply(name, (), [self.along(x, *sorted(axes))])
        return x.new(axes=x.but(*axes), body=body)

    def shares(self, x, axis, *sinks):
        """Return softmax(x), with a sink s times sigmoid(logsumexp(x) − s)."""
        head, index = "share" if x.finite else "masked_share", [self.a.index(x.axis(axis))]
        body = self.a.apply(head, ("softmax",), [self.along(x, axis)], index)
        weights = Tensor(x.axes, body)
        for sink in sinks:
            total = self.reduced("logsumexp", x, [axis])
            apart = self.sums(total, self.scaled(sink, -1)) if total.finite else None
            apart = apart or self.pointwise("sub of infinite", (), total, sink)
            weights = self.times(
                weights, self.pointwise("sigmoid", (), apart)._replace(finite=True)
            )
        return weights

    def seen(self, query, key, window=0):
        behind = self.a.add(query.body, self.a.scale(key.body, -1))
        body = self.a.apply("at_least_0", (), (), [behind])
        if window:
            left = self.a.add(self.a.number(window - 1), self.a.scale(behind, -1))
            body = self.a.multiply(body, self.a.apply("at_least_0", (), (), [left]))
        return Tensor(crossed(query, key), body)

    def segments(self, query, key):
        holds = self.pointwise("holds", ("same_segment",), query, key)
        return holds._replace(axes=crossed(query, key))

    def compared(self, n, x, y):
        """Return [x < y] or [x = y], of integers by their difference."""
        if not all(re.match(r"[iu]\d", t.dtype) for t in (x, y)):
            return self.pointwise("holds", (n.op,), x, y)
        gap = self.sums(*((x, self.scaled(y, -1)) if n.op == "equal" else (y, self.scaled(x, -1))))
        head, less = ("equal", 0) if n.op == "equal" else ("at_least_0", 1)
        index = self.a.add(gap.body, self.a.number(-1)) if less else gap.body
        return Tensor(gap.axes, self.a.apply(head, (), (), [index]))

    def masked(self, x, keep, fill):
        if isinstance(fill, float) and x.finite:
            return self.chosen(keep, x, Tensor((), self.a.number(fill)))
        return self.pointwise("mask", (fill,), x, keep)._replace(axes=x.axes, finite=False)

    def chunk(self, n, x):
        axis, of, parts = n.word("axis"), n.int("of"), n.int("parts", 1)
        size, piece = x.axis(axis).size, x.axis(axis).size // (of * parts)
        need(size % (of * parts) == 0 and 0 <= n.int("at") < of, "no such chunk")

        def place(i):
            outer = self.a.scale(self.quotient(i, piece), of)
            outer = self.a.add(outer, self.a.number(n.int("at")))
            return self.a.add(self.a.scale(outer, piece), self.remainder(i, piece))

        return self.moved(x, axis, size // of, index=place)

    def join(self, n, *xs):
        axis, parts = n.word("axis"), n.int("parts", 1)
        if parts == 1:
            return self.concat(xs, axis)
        size, number = xs[0].axis(axis).size, len(xs)
        need(size % parts == 0 and {x.axis(axis).size for x in xs} == {size}, "unequal chunks")
        new, piece = self.a.axis(axis, size * number), size // parts
        position = self.quotient(self.a.index(new), piece)
        outer = self.a.scale(self.quotient(position, number), piece)
        at = {axis: self.a.add(outer, self.remainder(self.a.index(new), piece))}
        bodies = [self.remainder(position, number), *(self.at(x, at, ()).body for x in xs)]
        return Tensor(xs[0].put(axis, new), self.a.apply("stack", (number,), (), bodies))

    def rope(self, n, x):
        new = self.a.axis(n.word("axis"), n.int("size"))
        attrs = [f"{k}={v}" for k, v in n.attrs.items() if k != "axis"]
        longest = [self.closed(x)] if n.word("scaling") in ("dynamic", "longrope") else []
        places = [x.body, self.a.index(new)]
        heads = ("rope_cos", "rope_sin")
        return [Tensor((*x.axes, new), self.a.apply(h, attrs, longest, places)) for h in heads]

    def rotate(self, n, *xs):
        axis = n.word("axis")
        functions, index = [self.along(t, axis) for t in xs], self.a.index(xs[0].axis(axis))
        return xs[0].new(body=self.a.apply("rotate", (), functions, [index]))

    def one_hot(self, n, ids):
        new = self.a.axis(*sizes(n.attrs["into"])[0])
        gap = self.a.add(ids.body, self.a.scale(self.a.index(new), -1))
        return Tensor((*ids.axes, new), self.a.apply("equal", (), (), [gap]))

    def relative_buckets(self, n, query, key):
        both = n.word("bidirectional") == "true"
        attrs = ("bucket", both, n.int("buckets", 32), n.int("max_distance", 128))
        gap = self.a.add(key.body, self.a.scale(query.body, -1))
        return Tensor(crossed(query, key), self.a.apply("integer", attrs, (), [gap]))

    def attention(self, n, query, key, value, *further):
        """Return the values, averaged by the softmax of what each query sees of its scores."""
        given = dict(zip(n.words("given"), further, strict=True))
        scores = self.contracted(query, key, [n.word("over")])
        scores, cap = self.scaled(scores, n.real("scale", "1.0")), Fraction(n.real("cap", "0.0"))
        if cap:
            scores = self.scaled(
                self.pointwise("tanh", (), self.scaled(scores, 1 / cap)), float(cap)
            )
        if "bias" in given:
            scores = self.sums(scores, given["bias"])._replace(axes=scores.axes)
        masks = [given["keep"]] if "keep" in given else []
        for name in n.words("causal"):
            axes = (scores.axis(name), scores.axis(n.word("along")))
            pair = (Tensor((v,), self.a.index(v)) for v in axes)
            masks.append(self.seen(*pair, n.int("window", 0)))
        if "query_segments" in given:
            masks.append(self.segments(given["query_segments"], given["key_segments"]))
        for mask in masks:
            scores = self.masked(scores, mask, "-inf")
        sinks = [given["sinks"]] if "sinks" in given else []
        return self.contracted(
            self.shares(scores, n.word("along"), *sinks), value, [n.word("along")]
        )

    def route(self, n, logits, *biases):
        """Return the k best experts by logits, or by score plus bias, and their gates."""
        a, gates, axis = self.a, n.word("gates", "renormalised"), n.word("axis", "expert")
        choice = a.axis(n.word("choice", "choice"), n.int("top_k"))
        score = "sigmoid" if gates.startswith("sigmoid") else "softmax"
        functions = [self.along(t, axis) for t in (logits, *biases)]
        attrs = (logits.axis(axis).size, choice.size, score if biases else "logits")
        index = [a.index(choice)]
        experts = a.apply("experts", attrs, functions, index)
        of_chosen = self.at(logits, {axis: experts}, ()).body
        if gates == "ones":
            body = a.one
        elif not logits.finite or gates == "sparsemixer":
            body = a.apply("gate", (gates,), [functions[0], a.function([choice], experts)], index)
        elif gates == "sigmoid":
            body = a.apply("sigmoid", (), (), [of_chosen])
        elif gates == "softmax":
            body = a.apply("share", (score,), functions[:1], [experts])
        else:
            need(gates in ("renormalised", "sigmoid-renormalised"), f"unknown gates {gates}")
            body = a.apply("share", (score,), [a.function([choice], of_chosen)], index)
        axes = (*logits.but(axis), choice)
        scaled = self.scaled(Tensor(axes, body), n.real("scale", "1.0"))
        return [Tensor(axes, experts), scaled._replace(finite=logits.finite)]

    def keep_choices(self, n, gates, *uniform):
        policy, axis = n.word("policy", "random"), gates.axis(n.word("choice", "choice"))
        first = Tensor(gates.axes, self.a.apply("equal", (), (), [self.a.index(axis)]))
        one = Tensor((), self.a.one)
        if policy in ("all", "none"):
            return first if policy == "none" else one._replace(axes=gates.axes)
        attrs = (policy, n.real("threshold", "0.2"))
        return self.chosen(first, one, self.pointwise("holds", attrs, gates, *uniform))

    def hash_experts(self, n, ids):
        choice = self.a.axis(n.word("choice", "choice"), n.int("top_k", 1))
        attrs = (n.int("experts"), n.int("seed", 0), n.word("hash", "murmur"))
        places = [ids.body, self.a.index(choice)]
        return Tensor((*ids.axes, choice), self.a.apply("hashed_expert", attrs, (), places))

    def assigned(self, n, kind, experts, choice, further, wanted):
        """Return slots of choices, which depend on the experts of all tokens and on `further`."""
        tokens = tuple(experts.axis(t) for t in n.words("tokens"))
        axes, slots = (*tokens, choice), n.word("slots", kind[1])
        places = [(*tokens, *(v for v in t.axes if v not in tokens)) for t in further]
        functions = [self.a.function(axes, experts.body)]
        functions += [self.a.function(p, t.body) for p, t in zip(places, further, strict=True)]
        notes = [f"{k}={v}" for k, v in n.attrs.items() if k not in ("tokens", "choice", "axis")]
        key = (kind[0], *notes, *(v.size for v in axes))
        slot = self.a.apply("slot_of", key, functions, self.indices(axes))
        groups = f"groups {tag(slot)}" if n.int("group_size", 0) else n.int("groups", 1)
        if slots != "ragged":
            wanted = self.a.apply("placed", key, functions, self.indices(axes))
        extents = (groups, n.int("experts"), f"slots {tag(slot)}")
        ragged = slots == "ragged"
        slots = Slots(key, functions, tokens, choice, experts.body, wanted, ragged, extents)
        return Tensor(experts.axes, slot, slots=slots)

    def assign_slots(self, n, experts, *further):
        (choice,) = experts.but(*n.words("tokens"))
        exists = self.a.apply("range", (0, n.int("experts")), (), [experts.body])
        named = dict(zip(n.words("using"), further, strict=True))
        wanted = [named[w].body for w in ("keep", "mask") if w in named]
        wanted = self.a.multiply(exists, *wanted)
        return self.assigned(n, ("AssignSlotsOp", "ragged"), experts, choice, further, wanted)

    def expert_choice(self, n, scores, *masks):
        choice = self.a.axis(n.word("choice", "choice"), n.int("experts"))
        axis, index = n.word("axis", "expert"), self.a.index(choice)
        experts = Tensor((*scores.but(axis), choice), index)
        gates, kind = self.at(scores, {axis: index}, experts.axes), ("ExpertChoiceOp", "capacity")
        slots = self.assigned(n, kind, experts, choice, (gates, *masks), self.a.one)
        return [experts, gates, slots]

    def dispatch(self, n, x, experts, slots):
        """Return what the token of each slot has; 0 in a slot that is not occupied."""
        s = slots.slots
        need(s.experts == experts.body, "slots of other experts")
        rows = [self.a.axis(*v) for v in zip(("group", "expert", "slot"), s.sizes, strict=True)]
        places = self.indices(rows)
        of_gates = n.op == "dispatch_gates"
        names = [v.name for v in (*s.tokens, *([s.choice] if of_gates else []))]
        values = {t: self.a.apply("token_of", (j, *s.key), s.functions, places)
                  for j, t in enumerate(names)}  # fmt: skip
        body = x.body if of_gates else self.a.cut(x.body)
        x = self.at(x.new(body=body), values, (*rows, *x.but(*names)))
        occupied = () if s.ragged else (self.a.apply("occupied", s.key, s.functions, places),)
        return x.new(body=self.a.multiply(*occupied, x.body))

    def combine(self, n, rows, experts, slots, *gates):
        """Return the sum over the choices that have a slot of gate times row."""
        s, a = slots.slots, self.a
        need(s.experts == experts.body, "slots of other experts")
        c = a.fresh(s.choice.size)
        to_c, places = {s.choice: a.index(c)}, self.indices((*s.tokens, c))
        where = {
            "group": a.apply("group_of", s.key, s.functions, places[:-1]),
            "expert": a.substitute(s.experts, to_c),
            "slot": a.apply("own_slot", s.key, s.functions, places),
        }
        axes = [v for v in slots.axes if v in s.tokens]
        factors = [self.at(rows, where, ()).body]
        factors += [a.substitute(g.body, to_c) for g in gates]
        factors.append(a.substitute(s.placed, to_c))
        body = a.multiply(*factors, over=[c])
        return Tensor((*axes, *rows.but("group", "expert", "slot")), body)

    def group_sum(self, n, x, slots):
        names = [v.name for v in slots.slots.tokens]
        group = self.a.axis("group", slots.slots.sizes[0])
        notes = [k for k in slots.slots.key if str(k).startswith(("groups=", "group_size="))]
        body = self.a.apply("group_sum", notes, [self.along(x, *names)], [self.a.index(group)])
        return Tensor((group, *x.but(*names)), body)

    # Weight expressions.

    def weight(self, e):
        if e.text not in self.weights:
            x = self.alike(e) if e.name == "stack" else None
            x = x or self.expression(e, [self.weight(o) for o in e.operands])
            self.weights[e.text] = x
        return self.weights[e.text]

    def alike(self, e):
        """Return a stack of expressions that differ in leaves alone as one over families."""
        parts = e.operands
        if len(parts) < 2 or len({p.kind for p in parts}) > 1:
            return None
        place, leaves = self.a.fresh(len(parts)), []
        for row in zip(*(p.leaves for p in parts), strict=True):
            names = tuple(x.words[0] if x.name == "source" else x.text for x in row)
            if len(set(names)) == 1:
                leaves.append(self.weight(row[0]))
                continue
            if len(set(names)) < len(names) or row[0].name == "full":
                return None
            type_ = row[0].type
            axes = tuple(self.a.axis(*v) for v in type_.axes)
            head, attrs = "family", (names, type_.dtype, tuple(v.size for v in axes))
            if row[0].name != "source":
                head, attrs = "weights", (names, ())
            body = self.a.apply(head, attrs, (), self.indices((place, *axes)))
            leaves.append(Tensor(axes, body, dtype=type_.dtype))
        remaining = iter(leaves)

        def over(p):
            return self.expression(p, [*map(over, p.operands)]) if p.operands else next(remaining)

        x, at = over(parts[0]), int(e.keywords.get("position", 0))
        new = self.a.axis(e.keywords["axis"], len(parts))
        body = self.a.substitute(x.body, {place: self.a.index(new)})
        return x.new(axes=(*x.axes[:at], new, *x.axes[at:]), body=body)

    def expression(self, e, xs):
        """Return an expression of operands. Intermediate results are real numbers."""
        a, name, key, x = self.a, e.name, e.keywords, xs[0] if xs else None
        axis, at = next(iter(key.items()), ("", ""))
        axes = tuple(a.axis(*v) for v in e.type.axes) if e.type else ()
        wide = "f64" if any(t.dtype == "f64" for t in xs) else "f32"
        kinds = {"cast": e.words[-1:], "clusters": ["i32"]}.get(name) or [
            e.type.dtype if e.type else x.dtype
        ]
        if name in ("scale", "add", "mul", "minimum", "mean", "std", "fitted"):
            kinds = [wide]
        if name == "select":
            kinds = [xs[1].dtype if xs[1].dtype == xs[2].dtype else wide]
        dtype = kinds[0]
        if name == "source":
            attrs = (e.words[0], dtype, tuple(v.size for v in axes))
            result = Tensor(axes, a.apply("source", attrs, (), self.indices(axes)))
        elif name == "tile":
            place, new = int(key.get("position", 0)), a.axis(axis, int(at))
            result = x.new(axes=(*x.axes[:place], new, *x.axes[place:]))
        elif name == "stack":
            result = self.stack(xs, key["axis"], int(key.get("position", 0)))
        elif name == "concat":
            result = self.concat(xs, key["axis"])
        elif name == "index":
            result = self.index(x, axis, int(at))
        elif name == "slice":
            result = self.slice(x, axis, *map(int, at.split(":")))
        elif name == "split":
            result = self.split(x, axis, sizes(at))
        elif name == "merge":
            names, _, into = e.words[0].partition("=")
            result = self.merge(x, words(names), into)
        elif name == "rename":
            result = self.moved(x, axis, x.axis(axis).size, at)
        elif name == "permute":
            result = x.new(axes=tuple(map(x.axis, words(e.words[0]))))
        elif name == "take":
            result = self.at(x, {axis: xs[1].body}, x.put(axis, *xs[1].axes))
            need(len(xs[1].axes) == 1, "an order of several axes")
        elif name == "permutation":
            attrs = (axes[0].size, int(key["key"], 16))
            result = Tensor(axes, a.apply("permutation", attrs, (), self.indices(axes)))
        elif name == "full" and not self.exact:
            value = float(e.words[0])
            stored = value if a.fractions else rounded(value, dtype)
            unknown = a.apply("constant", (value, dtype)) if stored is None else None
            result = Tensor(axes, unknown or a.number(stored))
        elif name == "scale" and not self.exact:
            value = float(e.words[0])
            result = self.scaled(x, value if a.fractions else rounded(value, dtype))
        elif name == "cast" and not self.exact:
            result = self.cast_to(x, dtype)
        elif name in ARITHMETIC and not self.exact:
            result = ARITHMETIC[name](self, *xs)
        else:
            need(axes or name in ("mean", "std"), f"no definition of the expression {name}")
            axes = axes or tuple(v for v in x.axes if v.name in words(key.get("keep", "")))
            layout = tuple((tuple(v.name for v in t.axes), t.dtype) for t in xs)
            attrs, functions = (e.spelled, layout), list(map(self.closed, xs))
            result = Tensor(axes, a.apply("weight", attrs, functions, self.indices(axes)))
        return result._replace(dtype=dtype)

    # Graphs.

    def typed_axes(self, type_, values):
        """Return the variables of a type, whose extents other values may set."""
        axes = []
        for name, size in type_.axes:
            if isinstance(size, tuple):
                size = values[size[1]].slots.sizes[0 if size[0] == "groups" else 2]
            axes.append(self.a.axis(name, size))
        return tuple(axes)

    def leaf(self, name, type_):
        axes = self.typed_axes(type_, {})
        kind = "integer" if re.match(r"[iu]\d", type_.dtype) else "source"
        attrs = (name, type_.dtype, tuple(v.size for v in axes))
        head = "holds" if type_.dtype == "pred" else kind
        return Tensor(axes, self.a.apply(head, attrs, (), self.indices(axes)), dtype=type_.dtype)

    def evaluate(self, graph, values):
        """Return all values of a graph, whose inputs are given or arbitrary."""
        for name, type_ in graph.inputs.items():
            values[name] = values.get(name) or self.leaf(f"input {name[1:]}", type_)
        used = {x for n in graph.lines for x in n.operands} | set(graph.outputs.values())
        for name, (type_, text) in graph.params.items():
            if name in used:
                if text:
                    e = Expression(text)
                    need(e.end == len(text), f"{name}: text after a weight expression")
                    x = self.cast_to(self.weight(e), type_.dtype)
                else:
                    x = self.leaf(f"parameter {name[1:]}", type_)
                need(set(x.axes) == set(self.typed_axes(type_, {})), f"{name}: of other axes")
                values[name] = x._replace(dtype=type_.dtype)
        for n in graph.lines:
            try:
                results = self.results(n, [values[x] for x in n.operands], values)
                for name, type_, x in zip(n.results, n.types, results, strict=True):
                    need(set(x.axes) == set(self.typed_axes(type_, values)), "axes of no such type")
                    need(x.slots is None or x.dtype in ("", type_.dtype), "slots as another type")
                    values[name] = x._replace(dtype=type_.dtype)
            except (Rejected, *MALFORMED) as error:
                raise Rejected(
                    f"{', '.join(n.results)} = {n.op}: {error or repr(error)}"
                ) from error
        return values

    def results(self, n, xs, values):
        """Return the results of an operation: by its definition, or uninterpreted."""
        if n.body:
            return (self.folded if self.rolled else self.repeated)(n, xs)
        define = OPERATIONS.get(n.op)
        finite = all(x.finite for x in xs)
        if n.op == "stop_gradient" and not self.exact:
            return [xs[0].new(body=self.a.stopped(xs[0].body))]
        if define and (n.op in MOVES or (not self.exact and (finite or n.op in OF_INFINITE))):
            results = define(self, n, *xs)
            return results if isinstance(results, list) else [results]
        if n.op in ELEMENTWISE and not self.exact:
            name = f"{n.op} of infinite" if define else n.op
            x = self.pointwise(name, (n.text,) if n.text else (), *xs)
            axes, bounded = self.typed_axes(n.types[0], values), n.op in BOUNDED
            return [x._replace(axes=axes, finite=x.finite or bounded)]
        functions, results = list(map(self.closed, xs)), []
        layout = tuple((tuple(v.name for v in x.axes), x.dtype) for x in xs)
        for i, type_ in enumerate(n.types):
            axes = self.typed_axes(type_, values)
            attrs = (i, n.text, layout, type_.dtype, *((v.name, v.size) for v in axes))
            body = self.a.apply(f"operation {n.op}", attrs, functions, self.indices(axes))
            results.append(Tensor(axes, body, finite))
        return results

    def scanned(self, n, xs):
        """Return the axis, the runs, and the operands of a scan: carries, stacked, others."""
        ((axis, runs),), carries = sizes(n.attrs["over"]), n.int("carries", 0)
        end = carries + n.int("stacked", 0)
        need(all(x.axis(axis).size == runs for x in xs[carries:end]), "other runs than stacked")
        return axis, runs, xs[:carries], xs[carries:end], xs[end:]

    def body(self, n, xs):
        pairs = zip(n.body.inputs.items(), xs, strict=True)
        values = self.evaluate(n.body, {name: x._replace(dtype=t.dtype) for (name, t), x in pairs})
        return [values[name] for name in n.body.outputs.values()]

    def repeated(self, n, xs):
        """Return the results of a scan, run after run."""
        axis, runs, carried, stacked, others = self.scanned(n, xs)
        rows, count_ = [], len(carried)
        for i in range(runs):
            slices = [self.index(x, axis, i) for x in stacked]
            results = self.body(n, [*carried, *slices, *others])
            carried = results[:count_]
            rows.append(results[count_:])
        return [*carried, *(self.stack(row, axis) for row in zip(*rows, strict=True))]

    def folded(self, n, xs):
        """Return the results of a scan as functions of its start and of its body."""
        axis, runs, starts, stacked, others = self.scanned(n, xs)
        need(not any(inner.body for inner in n.body.lines), "a scan within a rolled scan")
        a, run, count_ = self.a, self.a.fresh(runs), len(starts)
        all_finite = all(x.finite for x in xs)
        carried = []
        for i, x in enumerate(starts):
            attrs = (i, tuple(v.size for v in x.axes))
            carry = a.apply("carry", attrs, (), self.indices(x.axes))
            carried.append(Tensor(x.axes, carry, all_finite, x.dtype))
        slices = [self.at(x, {axis: a.index(run)}, x.but(axis)) for x in stacked]
        results = self.body(n, [*carried, *slices, *others])
        finite = all(x.finite for x in (*xs, *results))
        need(finite or not all_finite, "infinite values of finite ones in a rolled scan")
        need(
            [r.axes for r in results[:count_]] == [x.axes for x in starts], "carries of other axes"
        )
        functions = list(map(self.closed, starts))
        functions += [a.function((run, *x.axes), x.body) for x in results[:count_]]
        finals = []
        for i, x in enumerate(starts):
            final = a.apply("repeat", (runs, "carry", i), functions, self.indices(x.axes))
            finals.append(Tensor(x.axes, final, finite))
        for x in results[count_:]:
            axes = (a.axis(axis, runs), *x.axes)
            inner = [*functions, a.function((run, *x.axes), x.body)]
            each = a.apply("repeat", (runs, "each"), inner, self.indices(axes))
            finals.append(Tensor(axes, each, finite))
        return finals


def op_mean(e, n, x):
    names = n.words("axes")
    total, each = e.total(x, names), (inverse_size(e.a, x.axis(v).size) for v in names)
    return total.new(body=e.a.multiply(total.body, *each))


def op_constant(e, n):
    value = n.real("value")
    is_number = isinstance(value, float)
    body = e.a.number(value) if is_number else e.a.apply("constant", (value,))
    return Tensor((), body, is_number)


def op_scale(e, n, x):
    by = n.real("by")
    infinite = isinstance(by, str)
    return e.pointwise("scale", (by,), x)._replace(finite=False) if infinite else e.scaled(x, by)


def op_div(e, n, x, y):
    inverse_ = e.a.apply("inverse", (), (), [y.body])
    return Tensor(widest(x, y), e.a.multiply(e.a.cut(x.body), inverse_))


def op_embedding(e, n, table, ids):
    axis = n.word("axis")
    return e.at(table, {axis: ids.body}, (*ids.axes, *table.but(axis)))


def op_positions(e, n, x):
    axis = x.axis(n.word("axis"))
    return Tensor((axis,), e.a.index(axis))


# fmt: off
ARITHMETIC = {
    "add": Evaluation.sums, "mul": Evaluation.times, "select": Evaluation.chosen,
    "minimum": lambda e, x, y: e.pointwise("minimum", (), x, y),
}
OPERATIONS = {
    "add": lambda e, n, x, y: e.sums(x, y),
    "sub": lambda e, n, x, y: e.sums(x, e.scaled(y, -1)),
    "mul": lambda e, n, x, y: e.times(x, y),
    "div": op_div,
    "neg": lambda e, n, x: e.scaled(x, -1),
    "scale": op_scale,
    "maximum": lambda e, n, x, y: e.pointwise("maximum", (), x, y),
    "minimum": lambda e, n, x, y: e.pointwise("minimum", (), x, y),
    "less": Evaluation.compared,
    "equal": Evaluation.compared,
    "select": lambda e, n, condition, x, y: e.chosen(condition, x, y),
    "mask": lambda e, n, x, keep: e.masked(x, keep, n.real("fill", "-inf")),
    "cast": lambda e, n, x: e.cast_to(x, n.word("dtype")),
    "constant": op_constant,
    "rename": lambda e, n, x: e.moved(x, n.word("axis"), x.axis(n.word("axis")).size, n.word("to")),
    "broadcast": lambda e, n, x, like: x.new(axes=like.axes),
    "split": lambda e, n, x: e.split(x, n.word("axis"), sizes(n.attrs["into"])),
    "merge": lambda e, n, x: e.merge(x, n.words("axes"), n.word("into")),
    "slice": lambda e, n, x: e.slice(x, n.word("axis"), n.int("start"), n.int("stop")),
    "index": lambda e, n, x: e.index(x, n.word("axis"), n.int("at")),
    "stack": lambda e, n, *xs: e.stack(xs, n.word("axis")),
    "join": Evaluation.join,
    "chunk": Evaluation.chunk,
    "positions": op_positions,
    "embedding": op_embedding,
    "one_hot": Evaluation.one_hot,
    "contract": lambda e, n, x, y: e.contracted(x, y, n.words("over")),
    "sum": lambda e, n, x: e.total(x, n.words("axes")),
    "mean": op_mean,
    "max": lambda e, n, x: e.reduced("max", x, n.words("axes")),
    "logsumexp": lambda e, n, x: e.reduced("logsumexp", x, n.words("axes")),
    "softmax": lambda e, n, x: e.shares(x, n.word("axis")),
    "rms_norm": lambda e, n, x, scale: e.norm("rms", n, x, scale),
    "layer_norm": lambda e, n, x, scale, bias: e.sums(e.norm("layer_norm", n, x, scale), bias),
    "rope": Evaluation.rope,
    "rotate": Evaluation.rotate,
    "causal": lambda e, n, query, key: e.seen(query, key, n.int("window", 0)),
    "same_segment": lambda e, n, query, key: e.segments(query, key),
    "relative_buckets": Evaluation.relative_buckets,
    "attention": Evaluation.attention,
    "route": Evaluation.route,
    "keep_choices": Evaluation.keep_choices,
    "hash_experts": Evaluation.hash_experts,
    "assign_slots": Evaluation.assign_slots,
    "expert_choice": Evaluation.expert_choice,
    "dispatch": Evaluation.dispatch,
    "dispatch_gates": Evaluation.dispatch,
    "combine": Evaluation.combine,
    "combine_weighted": Evaluation.combine,
    "weight_rows": lambda e, n, x, y: x.new(body=e.a.multiply(x.body, y.body)),
    "group_sum": Evaluation.group_sum,
    # Collectives change where global values lie, not the values.
    **dict.fromkeys(("reshard", "shard", "all_gather", "all_reduce", "reduce_scatter", "all_to_all",
                     "ragged_all_to_all"), lambda e, n, x: x),
}
MOVES = {"rename", "broadcast", "split", "merge", "slice", "index", "stack"}
OF_INFINITE = {"softmax", "max", "logsumexp", "mask", "route"}
BOUNDED = {"sigmoid", "tanh", "normal_cdf"}
ELEMENTWISE = BOUNDED | {
    "silu", "gelu", "gelu_tanh", "relu", "exp", "log", "square", "rsqrt", "pointwise", "add", "sub",
    "mul", "div", "maximum", "minimum", "less", "equal", "neg", "scale", "cast", "select", "mask",
    "weight_rows",
}
# fmt: on
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration)


# The check.


def graph_of(text):
    need(text.startswith("moecc 1\ngraph ") and text.endswith("\n}\n"), "no text of a graph")
    lines = iter(text.split("\n")[2:])
    graph = read_graph(lines)
    need(list(lines) == [""], "text after a graph")
    return graph


def check(log, before, after):
    """Return the numbers of the steps that a proof needs. Raises: Rejected."""
    need(log["schema"] == SCHEMA, f"the schema is not {SCHEMA}")
    for key, text in (("before", before), ("after", after)):
        digest = hashlib.sha256(text.encode()).hexdigest()
        need(log[key] == digest, f"it is a proof of another graph {key!r}")
    names = Counter(name for name, _, _ in log["steps"])
    need(log.get("lemmas", names) == names, "counts of lemmas that are not those of the steps")
    a = Algebra()
    a.exact, a.fractions = bool(log["exact"]), bool(log.get("fractions"))
    read_log(a, log)
    graphs = [graph_of(before), graph_of(after)]
    evaluation = Evaluation(a, a.exact, bool(log.get("rolled")))
    (old, old_outputs), (new, new_outputs) = (
        (evaluation.evaluate(g, {}), g.outputs) for g in graphs
    )
    need(graphs[0].inputs == graphs[1].inputs, "graphs of other inputs")
    outputs = log.get("outputs", list(old_outputs))
    need(outputs and {*outputs} <= {*old_outputs} & {*new_outputs}, "outputs that a graph lacks")
    types = [
        {v: t for n in g.lines for v, t in zip(n.results, n.types, strict=True)} for g in graphs
    ]
    for name in outputs:
        value = old_outputs[name]
        x, y = old[value], new[new_outputs[name]]
        partial = [
            t[v].unreduced for t, v in zip(types, (value, new_outputs[name]), strict=True) if v in t
        ]
        need((x.axes, x.dtype) == (y.axes, y.dtype), f"output {name}: of two types")
        need(len(set(partial)) < 2 and x.body == y.body, f"output {name}: two different terms")
    return sorted(a.used - {-1})


def accepted(log, before, after):
    """Return the numbers of the steps that a proof needs. Raises: Rejected, whatever is wrong."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 20_000))
    try:
        return check(log, before, after)
    except (RecursionError, *MALFORMED) as error:
        raise Rejected(f"not a log, or not a graph: {error!r}") from error
    finally:
        sys.setrecursionlimit(limit)


def main():
    """Check the proof that the command line names."""
    if len(sys.argv) != 4:
        print("usage: moecc-check PROOF BEFORE.moe AFTER.moe", file=sys.stderr)
        return 2
    try:
        text, *graphs = (Path(name).read_text("utf-8") for name in sys.argv[1:])
        log = json.loads(text)
        used = accepted(log, *graphs)
        unused = sorted(set(range(len(log["steps"]))) - set(used))
        need(not unused, f"step {(unused or [0])[0]} is of no use")
    except (Rejected, OSError, ValueError) as error:
        print(f"rejected: {error}")
        return 1
    constants = ", for constants as fractions" if log["fractions"] else ""
    print(f"accepted: {len(used)} steps, {len(log['outputs'])} outputs{constants}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
