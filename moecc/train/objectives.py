"""Objectives: what a model sees of a corpus, row by row, and what it has to predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from numpy.typing import NDArray

from moecc.support.lazy import np
from moecc.train.rows import (
    DocumentPiece,
    Numbers,
    PackedPlan,
    PackedRows,
    RowPlan,
    StreamPlan,
    pack,
)
from moecc.train.tokens.folder import Special, TokenFolder

# What a model has to restore: spans behind sentinels (T5), single tokens behind a mask (BERT).

Ids = NDArray[np.int32]

MASKED, RANDOM = 0.8, 0.1
"""Of the tokens that BERT predicts: the shares that are masked, and replaced by any token."""


@dataclass(frozen=True)
class Spans:
    """Span corruption (Raffel et al. 2020, §3.1.4), the pre-training of ST-MoE.

    A sequence alternates between what is kept and what is hidden, and begins with what is kept.
    Encoder: what is kept, a sentinel for each span, and the end.  Decoder: each sentinel and its
    span, and the end.

    Attributes:
      density: the share of tokens that is hidden.
      mean: the mean length of a span.
      sentinels: the ids of sentinels, in order.
      end: the id of the end; None without one.
    """

    density: float
    mean: float
    sentinels: tuple[int, ...]
    end: int | None

    def counts(self, lengths: Numbers) -> tuple[Numbers, Numbers]:
        """Return the hidden tokens and the spans of sequences of `lengths`, each at least 2."""
        hidden = np.clip(np.round(lengths * self.density).astype(np.int64), 1, lengths - 1)
        spans = np.maximum(np.round(hidden / self.mean).astype(np.int64), 1)
        most = np.minimum(np.minimum(hidden, lengths - hidden), len(self.sentinels))
        return hidden, np.minimum(spans, most)

    def drawn(self, lengths: Numbers) -> tuple[float, float]:
        """Return the share of tokens that is hidden, and the mean span, of all sequences."""
        hidden, spans = self.counts(lengths)
        return hidden.sum() / max(lengths.sum(), 1), hidden.sum() / max(spans.sum(), 1)

    def sizes(self, lengths: Numbers) -> tuple[Numbers, Numbers]:
        """Return the tokens of encoder and decoder for sequences of `lengths`, each at least 2."""
        hidden, spans = self.counts(lengths)
        ends = 0 if self.end is None else 1
        return lengths - hidden + spans + ends, hidden + spans + ends

    def apply(self, ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Return the tokens of encoder and decoder for a sequence of at least 2 tokens."""
        hidden, spans = (int(n[0]) for n in self.counts(np.asarray([len(ids)])))
        kept_lengths = _partition(len(ids) - hidden, spans, rng)
        hidden_lengths = _partition(hidden, spans, rng)
        encoder: list[Ids] = []
        decoder: list[Ids] = []
        at = 0
        for shown, gone, sentinel in zip(
            kept_lengths, hidden_lengths, self.sentinels[:spans], strict=True
        ):
            mark = np.asarray([sentinel], np.int32)
            encoder += [ids[at : at + shown], mark]
            decoder += [mark, ids[at + shown : at + shown + gone]]
            at += shown + gone
        end = np.asarray([] if self.end is None else [self.end], np.int32)
        return np.concatenate([*encoder, end]), np.concatenate([*decoder, end])


def _partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Return `parts` positive lengths that add up to `total`, every such choice equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    edges = np.concatenate([[0], cuts, [total]])
    return [int(n) for n in np.diff(edges)]


