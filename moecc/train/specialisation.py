"""Which tokens go to which expert: counts, what the token alone explains, entropy of sentinels.

ST-MoE, section 7 (Zoph et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moecc.types.arrays import Array

SEED_OF_SHUFFLES = 0


@dataclass(frozen=True)
class Routed:
    """Where the tokens of a text went in one layer.

    Attributes:
      layer: its place in the graph.
      experts: how many there are.
      tokens: ids of vocabulary, ``[token]``.
      first: the expert of each token's first choice, ``[token]``.
    """

    layer: str
    experts: int
    tokens: Array
    first: Array

    @cached_property
    def counts(self) -> Array:
        """How often each id went to each expert, ``[id, expert]``."""
        return count(self.tokens, self.first, self.experts)

    @property
    def shares(self) -> Array:
        """The part of all tokens that each expert got, ``[expert]``."""
        return _shares(self.counts.sum(axis=0))

    @property
    def explained(self) -> float:
        """The part of the choice that the id alone explains: I(id; expert) / H(expert)."""
        return self._explained(self.counts)

    @property
    def by_chance(self) -> float:
        """The same where choices are shuffled among tokens: rare ids seem to explain a little."""
        shuffled = np.random.default_rng(SEED_OF_SHUFFLES).permutation(self.first)
        return self._explained(count(self.tokens, shuffled, self.experts))

    def _explained(self, counts: Array) -> float:
        uncertain = entropy(self.shares)
        return information(counts) / uncertain if uncertain else 0.0

    def typical(self, expert: int, most: int = 7) -> list[tuple[int, float]]:
        """Return the ids that tell this expert most from others, and their part that went there.

        They are those that add most to I(id; expert): frequent ones that prefer it.
        """
        totals = self.counts.sum(axis=1)
        there = self.counts[:, expert]
        part = there / np.maximum(totals, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(there > 0, there * np.log(part / self.shares[expert]), 0.0)
        best = np.argsort(-score, kind="stable")[:most]
        return [(int(i), float(part[i])) for i in best if score[i] > 0]

    def entropies(self, ids: frozenset[int]) -> tuple[float | None, float | None]:
        """Return the entropy over experts of the tokens in `ids`, and of the others, in nats.

        None where there are no such tokens; log(experts) is that of an even spread.
        """
        chosen = np.isin(self.tokens, sorted(ids))
        return self._entropy_of(chosen), self._entropy_of(~chosen)

    def _entropy_of(self, chosen: Array) -> float | None:
        if not chosen.any():
            return None
        return entropy(_shares(np.bincount(self.first[chosen], minlength=self.experts)))


def count(tokens: Array, experts: Array, size: int) -> Array:
    """Return how often each id met each expert, ``[id, expert]``."""
    table = np.zeros((int(tokens.max(initial=0)) + 1, size), np.int64)
    np.add.at(table, (tokens, experts), 1)
    return table


def entropy(shares: Array) -> float:
    """Return the entropy of a distribution, in nats."""
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def information(counts: Array) -> float:
    """Return the mutual information of rows and columns, in nats."""
    joint = counts / counts.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    return entropy(rows) + entropy(columns) - entropy(joint)


def _shares(counts: Array) -> Array:
    shares: Array = counts / max(int(counts.sum()), 1)
    return shares
