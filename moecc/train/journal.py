"""The journal of a run: a line of JSON an event, the same bytes however often it was resumed.

It holds what a recipe decides and no times, so that a run that was killed and resumed has the
journal of one that was not.  A resumed run cuts it back to its checkpoint first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from moecc.checkpoint.files import os_problem
from moecc.errors import InputError
from moecc.support.closing import Closing
from moecc.support.untyped import Json, JsonDict
from moecc.train.events import Evaluated, Event, Skipped, Stepped


def event_line(event: Event) -> JsonDict | None:
    """Return what the journal says of an event; None where that does not belong into it."""
    match event:
        case Stepped():
            return {"step": event.step, "tokens": event.tokens, **event.metrics}
        case Skipped():
            if event.back_to is not None:
                # Later than the checkpoint: a run that resumes from it comes by here again.
                return {"step": event.back_to + 1, "left_out": list(event.left_out)}
            faults = [fault.as_dict() for fault in event.faults]
            return {"step": event.step, "skipped": event.batch, "faults": faults, **event.metrics}
        case Evaluated():
            spread = {"spread": dict(event.spread)} if event.spread else {}
            return {"step": event.step, "held_out": dict(event.losses), **spread}
    return None


class Journal(Closing):
    """Appends lines to a file, each in one write; events, or lines of another kind.

    Args:
      path: the file; it is made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise os_problem(error, path, "write") from None

    def write(self, line: Json) -> None:
        """Append a line. Raises MachineError if the disk is full."""
        text = json.dumps(_finite(line), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        data = text.encode() + b"\n"
        try:
            self._file.write(data)
        except OSError as error:
            raise os_problem(error, self.path, "write") from None

    def record(self, event: Event) -> None:
        """Append what the journal says of an event, if anything. Raises as `write`."""
        line = event_line(event)
        if isinstance(event, Skipped) and event.back_to is not None:
            cut_back(self.path, event.back_to)
        if line is not None:
            self.write(line)

    def synchronise(self) -> None:
        """Return once the lines are on the disk. Raises MachineError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise os_problem(error, self.path, "synchronise") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """Return a JSON value with null in place of what is not finite, which JSON cannot say."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def cut_back(path: Path, step: int) -> None:
    """Remove the lines of a journal that are later than `step`, and what is no whole line.

    Raises:
      MachineError: the file cannot be written.
    """
    if not path.exists():
        return
    try:
        with path.open("r+b") as file:
            kept = 0
            for raw in file:
                if not _is_kept(raw, step):
                    break
                kept += len(raw)
            file.truncate(kept)
    except OSError as error:
        raise os_problem(error, path, "write") from None


def _is_kept(raw: bytes, step: int) -> bool:
    try:
        found = json.loads(raw)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return raw.endswith(b"\n") and isinstance(found, int) and found <= step


def read_journal(path: Path) -> Iterator[JsonDict]:
    """Yield the lines of a journal; one that a kill cut off at the end is left out.

    Raises:
      InputError: a line is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict):
                raise InputError("not a line of JSON", where=f"{path}:{number}",
                                 expected="an object in braces")  # fmt: skip
            yield line
