"""Statements about choices, ties, slots and indices, checked by z3 for all values at small sizes.

    python z3_lemmas.py [--out FILE]        in an environment that has z3-solver

Each statement is that of a lemma of `moecc.prove`, written here anew from its docstring, with none
of its code: what is chosen is defined by ranks (a score's rank is the number of scores that are
larger, or equal with a lower index), floors by inequalities, sums by their summands.  A statement
holds when z3 finds no counterexample at any of the sizes.  A variant, which lacks a condition, must
have one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import z3

Claim = tuple[list[Any], Any]
"""Assumptions, and what follows of them."""


def rank(scores: Sequence[Any], at: int) -> Any:
    """Return how many scores are ranked before a score: larger ones, or equal and earlier."""
    return z3.Sum(
        [
            z3.If(z3.Or(s > scores[at], z3.And(s == scores[at], i < at)), 1, 0)
            for i, s in enumerate(scores)
            if i != at
        ]
        or [z3.IntVal(0)]
    )


def rank_last(scores: Sequence[Any], at: int) -> Any:
    """Return the rank where a tie takes the highest index."""
    return z3.Sum(
        [
            z3.If(z3.Or(s > scores[at], z3.And(s == scores[at], i > at)), 1, 0)
            for i, s in enumerate(scores)
            if i != at
        ]
        or [z3.IntVal(0)]
    )


def reals(name: str, count: int) -> list[Any]:
    return [z3.Real(f"{name}{i}") for i in range(count)]


def best_of_repeated() -> Iterator[Claim]:
    """The k·n best of scores that come n times each are the k best, each with its n copies."""
    for groups, copies in product(range(1, 5), range(1, 4)):
        scores = reals("s", groups)
        repeated = [scores[i // copies] for i in range(groups * copies)]
        equal = [
            rank(repeated, i) == copies * rank(scores, i // copies) + i % copies
            for i in range(groups * copies)
        ]
        yield [], z3.And(equal)


def best_of_interleaved() -> Iterator[Claim]:
    """Variant: copies are no neighbours."""
    groups, copies = 2, 2
    scores = reals("s", groups)
    repeated = [scores[i % groups] for i in range(groups * copies)]
    equal = [
        rank(repeated, i) == copies * rank(scores, i // copies) + i % copies
        for i in range(groups * copies)
    ]
    yield [], z3.And(equal)


def best_of_repeated_ties_last() -> Iterator[Claim]:
    """Variant: a tie takes the highest index."""
    scores = reals("s", 2)
    repeated = [scores[i // 2] for i in range(4)]
    yield (
        [],
        z3.And([rank_last(repeated, i) == 2 * rank_last(scores, i // 2) + i % 2 for i in range(4)]),
    )


def best_of_unequal_copies() -> Iterator[Claim]:
    """Variant: one group has more copies than another."""
    a, b = reals("s", 2)
    repeated = [a, a, a, b]
    yield [], z3.And([rank(repeated, i) / 2 == rank([a, b], i // 2) for i in range(4)])


def best_of_equal() -> Iterator[Claim]:
    """Of equal scores the k best are the first k, in their order."""
    for count in range(1, 9):
        score = z3.Real("s")
        yield [], z3.And([rank([score] * count, i) == i for i in range(count)])


def best_of_equal_ties_last() -> Iterator[Claim]:
    """Variant: a tie takes the highest index."""
    yield [], rank_last([z3.Real("s")] * 2, 0) == 0


def all_best_are_a_bijection() -> Iterator[Claim]:
    """The n best of n are each of them once."""
    for count in range(1, 6):
        scores = reals("s", count)
        ranks = [rank(scores, i) for i in range(count)]
        inside = [z3.And(r >= 0, r < count) for r in ranks]
        yield [], z3.And(z3.Distinct(ranks) if count > 1 else True, *inside)


def some_best_are_no_bijection() -> Iterator[Claim]:
    """Variant: the k best of n, k below n, are each of n once."""
    scores = reals("s", 3)
    yield [], z3.And([rank(scores, i) < 2 for i in range(3)])


def best_of_repeated_shares_with_a_bias() -> Iterator[Claim]:
    """Variant: shares among all copies, to which a bias is added."""
    shares, biases = reals("s", 2), reals("b", 2)
    once = [s + b for s, b in zip(shares, biases, strict=True)]
    repeated = [shares[i // 2] / 2 + biases[i // 2] for i in range(4)]
    inside = [z3.And(s > 0, s < 1) for s in shares]
    yield inside, z3.And([rank(repeated, i) == 2 * rank(once, i // 2) + i % 2 for i in range(4)])


def order_is_kept() -> Iterator[Claim]:
    """The k best by σ(aᵢ) + b are the k best by aᵢ, for an increasing score σ."""
    for count in range(1, 5):
        scores, images = reals("s", count), reals("f", count)
        pairs = list(product(range(count), repeat=2))
        bias = z3.Real("b")
        increasing = [(scores[i] < scores[j]) == (images[i] < images[j]) for i, j in pairs]
        biased = [f + bias for f in images]
        yield increasing, z3.And([rank(scores, i) == rank(biased, i) for i in range(count)])


def order_is_nearly_kept() -> Iterator[Claim]:
    """Variant: the function may be constant in places."""
    scores, images = reals("s", 2), reals("f", 2)
    weakly = [
        z3.Implies(scores[i] < scores[j], images[i] <= images[j]) for i, j in ((0, 1), (1, 0))
    ]
    yield weakly, rank(scores, 0) == rank(images, 0)


def bias_dominates() -> Iterator[Claim]:
    """The k best of scores in (0, 1) with biases are those of the largest biases.

    That is so where these, at least k, are greater than every other by at least 1.
    """
    for count, favoured in ((2, 1), (3, 1), (3, 2), (4, 2), (5, 3)):
        scores, biases = reals("s", count), reals("b", count)
        inside = [z3.And(s > 0, s < 1) for s in scores]
        sums = [s + b for s, b in zip(scores, biases, strict=True)]
        for chosen in {tuple(range(favoured)), tuple(range(count - favoured, count))}:
            others = [i for i in range(count) if i not in chosen]
            greater = [biases[i] >= biases[j] + 1 for i in chosen for j in others]
            among = [sums[i] for i in chosen]
            ranks = [rank(sums, i) == rank(among, n) for n, i in enumerate(chosen)]
            yield [*inside, *greater], z3.And(ranks)


def small_bias_dominates() -> Iterator[Claim]:
    """Variant: a bias below 1."""
    a, b = reals("s", 2)
    bias = z3.Real("b")
    yield [a > 0, a < 1, b > 0, b < 1, bias > 0.9], rank([a, b + bias], 1) == 0


def equal_shares() -> Iterator[Claim]:
    """The share of each of n equal scores is 1/n."""
    for count in range(1, 9):
        weight = z3.Real("w")
        yield [weight > 0], weight * count == z3.Sum([weight] * count)


def repeated_shares() -> Iterator[Claim]:
    """The share of scores that come n times each is 1/n of the share among them once."""
    for groups, copies in product(range(1, 4), range(1, 4)):
        weights = reals("w", groups)
        once, all_of_them = z3.Real("once"), z3.Real("all")
        total = z3.Sum(weights)
        many = z3.Sum([w for w in weights for _ in range(copies)])
        yield (
            [
                *(w > 0 for w in weights),
                once * total == weights[0],
                all_of_them * many == weights[0],
            ],
            all_of_them * copies == once,
        )


def unequally_repeated_shares() -> Iterator[Claim]:
    """Variant: one score comes once, the other twice."""
    a, b = reals("w", 2)
    once, many = z3.Real("once"), z3.Real("all")
    yield [a > 0, b > 0, once * (a + b) == a, many * (2 * a + b) == a], many * 2 == once


def shares_add_up() -> Iterator[Claim]:
    """Shares of positive weights add up to 1."""
    for count in range(1, 6):
        weights, shares = reals("w", count), reals("g", count)
        defined = [g * z3.Sum(weights) == w for g, w in zip(shares, weights, strict=True)]
        yield [*(w > 0 for w in weights), *defined], z3.Sum(shares) == 1


def shares_of_any_sign_add_up() -> Iterator[Claim]:
    """Variant: weights may be negative, and their sum 0."""
    weights, shares = reals("w", 2), reals("g", 2)
    yield (
        [g * z3.Sum(weights) == w for g, w in zip(shares, weights, strict=True)],
        z3.Sum(shares) == 1,
    )


def slots_are_used_once() -> Iterator[Claim]:
    """No two choices have one slot of one expert, and a slot below the count is some choice's."""
    for choices, experts in product(range(1, 6), range(1, 4)):
        chosen = [z3.Int(f"e{i}") for i in range(choices)]
        valid = [z3.And(e >= 0, e < experts) for e in chosen]
        slots = [
            z3.Sum([z3.If(chosen[j] == chosen[i], 1, 0) for j in range(i)] or [z3.IntVal(0)])
            for i in range(choices)
        ]
        once = [
            z3.Not(z3.And(chosen[i] == chosen[j], slots[i] == slots[j]))
            for i in range(choices)
            for j in range(i)
        ]
        yield valid, z3.And(once or [z3.BoolVal(True)])


