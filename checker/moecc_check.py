"""moecc-check: an independent checker of proofs that two graphs are the same function.

    moecc-check PROOF BEFORE.moe AFTER.moe

It accepts (exit 0), or names the step, node or output that does not hold (exit 1). It shares no
code with the prover. It believes the equations of moecc_check_lemmas.txt and of
moecc_check_definitions.txt; terms, by which they are applied, and logs are here, graphs in
moecc_check_graphs.py. docs/proof-log.md has the format of a log.

    sum       Σ c·m              rational numbers c, monomials m; an index is a sum, too
    product   Σ_{v…} f·f·…       a monomial: bound index variables, and factors
    factor    v, or head[attributes](functions; sums)
    function  λv…. sum

A term is a node and its free variables in order. A node has places instead of names, exists once,
and orders the parts of sums and products by structure alone: two terms are equal if they are one
node at the same variables, renaming touches no node, and nothing can be captured. A node also knows
in which other orders of its variables it is the same, as x(i)·x(j) is for j, i. A log is advice: it
may name the lemma to use where a node is built, after its conditions are checked there.
"""

import ast
import hashlib
import itertools
import json
import re
import struct
import sys
from collections import Counter, namedtuple
from fractions import Fraction
from functools import reduce
from math import factorial, inf, isfinite, prod
from pathlib import Path

import moecc_check_graphs as reading
from moecc_check_graphs import MALFORMED, Rejected, need, read_table, scalar
from moecc_check_steps import Continuation

SCHEMA = "moecc.proof/1"
NOTES = {"fractions": ", for constants as fractions", "parts": ", for a part of the batch",
         "frozen": ", but for gradients of parameters that the log calls frozen",
         "step": ", for a step of generation"}  # fmt: skip
USAGE = "usage: moecc-check PROOF BEFORE.moe AFTER.moe\nexit: 0 accepted, 1 rejected, 2 usage"
MOST_ORDERS = 720
"""So many orders of like parts are tried; of more, equal terms may be seen to be different."""


# Terms.


class Values:
    """Arithmetic of what has a value: variables, terms, heads and tensors."""

    def __add__(self, other):
        return self.algebra.add(self, other)

    def __mul__(self, other):
        is_number = isinstance(other, int | Fraction)
        return (self.algebra.scale if is_number else self.algebra.multiply)(self, other)

    def __neg__(self):
        return self.algebra.scale(self, -1)

    def __sub__(self, other):
        return self.algebra.add(self, self.algebra.scale(other, -1))

    def __rsub__(self, other):
        return self.algebra.add(other, -self)

    __radd__, __rmul__ = __add__, __mul__


class Var(Values, namedtuple("Var", "serial name size algebra")):
    """An index from 0 to below its size: a number, or the name of an open size of at least 1."""


class Term(Values, namedtuple("Term", "node vars")):
    """A node at distinct variables, in the first order of those that are the same term."""

    algebra = property(lambda self: self.node.algebra)

    def __new__(cls, node, names):
        orders = (tuple(names[i] for i in order) for order in node.orders)
        return super().__new__(cls, node, min(orders, default=names))

    @property
    def orders(self):
        """The orders of the variables in which this is the same term."""
        return [tuple(self.vars[i] for i in o) for o in self.node.orders] or [self.vars]

    def __call__(self, *arguments):
        """Return the value of a function."""
        bound, body = self.algebra.entered(self)
        values = map(self.algebra.value, arguments)
        return self.algebra.substitute(body, dict(zip(bound, values, strict=True)))


class Tensor(Values, namedtuple("Tensor", "axes body finite dtype slots", defaults=(None,))):
    """A value at its indices: axes, element, whether certainly finite, type, and whose slots."""

    algebra = property(lambda self: self.body.node.algebra)

    def axis(self, name):
        return {v.name: v for v in self.axes}[name]


