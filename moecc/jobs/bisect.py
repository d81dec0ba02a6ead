"""``moecc bisect``: find the pass, the rewrite and the value that are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.jobs.checks import small_if_possible
from moecc.jobs.command import (
    AllowUnmatched,
    Compare,
    GraphFile,
    Load,
    PipelineText,
    Report,
    Seed,
    read_failing,
)
from moecc.jobs.failures import (
    RUN,
    WEIGHTS,
    Failure,
    Gap,
    PromiseTest,
    first_gap,
    gap,
    values_of,
    where_else,
)
from moecc.rewrite.driver import RewriteWatch, rewrites_watched
from moecc.rewrite.passes import KNOWN, Context, Pass, apply_pass
from moecc.rewrite.pipeline import Pipeline, format_pass
from moecc.rewrite.runner import run_pass
from moecc.support.untyped import JsonDict
from moecc.weights.expr import Expr
from moecc.weights.simplify import steps

# What a bisection finds.

PASS = "pass"
LOWERING = "lowering"
SIMPLIFIER = "simplifier"
WRITER = "evaluator or writer"
"""The parts that can be wrong: a pass; XLA's lowering of an operation; a rule that simplifies
weight expressions; their evaluation and the files written."""


@dataclass(frozen=True)
class Bisection:
    """The result of a bisection.

    Attributes:
      failure: what fails.
      step: the wrong part: `PASS`, `LOWERING`, `SIMPLIFIER` or `WRITER`.
      number: the number of the first pass that is wrong, or after which the failure is first seen,
        from 1; 0 if it is seen before any pass.
      item: that pass.
      rewrite: the first wrong rewrite, pass and rule and what it replaced; empty where none is
        known.
      rewrites: which of the rewrites of the pass that is, from 1, and how many there are.
      gap: the first value that differs, with its node.
    """

    failure: Failure
    step: str
    number: int
    item: Pass | None
    rewrite: str = ""
    rewrites: tuple[int, int] = (0, 0)
    gap: Gap | None = None

    def as_dict(self) -> JsonDict:
        """Return it as JSON values."""
        gap = self.gap
        return {
            "kind": self.failure.kind,
            "text": self.failure.text,
            "step": self.step,
            "pass": {"number": self.number, "text": format_pass(self.item)} if self.item else None,
            "rewrite": {
                "text": self.rewrite,
                "number": self.rewrites[0],
                "of": self.rewrites[1],
            }
            if self.rewrite
            else None,
            "value": {
                "where": gap.location,
                "expected": str(gap.expected),
                "found": str(gap.found),
            }
            if gap
            else None,
        }


# Find what is wrong where values are compared: the lowering, a rule for weights, or the writer.


def _compared(graph: Graph, pipeline: Pipeline, context: Context, compare: str) -> Bisection:
    """Return what is wrong with the values after `pipeline`, as XLA runs or writes them.

    A pass is named where the failure is first seen after it: it made the operation, or the weight
    expression, that is handled wrongly.
    """
    after, items = [graph], list(pipeline)
    for number, item in enumerate(items, 1):
        after.append(clone(after[-1]))
        run_pass(after[-1], item, context, number)
    if first_gap(after[-1], compare) is None:
        raise InputError("all values are as they should be", where=f"--compare {compare}")
    number, mismatch = _first(after, compare)
    failure = Failure(compare, "", str(mismatch))
    blamed = items[number - 1] if number else None
    if compare == RUN:
        return Bisection(failure, LOWERING, number, blamed, gap=mismatch)
    rule, which = _wrong_rule(after[number], mismatch)
    step = SIMPLIFIER if rule else WRITER
    return Bisection(failure, step, number, blamed, rule, which, mismatch)


def _first(graphs: Sequence[Graph], compare: str) -> tuple[int, Gap]:
    """Return the number of the first graph that has a gap, which the last one has, and the gap."""
    for number, graph in enumerate(graphs):
        # Before some pass a graph may have values that no backend computes.
        with suppress(InputError):
            difference = first_gap(graph, compare)
            if difference is not None:
                return number, difference
    raise AssertionError("the last graph has a gap")


def _wrong_rule(graph: Graph, mismatch: Gap) -> tuple[str, tuple[int, int]]:
    """Return the first rule that changes the value of the parameter, and which step it is."""
    weight = graph.value(mismatch.location.partition(", element")[0].removeprefix("%")).weight
    assert weight is not None, "a weight that is written is one"
    rules = list(steps(weight))
    for number, (rule, before, after) in enumerate(rules, 1):
        if _differ(before, after):
            return f"{rule} at {before}", (number, len(rules))
    return "", (0, 0)


def _differ(before: Expr, after: Expr) -> bool:
    from moecc.testing.weights import stored_sources, whole_naively

    read = stored_sources((before, after), 0)
    return whole_naively(before, read).tobytes() != whole_naively(after, read).tobytes()


# Find the step that is wrong: the pass, then the rewrite, then the first value that differs.


def _promised(graph: Graph, pipeline: Pipeline, context: Context) -> Bisection:
    """Return the first pass of `pipeline` that breaks its promise on `graph`, which is small."""
    before = clone(graph)
    for number, item in enumerate(pipeline, 1):
        failure = PromiseTest(context)(before, Pipeline((item,)))
        if failure is not None:
            last = _watched(before, item, context, None).done
            low, high = 0, last  # nothing is wrong after `low` rewrites, and something after `high`
            if last == 0 or _fails(before, item, 0, failure, context):
                return Bisection(
                    failure, PASS, number, item, gap=_first_gap(before, item, None, context)
                )
            while high - low > 1:
                middle = (low + high) // 2
                if _fails(before, item, middle, failure, context):
                    high = middle
                else:
                    low = middle
            watch = _watched(before, item, context, high)
            first = _first_gap(before, item, high, context)
            return Bisection(failure, PASS, number, item, watch.last, (high, last), first)
        run_pass(before, item, context, number)
    message = "no pass breaks its promise, crashes or leaves an invalid graph here"
    raise InputError(message, hint=where_else(pipeline))


def _watched(before: Graph, item: Pass, context: Context, limit: int | None) -> RewriteWatch:
    """Run a pass on a copy with a limited number of rewrites, whatever becomes of it."""
    with rewrites_watched(limit) as watch:
        _run(clone(before), item, context)
    return watch


def _run(graph: Graph, item: Pass, context: Context) -> bool:
    try:
        apply_pass(item, graph, context)
    except Exception:  # perhaps the crash that is looked for
        return False
    return True


def _fails(before: Graph, item: Pass, limit: int, failure: Failure, context: Context) -> bool:
    with rewrites_watched(limit):
        repeated = PromiseTest(context)(before, Pipeline((item,)))
    return failure.is_like(repeated)


def _first_gap(before: Graph, item: Pass, limit: int | None, context: Context) -> Gap | None:
    """Return the first value of a name that both graphs have, and that differs between them."""
    from moecc.testing.data import inputs_for, params_for, sizes_for

    after = clone(before)
    with rewrites_watched(limit):
        if not _run(after, item, context):
            return None
    sizes = sizes_for(before, 0) | sizes_for(after, 0)
    inputs = inputs_for(before, 0, sizes)
    try:
        expected = values_of(before, params_for(before, 0, sizes), inputs)
        actual = values_of(after, params_for(after, 0, sizes), inputs_for(after, 0, sizes) | inputs)
    except KNOWN:
        return None
    by_name = {v.name: (v, array) for v, array in expected.items() if v.node is not None}
    for value, array in actual.items():
        reference = by_name.get(value.name)
        if reference is None or value.node is None or reference[0].type != value.type:
            continue
        differs = gap(value, reference[1], array, 1e-12)
        if differs is not None:
            return differs
    return None


def bisection_text(bisection: Bisection) -> str:
    """Return a human-readable bisection."""
    rows = [f"failure  {bisection.failure}", f"step     {bisection.step}"]
    if bisection.item is not None:
        seen = "" if bisection.step == PASS else "first seen after "
        rows.append(f"pass     {seen}{bisection.number}, {format_pass(bisection.item)}")
    if bisection.rewrite:
        which, of = bisection.rewrites
        rows.append(f"rewrite  {bisection.rewrite} ({which} of {of})")
    if bisection.gap is not None:
        rows.append(f"value    {bisection.gap}")
    return "\n".join(rows)


def bisect(
    file: GraphFile,
    *,
    pipeline: PipelineText = "",
    compare: Compare = None,
    seed: Seed = 0,
    allow_unmatched: AllowUnmatched = False,
    load: Load = (),
) -> Report:
    """Find the first pass of a pipeline that is wrong.

    Its first wrong rewrite and the first wrong value are named, too. The model is made small first,
    if it can be.

    Example:
      moecc bisect model.moe -p 'canonicalize,mine' --load mine.py
    """
    graph, passes, seed = read_failing(file, pipeline, load, seed)
    context = Context(seed=seed, allow_unmatched=allow_unmatched)
    # Weights are compared as they are written, so their expressions have to stay.
    small = graph if compare == WEIGHTS else small_if_possible(graph)
    if compare is not None:
        bisection = _compared(small, passes, context, compare)
    else:
        bisection = _promised(small, passes, context)
    return Report("bisect", bisection.as_dict(), lambda: bisection_text(bisection))
