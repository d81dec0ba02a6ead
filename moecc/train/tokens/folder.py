"""Open a token folder: its facts, the beginnings of documents, and any range of its ids."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from numpy.typing import NDArray

from moecc.errors import InputError, Problem, raise_problems
from moecc.formats.files import (
    file_fault,
    identify,
    open_regular,
    read_into,
    read_json_object,
    read_whole,
)
from moecc.formats.store import is_address, mirror
from moecc.support.lazy import np
from moecc.support.record import Check, Count, read_record

SCHEMA = "moecc.tokens/1"

DOCUMENTS, EXAMPLES, LABELLED = "documents", "examples", "labelled"
KINDS = (DOCUMENTS, EXAMPLES, LABELLED)
"""Texts; prompts with completions; prompts whose completion is one of a few labels."""

ID_TYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Special:
    """The ids of special tokens; None where the tokenizer has none.

    Attributes:
      bos, eos, pad, mask: their ids.
      before, after: what the tokenizer puts around a text, ``[CLS]`` and ``[SEP]`` say.
      sentinels: what stands for hidden spans, in order.
    """

    bos: Count | None = None
    eos: Count | None = None
    pad: Count | None = None
    mask: Count | None = None
    before: tuple[Count, ...] = ()
    after: tuple[Count, ...] = ()
    sentinels: tuple[Count, ...] = ()


@dataclass(frozen=True)
class Label:
    """One of the completions of a labelled folder.

    Attributes:
      text: what it says.
      tokens: its ids.
      count: how many examples have it.
    """

    text: str
    tokens: tuple[Count, ...]
    count: Count


@dataclass(frozen=True)
class SourceFile:
    """A file that was read.

    Attributes:
      name: its name, without the folder.
      digest: ``sha256:…`` of its bytes.
      size_bytes: its size.
      empty: how many texts of white space alone were left out.
    """

    name: str
    digest: str
    size_bytes: Count
    empty: Count = 0


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """The content of ``tokens.json``.

    Attributes:
      schema: the version of the format.
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

    schema: str = SCHEMA
    kind: Annotated[str, Check(KINDS.__contains__, " | ".join(KINDS))]
    tokenizer: str
    tokenizer_digest: str
    vocab_size: Count
    special: Special
    dtype: Annotated[str, Check(ID_TYPES.__contains__, " | ".join(ID_TYPES))]
    documents: Count
    tokens: Count
    largest_id: Count
    digest: str
    duplicates: Count = 0
    held_out: str = ""
    labels: tuple[Label, ...] = ()
    sources: tuple[SourceFile, ...] = ()


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
        ids = np.frombuffer(data, self._dtype).astype(np.int32)
        if len(ids) and int(ids.max()) > self.facts.largest_id:
            raise InputError(
                "the file has other ids than when it was written",
                where=self.path / TOKENS,
                expected=f"at most {self.facts.largest_id}",
                found=str(ids.max()),
            )
        return ids

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The beginnings of documents, and the end of the last one, ``i64[documents + 1]``."""
        starts = self._read(STARTS, _START)
        is_rising = bool((np.diff(starts) >= 0).all())
        if not is_rising or starts[0] != 0 or starts[-1] != self.facts.tokens:
            raise InputError("documents do not follow each other", where=self.path / STARTS)
        return starts

    @cached_property
    def completions(self) -> NDArray[np.int64]:
        """The tokens of each document's prompt, after which its completion begins."""
        prompts = self._read(COMPLETIONS, _NUMBER)
        if ((prompts < 0) | (prompts > np.diff(self.starts))).any():
            where = str(self.path / COMPLETIONS)
            raise InputError("a completion begins outside its document", where=where)
        return prompts

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The number of each document's label."""
        numbers = self._read(LABELS, _NUMBER)
        if ((numbers < 0) | (numbers >= len(self.facts.labels))).any():
            raise InputError("a label is none of the folder's", where=self.path / LABELS)
        return numbers

    def _read(self, name: str, dtype: np.dtype[np.generic]) -> NDArray[np.int64]:
        return np.frombuffer(read_whole(self.path / name), dtype).astype(np.int64)


def open_tokens(path: Path | str) -> TokenFolder:
    """Open a token folder, local or in a store.

    Raises:
      InputError: it is none, or its files are not what its facts say.
      MachineError: it cannot be read.
    """
    folder = mirror(str(path)) if is_address(str(path)) else Path(path)
    if not (folder / FACTS).is_file():
        parts = [str(folder / n) for n in ("train", "heldout") if (folder / n / FACTS).is_file()]
        hint = "moecc tokens TEXT --tokenizer MODEL --out DIR writes one"
        if parts:
            hint = f"it has token folders in it: {', '.join(parts)}"
        elif not folder.exists():
            hint = f"there is no such folder; {hint}"
        raise InputError(
            "not a token folder", where=path, expected=f"a folder with {FACTS}", hint=hint
        )
    document = read_json_object(folder / FACTS, limit_bytes=LARGEST_FACTS_BYTES)
    facts = read_record(TokenFacts, document, str(folder / FACTS))
    sizes = expected_sizes(facts).items()
    problems = [p for name, size in sizes for p in _size_problems(folder, name, size)]
    raise_problems(problems)
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


def _size_problems(folder: Path, name: str, size: int) -> list[Problem]:
    path = folder / name
    fault = file_fault(path, folder)
    if fault is not None:
        return [fault]
    actual_size = identify(path).size_bytes
    if actual_size == size:
        return []
    message = "the file is not of the size that its facts say"
    hint = "a copy that was cut short? moecc tokens writes the folder anew"
    return [Problem(message, str(path), f"{size:,} bytes", f"{actual_size:,} bytes", hint)]
