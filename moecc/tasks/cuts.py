"""Ways to make an input that fails smaller, as functions that make a candidate when called.

What a candidate loses is not said to be useless: whoever asks tries whether it still fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from math import prod

from moecc.errors import MoeccError
from moecc.ir.graph import Graph, Node
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.operation import REQUIRED
from moecc.ir.structure import clone
from moecc.ir.unroll import unroll
from moecc.pipeline.passes import Context, Pass, apply_pass
from moecc.pipeline.text import Pipeline
from moecc.tasks.shrink import reduced, resized
from moecc.testing.strategies import keep_only, remove_dead
from moecc.weights.expr import Expr, Source, transform, walk


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
        yield partial(_unrolled, best)
    if any(size > 1 for size in sizes_of(best.graph)):
        yield partial(_reduced, best)


def _unrolled(best: Candidate) -> Candidate:
    graph = clone(best.graph)
    unroll(graph)
    return replace(best, graph=graph)


def _reduced(best: Candidate) -> Candidate:
    return replace(best, graph=reduced(best.graph))


def node_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the graph without some of its nodes, or with these alone, and with fewer outputs.

    Large parts come first: the halves, their halves, and at last each node.
    """
    count = len(best.graph)
    size = (count + 1) // 2
    while count and size:
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        if size < count:
            yield from (partial(_kept, best, part, True) for part in parts)
        yield from (partial(_kept, best, part, False) for part in parts)
        size //= 2
    names = best.graph.output_names if len(best.graph.output_names) > 1 else []
    for name in names:
        yield partial(_outputs, best, [name])
    for name in names:
        yield partial(_outputs, best, [other for other in names if other != name])


def _kept(best: Candidate, part: range, inside: bool) -> Candidate:
    graph = clone(best.graph)
    keep_only(graph, lambda position: (position in part) == inside)
    return replace(best, graph=graph)


def _outputs(best: Candidate, names: list[str]) -> Candidate:
    graph = clone(best.graph)
    for name in [n for n in graph.output_names if n not in names]:
        graph.drop_output(name)
    remove_dead(graph)
    return replace(best, graph=graph)


def plain_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the graph without its attributes and locations, and with attributes at defaults."""
    if set(best.graph.attrs) - {MESH}:
        yield partial(_bare, best)
    if any(node.loc or node.origin for node in best.graph):
        yield partial(_placeless, best)
    for position, node in enumerate(best.graph):
        if _defaults(node) != node.attrs:
            yield partial(_with_defaults, best, position)


def _bare(best: Candidate) -> Candidate:
    graph = clone(best.graph)
    graph.attrs = {MESH: graph.attrs[MESH]} if MESH in graph.attrs else {}
    return replace(best, graph=graph)


def _placeless(best: Candidate) -> Candidate:
    graph = clone(best.graph)
    for node in graph:
        node.loc = node.origin = ""
    for value in graph.params.values():
        value.loc = ""
    return replace(best, graph=graph)


def _with_defaults(best: Candidate, position: int) -> Candidate:
    graph = clone(best.graph)
    node = list(graph)[position]
    node.attrs = _defaults(node)
    return replace(best, graph=graph)


def _defaults(node: Node) -> dict[str, object]:
    default = {n: spec.default for n, spec in node.op.attrs.items() if spec.default is not REQUIRED}
    return {name: default.get(name, value) for name, value in node.attrs.items()}


def weight_cuts(best: Candidate) -> Iterator[Cut]:
    """Yield the graph without weight expressions, and one parameter or a part of it alone."""
    params = best.graph.params
    if any(value.weight is not None for value in params.values()):
        yield partial(_weightless, best)
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


def _weightless(best: Candidate) -> Candidate:
    graph = clone(best.graph)
    for value in graph.params.values():
        value.weight = None
    return replace(best, graph=graph)


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