def slots_without_experts() -> Iterator[Claim]:
    """Variant: a slot alone, without its expert, names a choice."""
    chosen = [z3.Int("e0"), z3.Int("e1")]
    slots = [z3.IntVal(0), z3.If(chosen[0] == chosen[1], 1, 0)]
    yield [z3.And(e >= 0, e < 2) for e in chosen], slots[0] != slots[1]


def quotient_of_sum() -> Iterator[Claim]:
    """⌊(n·a + b) / n⌋ = a + k and (n·a + b) mod n = b − k·n for k·n ≤ b < (k + 1)·n."""
    a, b, k = z3.Ints("a b k")
    for n in range(1, 13):
        x = n * a + b
        yield [k * n <= b, b < (k + 1) * n], z3.And(x / n == a + k, x % n == b - k * n)


def quotient_of_any_sum() -> Iterator[Claim]:
    """Variant: b may be anything."""
    a, b = z3.Ints("a b")
    yield [], (3 * a + b) / 3 == a


def nested_quotient() -> Iterator[Claim]:
    """⌊⌊a / m⌋ / n⌋ = ⌊a / (m·n)⌋."""
    a = z3.Int("a")
    for m, n in product(range(1, 7), repeat=2):
        yield [], (a / m) / n == a / (m * n)


