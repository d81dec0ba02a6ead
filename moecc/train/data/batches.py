"""The batches of a recipe: a pure function of recipe, number and rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moecc.errors import InputError, Problem
from moecc.support.text import amount
from moecc.train.data.collate import Shape, collate
from moecc.train.data.model_facts import ModelFacts
from moecc.train.data.objectives import ExampleRows, Rows, Segment
from moecc.train.data.open_rows import open_rows
from moecc.train.data.order import Mixture, Numbers, mixed, permuted
from moecc.train.recipe import Corpus, DataSection, Recipe
from moecc.train.recipe_checks import corpus_name
from moecc.train.tokens.folder import TokenFolder, open_tokens
from moecc.types.arrays import Array

TARGETS = "targets"
"""The input of a step besides those of its graph: the ids to predict, ``i32[batch, seq]``."""

_EVALUATION = 0
"""The order of held-out rows has a seed of its own, so that runs are compared on the same ones."""


@dataclass(frozen=True)
class Evaluation:
    """The batches of a held-out corpus, the same ones each time and for every seed.

    Attributes:
      name: of the corpus.
      batches: how many there are.
    """

    name: str
    batches: int
    _rows: Rows
    _shape: Shape

    def batch(self, number: int, rows: slice | None = None) -> dict[str, Array]:
        """Return a batch, as `Batches.batch`; rows after the last one are padding."""
        numbers = _numbers(number, self._shape.batch, rows)
        known = numbers[numbers < self._rows.rows]
        places = permuted(known, self._rows.rows, mixed(_EVALUATION))
        found = [
            self._rows.segments(int(place), _rng(_EVALUATION, int(n)))
            for n, place in zip(known, places, strict=True)
        ]
        return collate(found + [[]] * (len(numbers) - len(known)), self._shape)


@dataclass(frozen=True)
class Batches:
    """The batches of a recipe for a model.

    Attributes:
      shape: of every batch.
      seed: of order, spans and masks.
      folders: the token folders, by the names of their corpora.
      remarks: what a reader of the run should know.
    """

    shape: Shape
    seed: int
    folders: Mapping[str, TokenFolder]
    remarks: tuple[str, ...]
    _rows: tuple[Rows, ...]
    _mixture: Mixture
    _evaluations: Mapping[str, Evaluation]

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
        found: list[list[Segment]] = [
            self._rows[corpus].segments(int(place), _rng(self.seed + 1, int(n)))
            for n, corpus, place in zip(numbers, corpora, places, strict=True)
        ]
        return collate(found, self.shape)

    @property
    def evaluations(self) -> Mapping[str, Evaluation]:
        """The held-out corpora, by name."""
        return self._evaluations

    def evaluation(self, corpus: str) -> Evaluation:
        """Return the batches of a held-out corpus. Raises KeyError for an unknown name."""
        return self._evaluations[corpus]

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digest of each corpus, by name, and that of the order, which must not change."""
        corpora, epochs, places = self._mixture.find(range(256))
        order = np.stack([corpora, epochs, places]).astype("<i8").tobytes()
        digests = {name: folder.facts.digest for name, folder in self.folders.items()}
        return {**digests, "order": f"sha256:{hashlib.sha256(order).hexdigest()}"}

    @property
    def rows(self) -> dict[str, int]:
        """How many rows an epoch of each corpus of the mixture has, by name."""
        names = list(self.folders)[: len(self._rows)]
        return {name: rows.rows for name, rows in zip(names, self._rows, strict=True)}


def open_batches(data: DataSection, model: ModelFacts) -> Batches:
    """Open the token folders of a recipe for a model.

    Raises:
      InputError: a folder is missing or damaged, is of another tokenizer than the model or the
        other folders, has ids that the model does not know, or is empty or of another kind than
        the objective needs; all problems at once.
    """
    folders = dict(_opened(data))
    names = [corpus_name(corpus) for corpus in data.train]
    shape, rows = open_rows(folders, data, model)
    trained = tuple(rows[("train", name)] for name in names)
    weights = tuple(corpus.weight for corpus in data.train)
    mixture = Mixture(tuple(each.rows for each in trained), weights, data.seed)
    return Batches(
        shape=shape,
        seed=data.seed,
        folders={_label(*key): folder for key, folder in folders.items()},
        remarks=tuple(_remarks(rows)),
        _rows=trained,
        _mixture=mixture,
        _evaluations={
            name: Evaluation(name, _count(each, data), each, shape)
            for (use, name), each in rows.items()
            if use == "evaluate"
        },
    )


def resolved(recipe: Recipe, batches: Batches) -> Recipe:
    """Return `recipe` with the decoder's length that its data needs, where it leaves that open."""
    data = replace(recipe.data, decoder_seq=batches.shape.decoder_seq)
    return replace(recipe, data=data)


def _opened(data: DataSection) -> Iterator[tuple[tuple[str, str], TokenFolder]]:
    """Yield the folders by use and name. Raises InputError with the problems of all."""
    problems: list[Problem] = []
    for use, corpora in (("train", data.train), ("evaluate", data.evaluate)):
        for corpus in corpora:
            try:
                yield (use, corpus_name(corpus)), _open(corpus)
            except InputError as error:
                problems.extend(error.problems)
    if problems:
        raise InputError(problems)


def _open(corpus: Corpus) -> TokenFolder:
    return open_tokens(corpus.tokens)


def _label(use: str, name: str) -> str:
    return name if use == "train" else f"{use}/{name}"


def _remarks(rows: Mapping[tuple[str, str], Rows]) -> Iterator[str]:
    for (_, name), each in rows.items():
        if isinstance(each, ExampleRows) and each.cut:
            are = "is cut, as it is" if each.cut == 1 else "are cut, as they are"
            yield f"{name}: {amount(each.cut, 'example')} {are} longer than a sequence"


def _count(rows: Rows, data: DataSection) -> int:
    return min(data.evaluate_batches, -(-rows.rows // data.batch))


def _numbers(number: int, batch: int, rows: slice | None) -> Numbers:
    """Return the numbers of the rows of a batch, of all batches together."""
    return number * batch + np.arange(batch, dtype=np.int64)[slice(None) if rows is None else rows]


def _rng(seed: int, number: int) -> np.random.Generator:
    """Return the generator of one row."""
    return np.random.Generator(np.random.Philox(key=mixed(seed, number)))
