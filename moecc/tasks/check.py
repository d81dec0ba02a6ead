"""``--check``: verify that the passes of a pipeline keep their promises, on a reduced graph.

Each pass runs on the reduced graph, and the reference interpreter compares before and after on
random data: bit for bit where ``exact`` is promised, to 1e-12 of the magnitude for
``reassociation``; the error of an ``approximate`` pass is measured and shown beside the predicted
one.  The oracle is that of `moecc.testing`, which compares gradients, weights as they are stored
and the devices of small meshes, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np

from moecc.backend import Arrays
from moecc.errors import CheckError, InputError, Problem
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.pipeline.passes import Context, Pass, Preserves
from moecc.pipeline.runner import run_pass
from moecc.pipeline.text import Pipeline, format_pass
from moecc.tasks.shrink import reduced

SEEDS = (0, 1)
"""The seeds of the random data on which each pass is compared."""


@dataclass(frozen=True)
class Checked:
    """The result of checking a pass.

    Attributes:
      number: its position, from 1.
      item: the pass.
      promise: its promise for the reduced graph.
      measured: the root mean square of the change of outputs, relative to the outputs.
      problems: the violations of its promise.
    """

    number: int
    item: Pass
    promise: Preserves
    measured: float
    problems: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.number} {format_pass(self.item)}: promised {self.promise}; "
            f"measured relative error {self.measured:.2g}"
        )


def check_pipeline(
    graph: Graph,
    pipeline: Pipeline,
    *,
    context: Context | None = None,
    seeds: Sequence[int] = SEEDS,
) -> list[Checked]:
    """Check each pass of `pipeline` on `graph` at reduced sizes; `graph` is not changed.

    Raises:
      CheckError: a pass broke its promise; all such passes are named.
      InputError: the graph cannot be reduced, or a pass cannot be applied to the reduced graph.
    """
    context = Context() if context is None else context
    small = reduced(graph)
    done: list[Checked] = []
    for number, item in enumerate(pipeline, 1):
        before = clone(small)
        try:
            run = run_pass(small, item, context, number)
        except InputError as error:
            raise InputError(_on_reduced(p, number, item) for p in error.problems) from None
        done.append(_checked(number, item, run.preserves, before, small, seeds))
    problems = [p for one in done for p in one.problems]
    if problems:
        raise CheckError(problems)
    return done


def _on_reduced(problem: Problem, number: int, item: Pass) -> Problem:
    where = f"--check, pass {number}, {item.name}, on the reduced graph"
    where = f"{where}, {problem.where}" if problem.where else where
    return Problem(problem.what, where, problem.expected, problem.found, problem.hint)


def _checked(
    number: int,
    item: Pass,
    promise: Preserves,
    before: Graph,
    after: Graph,
    seeds: Sequence[int],
) -> Checked:
    same = _with_outputs_of(before, after)
    found = broken_promise(promise, before, same, seeds)
    problems = tuple(
        Problem("the pass broke its promise", f"pass {number}, {item.name}", str(promise), text)
        for text in found
    )
    measured = 0.0 if found else max(_measured(item, before, same, after, s) for s in seeds)
    return Checked(number, item, promise, measured, problems)


def _measured(item: Pass, before: Graph, same: Graph, after: Graph, seed: int) -> float:
    own = item.measure(before, after, seed)
    return measure(before, same, seed) if own is None else own


def _with_outputs_of(before: Graph, after: Graph) -> Graph:
    """Return `after` without the outputs that a pass added: a loss, say; the others must stay."""
    same = clone(after)
    for name in [n for n in same.output_names if n not in before.output_names]:
        same.drop_output(name)
    return same


def broken_promise(
    promise: Preserves, before: Graph, after: Graph, seeds: Sequence[int] = SEEDS
) -> list[str]:
    """Return what differs between two graphs although it was promised not to, a line each.

    An ``approximate`` pass promises nothing that random data could refute.
    """
    from moecc.testing.oracle import differences

    if promise.kind == "approximate":
        return []
    same = _with_outputs_of(before, after)
    return [d for s in seeds for d in differences(before, same, s, promise.kind == "exact")]


def measure(before: Graph, after: Graph, seed: int = 0) -> float:
    """Return the difference of the outputs of `after` from those of `before` on random data.

    This is the root mean square of the difference over that of the output; the maximum over
    floating-point outputs.
    """
    from moecc.testing.data import inputs_for, params_for, sizes_for
    from moecc.testing.oracle import run_reference

    old, new = sizes_for(before, seed), sizes_for(after, seed)
    sizes = {n: lcm(old.get(n, 1), new.get(n, 1)) for n in old | new}
    # A pass may add an input, such as a random key.
    inputs = inputs_for(after, seed, sizes) | inputs_for(before, seed, sizes)
    given = {n: inputs[n] for n in before.inputs}
    expected = run_reference(before, params=params_for(before, seed, sizes), inputs=given)
    found = run_reference(
        after, params=params_for(after, seed, sizes), inputs={n: inputs[n] for n in after.inputs}
    )
    return max(_errors(expected, found), default=0.0)


def _errors(expected: Arrays, found: Arrays) -> Iterable[float]:
    for name, a in expected.items():
        b = found.get(name)
        if b is None or a.dtype.kind != "f" or a.shape != b.shape or not a.size:
            continue
        finite = np.isfinite(a) & np.isfinite(b)
        apart, size = np.where(finite, a - b, 0.0), np.where(finite, a, 0.0)
        scale = float(np.sqrt(np.mean(size**2)))
        error = float(np.sqrt(np.mean(apart**2)))
        yield error / scale if scale else error
