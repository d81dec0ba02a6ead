"""``moecc reduce``: make an input that fails small."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from math import prod
from typing import Annotated

from moecc.errors import InputError, MoeccError, UsageError
from moecc.ir.graph import Graph, Node
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.operation import REQUIRED
from moecc.ir.structure import clone
from moecc.ir.text import print_graph
from moecc.ir.unroll import unroll
from moecc.ir.verify import verify
from moecc.jobs.checks import reduced, resized
from moecc.jobs.command import (
    AllowUnmatched,
    Compare,
    Force,
    GraphFile,
    Load,
    Output,
    PipelineText,
    Report,
    Seed,
    Spelling,
    artefact,
    check_writable,
    read_failing,
)
from moecc.jobs.failures import (
    CommandTest,
    ComparisonTest,
    FailureTest,
    PromiseTest,
    where_else,
)
from moecc.rewrite.passes import Context, Pass, apply_pass
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import Replay, loaded_files, reproducer_text, run_pass
from moecc.support.console import say
from moecc.support.text import amount
from moecc.support.untyped import JsonDict
from moecc.testing.generate import keep_only, remove_dead
from moecc.weights.expr import Expr, Source, transform, walk

# Ways to make an input that fails smaller, as functions that make a candidate when called.
#
# What a candidate loses is not said to be useless: whoever asks tries whether it still fails.


@dataclass(frozen=True)
class Candidate:
    """A graph and a pipeline to try."""

    graph: Graph
    pipeline: Pipeline


Cut = Callable[[], Candidate]
"""Makes a smaller input; raises MoeccError or a crash of a pass where it cannot be made."""


def pass_cuts(best: Candidate, context: Context) -> Iterator[Cut]:
    """Yield what the first passes made of the graph, fewer passes, and fewer options."""
    items = best.pipeline.passes
    for count in range(len(items), 0, -1):
        yield partial(_applied, best, count, context)
    for at, item in enumerate(items):
        yield partial(replace, best, pipeline=Pipeline(items[:at] + items[at + 1 :]))
        for plain in _plainer(item):
            yield partial(replace, best, pipeline=Pipeline((*items[:at], plain, *items[at + 1 :])))


def _applied(best: Candidate, count: int, context: Context) -> Candidate:
    graph = clone(best.graph)
    for item in best.pipeline.passes[:count]:
        apply_pass(item, graph, context)
    return Candidate(graph, Pipeline(best.pipeline.passes[count:]))


def _plainer(item: Pass) -> Iterator[Pass]:
    """Yield the pass with one of its options at its default."""
    for option in fields(item):
        if option.default is not MISSING and getattr(item, option.name) != option.default:
            try:
                yield replace(item, **{option.name: option.default})
            except (MoeccError, TypeError, ValueError):
                continue


def whole_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the model at small sizes, and with a copy of each repeated layer."""
    if any(node.body is not None for node in best.graph):
        yield partial(_changed, best, unroll)
    if any(size > 1 for size in sizes_of(best.graph)):
        yield lambda: replace(best, graph=reduced(best.graph))


def _changed(best: Candidate, change: Callable[..., object], *args: object) -> Candidate:
    """Return the input with a copy of its graph that ``change(graph, *args)`` has changed."""
    graph = clone(best.graph)
    change(graph, *args)
    return replace(best, graph=graph)


def node_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the graph without some of its nodes, or with these alone, and with fewer outputs.

    Large parts come first: the halves, their halves, and at last each node.
    """
    count = len(best.graph)
    size = (count + 1) // 2
    while count and size:
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        if size < count:
            yield from (partial(_changed, best, _keep_nodes, part, True) for part in parts)
        yield from (partial(_changed, best, _keep_nodes, part, False) for part in parts)
        size //= 2
    names = best.graph.output_names if len(best.graph.output_names) > 1 else []
    for name in names:
        yield partial(_changed, best, _keep_outputs, [name])
    for name in names:
        yield partial(_changed, best, _keep_outputs, [n for n in names if n != name])


def _keep_nodes(graph: Graph, part: range, inside: bool) -> None:
    keep_only(graph, lambda position: (position in part) == inside)


def _keep_outputs(graph: Graph, names: list[str]) -> None:
    for name in [n for n in graph.output_names if n not in names]:
        graph.drop_output(name)
    remove_dead(graph)


def plain_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the graph without its attributes and locations, and with attributes at defaults."""
    if set(best.graph.attrs) - {MESH}:
        yield partial(_changed, best, _drop_attributes)
    if any(node.loc or node.origin for node in best.graph):
        yield partial(_changed, best, _drop_locations)
    for position, node in enumerate(best.graph):
        if _defaults(node) != node.attrs:
            yield partial(_changed, best, _set_defaults, position)