class Head(Values, namedtuple("Head", "algebra name attrs functions", defaults=((), None))):
    """A head with attributes, and then functions; called with arguments, it is a factor."""

    def __getitem__(self, attrs):
        return self._replace(attrs=attrs if isinstance(attrs, tuple) else (attrs,))

    def __call__(self, *operands):
        if self.functions is None and all(self.algebra.kind(x) == "function" for x in operands):
            return self._replace(functions=operands)
        return self.algebra.apply(self.name, self.attrs, self.functions or (), operands)


class Node:
    """The structure of a term: kind, label, parts with places of variables, sizes of the free.

    It is the same in other orders of the free variables, if there are some.
    """

    def __init__(self, kind, label, parts, sizes, orders, number, algebra):
        self.kind, self.label, self.parts, self.sizes = kind, label, parts, sizes
        self.orders, self.number, self.algebra = orders, number, algebra


def loose(size):
    """Return a size without the tag of its assignment of slots, which free variables have."""
    return size.split(" ")[0] if isinstance(size, str) else size


def orders_of(tagged, bound):
    """Return the orders of pairs of tags and terms that are left by tags, nodes and variables.

    Colours of terms and of variables refine each other. Any order is right: it only decides whether
    equal terms are seen to be equal.
    """
    if len({(k, t.node.number) for k, t in tagged}) == len(tagged):
        return [sorted(tagged, key=lambda pair: (pair[0], pair[1].node.number))]
    colour, count, previous = {v: int(v in bound) for _, t in tagged for v in t.vars}, 0, -1
    while count != previous:
        rows = [(k, t.node.number, min(tuple(colour[v] for v in names) for names in t.orders))
                for k, t in tagged]  # fmt: skip
        distinct = {row: i for i, row in enumerate(sorted(set(rows)))}
        places = {v: [] for v in colour}
        for row, (_, t) in zip(rows, tagged, strict=True):
            for v in t.vars:
                places[v].append((distinct[row], min(names.index(v) for names in t.orders)))
        finer = {v: (colour[v], tuple(sorted(places[v]))) for v in colour}
        levels = sorted(set(finer.values()))
        colour = {v: levels.index(c) for v, c in finer.items()}
        count, previous = len(distinct) + len(levels), count
    groups = [[tagged[i] for i, r in enumerate(rows) if r == row] for row in distinct]
    if prod(factorial(len(g)) for g in groups) > MOST_ORDERS:
        return [[pair for g in groups for pair in sorted(g, key=lambda pair: pair[1].vars)]]
    choices = itertools.product(*(itertools.permutations(g) for g in groups))
    return [[pair for g in choice for pair in g] for choice in choices]


