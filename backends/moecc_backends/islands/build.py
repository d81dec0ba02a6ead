"""All blocks of a function as one graph: an input and an output for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.model.function_folder import GRAPH
from moecc.types.dtypes import F32
from moecc.types.tensor import Axis, TensorType
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


def build_graph(survey: Survey, *, name: str, is_causal: bool, labels: Mapping[Val, Dims]) -> Graph:
    """Return the blocks as one graph.

    Parameters are named after leaves, and their weights are read from them.

    Args:
      survey: the blocks.
      name: of the function.
      is_causal: whether no token may depend on later ones.
      labels: which dimensions of values are which axes of tokens, as far as that is known.
    """
    sites = survey.first_sites()
    blocks = [(one, sites[key]) for key, one in survey.instances().items()]
    graph = Graph(GRAPH, {"function": name})
    if is_causal:
        graph.attrs["causal_inputs"] = [input_name(one.loc) for one, _ in blocks]
    sizes: dict[tuple[str, int], str] = {}
    inputs = [_input(graph, input_name(one.loc), site, sizes, labels) for one, site in blocks]
    for (one, site), x in zip(blocks, inputs, strict=True):
        params = [_param(graph, one, i) for i in range(len(one.params))]
        made = _emit(Builder(graph, loc=one.loc), site, x, params)
        graph.set_output(output_name(one.loc), made)
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


def _input(
    graph: Graph,
    name: str,
    site: Site,
    sizes: dict[tuple[str, int], str],
    labels: Mapping[Val, Dims],
) -> Value:
    island = site.island
    shape = [n for i, n in enumerate(island.x.shape) if i != island.outer]
    axes = []
    for axis, size in zip(token_axes(site, labels), shape, strict=True):
        if (axis, size) not in sizes:
            sizes[axis, size] = _variable(axis, sizes)
        axes.append(Axis(axis, sizes[axis, size]))
    width = island.x.shape[island.outer]
    return graph.input(name, TensorType(F32, (*axes, Axis(OUTER, width))))


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
