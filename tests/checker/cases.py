"""Uses of every lemma of the checker: one where its conditions hold, and others where one does not.

The functions take the checker as a module, so that they judge its mutants, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

Case = tuple[str, bool, Any, tuple[Any, ...]]
"""A lemma, whether it holds, a term and parameters."""

EVEN = (0, 2, 4, 6)


class Notation:
    """Short names for terms of a checker's algebra."""

    def __init__(self, checker: Any) -> None:
        self.c, self.a = checker, checker.Algebra()
        self.axes: dict[tuple[str, Any], Any] = {}

    def v(self, name: str, size: Any = 8) -> Any:
        return self.a.axis(name, size)

    def i(self, name: str, size: Any = 8, by: Any = 1) -> Any:
        return self.a.scale(self.a.index(self.v(name, size)), by)

    def n(self, value: Any) -> Any:
        return self.a.number(value)

    def plus(self, *terms: Any) -> Any:
        return self.a.add(*terms)

    def f(self, head: str, attrs: tuple[Any, ...], arguments: Any = (), functions: Any = ()) -> Any:
        return self.a.application(head, attrs, list(functions), list(arguments))

    def lone(self, *args: Any) -> Any:
        return self.a.lone(self.f(*args))

    def fun(self, v: Any, body: Any) -> Any:
        return self.a.function([v], body)

    def source(self, *arguments: Any, name: str = "w") -> Any:
        return self.lone("source", (name, "f32"), arguments)

    def sigma(self, bound: list[Any], *factors: Any) -> tuple[Any, list[int], list[int]]:
        """Return a product, and the places of its bound variables and factors."""
        term, names, row = self.a.product(bound, factors)
        return term, [names.index(v) for v in bound], [row.index(f) for f in factors]

    def of(self, function: Any) -> Any:
        """Return the parameter that is this function."""
        return lambda _: function

    def holds(self, name: str, term: Any, parameters: tuple[Any, ...]) -> bool:
        """Return whether a lemma says something of a term."""
        kind = term.node.kind
        heads = self.c.LEMMAS[name][0]
        if heads != kind and self.a.applied(term)[0] not in heads.split():
            return False
        view = {"apply": self.a.applied, "product": self.a.entered}.get(kind, lambda t: (t,))
        try:
            return self.c.LEMMAS[name][2](self.a, *view(term), *parameters) is not None
        except self.c.MALFORMED:
            return False


def cases(s: Notation) -> Iterator[Case]:
    """Yield uses of lemmas."""
    a, i, n = s.a, s.i, s.n
    half = Fraction(1, 2)
    for name, head in (("quotient", "div"), ("remainder", "mod")):
        yield name, True, s.f(head, (4,), [s.plus(i("q", 3, 4), i("r", 4))]), ()
        yield name, False, s.f(head, (4,), [s.plus(i("q", 3, 4), i("r", 5))]), ()
        yield name, False, s.f(head, (4,), [s.plus(i("q", 3, 4), i("r", 4, -1))]), ()
        yield name, False, s.f(head, (4,), [s.plus(i("q", 3, 4), i("r", 4, half))]), ()
        yield name, False, s.f(head, (4,), [s.plus(i("q", 3, 4), i("r", "S"))]), ()
    inner = s.lone("div", (2,), [i("i")])
    yield "quotient of a quotient", True, s.f("div", (2,), [inner]), ()
    yield "quotient of a quotient", False, s.f("div", (2,), [s.lone("mod", (2,), [i("i")])]), ()
    div, mod = s.lone("div", (4,), [i("i")]), s.lone("mod", (4,), [i("i")])
    for by, is_true in ((4, True), (3, False)):
        total = s.plus(a.scale(div, by), mod)
        at = [m for _, m in a.terms(total)].index(a.terms(mod)[0][1])
        yield "quotient and remainder", is_true, total, (at,)
    ranges = {
        (0, 8): True,
        (0, 7): False,
        (1, 8): False,
        (8, 9): True,
        (-3, 0): True,
        (7, 9): False,
    }
    for ends, is_true in ranges.items():
        yield "range", is_true, s.f("range", ends, [i("i")]), ()
    for shift, is_true in ((0, True), (-1, False), (-8, True), (-7, False)):
        yield "comparison", is_true, s.f("at_least_0", (), [s.plus(i("i"), n(shift))]), ()
    for shift, is_true in ((-8, True), (-7, False), (1, True), (0, False)):
        yield "equality", is_true, s.f("equal", (), [s.plus(i("i"), n(shift))]), ()
    yield "equality", True, s.f("equal", (), [n(0)]), ()
    yield from _slots(s)
    yield from _stacks(s)
    yield from _choices(s)
    yield from _sums(s)


