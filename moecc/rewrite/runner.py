"""Run a pipeline: every pass in order, with the verifier and the instruments after each."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import unified_diff
from pathlib import Path
from time import perf_counter
from typing import ClassVar, TextIO

from moecc.errors import (
    CheckError,
    InputError,
    MachineError,
    Problem,
    UnmatchedError,
    UsageError,
    escaped,
    nearest,
    raise_problems,
)
from moecc.ir.graph import Graph
from moecc.ir.operation import OPS, OpDef
from moecc.ir.text import print_graph
from moecc.ir.unroll import is_rolled
from moecc.ir.verify import VerifyError, verify
from moecc.rewrite.passes import (
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
from moecc.rewrite.pipeline import LOADED, Pipeline, format_pass
from moecc.support.process import gc_paused
from moecc.version import __version__

# Reproducers: all that `moecc replay` needs to let a pipeline fail once more, in a folder.
#
# The input is a ``.moe`` file whose first comments hold the pipeline and its options; files of own
# passes are copied beside it.  A reproducer may come from a stranger: it names the files of its
# passes, and only the user's ``--load`` runs them.

_TITLE = "# moecc reproducer: "
_REPLAY = "# replay: "


@dataclass(frozen=True)
class Replay:
    """How a failure is repeated.

    Attributes:
      pipeline: the passes.
      seed: of the random choices.
      allow_unmatched: whether a pass that must match may match nothing.
      check: whether each pass is held to its promise, as by ``opt --check``.
      load: the files of own passes; in a reproducer relative to its folder.
      compare: what else is compared after the passes: ``run``, ``weights`` or nothing.
      moecc: the version that failed.
    """

    pipeline: str
    seed: int = 0
    allow_unmatched: bool = False
    check: bool = False
    load: tuple[str, ...] = ()
    compare: str = ""
    moecc: str = __version__


def temporary_folder() -> Path:
    """Return a new folder for a reproducer, outside of the working folder."""
    return Path(tempfile.mkdtemp(prefix="moecc-crash-"))


def loaded_files(
    passes: Iterable[Pass], operations: Iterable[OpDef] = OPS.values()
) -> tuple[str, ...]:
    """Return the files of own passes and operations, each once."""
    modules = [type(item).__module__ for item in passes]
    modules += [(row.declared or row.infer).__module__ for row in operations]
    files = (sys.modules[m].__file__ for m in modules if m.startswith(LOADED))
    return tuple(dict.fromkeys(file for file in files if file))


def write_reproducer(folder: Path, text: str, replay: Replay, title: str, notes: str) -> Path:
    """Write a reproducer and return its path; no existing file is overwritten.

    Args:
      folder: where; it is made if it does not exist.
      text: the graph.
      replay: the pipeline and its options.
      title: what failed, in one line.
      notes: further comments, such as a traceback.

    Raises:
      OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"moecc-crash-{number}.moe").exists():
        number += 1
    # Files of own passes are copied beside the reproducer.
    names = tuple(f"moecc-crash-{number}-{Path(file).name}" for file in replay.load)
    for file, name in zip(replay.load, names, strict=True):
        shutil.copyfile(file, folder / name)
    content = _content(text, replace(replay, load=names), title, notes)
    path.write_text(content, encoding="utf-8")
    return path


def reproducer_text(graph: Graph, replay: Replay, title: str) -> str:
    """Return the text of a reproducer, whose files of own passes are where they are."""
    return _content(print_graph(graph), replay, title, "")


def _content(text: str, replay: Replay, title: str, notes: str) -> str:
    head = [
        f"{_TITLE}{title}".splitlines()[0],
        f"{_REPLAY}{json.dumps(asdict(replay))}",
        f"# pipeline: {replay.pipeline}",
        f"# seed: {replay.seed}",
        *(f"# load: {name}" for name in replay.load),
        "#",
        *(f"# {line}".rstrip() for line in notes.splitlines()),
    ]
    return f"{escaped(chr(10).join(head))}\n{text}"


def is_reproducer(file: str) -> bool:
    """Return whether a file begins as a reproducer does."""
    path = Path(file)
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(len(_TITLE)) == _TITLE


