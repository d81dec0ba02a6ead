"""Random arrays for the inputs and parameters of a graph: by seed and name, the same everywhere.

Two graphs that share a name get the same array for it, and two parameters made from the same
source tensor are made from the same numbers, so that a graph can be compared with what a pass
made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from moecc.ir.graph import Graph, Value
from moecc.ir.ops.repetition import repetitions
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.structure import index_sizes
from moecc.support.lazy import np
from moecc.support.ranges import element, lengths
from moecc.testing.weights import generator, moved, weight_for
from moecc.types import Array, Size, TensorType

Sizes = Mapping[str, int]

MAX_SIZE = 4
"""The largest size drawn for a variable, before groups of tokens ask for a multiple."""

ANY_INDEX = 8
"""Integers are below this where nothing shows what they index."""


def sizes_for(graph: Graph, seed: int, size: int = 0) -> dict[str, int]:
    """Return small sizes for the variables of `graph`, such that its types hold.

    Groups divide the tokens, and there are as many to choose from as are chosen.

    Args:
      graph: the graph.
      seed: chooses the sizes.
      size: of all variables whose types allow it; 0 draws them.
    """
    values = [*graph.inputs.values(), *graph.params.values()]
    names = {s for v in values for s in v.type.sizes if isinstance(s, str)}
    sizes = {
        n: size or int(generator(seed, "size", n).integers(1, MAX_SIZE + 1)) for n in sorted(names)
    }
    for node in graph.every_node():
        count, axis = node.attrs.get("top_k"), node.attrs.get("axis")
        if isinstance(count, int) and isinstance(axis, str):
            choices = node.operands[0].type[axis].size
            if isinstance(choices, str):
                sizes[choices] = max(sizes.get(choices, 1), count)
        if node.op.assigns_slots:
            attrs = SlotsOp.of_node(node)
            groups = attrs.group_size or attrs.groups
            type = node.operands[0].type
            each = TensorType(type.dtype, tuple(type[n] for n in attrs.tokens))
            open_sizes = [s for s in each.sizes if isinstance(s, str)]
            if open_sizes and prod(shape_of(each, sizes)) % groups:
                sizes[open_sizes[0]] *= groups
    return sizes


def shape_of(type: TensorType, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of `type` under `sizes`; an extent counts as 1."""
    return tuple(_known(s, sizes) for s in type.sizes)


def _known(size: Size, sizes: Sizes) -> int:
    if isinstance(size, str):
        return sizes[size]
    return size if isinstance(size, int) else 1


def inputs_for(
    graph: Graph, seed: int = 0, sizes: Sizes | None = None, step: float = 0.0
) -> dict[str, Array]:
    """Return random arrays for the inputs of `graph`.

    Floats are normal with standard deviation 1; integers stay within the tables, one-hot axes and
    experts that they index, and are 0 to 7 elsewhere.

    Args:
      graph: the graph.
      seed: chooses the arrays, together with the name of the input.
      sizes: the sizes of the variables; missing, they are drawn.
      step: how far every float moves from there, in a direction that its name decides.
    """
    sizes = sizes_for(graph, seed) if sizes is None else sizes
    return {n: _draw(v, seed, sizes, "input", step) for n, v in graph.inputs.items()}


def params_for(
    graph: Graph, seed: int = 0, sizes: Sizes | None = None, step: float = 0.0
) -> dict[str, Array]:
    """Return random arrays for the parameters of `graph`.

    A parameter with a weight expression is what the expression makes of random source tensors,
    and one without is the source tensor of its name.

    Args:
      graph: the graph.
      seed: chooses the arrays, together with the name of the parameter or source tensor.
      sizes: the sizes of the variables; missing, they are drawn.
      step: how far every float of a source tensor moves from there, in a direction that its name
        decides.
    """
    sizes = sizes_for(graph, seed) if sizes is None else sizes
    return {n: _made(v, seed, sizes, step) for n, v in graph.params.items()}


def _made(value: Value, seed: int, sizes: Sizes, step: float) -> Array:
    if value.weight is None:
        # What no expression makes is the tensor of its own name, for passes that say so.
        rolled = _rolled(value, seed, sizes, step)
        return _draw(value, seed, sizes, "source", step) if rolled is None else rolled

    return weight_for(value.weight, seed, step)


def _rolled(value: Value, seed: int, sizes: Sizes, step: float) -> Array | None:
    """Return what stands for a parameter of each layer, or None where `value` is one of its own."""
    for user in value.users:
        axis, runs = repetitions(user.attrs) if user.body is not None else ("", 0)
        if lengths(value.name) == {runs} and axis in value.type:
            parts = (element(value.name, at) for at in range(runs))
            each = [_draw(value, seed, sizes, "source", step, n, axis) for n in parts]
            return np.stack(each, axis=value.type.names.index(axis))
    return None


def _draw(
    value: Value,
    seed: int,
    sizes: Sizes,
    kind: str,
    step: float,
    name: str = "",
    without: str = "",
) -> Array:
    """Draw what `value` is, or what `name` is, which lacks the axis `without`."""
    type = value.type.without(without) if without else value.type
    dtype, shape = type.dtype, shape_of(type, sizes)
    name = name or value.name
    rng = generator(seed, kind, name)
    if dtype.kind == "float":
        return moved(rng.standard_normal(shape).astype(dtype.numpy), step, seed, kind, name)
    if dtype.kind == "bool":
        return rng.random(shape) < 0.5
    if dtype.kind == "key":
        return rng.integers(0, 2**63, shape, dtype=np.uint64)
    limit = min(_limits(value, sizes), default=ANY_INDEX)
    return rng.integers(0, limit, shape).astype(dtype.numpy)


def _limits(value: Value, sizes: Sizes) -> Iterator[int]:
    """Yield what the elements of `value`, used as indices, must stay below."""
    pending, seen = [value], {value}
    while pending:
        index = pending.pop()
        yield from (_known(size, sizes) for size in index_sizes(index))
        for user in index.users:
            if user.body is not None:
                inner = zip(user.operands, user.body.inputs.values(), strict=True)
                pending += [i for v, i in inner if v is index]
            elif (user.op.carries or user.op.collective) and index is user.operands[0]:
                fresh = [v for v in user.results if v not in seen]
                pending += fresh
                seen.update(fresh)
