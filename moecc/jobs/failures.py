"""What may fail of a graph and a pipeline, each as a test that is run again and again.

`moecc.jobs.reduce` makes a failing input small, `moecc.jobs.bisect` finds the step that is wrong;
both only ask whether the failure is still the same.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from moecc.backend import get_backend
from moecc.errors import CheckError, InputError, OwnOperationError, UsageError
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import clone
from moecc.ir.text import format_node, print_graph
from moecc.jobs.checks import broken_promise
from moecc.rewrite.passes import KNOWN, Context, OwnPassError
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pass
from moecc.support.lazy import np
from moecc.testing.oracle import distance, magnitude
from moecc.types import F64, Array, Arrays

# The first value of a graph that is not what it means: of the XLA backend, or of its weights.

TOLERANCE = 1e-9
"""The difference allowed between two backends in float64, times the magnitude of a value."""


@dataclass(frozen=True)
class Gap:
    """A value that differs.

    Attributes:
      location: the line of its node, or the name of the parameter.
      expected: one element.
      found: the same element.
    """

    location: str
    expected: object
    found: object

    def __str__(self) -> str:
        return f"{self.location}: expected {self.expected}, found {self.found}"


def line_of(value: Value) -> str:
    """Return the line of the node that makes a value, or its name."""
    return f"%{value.name}" if value.node is None else format_node(value.node)


def gap(value: Value, expected: Array, actual: Array, tolerance: float) -> Gap | None:
    """Return the element in which two arrays differ most, or None if they agree.

    Args:
      value: what they are of.
      expected: the right one; what is NaN in it may be anything.
      actual: the other.
      tolerance: of floats, times the largest magnitude; 0 compares bit for bit.
    """
    if expected.shape != actual.shape:
        return Gap(line_of(value), f"shape {expected.shape}", f"shape {actual.shape}")
    if expected.dtype.kind not in "fV":
        apart = np.asarray(expected != actual, np.float64)
        allowed = 0.0
    else:
        apart, allowed = distance(expected, actual), tolerance * magnitude(expected)
    if not (apart > allowed).any():
        return None
    at = np.unravel_index(int(np.argmax(apart)), apart.shape)
    return Gap(f"{line_of(value)}, element {[int(i) for i in at]}", expected[at], actual[at])


def xla_gap(graph: Graph) -> Gap | None:
    """Return the first value that XLA computes otherwise than the reference, on random data.

    Both compute in float64.

    Raises:
      InputError: one of them cannot run the graph.
    """
    from moecc.testing.data import inputs_for, params_for

    params, inputs = params_for(graph), inputs_for(graph)
    names = watched(graph)
    expected = values_of(graph, params, inputs)
    with_all = _returning(graph, names)
    outputs = get_backend("xla").compile(with_all, dtype=F64).run(params, inputs)
    for name, output in names.items():
        value = graph.value(name)
        differs = gap(value, expected[value], np.asarray(outputs[output]), TOLERANCE)
        if differs is not None:
            return differs
    return None


def watched(graph: Graph) -> dict[str, str]:
    """Return the values that a backend can return, by name, with names of outputs for them.

    Rows of experts have no shape of their own; what is combined from them is compared.
    """
    results = [v for node in graph for v in node.results if not v.type.extents]
    free = [v for v in results if v.type.dtype.kind != "key" and not v.type.unreduced]
    return {value.name: f"value.{number}" for number, value in enumerate(free)}


def values_of(graph: Graph, params: Arrays, inputs: Arrays) -> dict[Value, Array]:
    """Return all values of `graph` in the reference, without those of repeated bodies."""
    program = cast(Any, get_backend("reference").compile(graph))
    return {value: np.asarray(array.data) for value, array in program.trace(params, inputs)}


def _returning(graph: Graph, names: Mapping[str, str]) -> Graph:
    copy = clone(graph)
    for name in list(copy.output_names):
        copy.drop_output(name)
    for name, output in names.items():
        copy.set_output(output, copy.value(name))
    if not copy.output_names:
        raise InputError("the graph has no value that could be compared")
    return copy


def weight_gap(graph: Graph) -> Gap | None:
    """Return the first parameter that is written otherwise than its expression says.

    The weights are written as a checkpoint, of random sources, and read back; the oracle evaluates
    the expressions as they stand, without the simplifier.

    Raises:
      InputError: the weights cannot be written.
    """
    from moecc.formats.safetensors import read_header
    from moecc.formats.writer import OutputTensor, WriteOptions, write_checkpoint
    from moecc.testing.weights import stored_sources, whole_naively

    weights = graph.weights
    read = stored_sources(weights.values(), 0)
    tensors = [OutputTensor(n, w, w.type.dtype) for n, w in weights.items()]
    with tempfile.TemporaryDirectory(prefix="moecc-weights-") as name:
        written = write_checkpoint(Path(name), tensors, read, WriteOptions(1 << 16))
        files = {n: Path(name) / t.file for n, t in written.tensors.items()}
        headers = {path: read_header(path) for path in set(files.values())}
        for tensor in tensors:
            expected = whole_naively(tensor.expr, read)
            info = headers[files[tensor.name]].tensors[tensor.name]
            with info.file.open("rb") as file:
                file.seek(info.offset)
                raw = file.read(info.nbytes)
            stored = np.frombuffer(raw, info.dtype.numpy).reshape(info.shape)
            if expected.tobytes() != raw:
                differs = gap(graph.params[tensor.name], expected, stored, 0.0)
                return differs or Gap(f"%{tensor.name}", "the same bits", "others")
    return None


RUN, WEIGHTS = "run", "weights"
COMPARED = (RUN, WEIGHTS)
"""The comparisons beside promises: XLA with the reference, written weights with the oracle."""

COMMAND_SECONDS = 60


def first_gap(graph: Graph, comparison: str) -> Gap | None:
    """Return the first gap of a graph by one of the comparisons `COMPARED`; raises as they do."""
    return xla_gap(graph) if comparison == RUN else weight_gap(graph)


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

    def is_like(self, failure: Failure | None) -> bool:
        """Whether the other failure is this one, perhaps on another input."""
        return failure is not None and (self.kind, self.where) == (failure.kind, failure.where)

    def __str__(self) -> str:
        if not self.where:
            return self.text
        # The exception of a crash begins its text, too.
        exception = self.text.partition(":")[0]
        return f"{self.kind}: {self.where}: ".removesuffix(f"{exception}: ") + self.text


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
    """

    context: Context

    def __call__(self, graph: Graph, pipeline: Pipeline) -> Failure | None:
        """Return the first failure of a pass; what the user would have to mend is none."""
        after = clone(graph)
        for number, item in enumerate(pipeline, 1):
            before = clone(after)
            try:
                run = run_pass(after, item, self.context, number)
            except CheckError as error:
                return Failure("invalid", item.name, str(error.problems[0]))
            except (OwnPassError, OwnOperationError) as error:
                kind, problem = type(error).__name__, error.problems[0]
                return Failure("crash", f"{item.name}: {kind}", f"{kind}: {problem}")
            except KNOWN:
                return None
            except Exception as error:
                kind = type(error).__name__
                return Failure("crash", f"{item.name}: {kind}", f"{kind}: {error}")
            if broken := broken_promise(run.preserves, before, after):
                return Failure("promise", item.name, f"promised {run.preserves}; {broken[0]}")
        return None