def read_reproducer(path: Path) -> Replay:
    """Return how a reproducer is repeated; the files of its own passes by their paths.

    Raises:
      InputError: the file has no such comment, or one of another version.
    """
    line = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for _ in range(8):
            line = file.readline(1 << 20)
            if line.startswith(_REPLAY):
                break
    try:
        stated = json.loads(line.removeprefix(_REPLAY)) if line.startswith(_REPLAY) else {}
        replay = Replay(**{**stated, "load": tuple(stated["load"])})
        _check_types(replay)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            "not a reproducer",
            where=str(path),
            expected=f"a comment {_REPLAY.strip()!r} in its first lines, which moecc wrote",
            hint="moecc opt runs a pipeline over any graph",
        ) from None
    # Beside the reproducer, or where the user said that it is.
    load = tuple(str(path.parent / str(name)) for name in replay.load)
    return replace(replay, load=load)


def _check_types(replay: Replay) -> None:
    """Raise TypeError for a field of another type than its default; a boolean is no number."""
    for field in fields(Replay):
        default = "" if field.name == "pipeline" else field.default
        if type(getattr(replay, field.name)) is not type(default):
            raise TypeError(field.name)
    if not all(isinstance(name, str) for name in replay.load):
        raise TypeError("load")


def check_loaded(path: Path, stated: Replay, files: Sequence[str]) -> None:
    """Check that the user names the files of own passes and operations that a reproducer needs.

    Args:
      path: the reproducer.
      stated: its content.
      files: the files of ``--load``.

    Raises:
      InputError: the reproducer needs such files, and `files` is empty.
    """
    if not stated.load or files:
        return
    names = list(map(shlex.quote, stated.load))
    raise InputError(
        "the reproducer needs passes or operations of your own",
        where=str(path),
        expected="--load FILE: a file that a reproducer names is run only if you name it, too",
        found=f"{', '.join(names)} in its comment {_REPLAY.strip()!r}",
        hint=f"if you trust their code: {' '.join(f'--load {name}' for name in names)}",
    )


def save_crash(
    folder: Callable[[], Path], text: str, replay: Replay, error: Exception, title: str
) -> str:
    """Write the reproducer of a crash; return how it is repeated, or why it was not written."""
    notes = "".join(traceback.format_exception(error))
    try:
        path = write_reproducer(folder(), text, replay, title, notes)
    except OSError as failure:
        return f"the reproducer could not be written: {failure}"
    words = ["moecc replay", shlex.quote(str(path))]
    words += [f"--load {shlex.quote(file)}" for file in read_reproducer(path).load]
    return f"{' '.join(words)} repeats it: the input, the pipeline and the seed are in there"


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
    raise_problems(problems, UsageError)
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
        raise UnmatchedError(
            "matched nothing, but must match",
            where=item.name,
            found=f"nearest misses:{''.join(lines)}" if misses else "no candidate",
            hint="leave it out, or go on without it: opt and convert by --allow-unmatched, "
            "a recipe by --set model.pipeline=",
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
        raise_problems(problems, UsageError)

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
          InputError: it is a file.
          MachineError: the folder cannot be written.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError("is a file, not a folder", where=self.folder)
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
        times = [(run.title, run.seconds, run.verify_seconds) for run in report.runs]
        passes, verifier = sum(t[1] for t in times), sum(t[2] for t in times)
        rows = [("pass", "seconds", "verify", "share")]
        for title, seconds, verified in [*times, ("total", passes, verifier)]:
            total = passes + verifier
            share = f"{(seconds + verified) / total:.0%}" if total else "-"
            rows.append((title, f"{seconds:.4f}", f"{verified:.4f}", share))
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
        misses = sorted(run.result.near_misses, key=lambda miss: -miss.score)
        # Where something matched, a miss in which only the root did is not worth printing.
        near = [m for m in misses if m.score >= 2 or run.item.must_match]
        if not near and not run.result.matched:
            near = misses[:1]
            if not near:
                self.stream.write(f"missed: {run.item.name}: no candidate\n")
        self.stream.writelines(f"missed: {run.item.name}: {miss}\n" for miss in near)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table: the first column left-aligned, the others right-aligned."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        yield "  ".join(["  " + first.ljust(widths[0]), *cells]).rstrip() + "\n"
