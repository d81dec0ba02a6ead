"""Run a pipeline: every pass in order, with the verifier and the instruments after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from moecc.errors import CheckError, InputError, Problem, UsageError
from moecc.ir.graph import Graph
from moecc.ir.unroll import is_rolled
from moecc.ir.verify import VerifyError, verify
from moecc.pipeline.blame import apply_pass
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark, weakest
from moecc.pipeline.reproducer import Reproducer
from moecc.pipeline.text import Pipeline, format_pass
from moecc.support.gc_pause import gc_paused

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
class Report:
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
        total = self.preserves
        return {
            "changed": self.changed,
            "preserves": _promise_dict(total),
            "passes": [_run_dict(run) for run in self.runs],
        }


def _promise_dict(promise: Preserves) -> dict[str, object]:
    return {
        "kind": promise.kind,
        "reason": promise.reason,
        "predicted_error": promise.predicted_error,
    }


def _run_dict(run: PassRun) -> dict[str, object]:
    result = run.result
    return {
        "pass": format_pass(run.item),
        "changed": result.changed,
        "matched": result.matched,
        "preserves": _promise_dict(run.preserves),
        "statistics": result.stats,
        "remarks": [{"where": r.where, "text": r.text} for r in run.remarks],
        "near_misses": [
            {"rule": m.rule, "where": m.where, "reason": m.reason} for m in result.near_misses
        ],
        "seconds": run.seconds,
        "verify_seconds": run.verify_seconds,
    }


class Instrument:
    """Observes a pipeline run; the methods do nothing by default."""

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Receive the graph before the first pass."""

    def before(self, number: int, item: Pass, graph: Graph) -> None:
        """Receive the graph before a pass."""

    def after(self, run: PassRun, graph: Graph) -> None:
        """Receive the verified graph after a pass."""

    def finish(self, report: Report) -> None:
        """Receive the report of all passes."""


def run_pipeline(
    graph: Graph,
    pipeline: Pipeline,
    *,
    context: Context | None = None,
    instruments: Sequence[Instrument] = (),
    crash_folder: Callable[[], Path] | None = None,
) -> Report:
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
    with (
        gc_paused(),
        Reproducer(graph, str(pipeline), pipeline, context, crash_folder) as reproducer,
    ):
        for number, item in enumerate(pipeline, 1):
            for instrument in instruments:
                instrument.before(number, item, graph)
            reproducer.number, reproducer.item = number, item
            run = run_pass(graph, item, context, number)
            runs.append(run)
            reproducer.item = None
            for instrument in instruments:
                instrument.after(run, graph)
    report = Report(tuple(runs))
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
            "the pass works layer by layer, but the graph repeats its layers", where=item.name,
            hint="unroll-layers before it, and roll-layers afterwards",
        )  # fmt: skip
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
        raise InputError([_unmatched(item, result)])
    remarks = tuple(dict.fromkeys([*remarked, *result.remarks]))
    return PassRun(number, item, result, remarks, middle - start, end - middle)


def _unmatched(item: Pass, result: PassResult) -> Problem:
    misses = sorted(result.near_misses, key=lambda m: -m.score)[:MAX_NEAR_MISSES]
    left = len(result.near_misses) - len(misses)
    lines = [f"\n    {m.where}: {m.reason}" for m in misses]
    if left:
        lines.append(f"\n    and {left} more")
    found = f"nearest misses:{''.join(lines)}" if misses else "no candidate"
    return Problem(
        "matched nothing, but must match",
        item.name,
        found=found,
        hint="leave it out; moecc opt and convert also go on without it by --allow-unmatched",
    )
