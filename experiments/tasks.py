"""Tasks for fine-tuning, from files that are not of this repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

SUBJECTIVITY = {"plot.tok.gt9.5000": "o", "quote.tok.gt9.5000": "s"}
"""The files of Pang and Lee's "subjectivity dataset v1.0" (2004): plots of films, and reviews."""

URL = "https://www.cs.cornell.edu/people/pabo/movie-review-data/"


def records(task: str, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the records of a task: a text and the letter of its label.

    Args:
      task: its name.
      folder: the folder of the unpacked data set.

    Raises:
      FileNotFoundError: the folder has no such files.
    """
    if task != "subjectivity":
        raise ValueError(f"no such task: {task}")
    for name, label in SUBJECTIVITY.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the data set of {task} is at {URL}")
        for line in path.read_text("latin-1").splitlines():
            if line.strip():
                yield {"text": line.strip()[:180], "label": label}


def write_task(task: str, folder: Path, out: Path) -> Path:
    """Write the records of a task as JSON lines; return the file."""
    lines = (json.dumps(record) for record in records(task, folder))
    out.write_text("\n".join(lines) + "\n", "utf-8")
    return out