class Algebra:
    """Builds terms, and takes the advice of a log for what is built."""

    def __init__(self, table, words, exact=False, fractions=False):
        self.table, self.words, self.exact = table, words, exact
        self.nodes, self.axes, self.serial = {}, {}, itertools.count()
        self.advice, self.results, self.used, self.open = {}, {}, set(), set()
        self.place = Node("place", None, (), (), (), -1, self)
        self.scope = {**vocabulary(self), "fractions": fractions}

    def fresh(self, size, name="_"):
        need(isinstance(size, str) or (isinstance(size, int) and size > 0), f"an axis of {size}")
        return Var(next(self.serial), name, size, self)

    def axis(self, name, size):
        if (name, size) not in self.axes:
            self.axes[name, size] = self.fresh(size, name)
        return self.axes[name, size]

    def packed(self, kind, label, orders, bound=()):
        """Return a node, in which `bound` are hidden, at the free variables; and the bound ones.

        Of orders of parts that are the same, and of their variables, the node has the least; those
        as small are orders of its own variables.
        """
        rows = [(x, names) for x in orders for names in itertools.product(*(p.orders for p in x))]
        least, results = None, []
        for parts, row in rows if len(rows) <= MOST_ORDERS else rows[:1]:
            seen = list(dict.fromkeys(v for names in row for v in names))
            inner, free = list(bound), [v for v in seen if v not in bound]
            if kind == "product":
                inner.sort(key=lambda v: (seen.index(v) if v in seen else inf, str(v.size)))
                label = tuple(v.size for v in inner)
            places = {
                **{v: i for i, v in enumerate(free)},
                **{v: -1 - i for i, v in enumerate(inner)},
            }
            shape = [(p.node, tuple(places[v] for v in names))
                     for p, names in zip(parts, row, strict=True)]  # fmt: skip
            rank = [(n.number, at) for n, at in shape], [*map(str, label)] if bound else []
            if least is None or rank < least:
                least, results, key = rank, [], (kind, label, tuple(shape))
            if rank == least:
                results.append((tuple(free), inner))
        free, inner = min(results, key=lambda pair: pair[0])
        if key not in self.nodes:
            orders = tuple({tuple(map(free.index, names)) for names, _ in results})
            sizes = tuple(loose(v.size) for v in free)
            orders = orders if len(orders) > 1 else ()
            self.nodes[key] = Node(*key, sizes, orders, len(self.nodes), self)
        return Term(self.nodes[key], free), inner

    def parts(self, term, bound=()):
        """Return the parts of a term, with variables for the bound ones."""
        return [Term(n, tuple(term.vars[i] if i >= 0 else bound[-1 - i] for i in places))
                for n, places in term.node.parts]  # fmt: skip

    def sum(self, terms):
        """Return Σ c·m, from a dictionary of monomials."""
        orders = orders_of([(c, m) for m, c in terms.items() if c], ())
        label = tuple(c for c, _ in orders[0])
        return self.packed("sum", label, [[m for _, m in pairs] for pairs in orders])[0]

    def product(self, bound, factors):
        """Return Σ_bound of the product, and the order of its bound variables."""
        orders = orders_of([(0, f) for f in factors], set(bound))
        return self.packed("product", (), [[f for _, f in row] for row in orders], bound)

    def function(self, bound, body, is_let=False):
        sizes = tuple(loose(v.size) if is_let else v.size for v in bound)
        return self.packed("function", sizes, [[body]], bound)[0]

    def application(self, head, attrs, functions, arguments):
        """Return a factor; names have any order of their variables, symmetric heads both."""
        if head in ("mod", "div", "experts", "permutation", "hashed_expert"):
            need(isinstance(attrs[0], int) and attrs[0] > 0, f"{head} of {attrs[0]}")
        if head == "experts":
            need(all(f.node.label == attrs[:1] for f in functions), "experts of other sizes")
        orders = [[*functions, *arguments]]
        if head == "let":
            bound, body = self.entered(functions[0])
            pairs, orders = dict(zip(bound, arguments, strict=True)), []
            for names in body.orders:
                names = [v for v in names if v in pairs]
                orders.append([self.function(names, body, True), *(pairs[v] for v in names)])
        elif head in ("maximum", "minimum"):
            orders.append([*functions, *arguments[::-1]])
        elif head == "equal":
            orders.append([self.scale(x, -1) for x in arguments])
        return self.packed("apply", (head, attrs, len(functions)), orders)[0]

    # Views.

    def kind(self, x):
        return x.node.kind if isinstance(x, Term) else ""

    def value(self, x):
        """Return what has a value as a sum; a function stays as it is."""
        if isinstance(x, Tensor):
            return x.body
        if isinstance(x, Head):
            return self.apply(x.name, x.attrs, x.functions or (), ())
        if isinstance(x, Var):
            x = self.packed("variable", loose(x.size), [[Term(self.place, (x,))]])[0]
        if isinstance(x, int | Fraction):
            return self.sum({self.product((), ())[0]: Fraction(x)})
        need(isinstance(x, Term), f"{type(x).__name__} is no value")
        if x.node.kind in ("variable", "apply"):
            x = self.product((), (x,))[0]
        return self.sum({x: Fraction(1)}) if x.node.kind == "product" else x

    def terms(self, total):
        total = self.value(total)
        return list(zip(total.node.label, self.parts(total), strict=True))

    def entered(self, term):
        """Return bound variables, fresh, and the body of a function or factors of a product."""
        bound = [self.fresh(s) for s in term.node.label]
        parts = self.parts(term, bound)
        return bound, parts[0] if term.node.kind == "function" else parts

    def applied(self, factor):
        """Return head, attributes, functions and arguments of a factor that has them."""
        factor = self.factor(factor) if self.kind(factor) == "sum" else factor
        if self.kind(factor) != "apply":
            return "", (), [], []
        (head, attrs, n), parts = factor.node.label, self.parts(factor)
        return head, attrs, parts[:n], parts[n:]

    def constant(self, total):
        """Return the number that a sum is, or None."""
        terms = self.terms(total)
        if terms and (len(terms) > 1 or terms[0][1].node.label or terms[0][1].node.parts):
            return None
        number = terms[0][0] if terms else Fraction(0)
        return int(number) if number.denominator == 1 else number

    def factor(self, total):
        """Return the factor that a sum is, or None."""
        terms = self.terms(total)
        is_plain = len(terms) == 1 and terms[0][0] == 1 and not terms[0][1].node.label
        factors = self.parts(terms[0][1]) if is_plain else ()
        return factors[0] if len(factors) == 1 else None

    def variable(self, total):
        factor = self.factor(total)
        return factor.vars[0] if self.kind(factor) == "variable" else None

    def tag(self, slots):
        """Return the name of an assignment of slots."""
        if isinstance(slots, Tensor) and slots.slots:
            return slots.slots[1]
        return f"{self.value(slots).node.number} {[v.serial for v in self.value(slots).vars]}"

    # Values, for which advice is taken.

    def scale(self, total, by):
        return self.sum({m: c * Fraction(by) for c, m in self.terms(total)})

    def add(self, *totals):
        terms = Counter()
        for c, m in (pair for t in totals for pair in self.terms(t)):
            terms[m] += c
        result = self.sum(terms)
        return self.rewritten(result, result) if len(result.node.parts) > 1 else result

    def apply(self, head, attrs=(), functions=(), arguments=()):
        arguments = list(map(self.value, arguments))
        factor = self.application(head, tuple(attrs), list(functions), arguments)
        return self.rewritten(factor, self.value(factor))

    def multiply(self, *totals, over=()):
        """Return the sum over free variables of the product of sums."""
        results = []
        for choice in itertools.product(*map(self.terms, totals)):
            opened = [self.entered(m) for _, m in choice]
            bound = [*over, *(v for inner, _ in opened for v in inner)]
            factors = [f for _, row in opened for f in row]
            plain = self.value(term := self.product(bound, factors)[0])
            result = self.rewritten(term, plain) if bound or len(factors) > 1 else plain
            results.append(self.scale(result, prod((c for c, _ in choice), start=Fraction(1))))
        return results[0] if len(results) == 1 else self.add(*results)

    def rewritten(self, term, plain):
        """Return what a lemma says of a term that is built, if there is advice for its node."""
        node = term.node
        if node not in self.advice:
            return plain
        if node not in self.results:
            step, lemma, parameters = self.advice[node]
            names = tuple(map(self.fresh, node.sizes))
            need(node not in self.open, f"step {step} ({lemma}) rests on itself")
            self.open.add(node)
            bound, factors = self.entered(Term(node, names)) if node.kind == "product" else ((), ())
            given = [p(names, bound) if callable(p) else p for p in parameters]
            words = {"B": list(bound), "R": list(factors)}
            result = self.defined(("lemma", lemma), (*given, Term(node, names)), (), words)
            need(result is not None, f"step {step} ({lemma}): its conditions do not hold")
            self.results[node] = names, self.value(result)
            self.used.add(step)
        names, result = self.results[node]
        renamed = dict(zip(names, term.vars, strict=True))
        return Term(result.node, tuple(renamed[v] for v in result.vars))

    # Substitution, which builds again from the inside out what it changes.

    def substitute(self, total, values, memo=None):
        """Return a sum with variables, and perhaps factors of them, replaced by sums."""
        memo = {} if memo is None else memo
        if not any(v in values for v in total.vars):
            return total
        if total not in memo:
            new = [self.variable(values[v]) if v in values else v for v in total.vars]
            is_renamed = None not in new and len(set(new)) == len(new) and all(
                loose(v.size) == loose(w.size) for v, w in zip(total.vars, new, strict=True)
            )  # fmt: skip
            if is_renamed and all(isinstance(v, Var) for v in values):
                memo[total] = Term(total.node, tuple(new))
            else:
                memo[total] = self.changed(total, lambda f: self._replaced(f, values, memo))
        return memo[total]

    def _replaced(self, factor, values, memo):
        if factor in values or factor.node.kind == "variable":
            return values.get(factor) or values.get(factor.vars[0]) or self.value(factor)
        if not any(v in values for v in factor.vars):
            return self.value(factor)
        if factor not in memo:
            memo[factor] = self.rebuilt(factor, lambda t: self.substitute(t, values, memo))
        return memo[factor]

    def changed(self, total, change):
        """Return a sum whose factors become other sums."""
        results = []
        for coefficient, monomial in self.terms(total):
            bound, factors = self.entered(monomial)
            product = self.multiply(1, *map(change, factors), over=bound)
            results.append(self.scale(product, coefficient))
        return results[0] if len(results) == 1 else self.add(*results)

    def rebuilt(self, factor, change, mark=()):
        """Return an application whose arguments, and bodies of functions, become others."""
        head, attrs, functions, arguments = self.applied(factor)
        opened = [(f, *self.entered(f)) for f in functions]
        inner = [self.function(bound, change(body), head == "let") if f.vars else f  # or closed
                 for f, bound, body in opened]  # fmt: skip
        return self.apply(head, attrs + mark, inner, map(change, arguments))

    def stopped(self, total):
        """Return a sum over stopped twins of its sources; a closed function is marked as one."""

        def twin(factor):
            head, attrs, functions, _ = self.applied(factor)
            if not head or head in self.words["integers"]:
                return self.value(factor)
            is_marked = head in self.words["leaves"] or any(not f.vars for f in functions)
            mark = ("stopped",) if is_marked and attrs[-1:] != ("stopped",) else ()
            return self.rebuilt(factor, self.stopped, mark)

        return self.changed(self.value(total), twin)

    # Names and cuts, which are always true.

    def named(self, total):
        """Return (λv. total)(v) for all v in it."""
        total = self.value(total)
        if not total.node.parts or self.factor(total):
            return total
        return self.apply("let", (), [self.function(total.vars, total, True)], total.vars)

    def cut(self, total, role="factor"):
        total = self.value(total)
        step, _, (word,) = self.advice.get((total.node, role), (-1, "", ("",)))
        self.used.add(step)
        if word == "name":
            return self.named(total)
        is_group = word == "group" and role == "factor"
        return self.apply("group", (), (), [total]) if is_group else total

    def is_integral(self, total):
        def is_integer(factor):
            head, _, _, arguments = self.applied(factor)
            is_whole = head != "mod" or self.is_integral(arguments[0])
            return factor.node.kind == "variable" or (head in self.words["integers"] and is_whole)

        return all(c.denominator == 1 and all(map(is_integer, self.entered(m)[1]))
                   for c, m in self.terms(total))  # fmt: skip

    def bounds(self, total):
        """Return the least and the greatest value of an index; infinite if unknown."""
        low = high = Fraction(0)
        for c, m in self.terms(total):
            bound, factors = self.entered(m)
            if bound or len(factors) > 1:
                return -inf, inf
            ends = sorted(c * end for end in (self._bounds(factors[0]) if factors else (1, 1)))
            low, high = low + ends[0], high + ends[1]
        return tuple(int(e) if isfinite(e) and e == int(e) else e for e in (low, high))

    def _bounds(self, factor):
        if factor.node.kind == "variable":
            size = factor.vars[0].size
            return 0, size - 1 if isinstance(size, int) else inf
        return self.defined(("bounds", factor.node.label[0]), (factor,)) or (-inf, inf)

    # Entries of the table.

    def defined(self, entry, operands, options=(), words=()):
        """Return what the first entry of a kind and name whose conditions hold says, or None."""
        for rule in self.table.get(entry, ()):
            if self.exact and "†" not in rule.marks and entry[0] not in ("define", "bounds"):
                continue
            scope = {**self.scope, **dict(words)}
            for name in rule.names:
                scope.pop(name, None)
            for name, default in rule.options.items():
                x = dict(options).get(name, default)
                scope[name] = (x,) if default == () and type(x) is not tuple else x
            if self.match_all(rule.operands, operands, scope):
                result = self.run(rule.lines, scope)
                if result is not None:
                    return result
        return None

    def run(self, lines, scope):
        """Return the right side of an equation; None where a condition does not hold."""
        for kind, target, code in lines:
            value = eval(code, scope)
            if kind == "=":
                return value
            if isinstance(target, ast.Name):
                scope[target.id] = value
            elif not (self.matches(target, value, scope) if target else value):
                return None
        return None

    def match_all(self, patterns, values, scope):
        stars = [i for i, p in enumerate(patterns) if isinstance(p, ast.Starred)]
        if not stars:
            return len(patterns) == len(values) and all(
                self.matches(p, x, scope) for p, x in zip(patterns, values, strict=True)
            )
        (i,), end = stars, len(values) - len(patterns) + stars[0] + 1
        return i <= end and (
            self.match_all(patterns[:i], values[:i], scope)
            and self.matches(patterns[i].value, tuple(values[i:end]), scope)
            and self.match_all(patterns[i + 1 :], values[end:], scope)
        )

    def matches(self, pattern, x, scope):
        """Return whether a value has a pattern, and bind the names in it, or compare them."""
        if isinstance(pattern, ast.Name | ast.Constant):
            name = getattr(pattern, "id", None)
            y = scope.setdefault(name, x) if name else pattern.value
            return y == x or (isinstance(y, Values | int) and self.value(y) == x)
        if isinstance(pattern, ast.Tuple):
            return self.match_all(pattern.elts, x, scope)
        attrs = functions = arguments = ()
        if isinstance(pattern, ast.Call):
            arguments, pattern = pattern.args, pattern.func
            if getattr(pattern, "id", "") == "sum":
                return self.kind(x) == "sum" and self.matches(arguments[0], x, scope)
            if getattr(pattern, "id", "") == "Σ":  # the named parts are none of B and R
                for name in (a.id for a in arguments):  # small letters are variables
                    whole = "B" if name.islower() else "R"
                    for y in scope[name] if type(scope[name]) is tuple else (scope[name],):
                        scope[whole] = [*scope[whole]]
                        scope[whole].remove(y)
                return self.kind(x) == "product"
        if isinstance(pattern, ast.Call):
            functions, pattern = pattern.args, pattern.func
        if isinstance(pattern, ast.Subscript):
            attrs = pattern.slice
            attrs, pattern = attrs.elts if isinstance(attrs, ast.Tuple) else [attrs], pattern.value
        x = (x.slots or (x.body,))[0] if isinstance(x, Tensor) else x
        head, *parts = self.applied(x)
        name = scope.setdefault(pattern.id, Head(self, head)).name
        patterns = (attrs, functions, arguments)
        return name == head and all(map(self.match_all, patterns, parts, [scope] * 3))