def _slots(s: Notation) -> Iterator[Case]:
    a, key = s.a, ("K", 8, 2)
    t, c = s.i("t"), s.i("c", 2)
    functions = [a.function([s.v("t"), s.v("c", 2)], s.lone("experts", (4, 2, "x"), [s.i("c", 2)]))]
    expert = a.at(functions[0], [t, c])
    group = s.lone("group_of", key, [t], functions)
    own = s.lone("own_slot", key, [t, c], functions)
    other = s.lone("own_slot", ("L", 8, 2), [t, c], functions)
    for head, attrs in (("token_of", (0, *key)), ("occupied", key)):
        yield "slot of a choice", True, s.f(head, attrs, [group, expert, own], functions), ()
        for places in (
            [group, expert, other],
            [group, s.n(1), own],
            [s.n(0), expert, own],
            [group, expert, c],
        ):
            yield "slot of a choice", False, s.f(head, attrs, places, functions), ()


def _stacks(s: Notation) -> Iterator[Case]:
    i = s.i
    parts = [s.source(i("j"), name=name) for name in "uv"]
    for at, is_true in ((0, True), (1, True), (2, False), (-1, False), (Fraction(1, 2), False)):
        yield "place in a stack", is_true, s.f("stack", (2,), [s.n(at), *parts]), ()
        family = s.f("family", (("u", "v"), "f32"), [s.n(at), i("j")])
        yield "member of a family", is_true, family, ()
    yield "place in a stack", False, s.f("stack", (2,), [i("i", 2), *parts]), ()
    yield "place in a stack", True, s.f("stack", (2,), [i("i", 2), parts[0], parts[0]]), ()
    place = s.plus(i("i", 2), s.n(1))
    yield "places within a stack", True, s.f("stack", (4,), [place, *parts, *parts]), ()
    yield "places within a stack", False, s.f("stack", (2,), [place, *parts]), ()
    before = s.plus(i("i", 2), s.n(-1))
    yield "places within a stack", False, s.f("stack", (4,), [before, *parts, *parts]), ()
    unknown = [s.lone("tanh", ("u",), [i("j")])] * 2
    yield "stack of sources", False, s.f("stack", (2,), [i("i", 2), *unknown]), ()
    yield "stack of sources", True, s.f("stack", (2,), [i("i", 2), *parts]), ()
    for part in (s.source(i("k"), name="v"), s.lone("source", ("v", "bf16"), [i("j")]), i("j")):
        yield "stack of sources", False, s.f("stack", (2,), [i("i", 2), parts[0], part]), ()
    members = [s.source(s.n(j)) for j in (0, 1)]
    function = s.fun(s.v("i", 2), s.source(i("i", 2)))
    stack = s.f("stack", (2,), [i("i", 2), *members])
    yield "stack by its members", True, stack, (s.of(function),)
    for place in (before, i("i", 2, Fraction(1, 2))):
        yield (
            "stack by its members",
            False,
            s.f("stack", (2,), [place, *members]),
            (s.of(function),),
        )
    yield (
        "stack by its members",
        False,
        s.f("stack", (2,), [i("i", 2), *reversed(members)]),
        (s.of(function),),
    )
    yield (
        "stack by its members",
        False,
        s.f("stack", (2,), [i("i", 3), *members]),
        (s.of(function),),
    )


def _repeated(s: Notation, size: int = 8, by: int = 2, name: str = "w") -> Any:
    return s.fun(s.v("x", size), s.source(s.lone("div", (by,), [s.i("x", size)]), name=name))


