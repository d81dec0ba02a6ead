"""The state of a step as tensors under the names of the model, and back, slice by slice.

`moecc.train.state` has the expressions; here they become slices of arrays on devices, and arrays
on devices become what their expressions say, each process reading what its devices hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moecc.ir.graph import Graph
from moecc.train.state import Weights, initial, moment, stored
from moecc.types import DTYPES
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import Evaluator, TensorReader
from moecc.weights.expr import Expr, Full, Source, transform
from moecc.weights.movement import Index, Merge, Permute, Rename, Slice, Split
from moecc.weights.simplify import simplify
from moecc_backends.xla.lower.function import sharded_array
from moecc_backends.xla.trace.values import PyTree

_COUNT = "moments.count"
"""The number of updates in a state."""


_GROUPS = 8
"""Tensors to be saved are made in about so many groups."""

Tensors = dict[str, Array]


@dataclass(frozen=True)
class StateLeaf:
    """A leaf of the state.

    Attributes:
      key: its name where no parameter is in its path: ``step``, ``moments.count``.
      expr: over tensors of the saved state, where a parameter is; else None.
      is_empty: whether it belongs to a parameter and holds nothing of it.
      abstract: its shape, type and sharding.
    """

    key: str
    expr: Expr | None
    is_empty: bool
    abstract: jax.ShapeDtypeStruct

    @property
    def tensors(self) -> list[tuple[str, Expr | None, Sharding]]:
        """Its tensors: names, expressions over its array (None for all of it), and shardings."""
        where = self.abstract.sharding
        assert where is not None, "a state says where it lies"
        if self.is_empty:
            return []
        if self.expr is None:
            return [(self.key, None, where)]
        parts = stored("array", self.expr)
        return [(key, expr, _sharding(expr, where)) for key, expr in parts]

    def restored(self, evaluator: Evaluator, reader: TensorReader) -> Array:
        """Return the array, made from saved tensors."""
        shape, dtype, where = self.abstract.shape, self.abstract.dtype, self.abstract.sharding
        if self.expr is not None:
            return _evaluated(self.expr, evaluator, self.abstract)
        array = np.zeros(shape, dtype) if self.is_empty else reader(self.key).astype(dtype)
        return sharded_array(shape, where, lambda box: array[tuple(slice(*b) for b in box)])


def slots_of(graph: Graph, state: PyTree) -> list[StateLeaf]:
    """Return the leaves of a state, in the order of its tree.

    Args:
      graph: the program; the weights of its parameters are over tensors of a canonical graph.
      state: a tree of shapes, types and shardings, with parameters' names in its paths.
    """
    slots = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        name = next((w for w in words if w in graph.params), None)
        # A balance bias is a parameter of the model that the optimiser does not know.
        key = ".".join("params" if w == "bias" else w for w in words if w != name)
        weight = None if name is None else graph.params[name].weight
        expr = None if weight is None else moment(weight, key, tuple(leaf.shape))
        slots.append(StateLeaf(key, expr, name is not None and expr is None, leaf))
    return slots


def to_tensors(slots: list[StateLeaf]) -> Callable[[PyTree], Tensors]:
    """Return a function from a state to its tensors, by the names that are saved.

    A tensor that is a whole array of the state is that array itself, which must not be donated
    while it is read.  Of an accelerator the tensors are in the memory of its host, and were made
    there a group at a time, so that a device has room for a group of them beside the state at most.
    """

    def compiled(group: list[int]) -> Callable[[list[Array]], Tensors]:
        parts = [slots[at].tensors for at in group]

        def tensors_of(arrays: list[Array]) -> Tensors:
            pairs = zip(arrays, parts, strict=True)
            return {
                key: array if expr is None else _moved(expr, array)
                for array, part in pairs
                for key, expr, _ in part
            }

        places = {key: _on_host(where) for part in parts for key, _, where in part}
        return jax.jit(tensors_of, out_shardings=places)

    groups = [(group, compiled(group)) for group in _groups(slots)]

    def tensors(state: PyTree) -> Tensors:
        leaves, named = jax.tree.leaves(state), {}
        for group, run in groups:
            named.update(run([leaves[at] for at in group]))
        return named

    return tensors


def _groups(slots: list[StateLeaf]) -> Iterator[list[int]]:
    """Yield the leaves of a state in groups of a part of its bytes, or of one large leaf."""
    sizes = [prod(slot.abstract.shape) * slot.abstract.dtype.itemsize for slot in slots]
    group: list[int] = []
    for at, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > sum(sizes) / _GROUPS:
            yield group
            group = []
        group.append(at)
    yield group


def _on_host(where: Sharding) -> Sharding:
    """Return `where` in the memory of the host, if that is not the memory of the device."""
    if jax.default_backend() == "cpu":
        return where
    return where.with_memory_kind("pinned_host")


def _moved(expr: Expr, array: Array) -> Array:
    """Return what `expr` is of `array`."""
    if isinstance(expr, Source):
        return array
    x = _moved(expr.operands[0], array)
    names = expr.operands[0].type.names
    match expr:
        case Index():
            return lax.index_in_dim(x, expr.at, names.index(expr.axis), keepdims=False)
        case Slice():
            return lax.slice_in_dim(x, expr.start, expr.stop, axis=names.index(expr.axis))
        case Permute():
            return jnp.transpose(x, [names.index(n) for n in expr.type.names])
        case Rename():
            return x
        case Split() | Merge():
            return jnp.reshape(x, expr.type.shape)
    raise TypeError(f"{expr} does not move data")


def _sharding(expr: Expr, where: Sharding) -> Sharding:
    """Return where the tensor `expr` of an array on `where` lies: as the axes that it keeps."""
    if not isinstance(where, NamedSharding):
        return where
    chain = [expr]
    while chain[-1].operands:
        chain.append(chain[-1].operands[0])
    by_axis = dict(zip(chain[-1].type.names, where.spec, strict=False))
    if any(isinstance(x, Slice | Rename | Split | Merge) for x in chain):
        by_axis = {}
    return NamedSharding(where.mesh, PartitionSpec(*map(by_axis.get, expr.type.names)))


def restore(slots: list[StateLeaf], reader: TensorReader, tree: PyTree) -> PyTree:
    """Return a state whose leaves are made from saved tensors.

    Args:
      slots: its leaves.
      reader: reads the tensors, by the names that were saved.
      tree: a tree of the same structure.

    Raises:
      InputError: a tensor is missing, or of another shape.
    """
    evaluator = Evaluator(reader)
    leaves = [slot.restored(evaluator, reader) for slot in slots]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def with_moments(
    state: PyTree, slots: list[StateLeaf], moments: Weights, reader: TensorReader
) -> PyTree:
    """Return a state whose moments are made from the moments of another state.

    Args:
      state: the state, with zeros in place of its moments.
      slots: its leaves.
      moments: expressions by name, ``moments.m.NAME``; what is not among them stays zero.
      reader: reads what they are made of, and the number of updates.
    """
    evaluator = Evaluator(reader)

    def carried(x: Expr) -> Expr:
        if not isinstance(x, Source):
            return x
        expr = moments.get(x.name)
        return Full(0.0, x.type) if expr is None else Cast(expr, x.type.dtype)

    leaves, tree = jax.tree.flatten(state)
    for at, slot in enumerate(slots):
        if slot.key == _COUNT:
            leaves[at] = slot.restored(evaluator, reader)
        elif slot.expr is not None and slot.key.startswith("moments."):
            leaves[at] = _evaluated(transform(slot.expr, carried), evaluator, slot.abstract)
    return jax.tree.unflatten(tree, leaves)


def load(
    graph: Graph,
    weights: Weights,
    reader: TensorReader,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> Tensors:
    """Return the parameters of a program before the first step.

    Args:
      graph: the program.
      weights: how the tensors of the canonical graph are made.
      reader: reads the source.
      abstract: shape, type and sharding of each parameter.

    Raises:
      InputError: a tensor of the source is missing or of another type.
    """
    evaluator, params = Evaluator(reader), {}
    for name, leaf in abstract.items():
        weight = graph.params[name].weight
        assert weight is not None, "parameters of a program have expressions"
        params[name] = _evaluated(initial(weight, weights), evaluator, leaf)
    return params


def _evaluated(expr: Expr, evaluator: Evaluator, leaf: jax.ShapeDtypeStruct) -> Array:
    """Return the value of `expr` in the type of `leaf` and on its devices, part by part."""
    kind = next(d for d in DTYPES.values() if d.numpy_name != "key" and d.numpy == leaf.dtype)
    wanted = simplify(Cast(expr, kind) if kind.is_float else expr)
    return sharded_array(
        expr.type.shape,
        leaf.sharding,
        lambda box: np.array(evaluator.block(wanted, box), order="C"),
    )
