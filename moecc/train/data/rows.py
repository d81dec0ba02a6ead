"""Rows: which parts of which documents make up each sequence of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

PACKED_TOGETHER = 4096
"""Pieces among which those are looked for that fill a row."""


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
        self._packed = Packed.alone(len(self.sizes))
        self.rows = self._packed.rows

    def pack(self, costs: Numbers, budgets: Numbers) -> None:
        """Put pieces that fit together into a row; arguments are those of `pack`."""
        self._packed = pack(costs, budgets)
        self.rows = self._packed.rows

    def pieces(self, row: int) -> list[Piece]:
        """Return the pieces of a row."""
        found = []
        for number in self._packed.pieces(row):
            start = int(self._starts[number])
            stop = start + int(self.sizes[number])
            found.append(Piece(int(self._documents[number]), start, stop))
        return found


@dataclass(frozen=True)
class Packed:
    """Which pieces make up each row.

    Attributes:
      order: pieces, row by row, ``i64[pieces]``.
      firsts: where each row begins in `order`, and the end of the last one, ``i64[rows + 1]``.
    """

    order: Numbers
    firsts: Numbers

    @classmethod
    def alone(cls, count: int) -> Packed:
        """Return rows of one piece each."""
        return cls(np.arange(count), np.arange(count + 1))

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.firsts) - 1

    def pieces(self, row: int) -> list[int]:
        """Return the pieces of a row."""
        first, last = (int(n) for n in self.firsts[row : row + 2])
        return [int(n) for n in self.order[first:last]]


def pack(costs: Numbers, budgets: Numbers) -> Packed:
    """Return rows of pieces that fit together, nearly full ones.

    Best fit, the longest first, within blocks of pieces (Ding et al. 2024, "Fewer Truncations").

    Args:
      costs: what each piece takes of each budget, ``i64[budgets, pieces]``; each fits alone.
      budgets: of a row, ``i64[budgets]``.
    """
    order: list[int] = []
    firsts = [0]
    for start in range(0, costs.shape[1], PACKED_TOGETHER):
        block = costs[:, start : start + PACKED_TOGETHER]
        for row in _best_fit(block[0].tolist(), block[1:].T.tolist(), budgets.tolist()):
            order += (start + number for number in row)
            firsts.append(len(order))
    return Packed(np.asarray(order, np.int64), np.asarray(firsts, np.int64))


def _best_fit(sizes: list[int], others: list[list[int]], budgets: list[int]) -> list[list[int]]:
    """Return rows of pieces, of which each is in the fullest row that has room for it.

    Args:
      sizes: what each piece takes of the first budget.
      others: what each takes of the other ones.
      budgets: of a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of the first budget, and the number of the row; sorted
    more: list[list[int]] = []  # of the others, by row
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        size, needs = sizes[number], others[number]
        at = bisect_left(room, (size, -1))
        while at < len(room) and any(
            n > left for n, left in zip(needs, more[room[at][1]], strict=True)
        ):
            at += 1
        if at == len(room):
            left, row = budgets[0], len(rows)
            rows.append([])
            more.append(budgets[1:])
        else:
            left, row = room.pop(at)
        rows[row].append(number)
        more[row] = [m - n for m, n in zip(more[row], needs, strict=True)]
        if left > size:
            insort(room, (left - size, row))
    return [sorted(row) for row in rows]
