"""All blocks of a function as one graph: an input and an output for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.model.open import GRAPH
from moecc.types import F32, Axis, TensorType
from moecc_backends.islands.blocks import OUTER
from moecc_backends.islands.labels import Dims
from moecc_backends.islands.naming import unique
from moecc_backends.islands.scopes import Val
from moecc_backends.islands.sites import Instance, Site, Survey

TOKEN_AXES = {1: ("token",), 2: ("batch", "seq")}
"""What the axes of tokens are called, by their number."""


def input_name(loc: str) -> str:
    """Return the name of the input of the block at `loc`."""
    return f"x.{loc}"


def output_name(loc: str) -> str:
    """Return the name of the output of the block at `loc`."""
    return f"y.{loc}"


class Around(Protocol):
    """What is between the blocks of a graph."""

    def order(self, locs: Sequence[str]) -> Sequence[str]:
        """Return the blocks in the order in which they run."""
        ...

    def begin(self, graph: Graph) -> None:
        """Add what is before all blocks."""
        ...

    def enter(self, graph: Graph, loc: str, type: TensorType) -> Value:
        """Add the input of a block."""
        ...

    def leave(self, graph: Graph, loc: str, value: Value) -> None:
        """Take the output of a block."""
        ...

    def end(self, graph: Graph) -> None:
        """Add what is behind all blocks."""
        ...


class Alone:
    """Nothing is: each block has an input and an output of the graph."""

    def order(self, locs: Sequence[str]) -> Sequence[str]:
        """Return the blocks as they are: none depends on another."""
        return locs

    def begin(self, graph: Graph) -> None:
        """Add nothing."""

    def enter(self, graph: Graph, loc: str, type: TensorType) -> Value:
        """Add an input."""
        return graph.input(input_name(loc), type)

    def leave(self, graph: Graph, loc: str, value: Value) -> None:
        """Add an output."""
        graph.set_output(output_name(loc), value)

    def end(self, graph: Graph) -> None:
        """Add nothing."""


def build_graph(
    survey: Survey,
    *,
    name: str,
    is_causal: bool,
    labels: Mapping[Val, Dims],
    around: Around | None = None,
) -> Graph:
    """Return the blocks as one graph.

    Parameters are named after leaves, and their weights are read from them.

    Args:
      survey: the blocks.
      name: of the function.
      is_causal: whether no token may depend on later ones.
      labels: which dimensions of values are which axes of tokens, as far as that is known.
      around: what is between the blocks; by default `Alone`.
    """
    sites = survey.first_sites()
    graph, around = Graph(GRAPH, {"function": name}), around or Alone()
    found = {one.loc: (one, sites[key]) for key, one in survey.instances().items()}
    blocks = [found[loc] for loc in around.order(list(found))]
    sizes: dict[tuple[str, int], str] = {}
    types = [_input_type(site, sizes, labels) for _, site in blocks]
    around.begin(graph)
    for (one, site), type in zip(blocks, types, strict=True):
        x = around.enter(graph, one.loc, type)
        params = [_param(graph, one, i) for i in range(len(one.params))]
        around.leave(graph, one.loc, _emit(Builder(graph, loc=one.loc), site, x, params))
    around.end(graph)
    if is_causal:
        graph.attrs["causal_inputs"] = list(graph.inputs)
    return graph


def token_axes(site: Site, labels: Mapping[Val, Dims]) -> tuple[str, ...]:
    """Return the names of the axes of tokens of a block's input, in order."""
    island = site.island
    dims = labels.get(island.x)
    count = len(island.x.shape) - 1
    plain = TOKEN_AXES.get(count) or tuple(f"axis{i}" for i in range(count))
    if dims is None:
        return plain
    own = [label for i, label in enumerate(dims) if i != island.outer]
    named = ["_".join(name for name, _ in label) for label in own]
    return tuple(unique(n or f"axis{i}" for i, n in enumerate(named)))


def _input_type(
    site: Site, sizes: dict[tuple[str, int], str], labels: Mapping[Val, Dims]
) -> TensorType:
    island = site.island
    shape = [n for i, n in enumerate(island.x.shape) if i != island.outer]
    axes = []
    for axis, size in zip(token_axes(site, labels), shape, strict=True):
        if (axis, size) not in sizes:
            sizes[axis, size] = _variable(axis, sizes)
        axes.append(Axis(axis, sizes[axis, size]))
    width = island.x.shape[island.outer]
    return TensorType(F32, (*axes, Axis(OUTER, width)))


def _variable(name: str, sizes: dict[tuple[str, int], str]) -> str:
    """Return a variable for another size of an axis."""
    letter = name[0].upper()
    taken = [v for v in sizes.values() if v[0] == letter]
    return f"{letter}{len(taken) + 1}" if taken else letter


def _param(graph: Graph, instance: Instance, at: int) -> Value:
    name, weight = instance.params[at], instance.weights[at]
    if name in graph.params:
        return graph.params[name]
    return graph.param(name, weight.type.with_dtype(F32), weight, loc=instance.loc)


def _emit(builder: Builder, site: Site, x: Value, params: list[Value]) -> Value:
    made: dict[str, Value] = {"x": x}
    made |= {f"p{i}": p for i, p in enumerate(params)}
    for number, operation in enumerate(site.block.operations):
        operands = (made[o] for o in operation.operands)
        attrs: dict[str, Any] = dict(operation.attrs)
        made[f"v{number}"] = builder.node(operation.name, *operands, **attrs).result
    return made[f"v{len(site.block.operations) - 1}"]