def _choices(s: Notation) -> Iterator[Case]:
    a, i, v, n = s.a, s.i, s.v, s.n
    plain, constant = s.fun(v("x"), s.source(i("x"))), s.fun(v("x"), s.source(i("t")))
    c = i("c", 2)
    twice = s.f("div", (2,), [s.plus(i("q", 4, 2), i("r", 2))])
    a.advice[twice.node] = (0, "quotient", ())
    for head, lemma in (("share", "equal shares"), ("experts", "best of equal scores")):
        attrs = ("softmax",) if head == "share" else (8, 2, "logits")
        yield lemma, True, s.f(head, attrs, [c], [constant]), ()
        yield lemma, False, s.f(head, attrs, [c], [plain]), ()
    for by, function, is_true in ((2, _repeated(s), True), (3, _repeated(s), False),
                                  (4, _repeated(s), False), (1, plain, False)):  # fmt: skip
        yield (
            "shares of repeated scores",
            is_true,
            s.f("share", ("softmax",), [c], [function]),
            (by,),
        )
        best = s.f("experts", (8, 2, "logits"), [c], [function])
        yield "best of repeated scores", is_true and 2 % by == 0, best, (by,)
    yield "best of repeated scores", False, s.f("experts", (8, 3, "x"), [c], [_repeated(s)]), (2,)
    biased = [plain, constant]
    yield "a bias of all scores", True, s.f("experts", (8, 2, "softmax"), [c], biased), ()
    yield "a bias of all scores", False, s.f("experts", (8, 2, "softmax"), [c], [plain, plain]), ()

    def constants(high: Any) -> Any:
        """Return a bias that is a number at every place: high at even ones."""
        pairs = [n(high) if j in EVEN else n(0) for j in range(8)]
        return s.fun(v("x"), s.lone("stack", (8,), [i("x"), *pairs]))

    # A stack of numbers is a number at each place only by advice.
    for j in range(8):
        for high in (1, 2, Fraction(1, 2)):
            values = [n(high) if p in EVEN else n(0) for p in range(8)]
            a.advice[s.f("stack", (8,), [n(j), *values]).node] = (j, "place in a stack", ())
    undominated = "best of undominated scores"
    good = s.f("experts", (8, 2, "sigmoid"), [c], [plain, constants(2)])
    yield undominated, True, good, (2, 4)
    yield undominated, True, s.f("experts", (8, 4, "sigmoid"), [c], [plain, constants(1)]), (2, 4)
    yield undominated, False, good, (0, 4)
    yield undominated, False, good, (2, 1)
    yield undominated, False, good, (1, 4)
    yield undominated, False, good, (2, 5)
    weak = s.f("experts", (8, 2, "sigmoid"), [c], [plain, constants(Fraction(1, 2))])
    yield undominated, False, weak, (2, 4)
    varying = s.f("experts", (8, 2, "softmax"), [c], [plain, constants(2)])
    yield undominated, False, varying, (2, 4)
    zero = s.f("gate", ("sparsemixer",), [c], [constant, plain])
    yield "sparsemixer of equal scores", True, zero, ()
    yield "sparsemixer of equal scores", False, s.f("gate", ("other",), [c], [constant]), ()
    yield "sparsemixer of equal scores", False, s.f("gate", ("sparsemixer",), [c], [plain]), ()
    third = s.f("gate", ("sparsemixer",), [i("c", 3)], [constant])
    yield "sparsemixer of equal scores", False, third, ()
    yield "function at 0", True, s.f("silu", ("",), [n(0)]), ()
    yield "function at 0", False, s.f("silu", ("",), [n(1)]), ()
    mask = s.lone("mask", ("-inf",), [s.source(i("x")), s.lone("holds", ("p",), [i("x")])])
    keep = s.lone("holds", ("q",), [i("x")])
    yield "masks compose", True, s.f("mask", ("-inf",), [mask, keep]), ()
    yield "masks compose", True, s.f("mask", (0.0,), [mask, n(1)]), ()
    yield "masks compose", False, s.f("mask", (0.0,), [mask, keep]), ()
    yield "inverse", True, s.f("inverse", (), [a.scale(s.source(i("x")), 2)]), ()
    yield "inverse", False, s.f("inverse", (), [s.plus(s.source(i("x")), n(1))]), ()
    yield "inverse", False, s.f("inverse", (), [n(0)]), ()
    yield "common factor", True, s.f("relu", ("",), [a.scale(s.source(i("x")), -2)]), ()
    yield "common factor", False, s.f("relu", ("",), [a.scale(s.source(i("x")), -1)]), ()


