"""Find the step that is wrong: the pass, then the rewrite, then the first value that differs."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.pipeline.blame import KNOWN
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.runner import run_pass
from moecc.pipeline.text import Pipeline, format_pass
from moecc.rewrite.driver import RewriteWatch, rewrites_watched
from moecc.tasks.failures import COMPARED, RUN, Failure, PromiseTest
from moecc.tasks.value_gaps import Gap, gap, values_of, weight_gap, xla_gap


@dataclass(frozen=True)
class Bisection:
    """The result of `bisect`.

    Attributes:
      failure: what fails.
      number: the number of the first pass that is wrong, from 1; 0 if no pass is to blame.
      item: that pass.
      rewrite: the first wrong rewrite, pass and rule and the line it replaced; empty for a pass
        that does not rewrite by rules.
      rewrites: which of the rewrites of the pass that is, from 1, and how many there are.
      gap: the first value that differs, with its node.
    """

    failure: Failure
    number: int = 0
    item: Pass | None = None
    rewrite: str = ""
    rewrites: tuple[int, int] = (0, 0)
    gap: Gap | None = None

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        found = self.gap
        return {
            "kind": self.failure.kind,
            "text": self.failure.text,
            "pass": {"number": self.number, "text": format_pass(self.item)} if self.item else None,
            "rewrite": {
                "text": self.rewrite,
                "number": self.rewrites[0],
                "of": self.rewrites[1],
            }
            if self.rewrite
            else None,
            "value": {
                "where": found.place,
                "expected": str(found.expected),
                "found": str(found.found),
            }
            if found
            else None,
        }


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
        return _compared(graph, pipeline, context, compare)
    before = clone(graph)
    for number, item in enumerate(pipeline, 1):
        failure = PromiseTest(context)(before, Pipeline((item,)))
        if failure is not None:
            return _within(before, item, number, failure, context)
        run_pass(before, item, context, number)
    raise InputError("no pass breaks its promise, crashes or leaves an invalid graph here")


def _compared(graph: Graph, pipeline: Pipeline, context: Context, compare: str) -> Bisection:
    after = clone(graph)
    for number, item in enumerate(pipeline, 1):
        run_pass(after, item, context, number)
    found = xla_gap(after) if compare == RUN else weight_gap(after)
    if found is None:
        raise InputError("all values are as they should be", where=f"--compare {compare}")
    return Bisection(Failure(compare, "", str(found)), gap=found)


def _within(
    before: Graph, item: Pass, number: int, failure: Failure, context: Context
) -> Bisection:
    """Return the first wrong rewrite of a pass, by halving their number."""
    last = _watched(before, item, context, None).done
    low, high = 0, last  # nothing is wrong after `low` rewrites, and something after `high`
    if last == 0 or _fails(before, item, 0, failure, context):
        return Bisection(failure, number, item, gap=_first_gap(before, item, None, context))
    while high - low > 1:
        middle = (low + high) // 2
        if _fails(before, item, middle, failure, context):
            high = middle
        else:
            low = middle
    watch = _watched(before, item, context, high)
    return Bisection(
        failure, number, item, watch.last, (high, last), _first_gap(before, item, high, context)
    )


def _watched(before: Graph, item: Pass, context: Context, limit: int | None) -> RewriteWatch:
    """Run a pass on a copy with a limited number of rewrites, whatever becomes of it."""
    with rewrites_watched(limit) as watch:
        _run(clone(before), item, context)
    return watch


def _run(graph: Graph, item: Pass, context: Context) -> bool:
    try:
        item.apply(graph, context)
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