# The words of the table.


def vocabulary(a):
    """Return the words of the table, by name."""

    def apart(variables, *terms):
        variables = [variables] if isinstance(variables, Var) else variables
        return not any(v in t.vars for v in variables for t in terms)

    def sigma(variables, *parts):
        row = [x for p in parts for x in (p if isinstance(p, list) else [p])]
        return a.multiply(*row, over=list(variables))

    def put(x, values):
        if isinstance(x, list):
            return [put(f, values) for f in x]
        body, wanted = a.value(x), {}
        for key, t in values.items():
            if isinstance(key, Term):  # a factor, which is where its variables are
                wanted.update({key: a.value(t), **{v: a.value(v) for v in key.vars}})
            wanted.update({v: a.value(t) for v in body.vars if key in (v, v.name)})
        return a.substitute(body, wanted)

    def divided(index, n):
        terms = a.terms(index)
        quotient = a.sum({m: c / n for c, m in terms if c % n == 0})
        return quotient, a.sum({m: c for c, m in terms if c % n})

    def parts(monomial, variables):
        sizes = tuple(v.size for v in variables)
        need(monomial.node.label == sizes and not {*variables} & {*monomial.vars}, "other sums")
        return a.parts(monomial, variables)

    defines = [name for kind, name in a.table if kind == "define"]
    # fmt: off
    return {
        **{h: Head(a, h) for k in ("heads", "integers", "positive", "leaves") for h in a.words[k]},
        **{n: lambda *xs, entry=("define", n): a.defined(entry, xs) for n in defines},
        "__builtins__": {}, "all": all, "any": any, "len": len, "tuple": tuple, "zip": zip,
        "dict": dict, "sorted": sorted, "abs": abs, "span": range, "tally": sum,
        "float_of": float, "larger": max, "smaller": min, "text": str, "integer_of": int,
        "fold": reduce, "prod": prod,
        "exact": Fraction, "ratio": lambda p, q: Fraction(p) / Fraction(q),
        "f32": lambda v: struct.unpack("<f", struct.pack("<f", v))[0],
        "is_number": lambda v: not isinstance(v, str), "is_bounded": isfinite, "scalar": scalar,
        "width": lambda x: x.size if isinstance(x, Var) else x.node.label[0],
        "widths": lambda f: f.node.label, "apart": apart, "Σ": sigma, "put": put, "parts": parts,
        "λ": lambda v, x: a.function([v] if isinstance(v, Var) else list(v), a.value(x)),
        "value": a.value, "total": a.add, "fresh": a.fresh, "constant": a.constant,
        "terms": a.terms, "factor": a.factor, "variable": a.variable, "integral": a.is_integral,
        "stopped": a.stopped, "named": a.named, "cut": a.cut, "new": a.axis, "divided": divided,
        "summand": lambda x: a.cut(x, "summand"), "head": lambda n: Head(a, n),
        "coefficient": lambda x, y: {m: c for c, m in a.terms(x)}.get(a.terms(y)[0][1], 0),
        "tag": a.tag, "is_a": lambda k, x: a.applied(x)[0] in a.words[k],
        "low": lambda t: a.bounds(t)[0], "high": lambda t: a.bounds(t)[1],
        "attributes": lambda x: a.applied(x)[1],
        "opened": lambda f: (lambda bound, body: (bound[0], body))(*a.entered(f)),
        "tensor": lambda axes, x, dtype="", finite=True:
            Tensor(tuple(axes), a.value(x), finite, dtype),
    }
    # fmt: on


