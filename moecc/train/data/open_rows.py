"""From token folders to rows: whether they suit the model and the objective, and how they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moecc.errors import InputError, Problem
from moecc.train.data.collate import Shape
from moecc.train.data.corruption import Masking, Spans
from moecc.train.data.label_choices import LabelChoices
from moecc.train.data.model_facts import ModelFacts
from moecc.train.data.objectives import (
    CausalRows,
    ExampleRows,
    MaskedRows,
    Room,
    Rows,
    SpanRows,
    end_of,
)
from moecc.train.recipe import DataSection, Objective
from moecc.train.tokens.facts import DOCUMENTS, LABELLED, Special
from moecc.train.tokens.folder import TokenFolder

Key = tuple[str, str]
"""The use of a folder, ``train`` or ``evaluate``, and the name of its corpus."""


def open_rows(
    folders: Mapping[Key, TokenFolder], data: DataSection, model: ModelFacts
) -> tuple[Shape, dict[Key, Rows]]:
    """Return the shape of batches, and the rows of each folder.

    Raises:
      InputError: the folders do not suit each other, the model or the objective; all at once.
    """
    maker = _Maker(folders, data, model)
    problems = [*maker.misfits()]
    if problems:
        raise InputError(problems)
    rows = {key: maker.rows(folder) for key, folder in folders.items()}
    empty = [folders[key] for key, each in rows.items() if not each.rows]
    if empty:
        raise InputError(
            Problem("no row of the corpus fits a sequence", str(folder.path),
                    "a longer seq, or longer documents") for folder in empty
        )  # fmt: skip
    return maker.shape, rows


def label_rows(choices: LabelChoices, data: DataSection, model: ModelFacts) -> tuple[Shape, Rows]:
    """Return the shape of batches, and rows of each example with each of its labels, in order.

    Args:
      choices: of a folder that suits the objective and the model, as `open_rows` finds.
      data: how long sequences are.
      model: the model.
    """
    maker = _Maker({("evaluate", ""): choices.folder}, data, model)
    decoder_seq = ExampleRows.decoder_seq(choices, maker.special) if model.has_decoder else 0
    start = maker.start if model.has_decoder else None
    rows = ExampleRows(choices, maker.special, start, Room(data.seq, decoder_seq, packing=False))
    return Shape(data.batch, data.seq, decoder_seq, model.inputs, maker.pad), rows


@dataclass(frozen=True)
class _Maker:
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
        """What a decoder begins with: its config says, or it is padding, as in T5."""
        return self.pad if self.model.decoder_start is None else self.model.decoder_start

    @property
    def pad(self) -> int:
        known = [p for p in (self.special.pad, self.model.pad) if p is not None]
        return next((p for p in known if p < self.model.vocab), 0)

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
    def shape(self) -> Shape:
        return Shape(self.data.batch, self.data.seq, self.decoder_seq, self.model.inputs, self.pad)

    def rows(self, folder: TokenFolder) -> Rows:
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
                return ExampleRows(folder, self.special, start, room)

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
                "hidden spans are for an encoder-decoder", model.name, "the input decoder_tokens",
                ", ".join(model.inputs), "data.objective = \"causal\", for a decoder alone",
            )  # fmt: skip
        if data.objective in (Objective.CAUSAL, Objective.MASKED) and model.has_decoder:
            yield Problem(
                f"the objective {data.objective.value} has one sequence, the model two",
                model.name, hint="data.objective = \"spans\"",
            )  # fmt: skip
        if model.longest is not None and max(data.seq, data.decoder_seq) > model.longest:
            yield Problem(
                "the sequences are longer than the model has positions for", model.name,
                f"data.seq at most {model.longest}", str(max(data.seq, data.decoder_seq)),
            )  # fmt: skip

    def _of_tokenizer(self, folder: TokenFolder) -> Iterator[Problem]:
        facts, model, where = folder.facts, self.model, str(folder.path)
        first = next(iter(self.folders.values()))
        expected = model.tokenizer_digest or first.facts.tokenizer_digest
        if facts.tokenizer_digest != expected:
            of = "the model" if model.tokenizer_digest else f"{first.path}"
            yield Problem(
                f"the tokens are of another tokenizer than {of}", where, expected,
                f"{facts.tokenizer_digest} ({facts.tokenizer})",
                f"moecc tokens … --tokenizer {model.name if model.tokenizer_digest else 'FOLDER'}",
            )  # fmt: skip
        elif facts.largest_id >= model.vocab:
            yield Problem(
                "there are ids beyond the vocabulary of the model", where,
                f"ids below {model.vocab}", str(facts.largest_id),
            )  # fmt: skip
        if facts.documents == 0 or facts.tokens == 0:
            yield Problem("the corpus is empty", where)

    def _of_kind(self, folder: TokenFolder) -> Iterator[Problem]:
        objective, kind = self.data.objective, folder.facts.kind
        needed = {Objective.COMPLETION: "examples", Objective.CLASSIFY: LABELLED}.get(objective)
        is_other = kind == DOCUMENTS or (needed == LABELLED and kind != LABELLED)
        if needed is not None and is_other:
            yield Problem(
                f"the objective {objective.value} needs {needed}", str(folder.path), needed, kind,
                f"moecc tokens … --kind {needed}",
            )  # fmt: skip

    def _of_special(self) -> Iterator[Problem]:
        special, name = self.special, self.data.objective.value
        where = str(next(iter(self.folders.values())).path)
        if self.data.objective is Objective.MASKED and special.mask is None:
            yield Problem("the tokenizer has no mask", where, "the special token mask")
        if self.data.objective is Objective.SPANS and not special.sentinels:
            yield Problem(
                "the tokenizer has no sentinels", where, "the tokens <extra_id_0>, <extra_id_1>, …",
                hint="the tokenizer of a T5, or bytes",
            )  # fmt: skip
        beyond = [id for id in self._used() if id >= self.model.vocab]
        if beyond:
            yield Problem(
                f"special tokens of the objective {name} are beyond the vocabulary of the model",
                where, f"ids below {self.model.vocab}", ", ".join(map(str, beyond[:8])),
            )  # fmt: skip

    def _used(self) -> Sequence[int]:
        """Return the special tokens that the objective puts into sequences."""
        special, end = self.special, end_of(self.special)
        used = [*special.before, *special.after, *([] if end is None else [end])]
        if self.data.objective is Objective.SPANS:
            used = [*special.sentinels, *([] if end is None else [end])]
        if self.data.objective is Objective.MASKED:
            used = [*special.before, *special.after, *([special.mask] if special.mask else [])]
        return used
