"""Find what is wrong where values are compared: the lowering, a rule for weights, or the writer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.pipeline.passes import Context
from moecc.pipeline.runner import run_pass
from moecc.pipeline.text import Pipeline
from moecc.tasks.bisection import LOWERING, SIMPLIFIER, WRITER, Bisection
from moecc.tasks.failures import RUN, Failure
from moecc.tasks.value_gaps import Gap, weight_gap, xla_gap
from moecc.weights.expr import Expr
from moecc.weights.simplify import steps


def bisect_compared(graph: Graph, pipeline: Pipeline, context: Context, compare: str) -> Bisection:
    """Return what is wrong with the values after `pipeline`.

    A pass is named where the failure is first seen after it: it made the operation, or the weight
    expression, that is handled wrongly.

    Args:
      graph: stays as it is.
      pipeline: the passes.
      context: of the passes.
      compare: ``run`` or ``weights``.

    Raises:
      InputError: nothing is wrong.
    """
    after, items = [clone(graph)], list(pipeline)
    for number, item in enumerate(items, 1):
        after.append(clone(after[-1]))
        run_pass(after[-1], item, context, number)
    if _gap(after[-1], compare) is None:
        raise InputError("all values are as they should be", where=f"--compare {compare}")
    number, found = _first(after, compare)
    failure = Failure(compare, "", str(found))
    blamed = items[number - 1] if number else None
    if compare == RUN:
        return Bisection(failure, LOWERING, number, blamed, gap=found)
    rule, which = _wrong_rule(after[number], found)
    step = SIMPLIFIER if rule else WRITER
    return Bisection(failure, step, number, blamed, rule, which, found)


def _first(graphs: Sequence[Graph], compare: str) -> tuple[int, Gap]:
    """Return the number of the first graph that has a gap, which the last one has, and the gap."""
    for number, graph in enumerate(graphs):
        # Before some pass a graph may have values that no backend computes.
        with suppress(InputError):
            found = _gap(graph, compare)
            if found is not None:
                return number, found
    raise AssertionError("the last graph has a gap")


def _gap(graph: Graph, compare: str) -> Gap | None:
    return xla_gap(graph) if compare == RUN else weight_gap(graph)


def _wrong_rule(graph: Graph, found: Gap) -> tuple[str, tuple[int, int]]:
    """Return the first rule that changes the value of the parameter, and which step it is."""
    weight = graph.value(found.place.partition(", element")[0].removeprefix("%")).weight
    assert weight is not None, "a weight that is written is one"
    made = list(steps(weight))
    for number, (rule, before, after) in enumerate(made, 1):
        if _differ(before, after):
            return f"{rule} at {before}", (number, len(made))
    return "", (0, 0)


def _differ(before: Expr, after: Expr) -> bool:
    from moecc.testing.weights import stored_sources, whole_naively

    read = stored_sources((before, after), 0)
    return whole_naively(before, read).tobytes() != whole_naively(after, read).tobytes()
