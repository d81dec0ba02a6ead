"""Every lemma: it is used where it holds, both sides are the same number, and not elsewhere.

A case builds a term twice: without lemmas, and with them.  A variant lacks a condition of the
lemma, which then must not be used; what is used instead must be right all the same.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from moecc.prove.rules import APPLICATIONS, MONOMIALS, SUMS, Lemmas
from moecc.terms.term import Algebra, Polynomial

from .lemma_cases import CASES, Build, head, i
from .reflection import Model, size_of


def value(term: Polynomial, seed: int) -> float:
    """Return a term as a number, where its free variables follow from the seed and their names."""
    rng = {n: np.random.default_rng([seed, *n.encode()]) for n in {v.name for v in term.free}}
    env = {v: int(rng[v.name].integers(size_of(v.size))) for v in term.free}
    return Model(seed, unfold=True).value(term, env)


def check(lemma: str, build: Build, *, is_used: bool) -> None:
    lemmas = Lemmas(of_shards=True)
    plain, rewritten = build(Algebra()), build(Algebra(lemmas))
    assert (lemmas.counts[lemma] > 0) == is_used, lemmas.counts
    for seed in range(8):
        a, b = value(plain, seed), value(rewritten, seed)
        assert math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9), (plain, rewritten)


@pytest.mark.parametrize("lemma", CASES)
def test_a_lemma_is_used_where_it_holds(lemma: str) -> None:
    check(lemma, CASES[lemma][0], is_used=True)


VARIANTS = [(name, n) for name, (_, variants) in CASES.items() for n in range(len(variants))]


@pytest.mark.parametrize(("lemma", "number"), VARIANTS)
def test_a_lemma_is_not_used_without_a_condition(lemma: str, number: int) -> None:
    check(lemma, CASES[lemma][1][number], is_used=False)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_family_has_no_member_beyond_its_numbers(number: int) -> None:
    lemmas = Lemmas()
    algebra = Algebra(lemmas)
    family = head("family", ("x", "y"), "f32", (99,))
    algebra.apply(family, (), [algebra.number(number), i(algebra)])
    assert lemmas.counts["member of a family"] == 0


def test_every_lemma_has_a_case() -> None:
    names = {x.name for xs in APPLICATIONS.values() for x in xs}
    assert names | {x.name for x in (*MONOMIALS, *SUMS)} == CASES.keys()
