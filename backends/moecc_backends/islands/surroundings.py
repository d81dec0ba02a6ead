"""The graph of a whole function: its blocks as operations, all else as regions of JAX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax

from moecc.ir.graph import Graph, Value
from moecc.types import DTYPES, Axis, DType, TensorType, is_name
from moecc_backends.islands.build import input_name
from moecc_backends.islands.functions import Traced
from moecc_backends.islands.labels import Dims
from moecc_backends.islands.naming import path_name, unique
from moecc_backends.islands.opaque import Region, Walk
from moecc_backends.islands.scopes import Val
from moecc_backends.islands.sites import Survey


@dataclass(frozen=True)
class Surroundings:
    """What is around the blocks of a function.

    Attributes:
      arguments: the types of its arguments by name, the parameters apart.
      before: the region before each block, by its location.
      results: the types of those results that depend on a block, and the regions before them.
    """

    arguments: Mapping[str, TensorType]
    before: Mapping[str, Region]
    results: Mapping[str, tuple[TensorType, Region]]
    _made: dict[str, Value] = field(default_factory=dict)

    def order(self, locs: Sequence[str]) -> Sequence[str]:
        """Return the blocks in the order in which they run first."""
        return list(self.before)

    def begin(self, graph: Graph) -> None:
        """Add the arguments."""
        self._made.update({n: graph.input(n, t) for n, t in self.arguments.items()})

    def enter(self, graph: Graph, loc: str, type: TensorType) -> Value:
        """Add the region before a block, whose result is its input."""
        return self._add(graph, self.before[loc], input_name(loc), type, loc)

    def leave(self, graph: Graph, loc: str, value: Value) -> None:
        """Note the output of a block."""
        self._made[loc] = value

    def end(self, graph: Graph) -> None:
        """Add the results of the function."""
        for name, (type, region) in self.results.items():
            graph.set_output(name, self._add(graph, region, name, type))

    def _add(
        self, graph: Graph, region: Region, name: str, type: TensorType, loc: str = ""
    ) -> Value:
        operands = [value for source, value in self._made.items() if source in region.takes]
        if not operands:
            return graph.input(name, type)
        attrs = {
            "into": tuple((a.name, a.size) for a in type.axes),
            "dtype": type.dtype.name,
            "equations": region.equations,
            "lines": region.lines,
        }
        return graph.append("jax", operands, attrs, names=(name,), loc=loc).result


def surroundings(traced: Traced, found: Survey, labels: Mapping[Val, Dims]) -> Surroundings:
    """Return what is around the blocks of a traced function."""
    named = {v: n for n, v in traced.argument_values.items()}
    arguments = {n: t for v, n in named.items() if (t := _type(v, labels)) is not None}
    walk = Walk(found.sites, found.instances())
    regions = walk.run(traced.scope, named)
    blocks = walk.regions.keys()
    results = {
        name: (type, region)
        for name, value, region in zip(
            _result_names(traced), traced.scope.outputs, regions, strict=True
        )
        if region.takes & blocks and (type := _type(value, labels)) is not None
    }
    return Surroundings(arguments, walk.regions, results)


def _result_names(traced: Traced) -> list[str]:
    numbers = range(traced.treedef.num_leaves)
    tree = jax.tree_util.tree_unflatten(traced.treedef, numbers)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return unique(f"result.{path_name(path)}" if path else "result" for path in paths)


def _type(value: Val, labels: Mapping[Val, Dims]) -> TensorType | None:
    """Return the type of a value that is of no block; None where the IR has no such elements."""
    dtype = _dtype(value)
    if dtype is None:
        return None
    dims = labels.get(value, ((),) * len(value.shape))
    names = unique(_names(dims))
    return TensorType(dtype, tuple(map(Axis, names, value.shape)))


def _names(dims: Sequence[Sequence[tuple[str, int]]]) -> Iterator[str]:
    for number, label in enumerate(dims):
        name = "_".join(n for n, _ in label)
        yield name if is_name(name) else f"axis{number}"


def _dtype(value: Val) -> DType | None:
    return next(
        (d for d in DTYPES.values() if d.kind != "key" and d.numpy == value.aval.dtype), None
    )