def _sums(s: Notation) -> Iterator[Case]:
    a, i, v = s.a, s.i, s.v

    def factor(*args: Any) -> Any:
        return s.f(*args)

    def w(*arguments: Any, name: str = "w") -> Any:
        return a.factor(s.source(*arguments, name=name))

    x = v("x")
    for head, is_true in (("holds", True), ("tanh", False)):
        p = factor(head, ("p",), [i("t")])
        term, _, (at, _) = s.sigma([], p, p)
        yield "indicators are idempotent", is_true, term, (at,)
    p = factor("holds", ("p",), [i("t")])
    term, _, (at, _) = s.sigma([], p, w(i("t")))
    yield "indicators are idempotent", False, term, (at,)
    for size, is_true in (("S", True), ("T", False)):
        term, _, (at, _) = s.sigma([], factor("inverse_size", ("S",)), factor("size", (size,)))
        yield "a size over itself", is_true, term, (at,)
    term, _, (at, _) = s.sigma([], factor("size", ("S",)), factor("size", ("S",)))
    yield "a size over itself", False, term, (at,)
    for root, is_true in (((2, 1), True), ((3, 1), False)):
        term, _, (at, _) = s.sigma([], factor("root", (2, 1)), factor("root", root))
        yield "square of a root", is_true, term, (at,)
    for head, is_true in (("exp", True), ("source", False)):
        z = factor(head, ("",), [i("x")])
        total = a.sum({s.sigma([x], z)[0]: Fraction(1)})
        inverse = factor("inverse", (), [total])
        term, (of,), (at, _) = s.sigma([x], inverse, z)
        yield "a positive sum over itself", is_true, term, (at, of)
        double = factor("inverse", (), [a.scale(total, 2)])
        term, (of,), (at, _) = s.sigma([x], double, z)
        yield "a positive sum over itself", False, term, (at, of)
        term, (of,), (at, *_) = s.sigma([x], inverse, z, w(i("x")))
        yield "a positive sum over itself", False, term, (at, of)
    term, (of,), _ = s.sigma([x], w(i("t")))
    yield "sum of a constant", True, term, (of,)
    term, (of,), _ = s.sigma([x], w(i("x")))
    yield "sum of a constant", False, term, (of,)
    for size, is_true in ((1, True), (2, False)):
        term, (of,), _ = s.sigma([v("x", size)], w(i("x", size)))
        yield "sum of one element", is_true, term, (of,)
    for size, more, is_true in ((8, i("t"), True), (8, i("x"), False), (7, i("t"), False)):
        scores = s.fun(v("y", size), s.source(i("y", size)))
        share = factor("share", ("softmax",), [i("x")], [scores])
        term, (of,), (at, _) = s.sigma([x], share, w(more))
        yield "shares add up", is_true, term, (at, of)
    inner = factor("share", ("softmax",), [i("x")], [s.fun(v("y"), s.source(i("y"), i("x")))])
    term, (of,), (at,) = s.sigma([x], inner)
    yield "shares add up", False, term, (at, of)
    for by, point, is_true in (
        (1, i("t", 8, -1), True),
        (-1, i("t"), True),
        (2, i("t", 8, -1), False),
        (1, s.source(i("t")), False),
        (1, s.lone("integer", ("z",), [i("x")]), False),
    ):
        equal = factor("equal", (), [s.plus(i("x", 8, by), point)])
        term, (of,), (at, _) = s.sigma([x], equal, w(i("x")))
        yield "sum at a point", is_true, term, (at, of)
    open_sum, (of,), (at,) = s.sigma([v("x", "S")], factor("equal", (), [i("x", "S")]))
    yield "sum at a point", False, open_sum, (at, of)
    for by, shift, is_true in ((1, s.n(2), True), (2, s.n(2), False), (1, i("t"), False)):
        inside = factor("range", (3, 5), [s.plus(i("x", 8, by), shift)])
        term, (of,), (at, _) = s.sigma([x], inside, w(i("x")))
        yield "sum over a range", is_true, term, (at, of)
    for head, attrs, is_true in (
        ("permutation", (8, 1), True),
        ("permutation", (9, 1), False),
        ("experts", (8, 8, "logits"), True),
        ("experts", (8, 7, "logits"), False),
        ("hashed_expert", (8, 1), False),
    ):
        scores = [s.fun(v("y"), s.source(i("y")))] if head == "experts" else []
        choice = factor(head, attrs, [i("x")], scores)
        for more, is_bound in (((), True), ((w(i("x")),), False)):
            term, (of,), _ = s.sigma([x], w(a.lone(choice)), *more)

            def renamed(bound: Any, choice: Any = choice) -> Any:
                return s.c.Term(choice.node, tuple(bound))

            yield "sum over a bijection", is_true and is_bound, term, (renamed, of)
    inner = factor("experts", (8, 8, "x"), [i("x")], [s.fun(v("y"), s.source(i("y"), i("x")))])
    term, (of,), _ = s.sigma([x], w(a.lone(inner)))
    yield "sum over a bijection", False, term, (lambda bound: s.c.Term(inner.node, (*bound,)), of)
    for by, is_true in ((1, True), (2, True), (3, False), (8, True)):
        term, (of,), _ = s.sigma([x], w(i("x")))
        yield "split a sum", is_true, term, (of, by)
    q, r = v("q", 2), v("r", 4)
    for by, more, is_true in ((4, (), True), (3, (), False), (4, (i("r", 4),), False)):
        index = s.plus(i("q", 2, by), i("r", 4))
        term, (outer, inner_place), _ = s.sigma([q, r], w(index, *more))
        yield "merge sums", is_true, term, (outer, inner_place)
        yield "merge sums", False, term, (inner_place, outer)
        yield "merge sums", False, term, (outer, outer)
    yield from _joins(s, w)


