"""Terms that use each lemma, and terms that lack one of its conditions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from moecc.prove.shards import (
    note_shards,
    number_of_shard,
    place_in_shard,
    times_size,
)
from moecc.terms.tensor import let
from moecc.terms.term import Abstraction, Algebra, Head, Polynomial

Build = Callable[[Algebra], Polynomial]


def i(a: Algebra, name: str = "i", size: int | str = 6) -> Polynomial:
    """Return a free index."""
    return a.index(a.axis(name, size))


def at(a: Algebra, name: str, *indices: Polynomial) -> Polynomial:
    """Return an element of a source."""
    return a.apply(Head("source", (name, "f32", (99,))), (), indices)


def div(a: Algebra, index: Polynomial, by: int) -> Polynomial:
    return a.apply(Head("div", (by,)), (), [index])


def mod(a: Algebra, index: Polynomial, by: int) -> Polynomial:
    return a.apply(Head("mod", (by,)), (), [index])


def function(a: Algebra, size: int | str, body: Callable[[Polynomial], Polynomial]) -> Abstraction:
    variable = a.fresh(size)
    return a.abstract([variable], body(a.index(variable)))


def total(a: Algebra, size: int | str, *factors: Callable[[Polynomial], Polynomial]) -> Polynomial:
    """Return a sum over an index."""
    variable = a.fresh(size)
    return a.multiply(*(f(a.index(variable)) for f in factors), over=[variable])


def halves(a: Algebra, x: Polynomial, end: int) -> Polynomial:
    """Return elements of two sources, one after the other."""
    first, second = (
        a.multiply(a.apply(head("range", *ends), (), [x]), at(a, name, x))
        for name, ends in (("x", (0, end)), ("y", (end, 6)))
    )
    return a.add(first, second)


def totals(
    a: Algebra, m: int, n: int, summand: Callable[[Polynomial, Polynomial], Polynomial]
) -> Polynomial:
    """Return a sum over two indices."""
    q, r = a.fresh(m), a.fresh(n)
    return a.multiply(summand(a.index(q), a.index(r)), over=[q, r])


def plus(a: Algebra, index: Polynomial, number: int) -> Polynomial:
    return a.add(index, a.number(number))


def head(name: str, *attrs: object) -> Head:
    return Head(name, tuple(attrs))  # type: ignore[arg-type]


def experts(
    a: Algebra, size: int, k: int, score: str, *functions: Abstraction, choice: int = 0
) -> Polynomial:
    return a.apply(head("experts", size, k, score), functions, [i(a, "c", choice or k)])


def steps(a: Algebra, values: list[float]) -> Abstraction:
    """Return a function of an index with these numbers as values."""
    numbers = [a.number(Fraction(v)) for v in values]
    return function(
        a, len(values), lambda x: a.apply(head("stack", len(values)), (), [x, *numbers])
    )


def row(a: Algebra, *, group: str = "group_of", other: bool = False, key: str = "K") -> Polynomial:
    """Return the token of a row in the slot of a choice."""
    t, c = i(a, "t", 5), i(a, "c", 2)
    variables = [a.axis("t", 5), a.axis("c", 2)]
    chosen = a.abstract(
        variables,
        a.apply(head("experts", 4, 2, "logits"), [function(a, 4, lambda x: at(a, "w", t, x))], [c]),
    )
    place = a.apply(head("own_slot", key), [chosen], [t, c])
    expert = a.instantiate(chosen, [t, c]) if not other else a.number(0)
    g = a.apply(head(group, "K"), [chosen], [t])
    return a.apply(head("token_of", 0, "K"), [chosen], [g, expert, place])


CASES: dict[str, tuple[Build, list[Build]]] = {
    "quotient": (
        lambda a: div(a, a.add(a.scale(i(a), 3), i(a, "j", 3)), 3),
        [lambda a: div(a, a.add(a.scale(i(a), 3), i(a, "j", 4)), 3)],
    ),
    "remainder": (
        lambda a: mod(a, a.add(a.scale(i(a), 3), i(a, "j", 3)), 3),
        [lambda a: mod(a, a.add(a.scale(i(a), 3), i(a, "j", 4)), 3)],
    ),
    "quotient of a quotient": (lambda a: div(a, div(a, i(a, size=24), 2), 3), []),
    "quotient and remainder": (
        lambda a: a.add(a.scale(div(a, i(a), 4), 4), mod(a, i(a), 4)),
        [
            lambda a: a.add(a.scale(div(a, i(a), 4), 3), mod(a, i(a), 4)),
            lambda a: a.add(a.scale(div(a, i(a), 4), 4), mod(a, i(a, "j"), 4)),
            lambda a: a.add(a.scale(div(a, i(a), 2), 4), mod(a, i(a), 4)),
        ],
    ),
    "range": (
        lambda a: a.apply(head("range", 0, 6), (), [i(a)]),
        [lambda a: a.apply(head("range", 0, 5), (), [i(a)])],
    ),
    "comparison": (
        lambda a: a.apply(Head("at_least_0"), (), [i(a, size="S")]),
        [lambda a: a.apply(Head("at_least_0"), (), [plus(a, i(a), -1)])],
    ),
    "equality": (
        lambda a: a.apply(Head("equal"), (), [plus(a, i(a), 1)]),
        [lambda a: a.apply(Head("equal"), (), [i(a)])],
    ),
    "equality of opposites": (
        lambda a: a.add(
            a.apply(Head("equal"), (), [a.subtract(i(a), i(a, "j"))]),
            a.apply(Head("equal"), (), [a.subtract(i(a, "j"), i(a))]),
        ),
        [
            lambda a: a.add(
                a.apply(Head("holds"), (), [a.subtract(i(a), i(a, "j"))]),
                a.apply(Head("holds"), (), [a.subtract(i(a, "j"), i(a))]),
            )
        ],
    ),
    "parentheses": (
        lambda a: a.apply(Head("group"), (), [at(a, "x", i(a))]),
        [lambda a: a.apply(Head("group"), (), [a.add(at(a, "x", i(a)), at(a, "y", i(a)))])],
    ),
    "common factor": (
        lambda a: a.apply(Head("relu"), (), [a.scale(a.add(at(a, "x"), at(a, "y")), 3)]),
        [
            lambda a: a.apply(Head("silu"), (), [a.scale(a.add(at(a, "x"), at(a, "y")), 3)]),
            lambda a: a.apply(Head("relu"), (), [a.scale(at(a, "x"), -1)]),
            lambda a: a.apply(Head("relu"), (), [a.add(a.scale(at(a, "x"), 3), at(a, "y"))]),
        ],
    ),
    "slot of a choice": (
        row,
        [
            lambda a: row(a, other=True),
            lambda a: row(a, group="slot_of"),
            lambda a: row(a, key="L"),
        ],
    ),
    "place in a stack": (
        lambda a: a.apply(head("stack", 2), (), [a.number(1), at(a, "x"), at(a, "y")]),
        [lambda a: a.apply(head("stack", 2), (), [i(a, size=2), at(a, "x"), i(a, "j")])],
    ),
    "places within a stack": (
        lambda a: a.apply(head("stack", 3), (), [i(a, size=2), at(a, "x"), i(a, "j"), a.one]),
        [lambda a: a.apply(head("stack", 3), (), [i(a, size=3), at(a, "x"), i(a, "j"), a.one])],
    ),
    "stack with a period": (
        lambda a: a.apply(
            head("stack", 4), (), [i(a, size=4), *[at(a, "x", a.number(3)), i(a, "j")] * 2]
        ),
        [
            lambda a: a.apply(
                head("stack", 4),
                (),
                [i(a, size=4), at(a, "x"), i(a, "j"), at(a, "x"), i(a, "k")],
            )
        ],
    ),
    "sum over places of a stack": (
        lambda a: total(a, 2, lambda x: a.apply(head("stack", 2), (), [x, at(a, "x"), i(a, "j")])),
        [lambda a: a.apply(head("stack", 2), (), [i(a, size=2), at(a, "x"), i(a, "j")])],
    ),
    "stack of sources": (
        lambda a: a.apply(head("stack", 2), (), [i(a, size=2), at(a, "x"), at(a, "y")]),
        [
            lambda a: a.apply(
                head("stack", 2), (), [i(a, size=2), at(a, "x", i(a, "j")), at(a, "y", a.one)]
            )
        ],
    ),
    "stack by its members": (
        lambda a: a.apply(
            head("stack", 4), (), [i(a, size=4), *(at(a, "x", a.number(n)) for n in (0, 0, 1, 1))]
        ),
        [
            lambda a: a.apply(
                head("stack", 4),
                (),
                [i(a, size=4), *(at(a, "x", a.number(n)) for n in (0, 1, 1, 0))],
            )
        ],
    ),
    "member of a family": (
        lambda a: a.apply(head("family", ("x", "y"), "f32", (99,)), (), [a.number(1), i(a)]),
        [lambda a: a.apply(head("family", ("x", "y"), "f32", (99,)), (), [i(a, size=2), i(a)])],
    ),
    "equal shares": (
        lambda a: a.apply(
            head("share", "softmax"), [function(a, 4, lambda x: at(a, "x"))], [i(a, size=4)]
        ),
        [
            lambda a: a.apply(
                head("share", "softmax"), [function(a, 4, lambda x: at(a, "x", x))], [i(a, size=4)]
            )
        ],
    ),
    "shares of repeated scores": (
        lambda a: a.apply(
            head("share", "sigmoid"), [function(a, 6, lambda x: at(a, "x", div(a, x, 2)))], [i(a)]
        ),
        [
            lambda a: a.apply(
                head("share", "sigmoid"),
                [function(a, 6, lambda x: a.add(at(a, "x", div(a, x, 2)), at(a, "y", x)))],
                [i(a)],
            ),
            lambda a: a.apply(
                head("share", "sigmoid"),
                [function(a, 6, lambda x: at(a, "x", mod(a, x, 2)))],
                [i(a)],
            ),
        ],
    ),
    "best of equal scores": (
        lambda a: experts(a, 4, 2, "logits", function(a, 4, lambda x: at(a, "x"))),
        [
            lambda a: experts(
                a, 4, 2, "sigmoid", function(a, 4, lambda x: at(a, "x")), steps(a, [0, 1, 2, 0])
            )
        ],
    ),
    "best of repeated scores": (
        lambda a: experts(a, 6, 4, "logits", function(a, 6, lambda x: at(a, "x", div(a, x, 2)))),
        [
            lambda a: experts(
                a, 6, 3, "logits", function(a, 6, lambda x: at(a, "x", div(a, x, 2)))
            ),
            lambda a: experts(
                a, 6, 4, "logits", function(a, 6, lambda x: at(a, "x", mod(a, x, 3)))
            ),
            lambda a: experts(
                a,
                6,
                4,
                "sigmoid",
                function(a, 6, lambda x: at(a, "x", div(a, x, 2))),
                function(a, 6, lambda x: at(a, "y", x)),
            ),
        ],
    ),
    "a bias of all scores": (
        lambda a: experts(
            a, 4, 2, "softmax", function(a, 4, lambda x: at(a, "x", x)), steps(a, [3, 3, 3, 3])
        ),
        [
            lambda a: experts(
                a,
                4,
                2,
                "softmax",
                function(a, 4, lambda x: at(a, "x", x)),
                steps(a, [3, 3, 2.9, 3]),
            )
        ],
    ),
    "best of undominated scores": (
        lambda a: experts(
            a, 4, 2, "sigmoid", function(a, 4, lambda x: at(a, "x", x)), steps(a, [0, -2, 0, -1])
        ),
        [
            lambda a: experts(
                a,
                4,
                2,
                "sigmoid",
                function(a, 4, lambda x: at(a, "x", x)),
                steps(a, [0, -2, 0, -0.5]),
            ),
            lambda a: experts(
                a,
                4,
                3,
                "sigmoid",
                function(a, 4, lambda x: at(a, "x", x)),
                steps(a, [0, -2, 0, -1]),
            ),
            lambda a: experts(
                a,
                4,
                2,
                "softmax",
                function(a, 4, lambda x: at(a, "x", x)),
                steps(a, [0, -3, 0.5, -3]),
            ),
        ],
    ),
    "function at 0": (
        lambda a: a.apply(Head("sigmoid"), (), [a.zero]),
        [
            lambda a: a.apply(Head("log"), (), [a.zero]),
            lambda a: a.apply(Head("silu"), (), [a.one]),
        ],
    ),
    "sparsemixer of equal scores": (
        lambda a: a.apply(
            head("gate", "sparsemixer"),
            [function(a, 4, lambda x: a.one), function(a, 2, lambda x: x)],
            [i(a, size=2)],
        ),
        [
            lambda a: a.apply(
                head("gate", "sparsemixer"),
                [function(a, 4, lambda x: at(a, "x", x)), function(a, 2, lambda x: x)],
                [i(a, size=2)],
            )
        ],
    ),
    "masks compose": (
        lambda a: a.apply(
            head("mask", -9.0),
            (),
            [
                a.apply(head("mask", -9.0), (), [at(a, "x"), a.apply(Head("holds"), (), [i(a)])]),
                a.apply(Head("holds"), (), [i(a, "j")]),
            ],
        ),
        [
            lambda a: a.apply(
                head("mask", -9.0),
                (),
                [
                    a.apply(
                        head("mask", -1.0), (), [at(a, "x"), a.apply(Head("holds"), (), [i(a)])]
                    ),
                    a.apply(Head("holds"), (), [i(a, "j")]),
                ],
            )
        ],
    ),
    "inverse": (
        lambda a: a.apply(Head("inverse"), (), [a.scale(at(a, "x"), 4)]),
        [lambda a: a.apply(Head("inverse"), (), [a.add(a.scale(at(a, "x"), 4), a.one)])],
    ),
    "indicators are idempotent": (
        lambda a: a.multiply(*[a.apply(Head("holds"), (), [i(a)])] * 2),
        [lambda a: a.multiply(at(a, "x"), at(a, "x"))],
    ),
    "square of a root": (
        lambda a: a.multiply(*[a.apply(head("root", 2, 1))] * 2, at(a, "x")),
        [lambda a: a.multiply(a.apply(head("root", 2, 1)), a.apply(head("root", 3, 1)))],
    ),
    "a size over itself": (
        lambda a: a.multiply(a.size("S"), a.apply(head("inverse_size", "S"))),
        [lambda a: a.multiply(a.size("S"), a.apply(head("inverse_size", "T")))],
    ),
    "sum of a constant": (
        lambda a: total(a, "S", lambda x: at(a, "x")),
        [lambda a: total(a, "S", lambda x: at(a, "x", x))],
    ),
    "sum of one element": (
        lambda a: total(a, 1, lambda x: at(a, "x", x)),
        [lambda a: total(a, "S", lambda x: at(a, "x", x))],
    ),
    "shares add up": (
        lambda a: total(
            a,
            4,
            lambda x: a.apply(
                head("share", "softmax"), [function(a, 4, lambda y: at(a, "w", y))], [x]
            ),
            lambda x: at(a, "x"),
        ),
        [
            # Another factor depends on the choice.
            lambda a: total(
                a,
                4,
                lambda x: a.apply(
                    head("share", "softmax"), [function(a, 4, lambda y: at(a, "w", y))], [x]
                ),
                lambda x: at(a, "x", x),
            ),
            # The sum is over some of the choices.
            lambda a: total(
                a,
                3,
                lambda x: a.apply(
                    head("share", "softmax"), [function(a, 4, lambda y: at(a, "w", y))], [x]
                ),
            ),
            # The scores depend on the choice, too.
            lambda a: total(
                a,
                4,
                lambda x: a.apply(
                    head("share", "softmax"), [function(a, 4, lambda y: at(a, "w", y, x))], [x]
                ),
            ),
            # Squares of shares.
            lambda a: total(
                a,
                4,
                *[
                    lambda x: a.apply(
                        head("share", "softmax"), [function(a, 4, lambda y: at(a, "w", y))], [x]
                    )
                ]
                * 2,
            ),
        ],
    ),
    "a positive sum over itself": (
        lambda a: a.multiply(
            total(a, 3, lambda x: a.apply(Head("exp"), (), [at(a, "x", x)])),
            a.apply(
                Head("inverse"),
                (),
                [total(a, 3, lambda x: a.apply(Head("exp"), (), [at(a, "x", x)]))],
            ),
        ),
        [
            # Not positive.
            lambda a: a.multiply(
                total(a, 3, lambda x: at(a, "x", x)),
                a.apply(Head("inverse"), (), [total(a, 3, lambda x: at(a, "x", x))]),
            ),
            # A sum over fewer.
            lambda a: a.multiply(
                total(a, 2, lambda x: a.apply(Head("exp"), (), [at(a, "x", x)])),
                a.apply(
                    Head("inverse"),
                    (),
                    [total(a, 3, lambda x: a.apply(Head("exp"), (), [at(a, "x", x)]))],
                ),
            ),
            # A sum that depends on the variable outside, too.
            lambda a: total(
                a,
                3,
                lambda x: a.apply(Head("sigmoid"), (), [a.scale(x, 2)]),
                lambda x: a.apply(
                    Head("inverse"),
                    (),
                    [total(a, 3, lambda y: a.apply(Head("sigmoid"), (), [a.add(x, y)]))],
                ),
            ),
            # Weighted.
            lambda a: a.multiply(
                total(
                    a,
                    3,
                    lambda x: a.apply(Head("exp"), (), [at(a, "x", x)]),
                    lambda x: at(a, "y", x),
                ),
                a.apply(
                    Head("inverse"),
                    (),
                    [total(a, 3, lambda x: a.apply(Head("exp"), (), [at(a, "x", x)]))],
                ),
            ),
        ],
    ),
    "sum at a point": (
        lambda a: total(
            a,
            6,
            lambda x: a.apply(Head("equal"), (), [a.subtract(x, i(a, "j", 9))]),
            lambda x: at(a, "x", x),
        ),
        [
            lambda a: total(
                a,
                6,
                lambda x: a.apply(Head("equal"), (), [a.subtract(a.scale(x, 2), i(a, "j", 9))]),
                lambda x: at(a, "x", x),
            )
        ],
    ),
    "sum over a range": (
        lambda a: total(
            a,
            6,
            lambda x: a.apply(head("range", 3, 9), (), [plus(a, x, 2)]),
            lambda x: at(a, "x", x),
        ),
        [
            lambda a: total(
                a,
                6,
                lambda x: a.apply(head("range", 3, 9), (), [a.scale(x, 2)]),
                lambda x: at(a, "x", x),
            )
        ],
    ),
    "sum over a bijection": (
        lambda a: total(a, 5, lambda x: at(a, "x", a.apply(head("permutation", 5, 1), (), [x]))),
        [
            # What is permuted is not all that is summed over.
            lambda a: total(
                a, 4, lambda x: at(a, "x", a.apply(head("permutation", 5, 1), (), [x]))
            ),
            # The index is used besides.
            lambda a: total(
                a, 5, lambda x: at(a, "x", a.apply(head("permutation", 5, 1), (), [x]), x)
            ),
            # Fewer than all are chosen.
            lambda a: total(
                a,
                3,
                lambda x: at(
                    a,
                    "x",
                    a.apply(
                        head("experts", 5, 3, "logits"),
                        [function(a, 5, lambda y: at(a, "w", y))],
                        [x],
                    ),
                ),
            ),
        ],
    ),
    "split a sum": (
        lambda a: total(a, 6, lambda x: at(a, "x", div(a, x, 3), mod(a, x, 3))),
        [lambda a: total(a, 5, lambda x: at(a, "x", div(a, x, 3), mod(a, x, 3)))],
    ),
    "cut a sum": (
        lambda a: total(a, 6, lambda x: a.apply(head("silu"), (), [halves(a, x, 3)])),
        [
            # The parts differ, as where neurons are padded.
            lambda a: total(a, 6, lambda x: a.apply(head("silu"), (), [halves(a, x, 4)])),
        ],
    ),
    "merge sums": (
        lambda a: totals(a, 2, 3, lambda q, r: at(a, "x", a.add(a.scale(q, 3), r))),
        [
            lambda a: totals(a, 2, 3, lambda q, r: at(a, "x", a.add(a.scale(q, 2), r))),
            lambda a: totals(a, 2, 3, lambda q, r: at(a, "x", a.add(a.scale(q, 3), r), q)),
            lambda a: totals(
                a, 2, 3, lambda q, r: a.multiply(at(a, "x", a.add(a.scale(q, 3), r)), r)
            ),
        ],
    ),
    "join sums": (
        lambda a: a.add(
            total(a, 3, lambda x: at(a, "x", x)), total(a, 2, lambda x: at(a, "x", plus(a, x, 3)))
        ),
        [
            lambda a: a.add(
                total(a, 3, lambda x: at(a, "x", x)),
                total(a, 2, lambda x: at(a, "x", plus(a, x, 4))),
            ),
            lambda a: a.add(
                total(a, 3, lambda x: at(a, "x", x)),
                a.scale(total(a, 2, lambda x: at(a, "x", plus(a, x, 3))), 2),
            ),
            lambda a: a.add(
                total(a, 3, lambda x: at(a, "x", x)),
                total(a, 2, lambda x: at(a, "y", plus(a, x, 3))),
            ),
        ],
    ),
    "join ranges": (
        lambda a: a.add(
            a.multiply(a.apply(head("range", 0, 2), (), [i(a)]), at(a, "x")),
            a.multiply(a.apply(head("range", 2, 5), (), [i(a)]), at(a, "x")),
        ),
        [
            lambda a: a.add(
                a.multiply(a.apply(head("range", 0, 2), (), [i(a)]), at(a, "x")),
                a.multiply(a.apply(head("range", 3, 5), (), [i(a)]), at(a, "x")),
            ),
            lambda a: a.add(
                a.multiply(a.apply(head("range", 0, 2), (), [i(a)]), at(a, "x")),
                a.multiply(a.apply(head("range", 2, 5), (), [i(a, "j")]), at(a, "x")),
            ),
        ],
    ),
    "name": (
        lambda a: _named(a, "token_of"),
        [lambda a: _named(a, "elsewhere")],
    ),
    "size of a shard": (
        lambda a: a.add(a.size("B/2"), a.apply(head("inverse_size", "B/4"))),
        [lambda a: a.add(a.size("B"), a.apply(head("inverse_size", "C")))],
    ),
    "multiples apart": (
        lambda a: a.multiply(
            div(a, a.add(a.scale(i(a), 4), i(a, "j", 9)), 2),
            mod(a, a.add(a.scale(i(a), 4), i(a, "j", 9)), 2),
        ),
        [
            lambda a: div(a, a.add(a.scale(i(a), 3), i(a, "j", 9)), 2),
            lambda a: div(a, a.add(a.scale(i(a), 4), at(a, "x")), 2),
        ],
    ),
    "quotient and remainder of a size": (
        lambda a: _divided(a, 4, 4),
        [lambda a: _divided(a, 4, 3), lambda a: _divided(a, 2, 4)],
    ),
    "place in a shard": (
        lambda a: _in_shard(a, a.add(_start(a, "B/2"), i(a, "i", "B/2"))),
        [
            lambda a: _in_shard(a, a.add(_start(a, "B/2"), i(a, "i", "B"))),
            lambda a: _in_shard(a, a.add(_start(a, "B/4"), i(a, "i", "B/2"))),
            lambda a: _in_shard(a, a.add(_start(a, "B/2"), a.number(1))),
        ],
    ),
    "shard and place": (
        lambda a: a.add(
            times_size(a, number_of_shard(a, i(a, "i", "B"), "B/2"), "B/2"),
            place_in_shard(a, i(a, "i", "B"), "B/2"),
        ),
        [
            lambda a: a.add(
                times_size(a, number_of_shard(a, i(a, "i", "B"), "B/2"), "B"),
                place_in_shard(a, i(a, "i", "B"), "B/2"),
            ),
            lambda a: a.add(
                times_size(a, number_of_shard(a, i(a, "i", "B"), "B/2"), "B/2"),
                place_in_shard(a, i(a, "j", "B"), "B/2"),
            ),
        ],
    ),
    "either order": (
        lambda a: a.add(
            a.apply(head("maximum"), (), [i(a), i(a, "j")]),
            a.apply(head("maximum"), (), [i(a, "j"), i(a)]),
        ),
        [],
    ),
    "merge shards": (
        lambda a: _sharded(a, 2, "B/4", "B/4"),
        [
            lambda a: _sharded(a, 2, "B/4", "B/2"),
            lambda a: _sharded(a, 3, "B/4", "B/4"),
        ],
    ),
    "range in shards": (
        lambda a: _ranges(a, lambda e, v: a.subtract(e, a.scale(v, 3))),
        [
            lambda a: _ranges(a, lambda e, v: a.subtract(e, a.scale(v, 2))),
            lambda a: _ranges(a, lambda e, v: a.add(e, a.scale(v, 3))),
            lambda a: _ranges(a, lambda e, v: a.subtract(e, a.scale(v, 3)), at_shard=True),
        ],
    ),
    "a placed choice has an expert": (
        lambda a: _placed(a, 0, 3),
        [lambda a: _placed(a, 0, 2), lambda a: _placed(a, 1, 3)],
    ),
    "slots of a shard": (
        lambda a: _slots(a),
        [
            lambda a: _slots(a, shards=3),
            lambda a: _slots(a, further="group_size=1"),
            lambda a: _slots(a, start=1),
        ],
    ),
}


def _divided(a: Algebra, by: int, times: int) -> Polynomial:
    """Return an open size times a remainder of a division by 4, and times a quotient."""
    parts = (a.scale(div(a, i(a, size=24), by), times), mod(a, i(a, size=24), 4))
    return a.add(*(a.multiply(a.size("B"), part) for part in parts))


def _start(a: Algebra, size: str) -> Polynomial:
    return times_size(a, i(a, "q", 2), size)


def _in_shard(a: Algebra, index: Polynomial) -> Polynomial:
    """Return the number of the shard of an index, and its place there, of halves."""
    return a.multiply(
        at(a, "x", number_of_shard(a, index, "B/2")), at(a, "y", place_in_shard(a, index, "B/2"))
    )


def _sharded(a: Algebra, m: int, size: str, step: str) -> Polynomial:
    """Return a sum over shards and over the places in one."""
    q, r = a.fresh(m), a.fresh(size)
    index = a.add(times_size(a, a.index(q), step), a.index(r))
    return a.multiply(at(a, "x", index), over=[q, r])


def _ranges(
    a: Algebra, index: Callable[[Polynomial, Polynomial], Polynomial], *, at_shard: bool = False
) -> Polynomial:
    """Return a sum over shards of what is there of the one that has a row."""
    expert = a.apply(head("integer", "e"), (), [i(a)])
    return total(
        a,
        2,
        lambda v: a.apply(head("range", 0, 3), (), [index(expert, v)]),
        lambda v: at(a, "x", v if at_shard else i(a)),
    )


def _chosen(a: Algebra, t: Polynomial, c: Polynomial) -> Polynomial:
    return a.apply(head("integer", "e"), (), [t, c])


def _placed(a: Algebra, low: int, high: int) -> Polynomial:
    """Return whether a choice has a slot, times whether its expert is in a range."""
    t, c = a.axis("t", 4), a.axis("c", 2)
    function = a.abstract([t, c], _chosen(a, a.index(t), a.index(c)))
    key = ("AssignSlotsOp", "experts=3", 4, 2)
    places = [a.index(t), a.index(c)]
    return a.multiply(
        a.apply(head("placed", *key), [function], places),
        a.apply(head("range", low, high), (), [_chosen(a, *places)]),
    )


def _slots(a: Algebra, *, shards: int = 2, start: int = 2, further: str = "") -> Polynomial:
    """Return all that an assignment of slots says, on the tokens of one of two shards."""
    s, t, c = i(a, "s", shards), a.axis("t", 2), a.axis("c", 2)
    first, choice = a.index(t), a.index(c)
    shard = a.abstract([t, c], _chosen(a, a.add(a.scale(s, start), first), choice))
    wide = a.axis("t", 4)
    whole = a.abstract([wide, c], _chosen(a, a.index(wide), choice))
    note_shards(a, [shard], s, [whole])
    key = ("AssignSlotsOp", "experts=3", *filter(None, [further]), 2, 2)
    place = [a.number(0), i(a, "x", 3), i(a, "p", 2)]
    of_choice = [
        a.apply(head(n, *key), [shard], [first, choice]) for n in ("slot_of", "own_slot", "placed")
    ]
    of_rows = [
        a.apply(head("token_of", 0, *key), [shard], place),
        a.apply(head("token_of", 1, *key), [shard], place) if further else a.zero,
        a.apply(head("occupied", *key), [shard], place),
        a.apply(head("group_of", *key), [shard], [first]),
    ]
    shift = a.abstract([t], at(a, "x", a.add(a.scale(s, start), first)))
    note_shards(a, [shift], s, [a.abstract([wide], at(a, "x", a.index(wide)))])
    sums = a.apply(head("group_sum", further or "groups=1"), [shift], [a.number(0)])
    terms = [*of_choice, *of_rows, *([] if further else [sums])]
    return a.add(*(a.scale(term, 7**n) for n, term in enumerate(terms)))


def _named(a: Algebra, row_head: str) -> Polynomial:
    """Return a named sum over a row, at the place of another."""
    variables = [a.axis(n, 3) for n in "gxp"]
    token = a.apply(head(row_head, 0, "K"), (), [a.index(v) for v in variables])
    body = let(a, a.add(at(a, "x", token), at(a, "y", token)))
    places = {v: at(a, "z", i(a, "t", 5)) for v in variables}
    return a.substitute(body, places)
