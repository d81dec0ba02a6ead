"""Run a pipeline: every pass in order, with the verifier and the instruments after each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import unified_diff
from pathlib import Path
from time import perf_counter
from typing import ClassVar, TextIO

from moecc.errors import CheckError, InputError, MachineError, Problem, UsageError, nearest
from moecc.ir.graph import Graph
from moecc.ir.text import print_graph
from moecc.ir.unroll import is_rolled
from moecc.ir.verify import VerifyError, verify
from moecc.pipeline.passes import (
    KNOWN,
    Context,
    Pass,
    PassResult,
    Preserves,
    Remark,
    apply_pass,
    crash_of,
    weakest,
)
from moecc.pipeline.reproducer import Replay, loaded_files, save_crash
from moecc.pipeline.text import Pipeline, format_pass
from moecc.support.process import gc_paused

MAX_NEAR_MISSES = 5
"""How many near misses are shown in the error of a pass that matched nothing."""


@dataclass(frozen=True)
class PassRun:
    """One pass of a pipeline, run.

    Attributes:
      number: its position, from 1.
      item: the pass.
      result: the result that it returned.
      remarks: its remarks, without duplicates.
      seconds: its time.
      verify_seconds: the time of the verifier after it.
    """

    number: int
    item: Pass
    result: PassResult
    remarks: tuple[Remark, ...]
    seconds: float
    verify_seconds: float

    @property
    def title(self) -> str:
        """Its description in messages."""
        return f"{self.number} {format_pass(self.item)}"

    @property
    def preserves(self) -> Preserves:
        """The effect on the function of this graph."""
        return self.result.preserves or self.item.preserves


@dataclass(frozen=True)
class PipelineReport:
    """A pipeline, run."""

    runs: tuple[PassRun, ...]

    @property
    def changed(self) -> bool:
        """Whether any pass changed the graph."""
        return any(r.result.changed for r in self.runs)

    @property
    def preserves(self) -> Preserves:
        """The combined promise of the passes that changed something."""
        return weakest(r.preserves for r in self.runs if r.result.changed)

    def as_dict(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return {
            "changed": self.changed,
            "preserves": asdict(self.preserves),
            "passes": [
                {
                    "pass": format_pass(run.item),
                    "changed": run.result.changed,
                    "matched": run.result.matched,
                    "preserves": asdict(run.preserves),
                    "statistics": run.result.stats,
                    "remarks": [asdict(remark) for remark in run.remarks],
                    "near_misses": [
                        {"rule": m.rule, "where": m.where, "reason": m.reason}
                        for m in run.result.near_misses
                    ],
                    "seconds": run.seconds,
                    "verify_seconds": run.verify_seconds,
                }
                for run in self.runs
            ],
        }


class Instrument:
    """Observes a pipeline run; the methods do nothing by default."""

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Receive the graph before the first pass."""

    def before(self, number: int, item: Pass, graph: Graph) -> None:
        """Receive the graph before a pass."""

    def after(self, run: PassRun, graph: Graph) -> None:
        """Receive the verified graph after a pass."""

    def finish(self, report: PipelineReport) -> None:
        """Receive the report of all passes."""


def run_pipeline(
    graph: Graph,
    pipeline: Pipeline,
    *,
    context: Context | None = None,
    instruments: Sequence[Instrument] = (),
    crash_folder: Callable[[], Path] | None = None,
) -> PipelineReport:
    """Run `pipeline` on `graph`, in place, and return a report of the passes.

    Args:
      graph: changed in place; after an error it may be half changed.
      pipeline: the passes.
      context: the seed, and the other context of passes.
      instruments: notified before the first pass, before and after each, and at the end.
      crash_folder: returns where a reproducer is written if a pass crashes; None writes none.

    Raises:
      UsageError: options contradict each other; all problems at once.
      InputError: the graph is invalid, or a pass that must match matched nothing.
      CheckError: a pass produced an invalid graph.
      PassCrash: a pass raised another exception.
    """
    context = Context() if context is None else context
    problems = pipeline.problems()
    if problems:
        raise UsageError(problems)
    verify(graph)
    for instrument in instruments:
        instrument.start(graph, pipeline)
    runs: list[PassRun] = []
    # Taken before any pass changes the graph.
    text = print_graph(graph) if crash_folder is not None else ""
    running: tuple[int, Pass] | None = None
    try:
        with gc_paused():
            for number, item in enumerate(pipeline, 1):
                for instrument in instruments:
                    instrument.before(number, item, graph)
                running = number, item
                runs.append(run_pass(graph, item, context, number))
                running = None
                for instrument in instruments:
                    instrument.after(runs[-1], graph)
    except KNOWN:
        # Errors of the user or the machine have messages of their own.
        raise
    except Exception as error:
        if running is None:
            raise
        number, item = running
        title, hint = f"the pass {number}, {item.name}, crashed", None
        if crash_folder is not None:
            load = loaded_files(pipeline)
            replay = Replay(str(pipeline), context.seed, context.allow_unmatched, load=load)
            hint = save_crash(crash_folder, text, replay, error, title)
        raise crash_of(type(item), title, error, hint) from error
    report = PipelineReport(tuple(runs))
    for instrument in instruments:
        instrument.finish(report)
    return report