# Logs, and the check.


def placed(x, places):
    """Return a variable or term as a function of a subject's free and bound variables."""
    where = [places[v] for v in ([x] if isinstance(x, Var) else x.vars)]

    def at(free, bound):
        names = tuple(free[i] if i >= 0 else bound[-1 - i] for i in where)
        return names[0] if isinstance(x, Var) else Term(x.node, names)

    return at


def read_log(log, exact=False, fractions=False):
    """Return an algebra with advice: the lemma for a node, with its parameters at its variables."""
    names = Counter(name for name, _, _ in log["steps"])
    need(log.get("lemmas", names) == names, "counts of lemmas that are not those of the steps")
    a = Algebra(*read_table(), exact, fractions)
    rows = []  # a term or variable, and of a product the places of bound variables

    def frozen(value):
        if match := isinstance(value, str) and re.fullmatch(r"(slots|groups) (\d+)", value):
            return f"{match[1]} {a.tag(rows[int(match[2])][0])}"
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    def row(number, *kinds):
        term = rows[number][0]
        need(a.kind(term) in kinds, f"row {number} is none of {kinds}")
        return a.factor(term) if "apply" in kinds else term

    for kind, *fields in log["terms"]:
        places = {}
        if kind == "variable":
            term = a.axis(*map(frozen, fields))
        elif kind == "sum":
            term = a.sum({row(m, "product"): Fraction(c) for c, m in fields[0]})
        elif kind == "product":
            factors = [row(i, "", "apply") for i in fields[1]]
            term, names = a.product([row(i, "") for i in fields[0]], factors)
            places = {v: -1 - i for i, v in enumerate(names)}
        elif kind == "apply":
            functions = [row(i, "function") for i in fields[2]]
            arguments = [row(i, "sum") for i in fields[3]]
            term = a.application(fields[0], frozen(fields[1]), functions, arguments)
        else:
            need(kind == "function", f"a row of unknown kind {kind!r}")
            term = a.function([row(i, "") for i in fields[0]], row(fields[1], "sum"))
        rows.append((term, places))

    for number, (name, at, values) in enumerate(log["steps"]):
        if name in ("equality of opposites", "either order"):
            continue  # one term here
        cut = name in ("cut factor", "cut summand")
        need(cut or ("lemma", name) in a.table, f"step {number}: no lemma is named {name!r}")
        subject, bound = rows[at]
        places = {**{v: i for i, v in enumerate(subject.vars)}, **bound}
        key = (subject.node, name[4:]) if cut else subject.node
        values = [placed(rows[v["term"]][0], places) if isinstance(v, dict) else v for v in values]
        a.advice.setdefault(key, (number, name, values))
    return a


