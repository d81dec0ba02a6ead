"""All blocks of a function as one graph: an input and an output for each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types.dtypes import F32
from moecc.types.tensor import Axis, TensorType
from moecc_backends.islands.blocks import OUTER
from moecc_backends.islands.sites import Instance

TOKEN_AXES = {1: ("token",), 2: ("batch", "seq")}
"""What the axes of tokens are called, by their number."""


def input_name(loc: str) -> str:
    """Return the name of the input of the block at `loc`."""
    return f"x.{loc}"


def output_name(loc: str) -> str:
    """Return the name of the output of the block at `loc`."""
    return f"y.{loc}"


def build_graph(instances: Iterable[Instance], *, name: str, is_causal: bool) -> Graph:
    """Return the blocks as one graph.

    Parameters are named after leaves, and their weights are read from them.

    Args:
      instances: the blocks.
      name: of the function.
      is_causal: whether no token may depend on later ones.
    """
    blocks = list(instances)
    graph = Graph("jax", {"function": name})
    if is_causal:
        graph.attrs["causal_inputs"] = [input_name(b.loc) for b in blocks]
    sizes: dict[tuple[str, int], str] = {}
    inputs = [_input(graph, block, sizes) for block in blocks]
    for block, x in zip(blocks, inputs, strict=True):
        params = [_param(graph, block, i) for i in range(len(block.params))]
        made = _emit(Builder(graph, loc=block.loc), block, x, params)
        graph.set_output(output_name(block.loc), made)
    return graph


def token_axes(instance: Instance) -> tuple[str, ...]:
    """Return the names of the axes of tokens of a block's input, in order."""
    count = len(instance.site.island.x.shape) - 1
    return TOKEN_AXES.get(count) or tuple(f"axis{i}" for i in range(count))


def _input(graph: Graph, instance: Instance, sizes: dict[tuple[str, int], str]) -> Value:
    island = instance.site.island
    shape = [n for i, n in enumerate(island.x.shape) if i != island.outer]
    axes = []
    for name, size in zip(token_axes(instance), shape, strict=True):
        if (name, size) not in sizes:
            sizes[name, size] = _variable(name, sizes)
        axes.append(Axis(name, sizes[name, size]))
    width = island.x.shape[island.outer]
    return graph.input(input_name(instance.loc), TensorType(F32, (*axes, Axis(OUTER, width))))


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


def _emit(builder: Builder, instance: Instance, x: Value, params: list[Value]) -> Value:
    made: dict[str, Value] = {"x": x}
    made |= {f"p{i}": p for i, p in enumerate(params)}
    for number, operation in enumerate(instance.block.operations):
        operands = (made[o] for o in operation.operands)
        attrs: dict[str, Any] = dict(operation.attrs)
        made[f"v{number}"] = builder.node(operation.name, *operands, **attrs).result
    return made[f"v{len(instance.block.operations) - 1}"]