def run_pass(graph: Graph, item: Pass, context: Context, number: int = 1) -> PassRun:
    """Run one pass on `graph`, in place, and verify the result.

    Raises:
      InputError: it must match and matched nothing, or it does not accept repeated layers.
      CheckError: it produced an invalid graph.
    """
    if not item.takes_rolled and is_rolled(graph):
        raise InputError(
            "the pass works layer by layer, but the graph repeats its layers",
            where=item.name,
            hint="unroll-layers before it, and roll-layers afterwards",
        )
    remarked: list[Remark] = []

    def note(remark: Remark) -> None:
        remarked.append(remark)
        context.remark(remark)

    start = perf_counter()
    result = apply_pass(item, graph, replace(context, remark=note))
    middle = perf_counter()
    try:
        verify(graph)
    except VerifyError as error:
        raise CheckError(
            replace(p, where=f"after pass {number}, {item.name}: {p.where or 'the graph'}")
            for p in error.problems
        ) from None
    end = perf_counter()
    if item.must_match and not result.matched and not context.allow_unmatched:
        misses = sorted(result.near_misses, key=lambda m: -m.score)[:MAX_NEAR_MISSES]
        lines = [f"\n    {m.where}: {m.reason}" for m in misses]
        if left := len(result.near_misses) - len(misses):
            lines.append(f"\n    and {left} more")
        raise InputError(
            "matched nothing, but must match",
            where=item.name,
            found=f"nearest misses:{''.join(lines)}" if misses else "no candidate",
            hint="leave it out; moecc opt and convert also go on without it by --allow-unmatched",
        )
    remarks = tuple(dict.fromkeys([*remarked, *result.remarks]))
    return PassRun(number, item, result, remarks, middle - start, end - middle)


# Instruments: observers that print a pipeline's progress and results.
#
# All but `DumpFolder` write to a given stream, which is never standard output: standard output
# carries only the artefact.


@dataclass
class PrintAfter(Instrument):
    """Prints the graph after passes; the output can be parsed.

    Attributes:
      which: ``all``, ``changed`` (passes that changed the graph), or names of passes.
      stream: the output stream.
    """

    which: str | frozenset[str]
    stream: TextIO
    position: ClassVar[str] = "after"

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Check the pass names.

        Raises:
          UsageError: a name is not that of a pass of the pipeline.
        """
        available = {item.name for item in pipeline}
        names = frozenset() if isinstance(self.which, str) else self.which - available
        passes = ", ".join(sorted(available)) or "none"
        problems = [
            Problem(
                f"the pipeline has no pass {name!r} to print {self.position}",
                hint=nearest(name, available) or f"passes: {passes}",
            )
            for name in sorted(names)
        ]
        if problems:
            raise UsageError(problems)

    def print(self, title: str, name: str, graph: Graph, *, changed: bool = False) -> None:
        """Print the graph if it is requested at this pass."""
        by_change = self.which == "changed" and changed
        if self.which == "all" or by_change or (self.which != "changed" and name in self.which):
            self.stream.write(f"# {self.position} pass {title}\n{print_graph(graph)}")

    def after(self, run: PassRun, graph: Graph) -> None:
        """Print the graph if it is requested after this pass."""
        self.print(run.title, run.item.name, graph, changed=run.result.changed)


class PrintBefore(PrintAfter):
    """Prints the graph before passes: all, or those that are named."""

    position = "before"

    def before(self, number: int, item: Pass, graph: Graph) -> None:
        """Print the graph if it is requested before this pass."""
        self.print(f"{number} {format_pass(item)}", item.name, graph)

    def after(self, run: PassRun, graph: Graph) -> None:
        """Print nothing."""


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

    def finish(self, report: PipelineReport) -> None:
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
class StatisticsTable(Instrument):
    """Prints the counts of each pass, and of its rules hits, attempts and time."""

    stream: TextIO

    def finish(self, report: PipelineReport) -> None:
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
