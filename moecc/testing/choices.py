"""Decisions that a generator makes, each between alternatives from simple to complex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

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
