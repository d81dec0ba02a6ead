"""Instruments: observers that print a pipeline's progress and results.

All but `DumpFolder` write to a given stream, which is never standard output: standard output
carries only the artefact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import TextIO

from moecc.errors import MachineError, Problem, UsageError, nearest
from moecc.ir.graph import Graph
from moecc.ir.printer import print_graph
from moecc.pipeline.passes import Pass
from moecc.pipeline.runner import Instrument, PassRun, Report
from moecc.pipeline.text import Pipeline, format_pass


@dataclass
class PrintAfter(Instrument):
    """Prints the graph after passes; the output can be parsed.

    Attributes:
      which: ``all``, ``changed`` (passes that changed the graph), or names of passes.
      stream: the output stream.
    """

    which: str | frozenset[str]
    stream: TextIO

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Check the pass names.

        Raises:
          UsageError: a name is not that of a pass of the pipeline.
        """
        if not isinstance(self.which, str):
            _check_names(self.which, pipeline, "after")

    def after(self, run: PassRun, graph: Graph) -> None:
        """Print the graph if it is requested after this pass."""
        if self.which == "changed":
            wanted = run.result.changed
        else:
            wanted = self.which == "all" or run.item.name in self.which
        if wanted:
            self.stream.write(f"# after pass {run.title}\n{print_graph(graph)}")


@dataclass
class PrintBefore(Instrument):
    """Prints the graph before passes; the output can be parsed.

    Attributes:
      which: ``all``, or names of passes.
      stream: the output stream.
    """

    which: str | frozenset[str]
    stream: TextIO

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Check the pass names.

        Raises:
          UsageError: a name is not that of a pass of the pipeline.
        """
        if not isinstance(self.which, str):
            _check_names(self.which, pipeline, "before")

    def before(self, number: int, item: Pass, graph: Graph) -> None:
        """Print the graph if it is requested before this pass."""
        if self.which == "all" or item.name in self.which:
            title = f"{number} {format_pass(item)}"
            self.stream.write(f"# before pass {title}\n{print_graph(graph)}")


def _check_names(names: frozenset[str], pipeline: Pipeline, when: str) -> None:
    """Raise UsageError for names that no pass of the pipeline has."""
    there = {item.name for item in pipeline}
    problems = [
        Problem(
            f"the pipeline has no pass {name!r} to print {when}",
            hint=nearest(name, there) or f"passes: {', '.join(sorted(there)) or 'none'}",
        )
        for name in sorted(names - there)
    ]
    if problems:
        raise UsageError(problems)


class DiffAfter(Instrument):
    """Prints what each pass changed, as a unified diff of the text."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text: list[str] = []
        self.title = "input"

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Store the text of the input."""
        self.text = print_graph(graph).splitlines(keepends=True)

    def after(self, run: PassRun, graph: Graph) -> None:
        """Print the difference to the previous text, and store this one."""
        text = print_graph(graph).splitlines(keepends=True)
        self.stream.writelines(unified_diff(self.text, text, self.title, run.title))
        self.text, self.title = text, run.title


_DUMPED = re.compile(r"\d{3}_[a-z0-9-]+\.moe\Z")
_MARK = "# moecc dump: "


class DumpFolder(Instrument):
    """Writes ``000_input.moe``, ``001_canonicalize.moe`` … into a folder.

    It deletes files of an earlier run, recognised by name and first line, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Create the folder, delete the files of an earlier run, and write the input.

        Raises:
          MachineError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _DUMPED.match(path.name) and path.is_file() and _is_marked(path):
                    path.unlink()
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        self.write("000_input.moe", f"input of {pipeline}", graph)

    def after(self, run: PassRun, graph: Graph) -> None:
        """Write the graph after a pass."""
        self.write(f"{run.number:03}_{run.item.name}.moe", f"after pass {run.title}", graph)

    def write(self, name: str, title: str, graph: Graph) -> None:
        """Write one file."""
        try:
            text = f"{_MARK}{title}\n{print_graph(graph)}"
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.folder / name, error) from None


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()


def _unwritable(path: Path, error: OSError) -> MachineError:
    return MachineError(f"cannot be written: {error.strerror or error}", where=str(path))


@dataclass
class Timing(Instrument):
    """Prints the time of each pass and of the verifier after it."""

    stream: TextIO

    def finish(self, report: Report) -> None:
        """Print the table."""
        total = sum(r.seconds + r.verify_seconds for r in report.runs)
        rows = [("pass", "seconds", "verify", "share")]
        for run in report.runs:
            both = run.seconds + run.verify_seconds
            share = f"{both / total:.0%}" if total else "-"
            rows.append((run.title, f"{run.seconds:.4f}", f"{run.verify_seconds:.4f}", share))
        rows.append(("total", f"{total:.4f}", "", ""))
        self.stream.writelines(_table(rows))


@dataclass
class Statistics(Instrument):
    """Prints the counts of each pass, and of its rules hits, attempts and time."""

    stream: TextIO

    def finish(self, report: Report) -> None:
        """Print a table for each pass."""
        for run in report.runs:
            result = run.result
            state = "changed" if result.changed else "unchanged"
            self.stream.write(f"pass {run.title}: {state}, {result.matched} matched\n")
            counts = [n for n in result.stats if n not in result.rules]
            rows = [(name, str(result.stats[name])) for name in counts]
            self.stream.writelines(_table(rows))
            rules = [
                (name, f"{s.hits} hits", f"{s.attempts} attempts", f"{s.seconds * 1e3:.2f} ms")
                for name, s in result.rules.items()
                if s.attempts
            ]
            self.stream.writelines(_table(rules))


@dataclass
class Remarks(Instrument):
    """Prints the remarks and near misses of each pass."""

    stream: TextIO

    def after(self, run: PassRun, graph: Graph) -> None:
        """Print the remarks and near misses of this pass."""
        for remark in run.remarks:
            self.stream.write(f"remark: {run.item.name}: {remark}\n")
        for miss in run.result.near_misses:
            # For a clean-up rule, a miss in which only the root matched is not worth printing.
            if miss.score < 2 and not run.item.must_match:
                continue
            self.stream.write(f"missed: {run.item.name}: {miss}\n")


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table: the first column left-aligned, the others right-aligned."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        yield "  ".join(["  " + first.ljust(widths[0]), *cells]).rstrip() + "\n"