def believe(log, *algebras):
    """Add what a log says of operations without a definition, which is believed."""
    own, commutative = ({*log.get(k, ())} for k in ("elementwise", "commutative"))
    for a in algebras:
        for name in own | commutative:
            is_known = ("operation", name) in a.table or name in a.words["elementwise"]
            need(isinstance(name, str) and not is_known, f"{name} has a meaning of its own")
            need(not a.exact, f"{name} is not known bit for bit")
        a.words = {**a.words, "own": own, "commutative": a.words["commutative"] | commutative}


def check(log, before, after):
    """Return the numbers of the steps that a proof needs, and of those about devices."""
    need(log["schema"] == SCHEMA, f"the schema is not {SCHEMA}")
    for key, text in (("before", before), ("after", after)):
        digest = hashlib.sha256(text.encode()).hexdigest()
        need(log[key] == digest, f"it is a proof of another graph {key!r}")
    if log.get("step"):
        need(
            not any(log.get(k) for k in ("exact", "steps", "devices", "parts", "frozen")),
            "a step alone",
        )
        continuation = Continuation(Algebra(*read_table()), False)
        believe(log, continuation.a)
        continuation.check(*map(reading.graph_of, (before, after)), log["outputs"])
        return [[], []]
    a = read_log(log, bool(log["exact"]), bool(log.get("fractions")))
    devices = reading.Devices(read_log(log.get("devices", {"terms": [], "steps": []})))
    believe(log, a, devices.a)
    evaluation = reading.Evaluation(a, bool(log.get("rolled")))
    reading.check_graphs(evaluation, devices, (before, after), log)
    return [sorted(x.used - {-1}) for x in (a, devices.a)]


