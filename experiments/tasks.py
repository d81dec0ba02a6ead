"""Tasks for fine-tuning, from files that are not of this repository."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

Record = tuple[str, str]
"""A text and the letter of its label."""

LONGEST = 56
"""Bytes of a text that are kept, so that a row of 64 holds it with its label."""

_LABELS = {"YES": "y", "TRUE": "y", "NO": "n", "FALSE": "n", "UNKNOWN": "n"}


@dataclass(frozen=True)
class Task:
    """A data set.

    Attributes:
      files: in its folder.
      url: where it is from.
      read: yields the records of one of its files.
    """

    files: tuple[str, ...]
    url: str
    read: Callable[[Path], Iterator[Record]]


def _subjectivity(path: Path) -> Iterator[Record]:
    """Yield the sentences of Pang and Lee's "subjectivity dataset v1.0" (2004): plots, reviews."""
    label = "o" if path.name.startswith("plot") else "s"
    for line in path.read_text("latin-1").splitlines():
        yield line, label


def _questions(path: Path) -> Iterator[Record]:
    """Yield questions with their six coarse classes (Li and Roth 2002), by initials."""
    for line in path.read_text("latin-1").splitlines():
        label, _, text = line.partition(" ")
        yield text, label[:1].lower()


def _entailment(path: Path) -> Iterator[Record]:
    """Yield pairs of a challenge of RTE (Dagan et al. 2006): the hypothesis, then the text."""
    for pair in ElementTree.parse(path).getroot().iter("pair"):
        said = pair.get("entailment") or pair.get("value") or ""
        parts = (" ".join((pair.findtext(name) or "").split()) for name in ("h", "t"))
        yield " | ".join(parts), _LABELS[said]


TASKS = {
    "subjectivity": Task(
        ("plot.tok.gt9.5000", "quote.tok.gt9.5000"),
        "https://www.cs.cornell.edu/people/pabo/movie-review-data/",
        _subjectivity,
    ),
    "qc": Task(("train.txt", "test.txt"), "https://cogcomp.seas.upenn.edu/Data/QA/QC/", _questions),
    "rte": Task(
        tuple(f"rte{n}_{part}.xml" for n in (1, 2, 3) for part in ("dev", "test")),
        "https://aclweb.org/aclwiki/Recognizing_Textual_Entailment",
        _entailment,
    ),
}
"""The tasks by their names."""


def records(task: str, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the records of a task: a text and the letter of its label.

    Args:
      task: its name.
      folder: the folder of the unpacked data set.

    Raises:
      FileNotFoundError: the folder has no such files.
    """
    found = TASKS[task]
    for name in found.files:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the data set of {task} is at {found.url}")
        for text, label in found.read(path):
            kept = text.strip().encode()[:LONGEST].decode(errors="ignore")
            if kept:
                yield {"text": kept, "label": label}


def write_task(task: str, folder: Path, out: Path) -> Path:
    """Write the records of a task as JSON lines; return the file."""
    lines = (json.dumps(record) for record in records(task, folder))
    out.write_text("\n".join(lines) + "\n", "utf-8")
    return out
