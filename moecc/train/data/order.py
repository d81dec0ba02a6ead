"""The order of a mixture: which row of which corpus a number stands for, without any state.

Every function here is a pure function of its arguments, and reads or keeps nothing else: step n has
the same rows after a stop, on one host and on many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

PERIOD = 1 << 16
"""Shares of a mixture are exact over this many rows."""

Numbers = NDArray[np.int64]
_Words = NDArray[np.uint64]

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """Return 64 bits that depend on all `numbers` and on their order."""
    word = np.zeros(1, np.uint64)
    for number in numbers:
        word = _scrambled(word + np.uint64((number * 2 + 1) * _GOLDEN & _ALL))
    return int(word[0])


def permuted(numbers: Numbers, size: int, key: int) -> Numbers:
    """Return where a permutation of ``range(size)`` sends each of `numbers`.

    A Feistel network over the next even power of two, walked until it is back in the range (Black
    and Rogaway 2002), so that no table is kept.

    Args:
      numbers: from 0 to `size`, without it.
      size: how many there are.
      key: chooses the permutation.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    words = numbers.astype(np.uint64)
    outside = np.ones(words.shape, bool)
    while outside.any():
        words[outside] = _feistel(words[outside], half, key)
        outside = words >= np.uint64(size)
    return words.astype(np.int64)


def _feistel(words: _Words, half: int, key: int) -> _Words:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = words >> shift, words & mask
    for number in range(_ROUNDS):
        salt = np.uint64((key + number * _GOLDEN) & _ALL)
        left, right = right, left ^ (_scrambled(right + salt) & mask)
    return (left << shift) | right


def _scrambled(words: _Words) -> _Words:
    """Return words whose bits all depend on all bits: the finaliser of SplitMix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class Mixture:
    """The rows of several corpora in one endless order.

    Each corpus has its share s of every stretch of the order, to fewer than 2(1 − s) + 2s(n − 1)
    rows of n corpora: it is less than a row off the time of a stretch, which the others shift by
    less than a row each.  Its rows come in an order of their own in each epoch, all of them once.

    Attributes:
      rows: how many rows each corpus has.
      weights: their shares, before they are normalised.
      seed: chooses the order.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int = 0

    def find(self, numbers: Sequence[int] | Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Return the corpus, the epoch in it, and the row, of each of `numbers`."""
        given = np.asarray(numbers, np.int64)
        turn, place = np.divmod(given, PERIOD)
        corpus = self._pattern[0][place]
        ordinal = turn * self._quotas[corpus] + self._pattern[1][place]
        epoch, row = np.divmod(ordinal, np.asarray(self.rows, np.int64)[corpus])
        for one in set(zip(corpus.tolist(), epoch.tolist(), strict=True)):
            here = (corpus == one[0]) & (epoch == one[1])
            row[here] = permuted(row[here], self.rows[one[0]], mixed(self.seed, *one))
        return corpus, epoch, row

    @cached_property
    def _quotas(self) -> Numbers:
        """How many rows of a period each corpus has: at least one, by largest remainders."""
        shares = np.asarray(self.weights) / sum(self.weights) * PERIOD
        quotas = np.maximum(np.floor(shares), 1).astype(np.int64)
        # Where many small ones were raised to one, the largest give.
        while (left := PERIOD - int(quotas.sum())) != 0:
            short = shares - quotas
            change = np.argmax(short) if left > 0 else np.argmin(np.where(quotas > 1, short, 1.0))
            quotas[change] += np.sign(left)
        return quotas

    @cached_property
    def _pattern(self) -> tuple[Numbers, Numbers]:
        """The corpus of each place of a period, and the how manieth of its corpus that is.

        A corpus has one place, drawn evenly, in each of as many equal parts as it has places.
        """
        corpora = np.repeat(np.arange(len(self.rows)), self._quotas)
        ordinals = np.concatenate([np.arange(q, dtype=np.int64) for q in self._quotas])
        draws = _scrambled(
            ordinals.astype(np.uint64) * np.uint64(_GOLDEN)
            + np.asarray([mixed(self.seed, c) for c in range(len(self.rows))], np.uint64)[corpora]
        )
        within = (draws >> np.uint64(11)).astype(np.float64) / 2**53
        order = np.argsort((ordinals + within) / self._quotas[corpora], kind="stable")
        return corpora[order].astype(np.int64), ordinals[order]
