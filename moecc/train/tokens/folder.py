"""Open a token folder: its facts, the beginnings of documents, and any range of its ids."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moecc.errors import InputError, Problem
from moecc.formats.files import file_fault, open_regular, os_problem, read_into, read_json_object
from moecc.support.problems import Problems, describe
from moecc.support.untyped import JsonDict

# What a token folder says about its tokens: its ``tokens.json``.

T = TypeVar("T")

SCHEMA = "moecc.tokens/1"

DOCUMENTS, EXAMPLES, LABELLED = KINDS = ("documents", "examples", "labelled")
"""Texts; prompts with completions; prompts whose completion is one of a few labels."""


@dataclass(frozen=True)
class Special:
    """The ids of special tokens; None where the tokenizer has none.

    Attributes:
      bos, eos, pad, mask: their ids.
      before, after: what the tokenizer puts around a text, ``[CLS]`` and ``[SEP]`` say.
      sentinels: what stands for hidden spans, in order.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    mask: int | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    sentinels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Label:
    """One of the completions of a labelled folder.

    Attributes:
      text: what it says.
      tokens: its ids.
      count: how many examples have it.
    """

    text: str
    tokens: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class SourceFile:
    """A file that was read.

    Attributes:
      name: its name, without the folder.
      digest: ``sha256:…`` of its bytes.
      size_bytes: its size.
    """

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class TokenFacts:
    """The content of ``tokens.json``.

    Attributes:
      kind: one of `KINDS`.
      tokenizer: ``bytes``, or the name of the folder that it came from.
      tokenizer_digest: ``sha256:…`` of its ``tokenizer.json``; ``bytes/1`` for bytes.
      vocab_size: the number of ids of the tokenizer.
      special: its special tokens.
      dtype: of the ids on disk, ``uint16`` or ``uint32``.
      documents: how many there are.
      tokens: how many there are in all documents, special ones left out.
      largest_id: of all ids in the folder.
      duplicates: documents that were left out because an equal one came before.
      held_out: which part of the texts this is, ``train`` or ``heldout`` of a share; empty: all.
      labels: the labels, by number.
      sources: what was read.
      digest: ``sha256:…`` of the other files of the folder.
    """

    kind: str
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    special: Special
    dtype: str
    documents: int
    tokens: int
    largest_id: int
    digest: str
    duplicates: int = 0
    held_out: str = ""
    labels: tuple[Label, ...] = ()
    sources: tuple[SourceFile, ...] = field(default=())

    def to_json(self) -> JsonDict:
        """Return what ``tokens.json`` contains."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def of_json(cls, data: Mapping[str, object], where: str) -> TokenFacts:
        """Return the facts in a ``tokens.json``.

        Raises:
          InputError: it is of another version, or keys are missing or of another type.
        """
        if data.get("schema") != SCHEMA:
            raise InputError(
                "not tokens that this version reads", where=where, expected=SCHEMA,
                found=describe(data.get("schema")), hint="moecc tokens writes them anew",
            )  # fmt: skip
        problems = Problems()
        given = _Keys(data, where, problems)
        found = cls(
            kind=given.one_of("kind", KINDS),
            tokenizer=given.text("tokenizer"),
            tokenizer_digest=given.text("tokenizer_digest"),
            vocab_size=given.count("vocab_size"),
            special=_special(given.inner("special")),
            dtype=given.one_of("dtype", ("uint16", "uint32")),
            documents=given.count("documents"),
            tokens=given.count("tokens"),
            largest_id=given.count("largest_id"),
            digest=given.text("digest"),
            duplicates=given.count("duplicates"),
            held_out=given.text("held_out"),
            labels=tuple(
                Label(each.text("text"), each.ids("tokens"), each.count("count"))
                for each in given.all("labels")
            ),
            sources=tuple(
                SourceFile(each.text("name"), each.text("digest"), each.count("size_bytes"))
                for each in given.all("sources")
            ),
        )
        problems.raise_if_any()
        return found


def _special(given: _Keys) -> Special:
    return Special(
        bos=given.id_or_none("bos"),
        eos=given.id_or_none("eos"),
        pad=given.id_or_none("pad"),
        mask=given.id_or_none("mask"),
        before=given.ids("before"),
        after=given.ids("after"),
        sentinels=given.ids("sentinels"),
    )


class _Keys:
    """Reads the keys of a JSON object and notes what is wrong."""

    def __init__(self, data: Mapping[str, object], where: str, problems: Problems) -> None:
        self._data = data
        self._where = where
        self._problems = problems

    def text(self, key: str) -> str:
        value = self._data.get(key)
        return value if isinstance(value, str) else self._wrong(key, "a text", "")

    def one_of(self, key: str, choices: tuple[str, ...]) -> str:
        value = self._data.get(key)
        known = isinstance(value, str) and value in choices
        return str(value) if known else self._wrong(key, " | ".join(choices), choices[0])

    def count(self, key: str) -> int:
        value = self._data.get(key)
        whole = type(value) is int and value >= 0
        return int(str(value)) if whole else self._wrong(key, "a whole number", 0)

    def id_or_none(self, key: str) -> int | None:
        return None if self._data.get(key) is None else self.count(key)

    def ids(self, key: str) -> tuple[int, ...]:
        value = self._data.get(key)
        if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
            return tuple(value)
        nothing: tuple[int, ...] = ()
        return self._wrong(key, "a list of ids", nothing)

    def inner(self, key: str) -> _Keys:
        value = self._data.get(key)
        found = value if isinstance(value, dict) else self._wrong(key, "an object", {})
        return _Keys(found, f"{self._where}: {key}", self._problems)

    def all(self, key: str) -> list[_Keys]:
        value = self._data.get(key)
        if isinstance(value, list) and all(isinstance(v, dict) for v in value):
            return [_Keys(v, f"{self._where}: {key}", self._problems) for v in value]
        nothing: list[_Keys] = []
        return self._wrong(key, "a list of objects", nothing)

    def _wrong(self, key: str, expected: str, default: T) -> T:
        found = describe(self._data[key]) if key in self._data else "nothing"
        self._problems.add(
            f"not the {key} of tokens", where=self._where, expected=expected, found=found
        )
        return default


FACTS = "tokens.json"
TOKENS = "tokens.bin"
STARTS = "starts.bin"
COMPLETIONS = "completions.bin"
LABELS = "labels.bin"

LARGEST_FACTS_BYTES = 16 << 20

_START = np.dtype("<i8")
_NUMBER = np.dtype("<i4")

Ids = NDArray[np.int32]


@dataclass
class TokenFolder:
    """A token folder that is read; ids are read as they are asked for.

    A file is read and not mapped, since a mapped file that shrinks ends the process.

    Attributes:
      path: the folder.
      facts: its ``tokens.json``.
    """

    path: Path
    facts: TokenFacts

    def __post_init__(self) -> None:
        self._dtype = np.dtype(self.facts.dtype).newbyteorder("<")
        self._descriptor = open_regular(self.path / TOKENS)[0]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file of the ids."""
        descriptor = getattr(self, "_descriptor", -1)
        if descriptor >= 0:
            os.close(descriptor)
            self._descriptor = -1

    def ids(self, start: int, stop: int) -> Ids:
        """Return the ids from `start` to `stop`, ``i32[stop − start]``.

        Raises:
          InputError: the file has become shorter, or contains an id that its facts exclude.
        """
        width = self._dtype.itemsize
        data = bytearray((stop - start) * width)
        read_into(self._descriptor, memoryview(data), start * width, self.path / TOKENS)
        found = np.frombuffer(data, self._dtype).astype(np.int32)
        if len(found) and int(found.max()) > self.facts.largest_id:
            raise InputError(
                "the file has other ids than when it was written", where=str(self.path / TOKENS),
                expected=f"at most {self.facts.largest_id}", found=str(found.max()),
            )  # fmt: skip
        return found

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where documents begin, and the end of the last one, ``i64[documents + 1]``."""
        found = self._read(STARTS, _START).astype(np.int64)
        rising = bool((np.diff(found) >= 0).all())
        if not rising or found[0] != 0 or found[-1] != self.facts.tokens:
            raise InputError("documents do not follow each other", where=str(self.path / STARTS))
        return found

    @cached_property
    def completions(self) -> NDArray[np.int64]:
        """The tokens of each document's prompt, after which its completion begins."""
        found = self._read(COMPLETIONS, _NUMBER).astype(np.int64)
        if ((found < 0) | (found > np.diff(self.starts))).any():
            where = str(self.path / COMPLETIONS)
            raise InputError("a completion begins outside its document", where=where)
        return found

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The number of each document's label."""
        found = self._read(LABELS, _NUMBER).astype(np.int64)
        if ((found < 0) | (found >= len(self.facts.labels))).any():
            raise InputError("a label is none of the folder's", where=str(self.path / LABELS))
        return found

    def _read(self, name: str, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        try:
            return np.fromfile(self.path / name, dtype)
        except OSError as error:
            raise os_problem(error, self.path / name) from None


def open_tokens(path: Path | str) -> TokenFolder:
    """Open a token folder.

    Raises:
      InputError: it is none, or its files are not what its facts say.
      MachineError: it cannot be read.
    """
    folder = Path(path)
    if not (folder / FACTS).is_file():
        raise InputError(
            "not a token folder", where=str(path), expected=f"a folder with {FACTS}",
            hint=_hint(folder),
        )  # fmt: skip
    data = read_json_object(folder / FACTS, limit_bytes=LARGEST_FACTS_BYTES)
    facts = TokenFacts.of_json(data, str(folder / FACTS))
    problems = [
        p for name, size in expected_sizes(facts).items() for p in _fault(folder, name, size)
    ]
    if problems:
        raise InputError(problems)
    return TokenFolder(folder, facts)


def expected_sizes(facts: TokenFacts) -> dict[str, int]:
    """Return the size of each file of a folder besides its facts, in bytes."""
    sizes = {
        TOKENS: facts.tokens * np.dtype(facts.dtype).itemsize,
        STARTS: (facts.documents + 1) * _START.itemsize,
    }
    if facts.kind != DOCUMENTS:
        sizes[COMPLETIONS] = facts.documents * _NUMBER.itemsize
    if facts.kind == LABELLED:
        sizes[LABELS] = facts.documents * _NUMBER.itemsize
    return sizes


def _fault(folder: Path, name: str, size: int) -> list[Problem]:
    path = folder / name
    fault = file_fault(path, folder)
    if fault is not None:
        return [fault]
    found = path.stat().st_size
    if found == size:
        return []
    what = "the file is not of the size that its facts say"
    hint = "a copy that was cut short? moecc tokens writes the folder anew"
    return [Problem(what, str(path), f"{size:,} bytes", f"{found:,} bytes", hint)]


def _hint(folder: Path) -> str:
    inner = [n for n in ("train", "heldout") if (folder / n / FACTS).is_file()]
    if inner:
        return f"it has token folders in it: {', '.join(str(folder / n) for n in inner)}"
    if folder.exists():
        return "moecc tokens TEXT --tokenizer FOLDER --out DIR makes one"
    return "there is no such folder"
