"""The state of a step as tensors under the names of the model, and back, slice by slice.

`moecc.train.state` has the expressions; here they become slices of arrays on devices, and arrays
on devices become what their expressions say, each process reading what its devices hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from moecc.ir.graph import Graph
from moecc.train.state import Weights, initial, moment, stored
from moecc.types import DTYPES, Array
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import Evaluator, TensorReader
from moecc.weights.expr import Box, Expr, Full, Source, transform
from moecc.weights.movement import Index, Merge, Permute, Rename, Slice, Split
from moecc.weights.simplify import simplify
from moecc_backends.xla.trace.values import PyTree

_COUNT = "moments.count"
"""The number of updates in a state."""

_ARRAY = "array"
"""What the array of a slot is called in the expressions of its tensors."""

_GROUPS = 8
"""Tensors to be saved are made in about so many groups."""

Tensors = dict[str, jax.Array]

_Parts = list[tuple[str, Expr | None, Sharding]]
"""The tensors of an array: names, what they are of it, and where."""


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
    def sharding(self) -> Sharding:
        """Where the array lies."""
        return self.abstract.sharding or SingleDeviceSharding(jax.devices()[0])


def slots_of(graph: Graph, state: PyTree) -> list[StateLeaf]:
    """Return the leaves of a state, in the order of its tree.

    Args:
      graph: the program; the weights of its parameters are over tensors of a canonical graph.
      state: a tree of shapes, types and shardings, with parameters' names in its paths.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return [_slot(graph, path, leaf) for path, leaf in leaves]


def _slot(graph: Graph, path: tuple[PyTree, ...], leaf: jax.ShapeDtypeStruct) -> StateLeaf:
    words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    name = next((w for w in words if w in graph.params), None)
    # A balance bias is a parameter of the model that the optimiser does not know.
    key = ".".join("params" if w == "bias" else w for w in words if w != name)
    if name is None:
        return StateLeaf(key, None, False, leaf)
    weight = graph.params[name].weight
    assert weight is not None, "parameters of a program have expressions"
    expr = moment(weight, key, tuple(leaf.shape))
    return StateLeaf(key, expr, expr is None, leaf)


def to_tensors(slots: list[StateLeaf]) -> Callable[[PyTree], Tensors]:
    """Return a function from a state to its tensors, by the names that are saved.

    A tensor that is a whole array of the state is that array itself, which must not be donated
    while it is read.  Of an accelerator the tensors are in the memory of its host, and were made
    there a group at a time, so that a device has room for a group of them beside the state at most.
    """
    parts = [_tensors_of(slot) for slot in slots]
    groups = [(group, _compiled([parts[at] for at in group])) for group in _groups(slots)]

    def tensors(state: PyTree) -> Tensors:
        leaves, named = jax.tree.leaves(state), {}
        for group, compiled in groups:
            named.update(compiled([leaves[at] for at in group]))
        return named

    return tensors


def _compiled(parts_of_arrays: list[_Parts]) -> Callable[[list[jax.Array]], Tensors]:
    """Return a compiled function from some arrays of a state to their tensors."""
    shardings = {key: _on_host(where) for parts in parts_of_arrays for key, _, where in parts}

    def tensors(arrays: list[jax.Array]) -> Tensors:
        return {
            key: array if expr is None else _moved(expr, array)
            for array, parts in zip(arrays, parts_of_arrays, strict=True)
            for key, expr, _ in parts
        }

    return jax.jit(tensors, out_shardings=shardings)


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


def _tensors_of(slot: StateLeaf) -> _Parts:
    if slot.is_empty:
        return []
    if slot.expr is None:
        return [(slot.key, None, slot.sharding)]
    parts = stored(_ARRAY, slot.expr)
    return [(key, expr, _sharding(expr, slot.sharding)) for key, expr in parts]


