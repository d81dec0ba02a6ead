"""Random numbers that depend on a seed and on names, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from moecc.support.lazy import np
from moecc.types import Array


def generator(seed: int, *words: str) -> np.random.Generator:
    """Return a generator that depends on `seed` and `words` alone."""
    # The name of a tensor may be half a surrogate, which JSON can escape.
    text = "\0".join(words).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def moved(data: Array, step: float, seed: int, *words: str) -> Array:
    """Return `data`, in float64 and a step further in a direction that `words` decide.

    Where the step is 0, `data` itself: in its own element type.
    """
    if not step:
        return data
    direction = generator(seed, "direction", *words).standard_normal(data.shape)
    return np.asarray(data.astype(np.float64) + step * direction)


# Decisions that a generator makes, each between alternatives from simple to complex.

T = TypeVar("T")


class Choices(Protocol):
    """Where the decisions come from."""

    def below(self, count: int) -> int:
        """Return a number from 0 to `count` − 1; 0 is the simplest choice."""
        ...


class Decisions:
    """Decisions that a seed makes."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def below(self, count: int) -> int:
        """Return a number from 0 to `count` − 1, each as likely."""
        return int(self._rng.integers(count))


def pick(choices: Choices, items: Sequence[T]) -> T:
    """Return one of `items`, which are ordered from simple to complex."""
    return items[choices.below(len(items))]
