"""Numbers for terms: what heads mean, in the plainest way, and unknown functions for the others.

An unknown function is drawn by its head and by the numbers that it is applied to, so that equal
arguments have equal values and nothing else is assumed.  Both sides of a lemma must then agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from moecc.ir.arrays import Array
from moecc.ir.operation import OPS
from moecc.ir.ops.slots import AssignSlotsOp
from moecc.prove.shards import open_shard
from moecc.terms.term import (
    INDICATORS,
    Abstraction,
    Application,
    Factor,
    Monomial,
    OpenMonomial,
    Polynomial,
    Var,
)

Env = Mapping[Var, int]
OPEN_SIZE = 4
"""What every open size is here; shards of it are halves and quarters."""


def size_of(size: int | str) -> int:
    """Return a size as a number."""
    return size if isinstance(size, int) else OPEN_SIZE // open_shard(size)[1]


class Model:
    """An interpretation of all heads.

    Args:
      seed: chooses the unknown functions.
      unfold: whether named functions are what they name, and not unknown.
    """

    def __init__(self, seed: int = 0, *, unfold: bool = False) -> None:
        self.seed, self.unfold = seed, unfold

    def value(self, term: object, env: Env) -> float:
        """Return the number that a term is where its free variables are as in `env`."""
        match term:
            case Var():
                return env[term]
            case Polynomial():
                return math.fsum(float(c) * self.value(m, env) for m, c in term.terms)
            case Monomial() | OpenMonomial():
                ranges = (range(size_of(v.size)) for v in term.bound)
                return math.fsum(
                    self._product(term.factors, inner)
                    for values in product(*ranges)
                    for inner in ({**env, **dict(zip(term.bound, values, strict=True))},)
                )
            case Application():
                return float(self._applied(term, env))
        raise TypeError(f"{term!r} is no term")

    def _product(self, factors: Sequence[Factor], env: Env) -> float:
        # Where an indicator is 0, other factors may have no value.
        first = [f for f in factors if isinstance(f, Application) and f.head.name in INDICATORS]
        result = math.prod(self.value(f, env) for f in first)
        if result:
            result *= math.prod(self.value(f, env) for f in factors if f not in first)
        return result

    def table(self, function: Abstraction, env: Env) -> np.ndarray:
        """Return all values of a function."""
        shape = [size_of(v.size) for v in function.variables]
        values = [
            self.value(function.body, {**env, **dict(zip(function.variables, at, strict=True))})
            for at in product(*map(range, shape))
        ]
        return np.array(values, float).reshape(shape)

    def _applied(self, term: Application, env: Env) -> float:
        name, attrs = term.head
        if name == "let" and self.unfold:
            (function,) = term.abstractions
            at = [round(self.value(p, env)) for p in term.arguments]
            return self.value(function.body, dict(zip(function.variables, at, strict=True)))
        if name == "stack":
            return self.value(term.arguments[1 + round(self.value(term.arguments[0], env))], env)
        arguments = [self.value(p, env) for p in term.arguments]
        if name in ("family", "weights"):
            at = round(arguments[0])
            leaf = ("source" if name == "family" else "weight", attrs[0][at], *attrs[1:])
            return self._unknown(leaf, arguments[1:], ())
        if name in ("source", "weight"):
            return self._unknown((name, *attrs), arguments, ())
        if "AssignSlotsOp" in attrs[:2]:
            tables = [self.table(a, env) for a in term.abstractions]
            return _assigned(name, attrs, tables[0], [round(a) for a in arguments])
        if name in SLOTS:
            return self._slot(name, attrs, arguments)
        meaning = MEANINGS.get(name)
        if meaning is None and any(not a.free for a in term.abstractions):
            # A closed function may be a whole model: what it is does not matter here.
            closed = tuple(a.body.serial for a in term.abstractions if not a.free)
            tables = [self.table(a, env) for a in term.abstractions if a.free]
            return self._unknown((name, *attrs, closed), arguments, tables)
        tables = [self.table(a, env) for a in term.abstractions]
        if meaning is not None:
            return meaning(attrs, tables, arguments)
        return self._unknown((name, *attrs), arguments, tables)

    def _slot(self, name: str, attrs: Sequence[object], arguments: Sequence[float]) -> float:
        """Return what an assignment in which every choice has a slot of its own says."""
        numbers = [round(a) for a in arguments]
        if name == "own_slot":
            return float(sum(n * 1000**i for i, n in enumerate(numbers)))
        if name == "group_of":
            return 0.0
        if name == "occupied":
            return 1.0
        return float(numbers[2] // 1000 ** int(str(attrs[0])) % 1000)

    def _unknown(
        self, head: Sequence[object], arguments: Sequence[float], tables: Sequence[np.ndarray]
    ) -> float:
        numbers = [round(a, 6) + 0.0 for a in (*arguments, *(x for t in tables for x in t.flat))]
        text = repr((self.seed, head, numbers)).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")
        # Positive and near 1, so that products of many stay numbers.
        return 0.5 + digest / 2**48


def _assigned(name: str, attrs: Sequence[object], experts: np.ndarray, at: Sequence[int]) -> float:
    """Return what the reference says of slots for one axis of tokens and one of choices."""
    key = attrs[1:] if name == "token_of" else attrs
    texts = dict(str(a).split("=") for a in key if "=" in str(a))
    numbers = {k: int(v) if v.isdigit() else v for k, v in texts.items()}
    defaults = {k: spec.default for k, spec in OPS["assign_slots"].attrs.items()}
    op = AssignSlotsOp({**defaults, "tokens": ("t",), "using": (), **numbers})
    slots = op.meaning(Array(experts.astype(int), ("t", "c")))
    size = op.bounds(*experts.shape)[1]
    if name in ("slot_of", "own_slot"):
        return float(slots.data[at[0], at[1]])
    if name == "placed":
        return float(slots.data[at[0], at[1]] >= 0)
    if name == "group_of":
        return float(at[0] // size)
    group, expert, slot = at
    tokens = [
        t for t in range(group * size, (group + 1) * size)
        for c in range(experts.shape[1]) if (experts[t, c], slots.data[t, c]) == (expert, slot)
    ]  # fmt: skip
    return float(bool(tokens) if name == "occupied" else (tokens or [group * size])[0])


SLOTS = ("own_slot", "group_of", "occupied", "token_of")


def _share(attrs: Sequence[object], tables: Sequence[np.ndarray], at: Sequence[float]) -> float:
    scores = np.exp(tables[0]) if attrs[0] == "softmax" else 1 / (1 + np.exp(-tables[0]))
    return float((scores / scores.sum())[round(at[0])])


def _experts(attrs: Sequence[object], tables: Sequence[np.ndarray], at: Sequence[float]) -> float:
    scores = np.round(tables[0], 9)
    if len(tables) > 1:
        parts = np.exp(scores)
        score = parts / parts.sum() if attrs[2] == "softmax" else 1 / (1 + np.exp(-scores))
        scores = np.round(score + tables[1], 9)
    return float(np.argsort(-scores, kind="stable")[round(at[0])])


def _permutation(attrs: Sequence[object], _: object, at: Sequence[float]) -> float:
    return float(np.random.default_rng(7).permutation(int(str(attrs[0])))[round(at[0])])


def _gate(attrs: Sequence[object], tables: Sequence[np.ndarray], at: Sequence[float]) -> float:
    from moecc.ir.ops.routing import GATE_FUNCTIONS

    gates = GATE_FUNCTIONS[str(attrs[0])](tables[0], tables[1].astype(int))
    return float(gates[round(at[0])])


MEANINGS = {
    "group": lambda a, t, x: x[0],
    "div": lambda a, t, x: round(x[0]) // a[0],
    "mod": lambda a, t, x: round(x[0]) % a[0],
    "shard": lambda a, t, x: round(x[0]) // size_of(f"{a[0]}/{a[1]}"),
    "within": lambda a, t, x: round(x[0]) % size_of(f"{a[0]}/{a[1]}"),
    "range": lambda a, t, x: float(a[0] <= round(x[0]) < a[1]),
    "equal": lambda a, t, x: float(round(x[0]) == 0),
    "at_least_0": lambda a, t, x: float(round(x[0]) >= 0),
    "root": lambda a, t, x: math.sqrt(a[0] / a[1]),
    "size": lambda a, t, x: float(size_of(a[0])),
    "inverse_size": lambda a, t, x: 1 / size_of(a[0]),
    "inverse": lambda a, t, x: 1 / x[0],
    "share": _share,
    "experts": _experts,
    "permutation": _permutation,
    "gate": _gate,
    "maximum": lambda a, t, x: max(x),
    "mask": lambda a, t, x: x[0] if round(x[1]) else -9.0,
    "sigmoid": lambda a, t, x: 1 / (1 + math.exp(-x[0])),
    "exp": lambda a, t, x: math.exp(x[0]),
    "silu": lambda a, t, x: x[0] / (1 + math.exp(-x[0])),
    "relu": lambda a, t, x: max(x[0], 0.0),
    "tanh": lambda a, t, x: math.tanh(x[0]),
    "square": lambda a, t, x: x[0] ** 2,
    "gelu": lambda a, t, x: x[0] * math.erfc(-x[0] / math.sqrt(2)) / 2,
    "gelu_tanh": lambda a, t, x: (
        x[0] / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x[0] + 0.044715 * x[0] ** 3)))
    ),
    "group_sum": lambda a, t, x: float(np.split(t[0], int(a[0][7:]))[round(x[0])].sum()),
    "holds": lambda a, t, x: float(hash((str(a), *(round(v, 6) for v in x))) % 2),
    "integer": lambda a, t, x: float(hash((str(a), *(round(v, 6) for v in x))) % 5),
}


def size(term: object) -> int:
    """Return how many numbers an evaluation of a term computes, roughly."""
    match term:
        case Polynomial():
            return sum(size(m) for m, _ in term.terms)
        case Monomial() | OpenMonomial():
            inner = sum(map(size, term.factors))
            return math.prod(size_of(v.size) for v in term.bound) * max(inner, 1)
        case Application():
            tables = sum(
                math.prod(size_of(v.size) for v in a.variables) * size(a.body)
                for a in term.abstractions
                if a.free or term.head.name in MEANINGS
            )
            return 1 + tables + sum(map(size, term.arguments))
    return 1