def quotient_and_remainder() -> Iterator[Claim]:
    """n·⌊a / n⌋ + a mod n = a."""
    a = z3.Int("a")
    for n in range(1, 13):
        yield [], n * (a / n) + a % n == a


def digits_are_unique() -> Iterator[Claim]:
    """n·q + r is another number for other q, or another r below n: merged axes are told apart."""
    q, r, s, t = z3.Ints("q r s t")
    for n in range(1, 8):
        inside = [z3.And(x >= 0, x < n) for x in (r, t)]
        yield [*inside, n * q + r == n * s + t], z3.And(q == s, r == t)


def digits_of_any_size() -> Iterator[Claim]:
    """Variant: r may be n or more."""
    q, r, s, t = z3.Ints("q r s t")
    yield [r >= 0, t >= 0, 3 * q + r == 3 * s + t], q == s


def sum_at_point() -> Iterator[Claim]:
    """Σᵢ [i = t]·f(i) = [0 ≤ t < n]·f(t) for i below n."""
    t = z3.Int("t")
    f = z3.Function("f", z3.IntSort(), z3.RealSort())
    for n in range(1, 9):
        summands = [z3.If(i == t, f(i), 0) for i in range(n)]
        yield [], z3.Sum(summands) == z3.If(z3.And(t >= 0, t < n), f(t), 0)


def sum_at_any_point() -> Iterator[Claim]:
    """Variant: t may lie outside."""
    t = z3.Int("t")
    f = z3.Function("f", z3.IntSort(), z3.RealSort())
    yield [], z3.Sum([z3.If(i == t, f(i), 0) for i in range(3)]) == f(t)


def sum_over_range() -> Iterator[Claim]:
    """Σᵢ [a ≤ i + c < b]·f(i) is the sum of f over the i of the range."""
    f = z3.Function("f", z3.IntSort(), z3.RealSort())
    for n, a, b, c in product(range(1, 5), range(3), range(5), (-1, 0, 2)):
        summands = [z3.If(z3.And(a <= i + c, i + c < b), f(i), 0) for i in range(n)]
        low, high = max(a - c, 0), min(b - c, n)
        yield [], z3.Sum(summands) == z3.Sum([f(i) for i in range(low, high)] or [z3.RealVal(0)])


def split_sum() -> Iterator[Claim]:
    """Σᵢ f(i) = Σ_q Σ_r f(n·q + r)."""
    f = z3.Function("f", z3.IntSort(), z3.RealSort())
    for m, n in product(range(1, 5), repeat=2):
        parts = [f(n * q + r) for q in range(m) for r in range(n)]
        yield [], z3.Sum([f(i) for i in range(m * n)]) == z3.Sum(parts)


def split_sum_the_other_way() -> Iterator[Claim]:
    """Variant: the factor is the other size."""
    f = z3.Function("f", z3.IntSort(), z3.RealSort())
    parts = [f(2 * q + r) for q in range(2) for r in range(3)]
    yield [], z3.Sum([f(i) for i in range(6)]) == z3.Sum(parts)


def join_sums() -> Iterator[Claim]:
    """Σ_{i<m} f(i) + Σ_{i<n} f(m + i) = Σ_{i<m+n} f(i)."""
    f = z3.Function("f", z3.IntSort(), z3.RealSort())
    for m, n in product(range(1, 5), repeat=2):
        left = z3.Sum([f(i) for i in range(m)]) + z3.Sum([f(m + i) for i in range(n)])
        yield [], left == z3.Sum([f(i) for i in range(m + n)])