@dataclass(frozen=True)
class Masking:
    """Masked language modelling (Devlin et al. 2019, §3.1).

    Attributes:
      density: the share of tokens that is predicted.
      mask: the id of the mask.
      vocab: tokens are replaced by any id below.
    """

    density: float
    mask: int
    vocab: int

    def apply(self, ids: Ids, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        """Return the tokens that the model sees, and which it has to predict."""
        count = min(max(round(len(ids) * self.density), 1), len(ids))
        chosen = np.zeros(len(ids), bool)
        chosen[rng.choice(len(ids), count, replace=False)] = True
        draw = rng.random(len(ids))
        seen = ids.copy()
        seen[chosen & (draw < MASKED)] = self.mask
        replaced = chosen & (draw >= MASKED) & (draw < MASKED + RANDOM)
        seen[replaced] = rng.integers(0, self.vocab, int(replaced.sum()))
        return seen, chosen


IGNORED = -1
"""The target of a token that has none: padding, a prompt, the last token of a document."""


@dataclass(frozen=True)
class RowSegment:
    """The part of a row that one document makes.

    Attributes:
      tokens: of the only sequence, or of the encoder's.
      targets: what is predicted at each token of the last sequence, `IGNORED` for nothing.
      decoder_tokens: of the decoder's sequence, where there is one.
      document: the number of the document.
    """

    tokens: Ids
    targets: Ids
    decoder_tokens: Ids | None = None
    document: int = 0


@dataclass(frozen=True)
class Room:
    """The room in a row.

    Attributes:
      seq: tokens of the only sequence, or of the encoder's.
      decoder_seq: tokens of the decoder's; 0 without one.
      packing: whether a row has several documents.
    """

    seq: int
    decoder_seq: int
    packing: bool


class Examples(Protocol):
    """Prompts with completions: those of a token folder, or made of them."""

    @property
    def starts(self) -> Numbers:
        """The beginnings of examples, and the end of the last one, ``i64[examples + 1]``."""
        ...

    @property
    def completions(self) -> Numbers:
        """The tokens of each prompt, after which its completion begins."""
        ...

    def ids(self, start: int, stop: int) -> Ids:
        """Return the ids from `start` to `stop`."""
        ...


class CorpusRows(ABC):
    """The rows of a corpus under an objective.

    Attributes:
      rows: how many there are.
    """

    rows: int

    @abstractmethod
    def segments(self, row: int, rng: np.random.Generator) -> list[RowSegment]:
        """Return what a row consists of, in order. Raises InputError as `TokenFolder.ids`."""


def end_of(special: Special) -> int | None:
    """Return what ends a document: the end of text, or what the tokenizer puts behind a text."""
    if special.eos is not None:
        return special.eos
    return special.after[-1] if special.after else None


class CausalRows(CorpusRows):
    """The next token, within each document.

    A document begins with what the tokenizer puts before a text, and ends with the end of text.
    Rows are full but for the last one; without packing, a row is a document or a part of one.
    """

    def __init__(self, folder: TokenFolder, special: Special, room: Room) -> None:
        self._folder = folder
        self._before = special.before
        self._after = _one(end_of(special))
        lengths = np.diff(folder.starts) + len(self._before) + len(self._after)
        self._plan: RowPlan = (
            StreamPlan(lengths, room.seq)
            if room.packing
            # A piece of one token would predict nothing.
            else PackedPlan(lengths, room.seq, least=2)
        )
        self.rows = self._plan.rows

    def segments(self, row: int, rng: np.random.Generator) -> list[RowSegment]:
        """Return the tokens of pieces, each with the next one of its document as target."""
        segments = []
        for piece in self._plan.pieces(row):
            size = piece.stop - piece.start
            # One token more, where the document goes on.
            stop = piece.stop + 1
            first, last = (int(n) for n in self._folder.starts[piece.document : piece.document + 2])
            begin, end = len(self._before), len(self._before) + last - first
            inner = (first + min(max(n, begin), end) - begin for n in (piece.start, stop))
            tail = self._after[max(piece.start - end, 0) : max(stop - end, 0)]
            ids = _joined(self._before[piece.start : stop], self._folder.ids(*inner), tail)
            targets = np.full(size, IGNORED, np.int32)
            targets[: len(ids) - 1] = ids[1:]
            segments.append(RowSegment(ids[:size], targets, document=piece.document))
        return segments


class SpanRows(CorpusRows):
    """Hidden spans, of an encoder-decoder.

    Args:
      folder: the corpus.
      spans: how they are hidden.
      start: what the decoder begins with.
      room: of a row.

    Attributes:
      hidden, mean: the share of the tokens that is hidden, and the mean length of a span: whole
        numbers of tokens and spans in each piece, and no more spans than sentinels.
    """

    def __init__(self, folder: TokenFolder, spans: Spans, start: int, room: Room) -> None:
        self._folder = folder
        self._spans = spans
        self._start = start
        most = _longest(spans, room.seq, room.decoder_seq)
        self._plan = PackedPlan(np.diff(folder.starts), max(most, 2), least=2)
        self.hidden, self.mean = spans.drawn(self._plan.sizes)
        if room.packing:
            sizes = np.stack(spans.sizes(self._plan.sizes))
            self._plan.pack(sizes, np.asarray([room.seq, room.decoder_seq]))
        self.rows = self._plan.rows if most else 0

    @staticmethod
    def decoder_seq(spans: Spans, seq: int) -> int:
        """Return what the longest piece needs: 114 for 512, as in T5."""
        most = _longest(spans, seq, 2 * seq)
        return int(spans.sizes(np.asarray([max(most, 2)]))[1][0])

    def segments(self, row: int, rng: np.random.Generator) -> list[RowSegment]:
        """Return pieces with hidden spans."""
        segments = []
        for piece in self._plan.pieces(row):
            ids = _ids_of(self._folder, piece)
            encoder, decoder = self._spans.apply(ids, rng)
            shown = shifted(decoder, self._start)
            segments.append(RowSegment(encoder, decoder, shown, piece.document))
        return segments


def _longest(spans: Spans, seq: int, decoder_seq: int) -> int:
    """Return the tokens of the longest piece that fits once spans are hidden; 0 for none."""
    every = np.arange(2, 2 * seq + 2)
    encoder, decoder = spans.sizes(every)
    return int(every[(encoder <= seq) & (decoder <= decoder_seq)].max(initial=0))


class MaskedRows(CorpusRows):
    """Masked tokens, of an encoder; each piece is between what the tokenizer puts around a text."""

    def __init__(self, folder: TokenFolder, masking: Masking, special: Special, room: Room) -> None:
        self._folder = folder
        self._masking = masking
        self._special = special
        around = len(special.before) + len(special.after)
        self._plan = PackedPlan(np.diff(folder.starts), max(room.seq - around, 1))
        if room.packing:
            self._plan.pack((self._plan.sizes + around)[None], np.asarray([room.seq]))
        self.rows = self._plan.rows if room.seq > around else 0

    def segments(self, row: int, rng: np.random.Generator) -> list[RowSegment]:
        """Return pieces of which some tokens are masked."""
        segments = []
        before, after = self._special.before, self._special.after
        for piece in self._plan.pieces(row):
            ids = _ids_of(self._folder, piece)
            seen, chosen = self._masking.apply(ids, rng)
            aims = np.where(chosen, ids, IGNORED).astype(np.int32)
            ignored = ((IGNORED,) * len(before), (IGNORED,) * len(after))
            targets = _joined(ignored[0], aims, ignored[1])
            tokens = _joined(before, seen, after)
            segments.append(RowSegment(tokens, targets, document=piece.document))
        return segments


class ExampleRows(CorpusRows):
    """Completions of prompts; a label is a completion like any other.

    A prompt that is too long loses its beginning, a completion its end.

    Args:
      folder: the corpus, of examples.
      special: special tokens.
      start: what the decoder begins with; None of a model with one sequence.
      room: of a row.

    Attributes:
      cut: how many examples are too long.
    """

    def __init__(self, folder: Examples, special: Special, start: int | None, room: Room) -> None:
        self._folder = folder
        self._before = special.before
        self._end = _one(end_of(special))
        self._tail = (special.after or self._end) if start is not None else ()
        self._start = start
        completions = np.diff(self._folder.starts) - self._folder.completions
        prompts, completions = self._folder.completions, completions + len(self._end)
        around = len(self._before) + len(self._tail)
        if start is None:
            # The last token is predicted and not seen.
            self._completions = np.minimum(completions, room.seq + 1 - around)
            left = room.seq + 1 - around - self._completions
            self._prompts = np.minimum(prompts, left)
            costs = (self._prompts + self._completions + around - 1)[None]
            budgets = np.asarray([room.seq])
        else:
            self._completions = np.minimum(completions, room.decoder_seq)
            self._prompts = np.minimum(prompts, room.seq - around)
            costs = np.stack([self._prompts + around, self._completions])
            budgets = np.asarray([room.seq, room.decoder_seq])
        self.cut = int(((self._prompts < prompts) | (self._completions < completions)).sum())
        self._packed = pack(costs, budgets) if room.packing else PackedRows.alone(len(prompts))
        self.rows = self._packed.rows

    @staticmethod
    def decoder_seq(folder: Examples, special: Special) -> int:
        """Return what the longest completion needs."""
        longest = np.diff(folder.starts) - folder.completions
        return int(longest.max(initial=0)) + len(_one(end_of(special)))

    def segments(self, row: int, rng: np.random.Generator) -> list[RowSegment]:
        """Return whole examples."""
        return [self._segment(number) for number in self._packed.pieces(row)]

    def _segment(self, number: int) -> RowSegment:
        start, stop = (int(n) for n in self._folder.starts[number : number + 2])
        middle = start + int(self._folder.completions[number])
        prompt = self._folder.ids(middle - int(self._prompts[number]), middle)
        answer = _joined((), self._folder.ids(middle, stop), self._end)
        completion = answer[: int(self._completions[number])]
        if self._start is not None:
            tokens = _joined(self._before, prompt, self._tail)
            return RowSegment(tokens, completion, shifted(completion, self._start), number)
        tokens = _joined(self._before, np.concatenate([prompt, completion]), ())
        targets = tokens[1:].copy()
        # Of a completion without anything before it, the first token is seen and not predicted.
        targets[: max(len(targets) - len(completion), 0)] = IGNORED
        return RowSegment(tokens[:-1], targets, document=number)


def shifted(targets: Ids, start: int) -> Ids:
    """Return what a decoder sees when it is to predict `targets`: them, one later."""
    return _joined((start,), targets[:-1], ())


def _ids_of(folder: TokenFolder, piece: DocumentPiece) -> Ids:
    first = int(folder.starts[piece.document])
    return folder.ids(first + piece.start, first + piece.stop)


def _joined(before: tuple[int, ...], ids: Ids, after: tuple[int, ...]) -> Ids:
    return np.concatenate([np.asarray(before, np.int32), ids, np.asarray(after, np.int32)])


def _one(id: int | None) -> tuple[int, ...]:
    return () if id is None else (id,)
