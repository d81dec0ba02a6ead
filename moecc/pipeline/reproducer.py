"""Crash reproducers: the input, the pipeline and the seed are written to a file."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar

from moecc.errors import MoeccError
from moecc.ir.graph import Graph
from moecc.ir.printer import print_graph

_KNOWN = (MoeccError, MemoryError, OSError)
"""Exceptions that are not a bug of a pass: the user's input, or the machine."""


class PassCrash(MoeccError):
    """A pass raised an unexpected exception: a bug, in the pass or in moecc."""

    exit_code: ClassVar[int] = 70


class Reproducer:
    """Turns an unexpected exception inside it into a `PassCrash`, and writes a reproducer.

    The text of the graph is taken when this is made, before any pass changes it.

    Attributes:
      current: the description of the running pass in messages.
    """

    def __init__(self, graph: Graph, pipeline: str, seed: int, folder: Path | None) -> None:
        self.text = print_graph(graph) if folder is not None else ""
        self.name = graph.name
        self.pipeline = pipeline
        self.seed = seed
        self.folder = folder
        self.current = ""

    def __enter__(self) -> Reproducer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Errors of the user or the machine have messages of their own.
        if not isinstance(error, Exception) or isinstance(error, _KNOWN):
            return
        hint = None if self.folder is None else self.kept(error)
        raise PassCrash(
            f"the pass {self.current} crashed: {type(error).__name__}: {error}", hint=hint
        ) from error

    def kept(self, error: Exception) -> str:
        """Write the reproducer and return where it is, or why it could not be written."""
        try:
            return f"the input, the pipeline and the seed are in {self.write(error)}"
        except OSError as failure:
            return f"the reproducer could not be written: {failure}"

    def write(self, error: Exception) -> Path:
        """Write the reproducer and return its path; no existing file is overwritten."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while (path := self.folder / f"moecc-crash-{number}.moe").exists():
            number += 1
        path.write_text(self.content(error, path), encoding="utf-8")
        return path

    def content(self, error: Exception, path: Path) -> str:
        """Return the text of the reproducer: a graph, after comments that describe the crash."""
        stack = "".join(traceback.format_exception(error)).splitlines()
        head = [
            f"moecc reproducer: {self.current} crashed",
            f"pipeline: {self.pipeline}",
            f"seed: {self.seed}",
            f"moecc opt {path.name} -p '{self.pipeline}' --seed {self.seed}",
            "",
            *stack,
        ]
        comments = "\n".join(f"# {line}".rstrip() for line in head)
        return f"{comments}\n{self.text}"
