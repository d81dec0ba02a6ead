"""Open a token folder: its facts, the beginnings of documents, and any range of its ids."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecc.checkpoint.files import file_fault, open_regular, os_problem, read_into
from moecc.checkpoint.jsonfile import read_json_object
from moecc.errors import InputError, Problem
from moecc.train.tokens.facts import DOCUMENTS, LABELLED, TokenFacts

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
