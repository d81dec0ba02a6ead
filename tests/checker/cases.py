"""Uses of every lemma of the checker, and what the checker says of them.

``cases.txt`` has for each lemma terms where its conditions hold, and terms where one does not. What
is accepted is evaluated, too: both sides are the same number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from .meaning import OPEN, Meaning

CASES = Path(__file__).with_name("cases.txt")
SHARDS = {"H": "U/2", "Q": "U/4"}
"""Sizes of shards of the open size U."""


class Case(NamedTuple):
    """A use of a lemma: whether it holds, its term, its parameters, and the result, if said."""

    lemma: str
    holds: bool
    term: str
    parameters: str
    result: str


@cache
def cases() -> tuple[Case, ...]:
    """Return the cases of the file."""
    rows, lemma = [], ""
    for line in CASES.read_text("utf-8").splitlines():
        if line.startswith("  "):
            use, _, result = line[4:].partition(" => ")
            term, _, parameters = use.partition(" | ")
            rows.append(Case(lemma, line[2] == "+", term, parameters, result))
        elif not line.startswith("#"):
            lemma = line
    return tuple(rows)


class Bench:
    """An algebra of a checker, and names for the terms of cases."""

    def __init__(self, checker: Any, table: Any) -> None:
        self.checker = checker
        self.a = checker.Algebra(*table)
        self.names = dict(self.a.scope)
        for name in "wuv":
            self.names[name] = checker.Head(self.a, "source", (name, "f32"))
        self._define("E", 'λ([t8, c2], experts[4, 2, "logits"](λ(y4, w(t8, y4)))(c2))')
        self._define("D", 'λ([t8, c2], experts[4, 2, "logits"](λ(y4, u(t8, y4)))(c2))')
        self._define("H", 'λ([t8, c8], experts[8, 8, "logits"](λ(y8, w(t8, y8)))(c8))')
        for name, axes in {"E8": ("t8", "c2"), "E9": ("t9", "c2"), "N8": ("t8", "c4")}.items():
            experts = f'experts[4, 2, "logits"](λ(y4, w({axes[0]}, y4)))({axes[1]})'
            self._define(name, f"λ([{axes[0]}, {axes[1]}], {experts})")
        self._define("E4", 'λ([t4, c2], experts[4, 2, "logits"](λ(y4, w(4*a2 + t4, y4)))(c2))')
        for name, start in {"F4": "4*a3", "K4": "4*a3 - 4", "L4": "2*a3"}.items():
            logits = f"λ(y4, w({start} + t4, y4))"
            self._define(name, f'λ([t4, c2], experts[4, 2, "logits"]({logits})(c2))')
        self._define("M8", "λ(t8, u(t8))")
        self._define("M4", "λ(t4, u(4*a2 + t4))")
        self._define("G", 'group_of["K"](E)(t8)')
        self._define("X", "E(t8, c2)")
        self._define("P", 'own_slot["K"](E)(t8, c2)')
        self._define("W", "w(div[2](x8))")
        self._define("U", "u(div[2](x8))")
        self._define("P2", 'holds["p"](x8)')
        self._define("Q2", 'holds["q"](x8)')
        for name, biases in {
            "B1": (1, 0) * 4,
            "B2": (2, 0) * 4,
            "H2": ("ratio(1, 2)", 0) * 4,
            "C2": (2,) * 4 + (0,) * 4,
            "V2": (2, 0, 3, 0, 2, 0, 5, 0),
            "F8": (5,) + (0,) * 7,
            "Z7": (1,) * 7,
        }.items():
            self._biases(name, [str(b) for b in biases])
        self._advise("div[2](2*q4 + r2)", "quotient")
        self._advise("range[0, 9](x9)", "range")

    def _biases(self, name: str, biases: list[str]) -> None:
        """Define a bias that is a number at every place, and of a period where it has one."""
        size, values = len(biases), ", ".join(biases)
        self._define(name, f"stack[{size}](x{size}, {values})")
        for j in range(size):
            self._advise(f"stack[{size}](value({j}), {values})", "place in a stack")
        if biases[:2] * (size // 2) == biases:
            self._advise(f"stack[{size}](2*i4, {values})", "stack with a period", 2)
            self._advise("mod[2](2*i4)", "remainder")
            self._advise(f"stack[2](value(0), {', '.join(biases[:2])})", "place in a stack")

    def _define(self, name: str, text: str) -> None:
        self.names[name] = self.read(text)

    def _advise(self, text: str, lemma: str, *parameters: Any) -> None:
        factor = self.a.factor(self.a.value(self.read(text)))
        if factor is not None:  # or there is advice for it
            self.a.advice[factor.node] = (len(self.a.advice), lemma, parameters)

    def read(self, text: str) -> Any:
        """Return the value of an expression."""
        for name, size in re.findall(r"\b([a-z])([0-9]|[A-Z])\b", text):
            extent = int(size) if size.isdigit() else SHARDS.get(size, size)
            self.names[name + size] = self.a.axis(name, extent)
        return eval(text, self.names)

    def subject(self, case: Case) -> tuple[Any, dict[Any, int]]:
        """Return the term that a lemma is used on, and the places of variables."""
        whole = self.read(case.term)
        if case.term.startswith("Σ") and " + Σ" not in case.term and " + w" not in case.term:
            outer = self.names["Σ"]
            self.names["Σ"] = lambda bound, *factors: (bound, factors)
            # Sums within factors are real ones.
            text = "Σ" + case.term[1:].replace("Σ", "inner")
            self.names["inner"] = outer
            bound, factors = self.read(text)
            self.names["Σ"] = outer
            factors = [self.a.factor(self.a.value(f)) for f in factors]
            term, names = self.a.product(list(bound), factors)
            bound_places = {v: -1 - i for i, v in enumerate(names)}
        else:
            total = self.a.value(whole)
            single = self.a.factor(total)
            term, bound_places = (single if single is not None else total), {}
        return term, {**{v: i for i, v in enumerate(term.vars)}, **bound_places}

    def parameters(self, case: Case, places: dict[Any, int]) -> list[Any]:
        """Return the parameters of a case as those of a log."""
        values = self.read(f"({case.parameters},)") if case.parameters else ()
        results = []
        for x in values:
            if isinstance(x, self.checker.Head):
                x = self.a.factor(self.a.value(x))
            elif isinstance(x, self.checker.Term) and self.a.kind(x) == "sum":
                is_whole = case.lemma == "common factor"
                x = x if is_whole else self.a.factor(x) or x
            is_number = isinstance(x, int) and not isinstance(x, self.checker.Values)
            results.append(x if is_number else self.checker.placed(x, places))
        return results

    def judge(self, case: Case) -> bool:
        """Return whether the lemma holds. Raises: AssertionError if it holds and is not true."""
        term, places = self.subject(case)
        advice, results = dict(self.a.advice), dict(self.a.results)
        self.a.open.clear()
        self.a.results.pop(term.node, None)
        plain = self.a.value(term)
        try:
            self.a.advice[term.node] = (-2, case.lemma, self.parameters(case, places))
            result = self.a.rewritten(term, plain)
        except (self.checker.Rejected, *self.checker.MALFORMED):
            return False
        finally:
            self.a.advice, self.a.results = advice, results
        if case.result:
            assert result == self.a.value(self.read(case.result)), f"{case.term} is another term"
        meaning = Meaning(self.a)
        free = sorted({*term.vars, *result.vars}, key=lambda v: v.serial)
        sizes = [range(OPEN[v.size] if isinstance(v.size, str) else v.size) for v in free]
        for values in product(*sizes):
            at = dict(zip(free, values, strict=True))
            left, right = meaning.number(plain, at), meaning.number(result, at)
            assert abs(left - right) < 1e-9, f"{case.term} is {left} and {right} at {values}"
        return True


def failures(checker: Any, table: Any, lemmas: frozenset[str] | None = None) -> Iterator[str]:
    """Yield the cases of lemmas, or of some, that the checker judges in another way, or wrongly."""
    bench = Bench(checker, table)
    for case in cases():
        if lemmas is None or case.lemma in lemmas:
            try:
                judged = bench.judge(case)
            except AssertionError as error:
                yield f"{case.lemma}: {error}"
                continue
            if judged is not case.holds:
                yield f"{case.lemma}: {'refuses' if case.holds else 'accepts'} {case.term}"
