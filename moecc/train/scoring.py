"""Losses of texts, document by document, and how sure a difference of two models is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Protocol, runtime_checkable

from moecc.ir.graph import Graph
from moecc.support.lazy import np
from moecc.types import Array, Arrays, Doubles, DType

_QUANTILE = 1.959963984540054
"""The normal quantile of 0.975."""
_FEW_DEGREES = {1: 12.706204736, 2: 4.302652730}
"""Student's, where the expansion is 24 % and 3 % too small."""


@dataclass(frozen=True)
class TokenScores:
    """The scores of a model on the targets of a batch.

    Attributes:
      losses: −log p of each target, in nats, 0 where there is none, ``f64[row, seq]``.
      counted: where there is a target.
      hits: targets that are the likeliest token; of equally likely tokens the first.
    """

    losses: Doubles
    counted: Array
    hits: Array

    def by_row(self) -> UnitScores:
        """Return the sums over each row."""
        return UnitScores(self.losses.sum(1), self.counted.sum(1), self.hits.sum(1))


@dataclass(frozen=True)
class UnitScores:
    """The scores of a model on documents, examples or rows: the units of an evaluation.

    Attributes:
      losses: −log p of the targets, summed, in nats, ``f64[unit]``.
      tokens: how many targets, ``i64[unit]``.
      hits: targets that are the likeliest token, ``i64[unit]``.
    """

    losses: Doubles
    tokens: Array
    hits: Array

    @property
    def loss(self) -> float:
        """The mean loss of a token, in nats."""
        return float(self.losses.sum() / max(int(self.tokens.sum()), 1))


def by_document(parts: Iterable[tuple[TokenScores, Array]], count: int) -> UnitScores:
    """Return the sums over each of `count` documents, wherever their targets are.

    Args:
      parts: the scores of batches, and the document of each target, −1 for padding.
      count: how many documents there are.
    """
    losses = np.zeros(count, np.float64)
    tokens, hits = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for scores, documents in parts:
        where = scores.counted & (documents >= 0)
        numbers = documents[where]
        losses += np.bincount(numbers, scores.losses[where], count)
        tokens += np.bincount(numbers, minlength=count)
        hits += np.bincount(numbers, scores.hits[where], count).astype(np.int64)
    return UnitScores(losses, tokens, hits)


class Scorer(Protocol):
    """A graph ready to score rows."""

    def __call__(self, batch: Arrays) -> TokenScores:
        """Return the scores of a batch: inputs by name, and ``targets`` ``[row, seq]``."""
        ...


@runtime_checkable
class ScoringBackend(Protocol):
    """A backend that scores rows."""

    def scorer(self, graph: Graph, params: Arrays, *, dtype: DType) -> Scorer:
        """Return the scorer of a graph with logits.

        Args:
          graph: the graph.
          params: its parameters, by name; each is read once.
          dtype: the type of the computation.

        Raises:
          InputError: the graph has no logits.
        """
        ...


@dataclass(frozen=True)
class LossDifference:
    """The difference of two mean losses on the same rows, in nats a token.

    Attributes:
      mean: the other model's loss less the first one's.
      low, high: a confidence interval of 95 %, of documents as the unit that is drawn.
    """

    mean: float
    low: float
    high: float


def paired_difference(first: UnitScores, second: UnitScores) -> LossDifference:
    """Return how `second` differs from `first` on the same documents.

    A ratio estimator, with its variance by linearisation (Cochran 1977, §6.4) and the quantile of
    Student's t by Cornish and Fisher's expansion: documents differ in length, and losses within one
    belong together, in however many rows it is.
    """
    tokens = first.tokens.astype(np.float64)
    total = max(float(tokens.sum()), 1.0)
    differences = second.losses - first.losses
    mean = float(differences.sum() / total)
    units = len(tokens)
    if units < 2:
        return LossDifference(mean, -np.inf, np.inf)
    residuals = differences - mean * tokens
    error = sqrt(float((residuals**2).sum()) * units / (units - 1)) / total
    reach = student_quantile(units - 1) * error
    return LossDifference(mean, mean - reach, mean + reach)


def student_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t, by its expansion about the normal one."""
    if degrees in _FEW_DEGREES:
        return _FEW_DEGREES[degrees]
    z = _QUANTILE
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def macro_f1(answers: Array, guesses: Array, labels: int) -> float:
    """Return the mean over labels of 2 TP / (2 TP + FP + FN); those that never occur are left out.

    Args:
      answers: the label of each example, ``[example]``.
      guesses: what was chosen.
      labels: how many there are.
    """
    scores = []
    for label in range(labels):
        right = int(((answers == label) & (guesses == label)).sum())
        total = int((answers == label).sum() + (guesses == label).sum())
        if total:
            scores.append(2 * right / total)
    return sum(scores) / max(len(scores), 1)


# Which tokens go to which expert: counts, what the token alone explains, entropy of sentinels.
#
# ST-MoE, section 7 (Zoph et al. 2022).

SEED_OF_SHUFFLES = 0


@dataclass(frozen=True)
class RoutedTokens:
    """The routes of the tokens of a text in one layer.

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
        """The number of times that each id went to each expert, ``[id, expert]``."""
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

    def typical(self, expert: int) -> list[tuple[int, float]]:
        """Return seven ids that tell this expert most from others, and their part that went there.

        They are those that add most to I(id; expert): frequent ones that prefer it.
        """
        totals = self.counts.sum(axis=1)
        there = self.counts[:, expert]
        part = there / np.maximum(totals, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(there > 0, there * np.log(part / self.shares[expert]), 0.0)
        best = np.argsort(-score, kind="stable")[:7]
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