def join_ranges() -> Iterator[Claim]:
    """[a ≤ i < b]·f + [b ≤ i < c]·f = [a ≤ i < c]·f for a ≤ b ≤ c."""
    a, b, c, i = z3.Ints("a b c i")
    f = z3.Real("f")

    def inside(low: Any, high: Any) -> Any:
        return z3.If(z3.And(low <= i, i < high), f, 0)

    yield [a <= b, b <= c], inside(a, b) + inside(b, c) == inside(a, c)


def join_ranges_of_any_order() -> Iterator[Claim]:
    """Variant: b may lie outside."""
    a, b, c, i = z3.Ints("a b c i")

    def inside(low: Any, high: Any) -> Any:
        return z3.If(z3.And(low <= i, i < high), z3.RealVal(1), 0)

    yield [a <= c], inside(a, b) + inside(b, c) == inside(a, c)


def indicators_are_idempotent() -> Iterator[Claim]:
    """[p]·[p] = [p]."""
    p = z3.Bool("p")
    one = z3.If(p, z3.RealVal(1), z3.RealVal(0))
    yield [], one * one == one


STATEMENTS: dict[str, Callable[[], Iterator[Claim]]] = {
    "best of repeated scores": best_of_repeated,
    "best of equal scores": best_of_equal,
    "sum over a bijection": all_best_are_a_bijection,
    "a bias of all scores": order_is_kept,
    "best of undominated scores": bias_dominates,
    "equal shares": equal_shares,
    "shares of repeated scores": repeated_shares,
    "shares add up": shares_add_up,
    "slot of a choice": slots_are_used_once,
    "quotient": quotient_of_sum,
    "remainder": quotient_of_sum,
    "multiples apart": quotient_of_sum,
    "quotient of a quotient": nested_quotient,
    "quotient and remainder": quotient_and_remainder,
    "merged axes": digits_are_unique,
    "sum at a point": sum_at_point,
    "sum over a range": sum_over_range,
    "split a sum": split_sum,
    "merge sums": split_sum,
    "join sums": join_sums,
    "join ranges": join_ranges,
    "indicators are idempotent": indicators_are_idempotent,
}
"""Statements by the names of the lemmas that they are of, as far as these have names."""

VARIANTS = (
    best_of_interleaved,
    best_of_repeated_ties_last,
    best_of_unequal_copies,
    best_of_equal_ties_last,
    best_of_repeated_shares_with_a_bias,
    some_best_are_no_bijection,
    order_is_nearly_kept,
    small_bias_dominates,
    unequally_repeated_shares,
    shares_of_any_sign_add_up,
    slots_without_experts,
    quotient_of_any_sum,
    digits_of_any_size,
    sum_at_any_point,
    split_sum_the_other_way,
    join_ranges_of_any_order,
)
"""Statements without one of their conditions: each has a counterexample."""


def counterexample(claim: Claim) -> str | None:
    """Return values for which a claim does not hold, or None where z3 shows that there are none."""
    assumptions, conclusion = claim
    solver = z3.Solver()
    solver.set("timeout", 60_000)
    solver.add(*assumptions, z3.Not(conclusion))
    answer = solver.check()
    if answer == z3.unsat:
        return None
    return str(solver.model()) if answer == z3.sat else "z3 does not know"


def main() -> int:
    """Check all statements and variants; exit code 1 if one is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the record goes")
    asked = parser.parse_args()
    record: dict[str, Any] = {"z3": z3.get_version_string(), "statements": {}, "variants": {}}
    is_right = True
    for name, statement in STATEMENTS.items():
        started, count, failures = time.monotonic(), 0, []
        for claim in statement():
            count += 1
            if (values := counterexample(claim)) is not None:
                failures.append(values)
        is_right &= count > 0 and not failures
        record["statements"][name] = {
            "statement": " ".join((statement.__doc__ or "").split()),
            "sizes": count,
            "milliseconds": round(1000 * (time.monotonic() - started)),
            "counterexamples": failures,
        }
    for variant in VARIANTS:
        values = [counterexample(c) for c in variant()]
        is_refuted = all(v is not None and v != "z3 does not know" for v in values)
        is_right &= is_refuted
        record["variants"][variant.__name__] = {
            "statement": " ".join((variant.__doc__ or "").split()),
            "refuted": is_refuted,
        }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    if asked.out is not None:
        asked.out.write_text(text + "\n", "utf-8")
    print(text)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