@dataclass(frozen=True)
class ComparisonTest:
    """Values of the XLA backend against the reference, or written weights against the oracle.

    Attributes:
      comparison: one of `COMPARED`.
      context: of the passes.
    """

    comparison: str
    context: Context

    def __post_init__(self) -> None:
        if self.comparison not in COMPARED:
            expected = " or ".join(COMPARED)
            raise UsageError("unknown comparison", expected=expected, found=self.comparison)

    def __call__(self, graph: Graph, pipeline: Pipeline) -> Failure | None:
        """Return what differs once the pipeline has run, if anything does."""
        after = clone(graph)
        try:
            for number, item in enumerate(pipeline, 1):
                run_pass(after, item, self.context, number)
            mismatch = first_gap(after, self.comparison)
        except KNOWN:
            return None
        except Exception as error:
            kind = type(error).__name__
            return Failure("crash", kind, f"{kind}: {error}")
        return Failure(self.comparison, "", str(mismatch)) if mismatch else None


def where_else(pipeline: Pipeline) -> str:
    """Return where to look for a failure that passes do not show."""
    if not len(pipeline):
        return "-p names the passes to look at"
    return "--compare run or --compare weights looks at more than passes"


@dataclass(frozen=True)
class CommandTest:
    """A command of the user that fails: ``{}`` is the graph's file, ``{pipeline}`` the pipeline.

    Attributes:
      command: the command; no shell is involved.
    """

    command: str

    def __post_init__(self) -> None:
        if "{}" not in self.command and "{pipeline}" not in self.command:
            raise UsageError("the command reads neither graph nor pipeline", where="--test",
                             expected="{} for the file of the graph, or {pipeline}",
                             found=self.command)  # fmt: skip

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
                words = shlex.split(self.command)
                for mark, text in stated.items():
                    words = [word.replace(mark, text) for word in words]
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
