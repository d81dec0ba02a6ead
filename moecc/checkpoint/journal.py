"""What a conversion has written so far, in its temporary folder, so that it can be continued.

The first line states what decides the result; then comes a line for each tensor that is complete,
with its digest.  Nothing in it is trusted: what is on the disk is hashed again before it is kept,
so lines need not reach the disk in order, and a torn last line does no harm.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecc.checkpoint.disk import APPEND, disk
from moecc.checkpoint.files import os_problem, read_bounded
from moecc.checkpoint.nonfinite import Nonfinite
from moecc.errors import InputError, Problem, printable

JOURNAL_NAME = "moecc_journal.jsonl"
COMMIT_NAME = "moecc_commit.jsonl"
"""The name of the journal while a file and its manifest are put in place."""
SCHEMA = "moecc.journal/1"
MAX_JOURNAL_BYTES = 1 << 30

Facts = Mapping[str, object]
"""What decides the result of a conversion, by name."""


@dataclass(frozen=True)
class Done:
    """A tensor that is complete, with its copies.

    Attributes:
      name: of the first copy.
      sha256: of its bytes.
      nonfinite: how many of its elements are not finite.
      found: the tensors of the source with NaN or infinity that it was made from.
      zeros: the matrices of the source without anything but zeros that it was made from.
    """

    name: str
    sha256: str
    nonfinite: int = 0
    found: tuple[Nonfinite, ...] = ()
    zeros: tuple[str, ...] = ()

    def line(self) -> bytes:
        """Return its line."""
        found = [[f.tensor, list(f.index), f.value] for f in self.found]
        fields: dict[str, object] = {"name": self.name, "sha256": self.sha256}
        if self.nonfinite or found:
            fields |= {"nonfinite": self.nonfinite, "found": found}
        if self.zeros:
            fields["zeros"] = list(self.zeros)
        return f"{json.dumps(fields)}\n".encode()


class Journal:
    """The journal of one output; thread-safe.

    Attributes:
      known: what an earlier run completed, by the name of the first copy.
    """

    def __init__(self, folder: Path, facts: Facts, known: Mapping[str, Done]) -> None:
        self.known = known
        self._path = folder / JOURNAL_NAME
        self._lock = threading.Lock()
        try:
            self._descriptor = disk().open(self._path, APPEND)
            # After a torn line, a new one begins.
            disk().append(self._descriptor, b"\n" if known else _header(facts))
        except OSError as error:
            raise os_problem(error, self._path, "write") from None

    def note(self, done: Done) -> None:
        """Append a line. Raises MachineError."""
        try:
            with self._lock:
                disk().append(self._descriptor, done.line())
        except OSError as error:
            raise os_problem(error, self._path, "write") from None

    def synchronise(self) -> None:
        """Return once it is on the disk. Raises MachineError."""
        try:
            disk().sync(self._descriptor)
        except OSError as error:
            raise os_problem(error, self._path, "synchronise") from None

    def close(self) -> None:
        """Close the file, which stays."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file: the output is complete. Raises MachineError."""
        try:
            disk().unlink(self._path)
        except OSError as error:
            raise os_problem(error, self._path, "remove") from None


def _header(facts: Facts) -> bytes:
    return f"{json.dumps({'schema': SCHEMA, 'facts': facts}, sort_keys=True)}\n".encode()


def has_journal(folder: Path) -> bool:
    """Return whether a partial output can be continued, if by anything."""
    return _journal_of(folder).is_file()


def _journal_of(folder: Path) -> Path:
    journal, commit = folder / JOURNAL_NAME, folder / COMMIT_NAME
    return commit if commit.is_file() and not journal.is_file() else journal


def read_journal(folder: Path, facts: Facts) -> dict[str, Done]:
    """Return what an earlier run of the same conversion completed; nothing if it left no journal.

    Raises:
      InputError: the earlier run was another conversion; all differences.
      MachineError: the file cannot be read.
    """
    if not has_journal(folder):
        return {}
    lines = read_bounded(_journal_of(folder), MAX_JOURNAL_BYTES).split(b"\n")
    first = _object(lines[0])
    stated = first.get("facts")
    if first.get("schema") != SCHEMA or not isinstance(stated, dict):
        return {}
    problems = list(_differences(stated, json.loads(json.dumps(facts)), str(folder)))
    if problems:
        raise InputError(problems)
    known = {}
    for line in lines[1:-1]:  # the last one is torn, or empty
        done = _done(_object(line))
        if done is not None:
            known[done.name] = done
    return known


def _differences(
    before: dict[str, Any], now: dict[str, Any], where: str, of: str = ""
) -> Iterator[Problem]:
    """Yield a problem for each fact, and each part of one, that is not as it was."""
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, where, f"{name} ")
        elif old != new:
            yield Problem(
                f"the conversion that was killed is not this one: {of}{name} differs",
                where=where,
                expected=_shown(old),
                found=_shown(new),
                hint="continue it as it was started; --force without --resume begins anew",
            )


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    return printable(value if isinstance(value, str) else json.dumps(value), 300)


def _done(stated: dict[str, Any]) -> Done | None:
    name, digest = stated.get("name"), stated.get("sha256")
    if not isinstance(name, str) or not isinstance(digest, str):
        return None
    try:
        found = tuple(
            Nonfinite(str(tensor), tuple(map(int, index)), str(value))
            for tensor, index, value in stated.get("found", ())
        )
        zeros = tuple(map(str, stated.get("zeros", ())))
        return Done(name, digest, int(stated.get("nonfinite", 0)), found, zeros)
    except (TypeError, ValueError):
        return None


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