def accepted(log, before, after):
    """Return the numbers of the steps that are needed. Raises: Rejected, whatever is wrong."""
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
    asked = not {"-h", "--help"}.isdisjoint(sys.argv)
    if asked or len(sys.argv) != 4:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        text, *graphs = (Path(name).read_text("utf-8") for name in sys.argv[1:])
        log = json.loads(text)
        used = accepted(log, *graphs)
        for part, numbers in zip((log, log.get("devices", {"steps": []})), used, strict=True):
            unused = {*range(len(part["steps"]))} - {*numbers}
            need(not unused, f"step {min(unused, default=0)} is of no use")
    except (Rejected, OSError, ValueError) as error:
        place = f"{sys.argv[1]} is not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        print(f"rejected: {place}{error}")
        return 1
    notes = [text for key, text in NOTES.items() if log.get(key)]
    notes += [f", if {name} works element by element" for name in log.get("elementwise", ())]
    notes += [f", if operands of {name} may be exchanged" for name in log.get("commutative", ())]
    if "\n  attr mesh = " in "".join(graphs):
        notes.append(f", on all devices{', in real arithmetic' if log['exact'] else ''}")
    steps, outputs = (f"{n} {of}{'s' * (n != 1)}" for n, of in
                      ((sum(map(len, used)), "step"), (len(log["outputs"]), "output")))  # fmt: skip
    print(f"accepted: {steps}, {outputs}{''.join(notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
