"""What may fail of a graph and a pipeline, each as a test that is run again and again.

`moecc.tasks.reduce` makes a failing input small, `moecc.tasks.bisect` finds the step that is wrong;
both only ask whether the failure is still the same.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moecc.errors import CheckError, UsageError
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.text import print_graph
from moecc.pipeline.passes import KNOWN, Context
from moecc.pipeline.runner import run_pass
from moecc.pipeline.text import Pipeline
from moecc.tasks.check import SEEDS, broken_promise
from moecc.tasks.value_gaps import weight_gap, xla_gap

RUN, WEIGHTS = "run", "weights"
COMPARED = (RUN, WEIGHTS)
"""What may be compared beside promises: XLA with the reference, written weights with the oracle."""

COMMAND_SECONDS = 60


@dataclass(frozen=True)
class Failure:
    """A failure.

    Attributes:
      kind: ``crash``, ``promise``, ``invalid`` (graph), ``run``, ``weights`` or ``command``.
      where: what stays the same while the input shrinks: the pass, the exception, the exit code.
      text: what was found, for people.
    """

    kind: str
    where: str
    text: str

    def is_like(self, other: Failure | None) -> bool:
        """Whether the other failure is this one, perhaps on another input."""
        return other is not None and (self.kind, self.where) == (other.kind, other.where)

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.text}" if self.where else self.text


class FailureTest(Protocol):
    """Runs a pipeline on a graph, which it leaves as it is, and returns the first failure."""

    def __call__(self, graph: Graph, pipeline: Pipeline) -> Failure | None:
        """Return the first failure, or None."""
        ...


@dataclass(frozen=True)
class PromiseTest:
    """Crashes, invalid graphs and broken promises of passes.

    Attributes:
      context: of the passes.
      seeds: of the random data on which promises are checked.
    """

    context: Context = field(default_factory=Context)
    seeds: Sequence[int] = SEEDS

    def __call__(self, graph: Graph, pipeline: Pipeline) -> Failure | None:
        """Return the first failure of a pass; what the user would have to mend is none."""
        after = clone(graph)
        for number, item in enumerate(pipeline, 1):
            before = clone(after)
            try:
                run = run_pass(after, item, self.context, number)
            except CheckError as error:
                return Failure("invalid", item.name, str(error.problems[0]))
            except KNOWN:
                return None
            except Exception as error:
                kind = type(error).__name__
                return Failure("crash", f"{item.name}: {kind}", f"{kind}: {error}")
            if found := broken_promise(run.preserves, before, after, self.seeds):
                return Failure("promise", item.name, f"promised {run.preserves}; {found[0]}")
        return None


@dataclass(frozen=True)
class ComparisonTest:
    """Values of the XLA backend against the reference, or written weights against the oracle.

    Attributes:
      what: one of `COMPARED`.
      context: of the passes.
    """

    what: str
    context: Context = field(default_factory=Context)

    def __post_init__(self) -> None:
        if self.what not in COMPARED:
            expected = " or ".join(COMPARED)
            raise UsageError("unknown comparison", expected=expected, found=self.what)

    def __call__(self, graph: Graph, pipeline: Pipeline) -> Failure | None:
        """Return what differs once the pipeline has run, if anything does."""
        after = clone(graph)
        try:
            for number, item in enumerate(pipeline, 1):
                run_pass(after, item, self.context, number)
            found = xla_gap(after) if self.what == RUN else weight_gap(after)
        except KNOWN:
            return None
        except Exception as error:
            kind = type(error).__name__
            return Failure("crash", kind, f"{kind}: {error}")
        return Failure(self.what, "", str(found)) if found else None


@dataclass(frozen=True)
class CommandTest:
    """A command of the user that fails: ``{}`` is the graph's file, ``{pipeline}`` the pipeline.

    Attributes:
      command: the command; no shell is involved.
    """

    command: str

    def __call__(self, graph: Graph, pipeline: Pipeline) -> Failure | None:
        """Return a failure with the exit code of the command, unless that is 0.

        Raises:
          UsageError: there is no such command.
        """
        with tempfile.TemporaryDirectory(prefix="moecc-reduce-") as folder:
            file = Path(folder) / "graph.moe"
            file.write_text(print_graph(graph), "utf-8")
            stated = {"{}": str(file), "{pipeline}": str(pipeline)}
            try:
                words = [stated.get(word, word) for word in shlex.split(self.command)]
                done = subprocess.run(
                    words, capture_output=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL
                )
            except subprocess.TimeoutExpired:
                return None
            except (OSError, IndexError, ValueError) as error:
                raise UsageError(f"the command cannot be run: {error}", where="--test") from None
        if done.returncode == 0:
            return None
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Failure("command", f"exit code {done.returncode}", "".join(last))
