"""Find the step that is wrong: the pass, then the rewrite, then the first value that differs."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.pipeline.passes import KNOWN, Context, Pass, apply_pass
from moecc.pipeline.runner import run_pass
from moecc.pipeline.text import Pipeline
from moecc.rewrite.driver import RewriteWatch, rewrites_watched
from moecc.tasks.bisect_compared import bisect_compared
from moecc.tasks.bisection import PASS, Bisection
from moecc.tasks.failures import COMPARED, Failure, PromiseTest
from moecc.tasks.value_gaps import Gap, gap, values_of


def bisect(
    graph: Graph, pipeline: Pipeline, *, context: Context | None = None, compare: str = ""
) -> Bisection:
    """Return the first step of `pipeline` that is wrong on `graph`, which is small.

    Args:
      graph: stays as it is.
      pipeline: the passes.
      context: of the passes.
      compare: empty for promises of passes; ``run`` for the values that XLA computes after the
        passes, ``weights`` for what is written of them.

    Raises:
      InputError: nothing is wrong.
    """
    context = context or Context()
    if compare in COMPARED:
        return bisect_compared(graph, pipeline, context, compare)
    before = clone(graph)
    for number, item in enumerate(pipeline, 1):
        failure = PromiseTest(context)(before, Pipeline((item,)))
        if failure is not None:
            return _within(before, item, number, failure, context)
        run_pass(before, item, context, number)
    raise InputError("no pass breaks its promise, crashes or leaves an invalid graph here")


def _within(
    before: Graph, item: Pass, number: int, failure: Failure, context: Context
) -> Bisection:
    """Return the first wrong rewrite of a pass, by halving their number."""
    last = _watched(before, item, context, None).done
    low, high = 0, last  # nothing is wrong after `low` rewrites, and something after `high`
    if last == 0 or _fails(before, item, 0, failure, context):
        return Bisection(failure, PASS, number, item, gap=_first_gap(before, item, None, context))
    while high - low > 1:
        middle = (low + high) // 2
        if _fails(before, item, middle, failure, context):
            high = middle
        else:
            low = middle
    watch = _watched(before, item, context, high)
    first = _first_gap(before, item, high, context)
    return Bisection(failure, PASS, number, item, watch.last, (high, last), first)


def _watched(before: Graph, item: Pass, context: Context, limit: int | None) -> RewriteWatch:
    """Run a pass on a copy with a limited number of rewrites, whatever becomes of it."""
    with rewrites_watched(limit) as watch:
        _run(clone(before), item, context)
    return watch


def _run(graph: Graph, item: Pass, context: Context) -> bool:
    try:
        apply_pass(item, graph, context)
    except KNOWN:
        return False
    except Exception:  # the crash that is looked for
        return False
    return True


def _fails(before: Graph, item: Pass, limit: int, failure: Failure, context: Context) -> bool:
    with rewrites_watched(limit):
        found = PromiseTest(context)(before, Pipeline((item,)))
    return failure.is_like(found)


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
        found = values_of(after, params_for(after, 0, sizes), inputs_for(after, 0, sizes) | inputs)
    except KNOWN:
        return None
    by_name = {v.name: (v, array) for v, array in expected.items() if v.node is not None}
    for value, array in found.items():
        known = by_name.get(value.name)
        if known is None or value.node is None or known[0].type != value.type:
            continue
        differs = gap(value, known[1], array, 1e-12)
        if differs is not None:
            return differs
    return None
