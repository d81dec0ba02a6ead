"""What terms of the checker are in numbers, at one choice of all sources and free variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from hashlib import sha256
from itertools import product
from typing import Any

OPEN = {"S": 3, "T": 5, "U": 8, "U/2": 4, "U/4": 2}
"""Sizes that are open in a case."""

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "square": lambda x: x * x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(0.8 * x)) / 2,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "exp": math.exp,
    "inverse": lambda x: 1 / x,
    "group": lambda x: x,
}


def drawn(*key: Any) -> float:
    """Return a number from -1 to 1 that belongs to a key."""
    text = repr([Fraction(k) if isinstance(k, int | float) else k for k in key])
    return int.from_bytes(sha256(text.encode()).digest()[:6], "big") / 2**47 - 1


class Meaning:
    """Evaluates terms of an algebra.

    Attributes:
      algebra: that built the terms.
      places: of variables that are not in it, drawn within their size.
    """

    def __init__(self, algebra: Any) -> None:
        self.algebra, self.places = algebra, dict[Any, Any]()

    def size(self, size: Any) -> int:
        """Return a size as a number."""
        return OPEN[size] if isinstance(size, str) else size

    def number(self, term: Any, places: dict[Any, Any]) -> Any:
        """Return the number that a sum is."""
        total: Any = 0
        for c, monomial in self.algebra.terms(term):
            bound, factors = self.algebra.entered(monomial)
            total += c * self._summed(bound, factors, places)
        return total

    def _summed(self, bound: list[Any], factors: list[Any], places: dict[Any, Any]) -> Any:
        if bound:
            inner = range(self.size(bound[0].size))
            return sum(self._summed(bound[1:], factors, {**places, bound[0]: i}) for i in inner)
        return math.prod((self._factor(f, places) for f in factors), start=Fraction(1))

    def _table(self, function: Any, places: dict[Any, Any]) -> list[Any]:
        bound, body = self.algebra.entered(function)
        return [
            self.number(body, {**places, **dict(zip(bound, at, strict=True))})
            for at in product(*(range(self.size(v.size)) for v in bound))
        ]

    def _factor(self, factor: Any, places: dict[Any, Any]) -> Any:
        if factor.node.kind == "variable":
            return places[factor.vars[0]]
        head, attrs, functions, arguments = self.algebra.applied(factor)
        values = [self.number(x, places) for x in arguments]
        x = values[0] if values else None
        if head in FUNCTIONS:
            return FUNCTIONS[head](float(x))
        match head:
            case "range":
                return int(attrs[0] <= x < attrs[1])
            case "equal":
                return int(x == 0)
            case "at_least_0":
                return int(x >= 0)
            case "div":
                return x // attrs[0]
            case "mod":
                return x % attrs[0]
            case "stack" | "family" | "weights":
                parts = values[1:] if head == "stack" else attrs[0]
                assert head != "stack" or attrs == (len(parts),), attrs
                if x not in range(len(parts)):
                    return drawn("beyond", x, *parts)
                kind = "source" if head == "family" else "weight"
                inner = (parts[int(x)], *attrs[1:], *values[1:])
                return parts[int(x)] if head == "stack" else drawn(kind, *inner)
            case "let":
                bound, body = self.algebra.entered(functions[0])
                return self.number(body, dict(zip(bound, values, strict=True)))
            case "root":
                return math.sqrt(attrs[0] / attrs[1])
            case "size" | "inverse_size":
                return Fraction(self.size(attrs[0])) ** (1 if head == "size" else -1)
            case "mask":
                fill = -1e3 if attrs[0] == "-inf" else attrs[0]
                return x if values[1] else fill
            case "share":
                return self._share(attrs[0], self._table(functions[0], places), x)
            case "experts":
                return self._experts(attrs, [self._table(f, places) for f in functions], x)
            case "shard":
                return x // Fraction(self.size(attrs[0]), attrs[1])
            case "within":
                return x % Fraction(self.size(attrs[0]), attrs[1])
            case "row":
                return int(drawn(head, *attrs, *values) * 99) % attrs[0]
            case "permutation":
                return (5 * x + 3) % attrs[0]
            case "hashed_expert":
                return int(drawn(head, *values) * 99) % attrs[0]
            case "integer":
                return int(drawn(head, *attrs, *values) * 9)
            case "holds":
                return int(drawn(head, attrs, *values) > 0)
            case "gate":
                return 1 / (len(self._table(functions[0], places)) - x)
            case (
                "own_slot"
                | "placed"
                | "slot_of"
                | "group_of"
                | "token_of"
                | "occupied"
                | "group_sum"
            ):
                return Groups(self, attrs, functions, places).number(head, values)
        return drawn(head, *attrs, *values)

    def _share(self, score: str, scores: list[Any], at: Any) -> float:
        sigma = math.exp if score == "softmax" else FUNCTIONS["sigmoid"]
        exponents = [sigma(float(s)) for s in scores]
        if at not in range(len(scores)):
            return drawn("beyond", at)
        return exponents[int(at)] / sum(exponents)

    def _experts(self, attrs: tuple[Any, ...], tables: list[Any], choice: Any) -> Any:
        logits, *biases = tables
        count, _, kind = attrs
        if choice not in range(count):
            return drawn("beyond", choice)
        if kind == "logits":
            scores = logits
        elif kind == "sigmoid":
            scores = [FUNCTIONS["sigmoid"](float(x)) for x in logits]
        else:
            scores = [self._share(kind, logits, i) for i in range(count)]
        keys = [round(float(s + sum(b[i] for b in biases)), 12) for i, s in enumerate(scores)]
        return sorted(range(count), key=lambda i: (-keys[i], i))[int(choice)]


class Groups:
    """An assignment of slots to choices, group by group, drawn from what it reads of a group."""

    def __init__(
        self, meaning: Meaning, attrs: tuple[Any, ...], functions: list[Any], places: dict[Any, Any]
    ) -> None:
        self.first = [a for a in attrs if isinstance(a, int)][:1]
        numbers = [str(a).removeprefix("groups=") for a in attrs if str(a).startswith("groups=")]
        self.key = [a for a in attrs if isinstance(a, str) and not a.startswith("groups=")]
        tokens = meaning.size(functions[0].node.label[0])
        self.tokens = tokens // int(numbers[0] if numbers else 1)
        self.tables = []
        for function in functions:
            values = meaning._table(function, places)
            width = len(values) // tokens
            self.tables.append([values[i : i + width] for i in range(0, len(values), width)])

    def drawn(self, name: str, group: int, *more: Any) -> float:
        """Return a number that belongs to what is read of a group."""
        start = group * self.tokens
        rows = [
            x for table in self.tables for row in table[start : start + self.tokens] for x in row
        ]
        return drawn(name, *self.key, *rows, *more)

    def number(self, head: str, values: list[Any]) -> Any:
        """Return the value of a head at indices."""
        if head in ("token_of", "occupied", "group_sum"):
            return self._of_group(head, *values)
        if values[0] not in range(len(self.tables[0])):
            return drawn("beyond", head, *values)
        group, token = divmod(int(values[0]), self.tokens)
        if head == "group_of":
            return group
        value = self.drawn(head, group, token, values[1])
        if head != "placed":
            return value
        experts = [int(k.removeprefix("experts=")) for k in self.key if k.startswith("experts=")]
        expert = self.tables[0][int(values[0])][int(values[1])]
        return int(value > 0 and (not experts or expert in range(experts[0])))

    def _of_group(self, head: str, group: Any, *place: Any) -> Any:
        start = int(group) * self.tokens
        if group not in range(len(self.tables[0]) // self.tokens):
            return drawn("beyond", head, group, *place)
        for token in range(self.tokens if place else 0):
            for choice, expert in enumerate(self.tables[0][start + token]):
                if [expert, self.drawn("own_slot", int(group), token, choice)] == [*place]:
                    return (start + token, choice)[self.first[0]] if head == "token_of" else 1
        if head != "token_of":
            return self.drawn(head, int(group), *place)
        return self.drawn(head, int(group), *self.first, *place) + (
            start if self.first == [0] else 0
        )