def _drop_attributes(graph: Graph) -> None:
    graph.attrs = {MESH: graph.attrs[MESH]} if MESH in graph.attrs else {}


def _drop_locations(graph: Graph) -> None:
    for node in graph:
        node.loc = node.origin = ""
    for value in graph.params.values():
        value.loc = ""


def _set_defaults(graph: Graph, position: int) -> None:
    node = list(graph)[position]
    node.attrs = _defaults(node)


def _defaults(node: Node) -> JsonDict:
    default = {n: spec.default for n, spec in node.op.attrs.items() if spec.default is not REQUIRED}
    return {name: default.get(name, value) for name, value in node.attrs.items()}


def weight_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the graph without weight expressions, and one parameter or a part of it alone."""
    params = best.graph.params
    if best.graph.weights:
        yield partial(_changed, best, _drop_weights)
    for value in params.values():
        if value.weight is None:
            continue
        parts = sorted(set(walk(value.weight)) - {value.weight}, key=_size)
        yield from (partial(_one_param, best, part) for part in parts)
        yield from (partial(_one_param, best, e) for e in _sourced(value.weight, parts))
        if len(best.graph) or len(params) > 1:
            yield partial(_one_param, best, value.weight)


def _size(expr: Expr) -> tuple[int, int]:
    return sum(1 for _ in walk(expr)), prod(expr.type.shape)


def _sourced(weight: Expr, parts: Iterable[Expr]) -> Iterator[Expr]:
    """Yield the expression with a part replaced by a tensor of its type."""
    for part in parts:
        if not isinstance(part, Source):
            yield _with_source(weight, part)


def _with_source(weight: Expr, part: Expr) -> Expr:
    read = Source("part", part.type)
    return transform(weight, lambda e: read if e is part else e)


def _drop_weights(graph: Graph) -> None:
    for value in graph.params.values():
        value.weight = None


def _one_param(best: Candidate, weight: Expr) -> Candidate:
    graph = Graph(best.graph.name)
    graph.set_output("y0", graph.param("w", weight.type, weight))
    return replace(best, graph=graph)


def size_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the graph with one of its sizes smaller, wherever it occurs."""
    every = sizes_of(best.graph)
    for size in sorted(every, reverse=True):
        for smaller in dict.fromkeys((1, 2, size // 2)):
            if 0 < smaller < size:
                yield partial(_resized, best, {n: n for n in every} | {size: smaller})


def _resized(best: Candidate, sizes: Mapping[int, int]) -> Candidate:
    return replace(best, graph=resized(best.graph, sizes))


def sizes_of(graph: Graph) -> set[int]:
    """Return the sizes of axes that are numbers."""
    values = [*graph.inputs.values(), *graph.params.values()]
    values += [v for node in graph.every_node() for v in node.results]
    return {size for value in values for size in value.type.sizes if isinstance(size, int)}


# Make an input that fails small: fewer passes, nodes and outputs, plain attributes, small sizes.
#
# Delta debugging (Zeller and Hildebrandt 2002): parts are taken away, halves first, as long as the
# same failure remains.  Nodes are cut out of the middle of a graph, too: what they took becomes an
# output, what they gave an input (`moecc.testing.generate.keep_only`).

TIME_LIMIT_SECONDS = 60.0


def _refusal(start: Candidate, context: Context) -> str | None:
    """Return why a pass refuses the input, or None."""
    graph = clone(start.graph)
    try:
        for number, item in enumerate(start.pipeline, 1):
            run_pass(graph, item, replace(context, allow_unmatched=False), number)
    except MoeccError as error:
        return str(error.problems[0])
    return None


class _Reducer:
    """Searches for a small input that fails alike. Raises InputError if nothing fails."""

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
            hint = where_else(start.pipeline)
            if isinstance(test, CommandTest):
                hint = "the command fails with an exit code other than 0"
            refusal = _refusal(start, context)
            raise InputError(
                "nothing fails here, so there is nothing to reduce"
                if refusal is None
                else "the input is refused, which is no failure of a pass",
                found=refusal,
                hint=hint,
            )
        self.failure = failure

    def run(self) -> None:
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
            progress = [self.take(kind) for kind in kinds]
            changed = any(progress)

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
            candidate = cut()
            verify(candidate.graph)
        except Exception:  # it is not smaller in this way, or crashes an earlier pass
            return False
        if smaller and not measure(candidate) < measure(self.best):
            return False
        self.tries += 1
        failure = self.test(candidate.graph, candidate.pipeline)
        if failure is None or not self.failure.is_like(failure):
            return False
        self.best, self.failure = candidate, failure
        return True


def measure(candidate: Candidate) -> tuple[int, ...]:
    """Return how large an input is: passes and options count most, then nodes, then the rest."""
    graph = candidate.graph
    return (
        len(candidate.pipeline),
        len(str(candidate.pipeline)),
        len(graph),
        len(graph.output_names) + len(graph.inputs) + len(graph.params),
        sum(1 for weight in graph.weights.values() for _ in walk(weight)),
        len(str(graph.attrs)),
        len(re.sub(r"[0-9]+", "", print_graph(graph))),
        sum(sizes_of(graph)),
    )


def reduce(
    file: GraphFile,
    *,
    pipeline: PipelineText = "",
    compare: Compare = None,
    test: Annotated[str | None, Spelling("COMMAND")] = None,
    output: Output = None,
    time_limit: Annotated[float, Spelling("SECONDS", low=0)] = TIME_LIMIT_SECONDS,
    seed: Seed = 0,
    allow_unmatched: AllowUnmatched = False,
    load: Load = (),
    force: Force = False,
) -> Report:
    """Make a graph and a pipeline small while they fail.

    A failure is a crash of a pass, an invalid graph, a broken promise; with --compare a value or a
    weight that is wrong after the passes; with --test the exit code of a command. What is left is a
    reproducer, which moecc replay repeats. A reproducer as FILE brings its own pipeline.

    Args:
      test: Command that fails, in which {} stands for the file of the graph and {pipeline} for the
        pipeline.
      time_limit: Time after which the smallest input so far is printed.
      allow_unmatched: Accept passes that match nothing, which a reduction always does.

    Example:
      moecc reduce model.moe -p 'canonicalize,mine' --load mine.py -o small.moe
    """
    check_writable(output, force=force)
    graph, passes, seed = read_failing(file, pipeline, load, seed)
    context = Context(seed=seed, allow_unmatched=True)
    if test is not None and compare is not None:
        raise UsageError("--test and --compare exclude each other")
    fails: FailureTest = PromiseTest(context)
    if test is not None:
        fails = CommandTest(test)
    elif compare is not None:
        fails = ComparisonTest(compare, context)
    reducer = _Reducer(Candidate(graph, passes), fails, context, time_limit)
    reducer.run()
    small, left, failure = reducer.best.graph, reducer.best.pipeline, reducer.failure
    say(
        f"left are {len(small)} of {amount(len(graph), 'node')} and {len(left)} of "
        f"{amount(len(passes), 'pass', 'passes')}, in "
        f"{time.monotonic() - reducer.began:.1f} s and {amount(reducer.tries, 'try', 'tries')}"
        + ("; the time was over" if reducer.is_late else "")
    )
    say(str(failure))
    if len(left):
        say(f"pipeline: {left}")
    replay = Replay(
        str(left), seed, True, failure.kind in ("promise", "invalid"), loaded_files(left),
        compare or "",
    )  # fmt: skip
    return artefact(
        "reduce", reproducer_text(small, replay, str(failure).splitlines()[0]), output,
        force=force, pipeline=str(left), failure=str(failure), nodes=len(small),
    )  # fmt: skip
