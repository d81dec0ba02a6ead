"""The batches of a recipe: a pure function of recipe, number and rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from numpy.typing import NDArray

from moecc.errors import InputError, Problem, raise_problems
from moecc.model.inputs import context_remarks
from moecc.support.lazy import np
from moecc.support.text import amount
from moecc.train.objectives import (
    IGNORED,
    CausalRows,
    CorpusRows,
    ExampleRows,
    MaskedRows,
    Masking,
    Room,
    RowSegment,
    SpanRows,
    Spans,
    end_of,
)
from moecc.train.recipe import DataSection, Objective, Recipe, corpus_names
from moecc.train.rows import LabelChoices, ModelFacts
from moecc.train.tokens.folder import DOCUMENTS, LABELLED, Special, TokenFolder, open_tokens
from moecc.types import Array

# Segments of rows become arrays, by the names of the inputs of a graph.

PARTS = ("tokens", "segments", "positions", "mask")
"""The inputs of a sequence; those of a decoder begin with ``decoder_``."""


@dataclass(frozen=True)
class BatchShape:
    """The shapes of the arrays of a batch.

    Attributes:
      batch: rows.
      seq: tokens of the only sequence, or of the encoder's.
      decoder_seq: tokens of the decoder's; 0 without one.
      inputs: the names of the graph's inputs.
      pad: the id of padding.
    """

    batch: int
    seq: int
    decoder_seq: int
    inputs: tuple[str, ...]
    pad: int

    def arrays(self) -> dict[str, tuple[tuple[int, int], str]]:
        """Return shape and element type of each array, by name."""
        arrays: dict[str, tuple[tuple[int, int], str]] = {}
        for prefix, length in (("", self.seq), ("decoder_", self.decoder_seq)):
            for part in PARTS:
                if f"{prefix}{part}" in self.inputs:
                    kind = "bool" if part == "mask" else "int32"
                    arrays[f"{prefix}{part}"] = ((self.batch, length), kind)
        return {**arrays, "targets": ((self.batch, self.decoder_seq or self.seq), "int32")}


def collate(rows: Sequence[Sequence[RowSegment]], shape: BatchShape) -> dict[str, Array]:
    """Return the arrays of rows, ``[rows, seq]``; a row without segments is padding.

    ``segments`` numbers the documents of a row from 1, 0 is padding; ``positions`` counts in each
    from 0; ``mask`` is true for tokens.
    """
    decoder = shape.decoder_seq
    first = _Sequences(len(rows), shape.seq, shape.pad)
    second = _Sequences(len(rows), decoder, shape.pad)
    targets = np.full((len(rows), decoder or shape.seq), IGNORED, np.int32)
    for row, segments in enumerate(rows):
        for number, segment in enumerate(segments, 1):
            at = first.put(row, number, segment.tokens)
            if segment.decoder_tokens is not None:
                at = second.put(row, number, segment.decoder_tokens)
            targets[row, at : at + len(segment.targets)] = segment.targets
    arrays = {**first.arrays(""), **second.arrays("decoder_")}
    return {**{name: arrays[name] for name in shape.inputs if name in arrays}, "targets": targets}


class _Sequences:
    """The arrays of one sequence of each row."""

    def __init__(self, rows: int, length: int, pad: int) -> None:
        self._tokens = np.full((rows, length), pad, np.int32)
        self._segments = np.zeros((rows, length), np.int32)
        self._positions = np.zeros((rows, length), np.int32)
        self._filled = [0] * rows

    def put(self, row: int, number: int, tokens: Array) -> int:
        """Put the tokens of a document behind what is there, and return where they begin."""
        at = self._filled[row]
        end = at + len(tokens)
        self._tokens[row, at:end] = tokens
        self._segments[row, at:end] = number
        self._positions[row, at:end] = np.arange(len(tokens))
        self._filled[row] = end
        return at

    def arrays(self, prefix: str) -> dict[str, Array]:
        """Return the arrays by name."""
        return {
            f"{prefix}tokens": self._tokens,
            f"{prefix}segments": self._segments,
            f"{prefix}positions": self._positions,
            f"{prefix}mask": self._segments > 0,
        }


# From token folders to rows: whether they suit the model and the objective, and how they do.

Key = tuple[str, str]
"""The use of a folder, ``train`` or ``evaluate``, and the name of its corpus."""

_OF_THE_MODEL = "make the tokens with the model's own tokenizer: moecc tokens … --tokenizer MODEL"


def label_rows(
    choices: LabelChoices, data: DataSection, model: ModelFacts
) -> tuple[BatchShape, CorpusRows]:
    """Return the shape of batches, and rows of each example with each of its labels, in order.

    Args:
      choices: of a folder that suits the objective and the model.
      data: how long sequences are.
      model: the model.
    """
    maker = _RowMaker({("evaluate", ""): choices.folder}, data, model)
    decoder_seq = ExampleRows.decoder_seq(choices, maker.special) if model.has_decoder else 0
    start = maker.start if model.has_decoder else None
    rows = ExampleRows(choices, maker.special, start, Room(data.seq, decoder_seq, packing=False))
    return BatchShape(data.batch, data.seq, decoder_seq, model.inputs, maker.pad), rows


@dataclass(frozen=True)
class _RowMaker:
    """Makes rows of folders."""

    folders: Mapping[Key, TokenFolder]
    data: DataSection
    model: ModelFacts

    @property
    def special(self) -> Special:
        """The special tokens, which are those of all folders."""
        return next(iter(self.folders.values())).facts.special

    @property
    def spans(self) -> Spans:
        data = self.data
        return Spans(
            data.noise_density, data.mean_span, self.special.sentinels, end_of(self.special)
        )

    @property
    def start(self) -> int:
        """The token that a decoder begins with: its config's, or padding, as in T5."""
        return self.pad if self.model.decoder_start is None else self.model.decoder_start

    @property
    def pad(self) -> int:
        pads = [p for p in (self.special.pad, self.model.pad) if p is not None]
        return next((p for p in pads if p < self.model.vocab), 0)

    @property
    def decoder_seq(self) -> int:
        """The decoder's tokens: those of the recipe, or as many as are needed."""
        if not self.model.has_decoder:
            return 0
        if self.data.decoder_seq:
            return self.data.decoder_seq
        if self.data.objective is Objective.SPANS:
            return SpanRows.decoder_seq(self.spans, self.data.seq)
        needed = (ExampleRows.decoder_seq(f, self.special) for f in self.folders.values())
        return min(max(needed), self.data.seq)

    @property
    def shape(self) -> BatchShape:
        return BatchShape(
            self.data.batch, self.data.seq, self.decoder_seq, self.model.inputs, self.pad
        )

    def rows(self, folder: TokenFolder) -> CorpusRows:
        """Return the rows of a folder, for which there are no misfits."""
        room = Room(self.data.seq, self.decoder_seq, self.data.packing)
        match self.data.objective:
            case Objective.CAUSAL:
                return CausalRows(folder, self.special, room)
            case Objective.SPANS:
                return SpanRows(folder, self.spans, self.start, room)
            case Objective.MASKED:
                assert self.special.mask is not None, "it is no misfit"
                vocab = min(folder.facts.vocab_size, self.model.vocab)
                masking = Masking(self.data.noise_density, self.special.mask, vocab)
                return MaskedRows(folder, masking, self.special, room)
            case Objective.COMPLETION | Objective.CLASSIFY:
                start = self.start if self.model.has_decoder else None
                # Chat templates write special tokens themselves.
                return ExampleRows(folder, folder.facts.special, start, room)

    def misfits(self) -> Iterator[Problem]:
        """Yield why the folders do not suit each other, the model or the objective."""
        yield from self._of_model()
        for folder in {folder.path: folder for folder in self.folders.values()}.values():
            yield from self._of_tokenizer(folder)
            yield from self._of_kind(folder)
        yield from self._of_special()

    def _of_model(self) -> Iterator[Problem]:
        model, data = self.model, self.data
        if data.objective is Objective.SPANS and not model.has_decoder:
            yield Problem(
                "hidden spans are for an encoder-decoder",
                model.name,
                "the input decoder_tokens",
                ", ".join(model.inputs),
                'data.objective = "causal", for a decoder alone',
            )
        if data.objective in (Objective.CAUSAL, Objective.MASKED) and model.has_decoder:
            yield Problem(
                f"the objective {data.objective.value} has one sequence, the model two",
                model.name,
                hint='data.objective = "spans"',
            )
        if model.longest is not None and max(data.seq, data.decoder_seq) > model.longest:
            yield Problem(
                "the sequences are longer than the model has positions for",
                model.name,
                f"data.seq at most {model.longest}",
                str(max(data.seq, data.decoder_seq)),
            )

    def _of_tokenizer(self, folder: TokenFolder) -> Iterator[Problem]:
        facts, model, where = folder.facts, self.model, str(folder.path)
        first = next(iter(self.folders.values()))
        expected = model.tokenizer_digest or first.facts.tokenizer_digest
        if facts.tokenizer_digest != expected:
            of = "the model" if model.tokenizer_digest else f"{first.path}"
            yield Problem(
                f"the tokens are of another tokenizer than {of}",
                where,
                expected,
                f"{facts.tokenizer_digest} ({facts.tokenizer})",
                f"moecc tokens … --tokenizer {model.name if model.tokenizer_digest else 'FOLDER'}",
            )
        elif facts.largest_id >= model.vocab:
            yield Problem(
                "there are ids beyond the vocabulary of the model",
                where,
                f"ids below {model.vocab}",
                str(facts.largest_id),
                _OF_THE_MODEL,
            )
        if facts.documents == 0 or facts.tokens == 0:
            yield Problem("the corpus is empty", where)

    def _of_kind(self, folder: TokenFolder) -> Iterator[Problem]:
        objective, kind = self.data.objective, folder.facts.kind
        needed = {Objective.COMPLETION: "examples", Objective.CLASSIFY: LABELLED}.get(objective)
        is_other = kind == DOCUMENTS or (needed == LABELLED and kind != LABELLED)
        if needed is not None and is_other:
            noun = "labelled examples" if needed == LABELLED else needed
            yield Problem(
                f"the objective {objective.value} needs {noun}",
                str(folder.path),
                needed,
                kind,
                "moecc tokens … --kind examples, or --kind chat"
                if needed == "examples"
                else f"moecc tokens … --kind {needed}",
            )

    def _of_special(self) -> Iterator[Problem]:
        special, name = self.special, self.data.objective.value
        where = str(next(iter(self.folders.values())).path)
        if self.data.objective is Objective.MASKED and special.mask is None:
            yield Problem("the tokenizer has no mask", where, "the special token mask")
        if self.data.objective is Objective.SPANS and not special.sentinels:
            yield Problem(
                "the tokenizer has no sentinels",
                where,
                "the tokens <extra_id_0>, <extra_id_1>, …",
                hint="the tokenizer of a T5, or bytes",
            )
        beyond = [id for id in self._used() if id >= self.model.vocab]
        if beyond:
            yield Problem(
                f"special tokens of the objective {name} are beyond the vocabulary of the model",
                where,
                f"ids below {self.model.vocab}",
                ", ".join(map(str, beyond[:8])),
                _OF_THE_MODEL,
            )

    def _used(self) -> Sequence[int]:
        """Return the special tokens that the objective puts into sequences."""
        special, end = self.special, end_of(self.special)
        around = (*special.before, *special.after)
        match self.data.objective:
            case Objective.SPANS:
                used = (*special.sentinels, end)
            case Objective.MASKED:
                used = (*around, special.mask)
            case _:
                used = (*around, end)
        return [id for id in used if id is not None]


