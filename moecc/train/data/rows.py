"""Rows: which parts of which documents make up each sequence of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
      document: its number.
      start, stop: of its tokens; what is counted is up to the plan that made it.
    """

    document: int
    start: int
    stop: int


class RowPlan(ABC):
    """The rows of a corpus.

    Attributes:
      rows: how many there are.
    """

    rows: int

    @abstractmethod
    def pieces(self, row: int) -> list[Piece]:
        """Return what a row consists of, in order."""


class StreamPlan(RowPlan):
    """Documents one after the other, cut into rows of equal length.

    Args:
      lengths: of documents, with what is put around each, ``i64[documents]``.
      row: tokens of a row.
    """

    def __init__(self, lengths: Numbers, row: int) -> None:
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._row = row
        self.rows = -(-int(self._starts[-1]) // row)

    def pieces(self, row: int) -> list[Piece]:
        """Return the parts of documents in a row."""
        start = row * self._row
        stop = min(start + self._row, int(self._starts[-1]))
        document = int(np.searchsorted(self._starts, start, "right")) - 1
        found = []
        while start < stop:
            first, last = int(self._starts[document]), int(self._starts[document + 1])
            end = min(last, stop)
            if end > start:
                found.append(Piece(document, start - first, end - first))
            start, document = end, document + 1
        return found


class PackedPlan(RowPlan):
    """Documents in pieces of at most so many tokens, one in a row until they are packed.

    Args:
      lengths: of documents, ``i64[documents]``.
      most: tokens of a piece.
      least: tokens without which a piece is left out.

    Attributes:
      sizes: the tokens of each piece, ``i64[pieces]``.
    """

    def __init__(self, lengths: Numbers, most: int, *, least: int = 1) -> None:
        counts = -(-lengths // most)
        documents = np.repeat(np.arange(len(lengths)), counts)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        starts = (np.arange(len(documents)) - before) * most
        sizes = np.minimum(most, lengths[documents] - starts)
        kept = sizes >= least
        self._documents, self._starts, self.sizes = documents[kept], starts[kept], sizes[kept]
        self._firsts = np.arange(len(self.sizes) + 1)
        self.rows = len(self.sizes)

    def pack(self, costs: Numbers, budgets: Numbers) -> None:
        """Put as many pieces into a row as fit, in order; arguments are those of `pack`."""
        self._firsts = pack(costs, budgets)
        self.rows = len(self._firsts) - 1

    def pieces(self, row: int) -> list[Piece]:
        """Return the pieces of a row."""
        found = []
        for number in range(int(self._firsts[row]), int(self._firsts[row + 1])):
            start = int(self._starts[number])
            stop = start + int(self.sizes[number])
            found.append(Piece(int(self._documents[number]), start, stop))
        return found


def pack(costs: Numbers, budgets: Numbers) -> Numbers:
    """Return the first piece of each row, and the number of pieces.

    A row has as many pieces as fit, in order (next fit).

    Args:
      costs: what each piece takes of each budget, ``i64[budgets, pieces]``; each fits alone.
      budgets: of a row, ``i64[budgets]``.
    """
    count = costs.shape[1]
    spent = np.concatenate([np.zeros((len(costs), 1), np.int64), np.cumsum(costs, axis=1)], axis=1)
    found, at = [0], 0
    while at < count:
        limits = (
            int(np.searchsorted(line, line[at] + budget, "right")) - 1
            for line, budget in zip(spent, budgets, strict=True)
        )
        at = max(min(limits), at + 1)
        found.append(at)
    return np.asarray(found, np.int64)
