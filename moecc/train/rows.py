"""Rows: which parts of which documents make up each sequence of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from numpy.typing import NDArray

from moecc.formats.files import read_whole
from moecc.ir.conventions import DECODER_TOKENS, TOKENS
from moecc.ir.graph import Graph
from moecc.ir.structure import index_bound
from moecc.model.inputs import longest, stated_context
from moecc.model.open import OpenedModel
from moecc.support.lazy import np
from moecc.train.tokens.encoders import tokenizer_digest
from moecc.train.tokens.folder import Ids, TokenFolder

Numbers = NDArray[np.int64]

PACKED_TOGETHER = 4096
"""Pieces among which those are looked for that fill a row."""


@dataclass(frozen=True)
class DocumentPiece:
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
    def pieces(self, row: int) -> list[DocumentPiece]:
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

    def pieces(self, row: int) -> list[DocumentPiece]:
        """Return the parts of documents in a row."""
        start = row * self._row
        stop = min(start + self._row, int(self._starts[-1]))
        document = int(np.searchsorted(self._starts, start, "right")) - 1
        pieces = []
        while start < stop:
            first, last = int(self._starts[document]), int(self._starts[document + 1])
            end = min(last, stop)
            if end > start:
                pieces.append(DocumentPiece(document, start - first, end - first))
            start, document = end, document + 1
        return pieces


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
        is_long = sizes >= least
        self._documents, self._starts, self.sizes = (
            documents[is_long],
            starts[is_long],
            sizes[is_long],
        )
        self._packed = PackedRows.alone(len(self.sizes))
        self.rows = self._packed.rows

    def pack(self, costs: Numbers, budgets: Numbers) -> None:
        """Put pieces that fit together into a row; arguments are those of `pack`."""
        self._packed = pack(costs, budgets)
        self.rows = self._packed.rows

    def pieces(self, row: int) -> list[DocumentPiece]:
        """Return the pieces of a row."""
        pieces = []
        for number in self._packed.pieces(row):
            start = int(self._starts[number])
            stop = start + int(self.sizes[number])
            pieces.append(DocumentPiece(int(self._documents[number]), start, stop))
        return pieces


@dataclass(frozen=True)
class PackedRows:
    """The pieces of each row.

    Attributes:
      order: pieces, row by row, ``i64[pieces]``.
      firsts: where each row begins in `order`, and the end of the last one, ``i64[rows + 1]``.
    """

    order: Numbers
    firsts: Numbers

    @classmethod
    def alone(cls, count: int) -> PackedRows:
        """Return rows of one piece each."""
        return cls(np.arange(count), np.arange(count + 1))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.firsts) - 1

    def pieces(self, row: int) -> list[int]:
        """Return the pieces of a row."""
        first, last = (int(n) for n in self.firsts[row : row + 2])
        return [int(n) for n in self.order[first:last]]


def pack(costs: Numbers, budgets: Numbers) -> PackedRows:
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
    return PackedRows(np.asarray(order, np.int64), np.asarray(firsts, np.int64))


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


# Every label of every example as a completion of its prompt, so that the likeliest is found.


@dataclass(frozen=True)
class LabelChoices:
    """A labelled folder in which each example is repeated with each label, in order.

    Attributes:
      folder: the labelled folder.
      examples: the numbers of its examples.
    """

    folder: TokenFolder
    examples: Numbers

    @property
    def labels(self) -> int:
        """The number of labels."""
        return len(self.folder.facts.labels)

    @property
    def answers(self) -> NDArray[np.int64]:
        """The label of each example."""
        return self.folder.labels[self.examples]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The beginnings of the repeated examples, and the end of the last one."""
        sizes = [len(document) for document in self._documents]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def completions(self) -> NDArray[np.int64]:
        """The tokens of each prompt, after which its label begins."""
        return np.repeat(self.folder.completions[self.examples], self.labels)

    def ids(self, start: int, stop: int) -> Ids:
        """Return the ids from `start` to `stop`."""
        return np.concatenate(self._documents)[start:stop]

    @cached_property
    def _documents(self) -> list[Ids]:
        labels = [np.asarray(label.tokens, np.int32) for label in self.folder.facts.labels]
        starts = self.folder.starts[self.examples]
        ends = starts + self.folder.completions[self.examples]
        prompts = (self.folder.ids(int(a), int(b)) for a, b in zip(starts, ends, strict=True))
        return [np.concatenate([prompt, label]) for prompt in prompts for label in labels]


# What batches need to know of a model: its inputs, its vocabulary, its tokenizer.


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that batches depend on.

    Attributes:
      name: in messages.
      vocab: ids are below.
      inputs: the names of the graph's inputs.
      longest: the longest sequence that learned positions allow; None where nothing bounds it.
      context: the longest sequence that its config states; None where it states none.
      pad: the id of padding, of its config; None without one.
      decoder_start: what a decoder begins with, of its config; None without one.
      tokenizer_digest: of the ``tokenizer.json`` beside its weights; None without one.
    """

    name: str
    vocab: int
    inputs: tuple[str, ...]
    longest: int | None = None
    context: int | None = None
    pad: int | None = None
    decoder_start: int | None = None
    tokenizer_digest: str | None = None

    @property
    def has_decoder(self) -> bool:
        """Whether it is an encoder-decoder."""
        return DECODER_TOKENS in self.inputs


def facts_of(model: OpenedModel, graph: Graph | None = None) -> ModelFacts:
    """Return the facts of `model`, whose step has the graph `graph`, its own by default."""
    graph = model.graph if graph is None else graph
    config = model.graph.stated_config
    pad, start = config.get("pad_token_id"), config.get("decoder_start_token_id")
    tokens = graph.inputs.get(TOKENS)
    bound = None if tokens is None else index_bound(tokens)
    return ModelFacts(
        name=model.name,
        vocab=(0 if bound is None else bound),
        inputs=tuple(graph.inputs),
        longest=longest(model.graph),
        context=stated_context(model.graph),
        pad=pad if isinstance(pad, int) and pad >= 0 else None,
        decoder_start=start if isinstance(start, int) else None,
        tokenizer_digest=_digest(model),
    )


def _digest(model: OpenedModel) -> str | None:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return None
    return tokenizer_digest(read_whole(tokenizer) if isinstance(tokenizer, Path) else tokenizer)