def _joins(s: Notation, w: Any) -> Iterator[Case]:
    a, i, v = s.a, s.i, s.v

    def total(*pairs: tuple[Any, Any]) -> tuple[Any, list[int]]:
        """Return a sum, and the places of its monomials."""
        result = a.sum({m: Fraction(c) for c, m in pairs})
        monomials = [m for _, m in a.terms(result)]
        return result, [monomials.index(m) for _, m in pairs]

    first = s.sigma([v("x", 3)], w(i("x", 3)))[0]
    for shift, c, is_true in ((3, 1, True), (2, 1, False), (3, 2, False)):
        second = s.sigma([v("y", 5)], w(s.plus(i("y", 5), s.n(shift))))[0]
        result, (m, then) = total((1, first), (c, second))
        yield "join sums", is_true, result, (m, 0, then, 0)
        point = s.sigma([], w(s.n(shift)))[0]
        result, (m, then) = total((1, first), (c, point))
        yield "join sums", is_true, result, (m, 0, then, -1)

    def inside(start: int, stop: int, name: str = "w") -> tuple[Any, int]:
        ranged = s.f("range", (start, stop), [i("x")])
        term, _, (at, _) = s.sigma([], ranged, w(i("x"), name=name))
        return term, at

    low, at = inside(0, 3)
    for start, name, c, is_true in (
        (3, "w", 1, True), (2, "w", 1, False), (4, "w", 1, False), (3, "u", 1, False),
        (3, "w", 2, False),
    ):  # fmt: skip
        high, other = inside(start, 6, name)
        result, (m, then) = total((1, low), (c, high))
        yield "join ranges", is_true, result, (m, at, then, other)
    high, other = inside(3, 2)
    result, (m, then) = total((1, low), (1, high))
    yield "join ranges", False, result, (m, at, then, other)


def failures(checker: Any) -> list[str]:
    """Return the lemmas that hold where they should not, or do not where they should."""
    notation = Notation(checker)
    wrong = []
    for name, is_true, term, parameters in cases(notation):
        if notation.holds(name, term, parameters) is not is_true:
            wrong.append(f"{name}: {'refused' if is_true else 'accepted'}")
    return wrong