# The order of a mixture: which row of which corpus a number stands for, without any state.
#
# Every function here is a pure function of its arguments, and reads or keeps nothing else: step n
# has the same rows after a stop, on one host and on many.

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
    seed: int

    def find(self, numbers: Sequence[int] | Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Return the corpus, the epoch in it, and the row, of each of `numbers`."""
        ordinals = np.asarray(numbers, np.int64)
        turn, offset = np.divmod(ordinals, PERIOD)
        corpus = self._pattern[0][offset]
        ordinal = turn * self._quotas[corpus] + self._pattern[1][offset]
        epoch, row = np.divmod(ordinal, np.asarray(self.rows, np.int64)[corpus])
        for pair in set(zip(corpus.tolist(), epoch.tolist(), strict=True)):
            here = (corpus == pair[0]) & (epoch == pair[1])
            row[here] = permuted(row[here], self.rows[pair[0]], mixed(self.seed, *pair))
        return corpus, epoch, row

    @cached_property
    def _quotas(self) -> Numbers:
        """The rows of each corpus in a period: at least one, by largest remainders."""
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


TARGETS = "targets"
"""The input of a step besides those of its graph: the ids to predict, ``i32[batch, seq]``."""

TEACHER = "teacher"
"""The logits of the model that a step is distilled from, ``[batch, seq, vocab]``."""

_EVALUATION = 0
"""The order of held-out rows has a seed of its own, so that runs are compared on the same ones."""


@dataclass(frozen=True)
class HeldOutBatches:
    """The batches of a held-out corpus, the same ones each time and for every seed.

    Attributes:
      name: of the corpus.
      batches: how many there are.
    """

    name: str
    batches: int
    _rows: CorpusRows
    _shape: BatchShape

    def batch(self, number: int, rows: slice | None = None) -> dict[str, Array]:
        """Return a batch, as `Batches.batch`; rows after the last one are padding."""
        return collate(self._segments(number, rows), self._shape)

    def documents(self, number: int) -> Array:
        """Return the number of the document of each target of a batch, −1 for padding."""
        rows = self._segments(number)
        documents = np.full((len(rows), self._shape.decoder_seq or self._shape.seq), -1, np.int64)
        for row, segments in enumerate(rows):
            at = 0
            for segment in segments:
                end = at + len(segment.targets)
                documents[row, at:end] = segment.document
                at = end
        return documents

    def _segments(self, number: int, rows: slice | None = None) -> list[list[RowSegment]]:
        numbers = _numbers(number, self._shape.batch, rows)
        present = numbers[numbers < self._rows.rows]
        places = permuted(present, self._rows.rows, mixed(_EVALUATION))
        rows_of_batch = [
            self._rows.segments(int(row), _rng(_EVALUATION, int(n)))
            for n, row in zip(present, places, strict=True)
        ]
        return rows_of_batch + [[]] * (len(numbers) - len(present))


@dataclass(frozen=True)
class Batches:
    """The batches of a recipe for a model.

    Attributes:
      shape: of every batch.
      seed: of order, spans and masks.
      folders: the token folders, as ``train/NAME`` and ``evaluate/NAME``.
      remarks: what a reader of the run should know.
      evaluations: the held-out corpora, by name.
    """

    shape: BatchShape
    seed: int
    folders: Mapping[str, TokenFolder]
    remarks: tuple[str, ...]
    evaluations: Mapping[str, HeldOutBatches]
    _rows: tuple[CorpusRows, ...]
    _mixture: Mixture

    def batch(self, number: int, rows: slice | None = None) -> dict[str, Array]:
        """Return the arrays of batch `number`, by the names of the inputs of the graph.

        And `TARGETS`.  Token ids, segments and positions are ``i32[batch, seq]``.

        Args:
          number: from 0, without an end.
          rows: of the batch, for the rows of a host; all by default.

        Raises:
          InputError: a token file was changed or damaged meanwhile.
        """
        numbers = _numbers(number, self.shape.batch, rows)
        corpora, _, places = self._mixture.find(numbers)
        rows_of_batch: list[list[RowSegment]] = [
            self._rows[corpus].segments(int(row), _rng(self.seed + 1, int(n)))
            for n, corpus, row in zip(numbers, corpora, places, strict=True)
        ]
        return collate(rows_of_batch, self.shape)

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digest of each folder, and that of the order, which must not change."""
        corpora, epochs, places = self._mixture.find(range(256))
        order = np.stack([corpora, epochs, places]).astype("<i8").tobytes()
        digests = {name: folder.facts.digest for name, folder in self.folders.items()}
        return {**digests, "order": f"sha256:{hashlib.sha256(order).hexdigest()}"}

    @property
    def rows(self) -> dict[str, int]:
        """The rows of an epoch of each corpus of the mixture, by name."""
        pairs = zip(self.folders, self._rows, strict=False)
        return {folder.removeprefix("train/"): rows.rows for folder, rows in pairs}

    def epochs(self, recipe: Recipe) -> dict[str, float]:
        """Return how often the run of a recipe reads each corpus of the mixture, by name."""
        data, rows = recipe.data, recipe.data.batch * recipe.run.steps
        total = sum(corpus.weight for corpus in data.train)
        shares = zip(self.rows.items(), data.train, strict=True)
        return {name: rows * corpus.weight / total / count for (name, count), corpus in shares}


MOST_EPOCHS = 4
"""Epochs up to which repeated text is about as good as new text (Muennighoff et al. 2023)."""


def run_remarks(batches: Batches, recipe: Recipe) -> Iterator[str]:
    """Yield remarks on text that a run reads too often, or both trains and is evaluated on."""
    trained, held_out = (
        {n.removeprefix(use): f for n, f in batches.folders.items() if n.startswith(use)}
        for use in ("train/", "evaluate/")
    )
    digests = {folder.facts.digest for folder in trained.values()}
    for name, folder in held_out.items():
        if folder.facts.digest in digests:
            yield f"{name}: data.evaluate has the tokens of data.train, on which the run trains"
    for name, count in batches.epochs(recipe).items():
        if count > MOST_EPOCHS:
            yield (
                f"{name} is read {count:,.1f} times: text that is repeated more than {MOST_EPOCHS} "
                "times is worth less than new text"
            )


def open_batches(data: DataSection, model: ModelFacts) -> Batches:
    """Open the token folders of a recipe for a model.

    Raises:
      InputError: a folder is missing or damaged, is of another tokenizer than the model or the
        other folders, has ids that the model does not know, or is empty or of another kind than
        the objective needs; all problems at once.
    """
    folders = dict(_opened(data))
    maker = _RowMaker(folders, data, model)
    raise_problems(maker.misfits())
    rows = {key: maker.rows(folder) for key, folder in folders.items()}
    raise_problems(
        Problem(
            "no row of the corpus fits a sequence",
            str(folders[key].path),
            "a longer seq, or longer documents",
        )
        for key, each in rows.items()
        if not each.rows
    )
    shape = maker.shape
    trained = tuple(rows[("train", name)] for name in corpus_names(data.train))
    weights = tuple(corpus.weight for corpus in data.train)
    mixture = Mixture(tuple(each.rows for each in trained), weights, data.seed)
    return Batches(
        shape=shape,
        seed=data.seed,
        folders={"/".join(key): folder for key, folder in folders.items()},
        remarks=(
            *context_remarks(model.name, model.context, max(data.seq, shape.decoder_seq)),
            *_remarks(folders, rows, data),
        ),
        _rows=trained,
        _mixture=mixture,
        evaluations={
            name: HeldOutBatches(
                name, min(data.evaluate_batches, -(-each.rows // data.batch)), each, shape
            )
            for (use, name), each in rows.items()
            if use == "evaluate"
        },
    )


def resolved(recipe: Recipe, batches: Batches) -> Recipe:
    """Return `recipe` with the decoder's length that its data needs, where it leaves that open."""
    data = replace(recipe.data, decoder_seq=batches.shape.decoder_seq)
    return replace(recipe, data=data)


def _opened(data: DataSection) -> Iterator[tuple[Key, TokenFolder]]:
    """Yield the folders by use and name. Raises InputError with the problems of all."""
    problems: list[Problem] = []
    for use, corpora in (("train", data.train), ("evaluate", data.evaluate)):
        for number, (corpus, name) in enumerate(zip(corpora, corpus_names(corpora), strict=True)):
            key = f"data.{use}.{number}.tokens"
            try:
                yield (use, name), open_tokens(corpus.tokens)
            except InputError as error:
                problems += [replace(p, message=f"{key}: {p.message}") for p in error.problems]
    raise_problems(problems)


ROUNDED_BY = 0.05
"""Hidden shares and spans that differ by more from the recipe's are a remark."""


def _remarks(
    folders: Mapping[Key, TokenFolder], rows: Mapping[Key, CorpusRows], data: DataSection
) -> Iterator[str]:
    for (use, name), each in rows.items():
        kind = folders[use, name].facts.kind
        if kind != DOCUMENTS and not isinstance(each, ExampleRows):
            yield (
                f"{name}: the objective {data.objective.value} reads examples as texts, and "
                "predicts prompts, too; the objective completion predicts what follows them"
            )
        if isinstance(each, SpanRows):
            pairs = (("noise_density", each.hidden), ("mean_span", each.mean))
            for key, drawn in pairs:
                asked = getattr(data, key)
                if abs(drawn / asked - 1) > ROUNDED_BY:
                    yield f"{name}: {key} is {drawn:.3g} in whole tokens and spans, not {asked:g}"
        if isinstance(each, ExampleRows) and each.cut:
            are = "is cut, as it is" if each.cut == 1 else "are cut, as they are"
            yield f"{name}: {amount(each.cut, 'example')} {are} longer than a sequence"


def _numbers(number: int, batch: int, rows: slice | None) -> Numbers:
    """Return the numbers of the rows of a batch, of all batches together."""
    return number * batch + np.arange(batch, dtype=np.int64)[slice(None) if rows is None else rows]


def _rng(seed: int, number: int) -> np.random.Generator:
    """Return the generator of one row."""
    return np.random.Generator(np.random.Philox(key=mixed(seed, number)))