def _moved(expr: Expr, array: jax.Array) -> jax.Array:
    """Return what `expr` is of `array`."""
    if isinstance(expr, Source):
        return array
    x = _moved(expr.operands[0], array)
    names = expr.operands[0].type.names
    match expr:
        case Index():
            return jax.lax.index_in_dim(x, expr.at, names.index(expr.axis), keepdims=False)
        case Slice():
            return jax.lax.slice_in_dim(x, expr.start, expr.stop, axis=names.index(expr.axis))
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
    source = next(x for x in _chain(expr) if isinstance(x, Source))
    spec = (*where.spec, *(None for _ in range(source.type.rank)))[: source.type.rank]
    by_axis = dict(zip(source.type.names, spec, strict=True))
    if any(isinstance(x, Slice | Rename | Split | Merge) for x in _chain(expr)):
        by_axis = {}
    return NamedSharding(where.mesh, PartitionSpec(*(by_axis.get(n) for n in expr.type.names)))


def _chain(expr: Expr) -> list[Expr]:
    chain = [expr]
    while chain[-1].operands:
        chain.append(chain[-1].operands[0])
    return chain


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
    leaves = [_restored(slot, evaluator, reader) for slot in slots]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _restored(slot: StateLeaf, evaluator: Evaluator, reader: TensorReader) -> jax.Array:
    shape, dtype = tuple(slot.abstract.shape), np.dtype(slot.abstract.dtype)
    if slot.is_empty:
        return _placed(
            shape,
            slot.sharding,
            lambda box: np.zeros(tuple(stop - start for start, stop in box), dtype),
        )
    if slot.expr is None:
        array = reader(slot.key).astype(dtype)
        return _placed(shape, slot.sharding, lambda box: array[tuple(slice(*b) for b in box)])
    return made(slot.expr, evaluator, dtype, slot.sharding)


def with_moments(
    state: PyTree, slots: list[StateLeaf], moments: Weights, reader: TensorReader
) -> PyTree:
    """Return a state with moments that are made from those of another one.

    Args:
      state: with zeros in their place.
      slots: its leaves.
      moments: expressions by name, ``moments.m.NAME``; what is not among them stays zero.
      reader: reads what they are made of, and the number of updates.
    """
    evaluator = Evaluator(reader)
    leaves, tree = jax.tree.flatten(state)
    for at, slot in enumerate(slots):
        if slot.key == _COUNT:
            leaves[at] = _restored(slot, evaluator, reader)
        elif slot.expr is not None and slot.key.startswith("moments."):
            expr = transform(slot.expr, lambda x: _carried(x, moments))
            leaves[at] = made(expr, evaluator, np.dtype(slot.abstract.dtype), slot.sharding)
    return jax.tree.unflatten(tree, leaves)


def _carried(x: Expr, moments: Weights) -> Expr:
    if not isinstance(x, Source):
        return x
    moment_expr = moments.get(x.name)
    return Full(0.0, x.type) if moment_expr is None else Cast(moment_expr, x.type.dtype)


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
        where = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
        params[name] = made(initial(weight, weights), evaluator, np.dtype(leaf.dtype), where)
    return params


def made(expr: Expr, evaluator: Evaluator, dtype: np.dtype[Any], where: Sharding) -> jax.Array:
    """Return the value of `expr` on the devices of `where`, each with its own part."""
    kind = next(d for d in DTYPES.values() if d.numpy_name != "key" and d.numpy == dtype)
    wanted = simplify(Cast(expr, kind) if kind.is_float else expr)
    return _placed(
        expr.type.shape, where, lambda box: np.array(evaluator.block(wanted, box), order="C")
    )


def _placed(shape: tuple[int, ...], where: Sharding, part: Callable[[Box], Array]) -> jax.Array:
    # Devices that are copies of one another ask for the same part.
    blocks: dict[Box, Array] = {}

    def callback(index: tuple[slice, ...] | None) -> Array:
        assert index is not None, "every device has its part"
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if box not in blocks:
            blocks[box] = part(box)
        return blocks[box]

    return jax.make_array_from_callback(shape, where, callback)
