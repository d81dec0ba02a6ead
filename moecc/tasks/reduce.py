"""Make an input that fails small: fewer passes, nodes and outputs, plain attributes, small sizes.

Delta debugging (Zeller and Hildebrandt 2002): parts are taken away, halves first, as long as the
same failure remains.  Nodes are cut out of the middle of a graph, too: what they took becomes an
output, what they gave an input (`moecc.testing.strategies.keep_only`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.text import print_graph
from moecc.ir.verify import verify
from moecc.pipeline.passes import Context
from moecc.pipeline.text import Pipeline
from moecc.tasks.cuts import (
    Candidate,
    Cut,
    node_cuts,
    pass_cuts,
    plain_cuts,
    size_cuts,
    sizes_of,
    weight_cuts,
    whole_cuts,
)
from moecc.tasks.failures import Failure, FailureTest
from moecc.weights.expr import walk

TIME_LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Reduction:
    """The result of `reduce`.

    Attributes:
      graph: the smallest graph found.
      pipeline: the passes that are left.
      failure: the failure, as it is on that graph.
      tries: how many inputs were tried.
      seconds: the time it took.
      finished: whether nothing more can be taken away; otherwise the time was over.
    """

    graph: Graph
    pipeline: Pipeline
    failure: Failure
    tries: int
    seconds: float
    finished: bool


def reduce(
    graph: Graph,
    pipeline: Pipeline,
    test: FailureTest,
    *,
    context: Context | None = None,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
) -> Reduction:
    """Return a small input that fails as `graph` and `pipeline` do.

    Args:
      graph: stays as it is.
      pipeline: the passes.
      test: what fails.
      context: of the passes, for those that are applied once and for all.
      time_limit_seconds: after this time the smallest input so far is returned.

    Raises:
      InputError: nothing fails.
    """
    start = Candidate(graph, pipeline)
    return _Reducer(start, test, context or Context(), time_limit_seconds).run()


class _Reducer:
    def __init__(
        self, start: Candidate, test: FailureTest, context: Context, time_limit_seconds: float
    ) -> None:
        self.test = test
        self.context = context
        self.began = time.monotonic()
        self.deadline = self.began + time_limit_seconds
        self.tries = 0
        self.best = start
        failure = test(start.graph, start.pipeline)
        if failure is None:
            raise InputError(
                "nothing fails here, so there is nothing to reduce",
                hint="--compare run or --compare weights looks at more than passes",
            )
        self.failure = failure

    def run(self) -> Reduction:
        """Try all kinds of cuts again and again, until none makes the input smaller."""
        for cut in whole_cuts(self.best):
            self.accepts(cut, smaller=False)
        kinds: tuple[Callable[[Candidate], Iterator[Cut]], ...] = (
            lambda best: pass_cuts(best, self.context),
            node_cuts,
            weight_cuts,
            plain_cuts,
            size_cuts,
        )
        changed = True
        while changed and not self.is_late:
            taken = [self.take(kind) for kind in kinds]
            changed = any(taken)
        return Reduction(
            self.best.graph, self.best.pipeline, self.failure, self.tries,
            time.monotonic() - self.began, not self.is_late,
        )  # fmt: skip

    @property
    def is_late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline

    def take(self, kind: Callable[[Candidate], Iterator[Cut]]) -> bool:
        """Accept cuts of a kind as long as there is one with which the input fails alike."""
        changed = False
        while any(self.accepts(cut) for cut in kind(self.best)):
            changed = True
        return changed

    def accepts(self, cut: Cut, *, smaller: bool = True) -> bool:
        """Whether a cut gives a valid input that fails alike; it then is the best one.

        Args:
          cut: makes the input.
          smaller: whether the input must be smaller, so that the search ends.
        """
        if self.is_late:
            return False
        try:
            made = cut()
            verify(made.graph)
        except Exception:  # it is not smaller in this way, or crashes an earlier pass
            return False
        if smaller and not measure(made) < measure(self.best):
            return False
        self.tries += 1
        found = self.test(made.graph, made.pipeline)
        if found is None or not self.failure.is_like(found):
            return False
        self.best, self.failure = made, found
        return True


def measure(candidate: Candidate) -> tuple[int, ...]:
    """Return how large an input is: passes and options count most, then nodes, then the rest."""
    graph = candidate.graph
    weights = [v.weight for v in graph.params.values() if v.weight is not None]
    return (
        len(candidate.pipeline),
        len(str(candidate.pipeline)),
        len(graph),
        len(graph.output_names) + len(graph.inputs) + len(graph.params),
        sum(1 for weight in weights for _ in walk(weight)),
        len(str(graph.attrs)),
        len(re.sub(r"[0-9]+", "", print_graph(graph))),
        sum(sizes_of(graph)),
    )
