"""Where the parameters of a converted graph lie, and their arrays.

A leaf whose use is all converted is replaced by what became of it, stacked as it was; what has no
place in the tree, routers and parts of fused leaves, is beside it under the name of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.types import Array
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import Evaluator
from moecc.weights.expr import Box, Expr, Source, extents, sources
from moecc.weights.movement import Index, Merge, Rename, Split, Stack, Tile
from moecc.weights.simplify import simplify
from moecc_backends.jaxpr.survey import BlockInstance
from moecc_backends.jaxpr.views import AnyArray, AnyArrays, TreeLeaf, ranged_name, shape_of
from moecc_backends.xla.lower.function import sharded_array


@dataclass(frozen=True)
class ParamSlot:
    """Where a parameter lies.

    Attributes:
      key: the leaf that it replaces, or its name beside the tree.
      in_tree: which of the two.
      row: which part of a stack it is; None where it is not stacked.
    """

    key: str
    in_tree: bool
    row: int | None = None


@dataclass(frozen=True)
class StoredParam:
    """An array of the new parameters.

    Attributes:
      key: the leaf that it replaces, or its name beside the tree.
      in_tree: which of the two.
      weight: what it is of the leaves.
      like: the leaf whose element type and placement it has.
    """

    key: str
    in_tree: bool
    weight: Expr
    like: str


@dataclass
class ParamStorage:
    """Where the parameters of converted blocks lie.

    Attributes:
      slots: the slot of each parameter, by its name in the graph.
      arrays: the arrays to make.
      gone: the leaves that nothing uses any more.
    """

    slots: dict[str, ParamSlot] = field(default_factory=dict)
    arrays: list[StoredParam] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)

    def put(
        self, key: str, in_tree: bool, like: str, params: Mapping[str, Expr], *, is_stack: bool
    ) -> None:
        """Store parameters as one array, a stack or a single one; those with a slot keep it."""
        weights = tuple(params.values())
        for row, name in enumerate(params):
            self.slots.setdefault(name, ParamSlot(key, in_tree, row if is_stack else None))
        weight = Stack(weights, "layer") if is_stack else weights[0]
        self.arrays.append(StoredParam(key, in_tree, weight, like))


def plan_storage(
    graph: Graph,
    leaves: Mapping[str, TreeLeaf],
    sites: Sequence[tuple[bool, Sequence[BlockInstance]]],
    still_used: set[str],
    params_of: Mapping[str, Sequence[str]],
) -> ParamStorage:
    """Return where the parameters of converted blocks lie.

    Args:
      graph: the converted graph.
      leaves: the leaves by name.
      sites: the converted blocks of each site, and whether loops pick them.
      still_used: leaves that something else uses.
      params_of: the names of the parameters of each block in the graph, by location, in order.
    """
    storage = ParamStorage()
    weights = graph.weights
    dense: dict[str, dict[str, Expr]] = {}
    for instance in {i.loc: i for _, instances in sites for i in instances}.values():
        for name, weight in zip(instance.params, instance.weights, strict=True):
            (source,) = sources(weight)
            # The names that blocks give to its axes do not count.
            while isinstance(weight, Rename):
                weight = weight.x
            dense.setdefault(source.name, {})[name] = weight
    for name, parts in dense.items():
        if name not in still_used:
            storage.gone.add(name)
            _put_in_place(storage, leaves[name], parts, weights)
    for is_stack, instances in sites:
        (source, *_) = sources(instances[0].weights[0])
        for names in zip(*(params_of[i.loc] for i in instances), strict=True):
            if any(n not in storage.slots for n in names):
                key = ranged_name(names) if is_stack else names[0]
                params = {n: weights[n] for n in (names if is_stack else names[:1])}
                storage.put(key, False, source.name, params, is_stack=is_stack)
    return storage


def _put_in_place(
    storage: ParamStorage,
    leaf: TreeLeaf,
    parts: Mapping[str, Expr],
    weights: Mapping[str, Expr],
) -> None:
    """Put what became of the parts of a leaf in its place, where that is one array."""
    if not parts.keys() <= weights.keys() or len({weights[n].type for n in parts}) != 1:
        return
    # Which part along the first axis of the leaf each is.
    rows = {
        part.at
        if isinstance(part, Index) and part.x is leaf.source and part.axis == leaf.axes[0]
        else None: name
        for name, part in parts.items()
    }
    if leaf.shape and rows.keys() == set(range(leaf.shape[0])):
        stacked = {rows[i]: weights[rows[i]] for i in range(leaf.shape[0])}
        storage.put(leaf.name, True, leaf.name, stacked, is_stack=True)
        return
    ((name, weight), *more) = parts.items()
    if not more and prod(weight.type.shape) == prod(leaf.shape):
        storage.put(leaf.name, True, leaf.name, {name: weights[name]}, is_stack=False)


# Placement: sharded as the dense leaf is, experts over the mesh axis for them.

EXPERT = "expert"
"""The axis of experts, and the mesh axis that it is sharded over where there is one."""

MeshAxes = dict[str, tuple[str, ...]]
"""The mesh axes of each axis that is sharded."""


def sharding_of(weight: Expr, like: AnyArray) -> NamedSharding | None:
    """Return where a parameter lies that is made from a leaf that is sharded; None otherwise.

    An axis of the leaf keeps its mesh axes wherever it goes; one that no longer divides, or whose
    mesh axes another axis has, is whole.

    Args:
      weight: what the parameter is of the leaf.
      like: the leaf.
    """
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    mesh, mesh_axes = sharding.mesh, _mesh_axes(weight, sharding)
    if EXPERT in mesh.shape and EXPERT in weight.type.names:
        mesh_axes = {EXPERT: (EXPERT,), **mesh_axes}
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for axis, size in zip(weight.type.names, weight.type.shape, strict=True):
        names = tuple(m for m in mesh_axes.get(axis, ()) if m not in used)
        if not names or size % prod(mesh.shape[n] for n in names):
            names = ()
        parts.append(names or None)
        used.update(names)
    return NamedSharding(mesh, PartitionSpec(*parts))


def _mesh_axes(weight: Expr, sharding: NamedSharding) -> MeshAxes:
    """Return the mesh axes of the axes of a weight."""
    axes: MeshAxes = {}
    if isinstance(weight, Source):
        for name, entry in zip(weight.type.names, sharding.spec, strict=False):
            if entry is not None:
                axes[name] = (entry,) if isinstance(entry, str) else tuple(entry)
        return axes
    if isinstance(weight, Stack):
        axes = _mesh_axes(weight.xs[0], sharding)
        # The axis of the stack is that along which the leaf was taken apart.
        inner: Expr = weight.xs[0]
        while inner.operands and not isinstance(inner, Index):
            inner = inner.operands[0]
        if isinstance(inner, Index):
            stacked = _mesh_axes(inner.x, sharding).get(inner.axis)
            axes |= {weight.axis: stacked} if stacked else {}
        return axes
    for operand in weight.operands:
        axes |= _mesh_axes(operand, sharding)
    if isinstance(weight, Rename) and weight.old in axes:
        axes[weight.new] = axes.pop(weight.old)
    elif isinstance(weight, Index | Tile):
        axes.pop(weight.axis, None)
    elif isinstance(weight, Split) and weight.axis in axes:
        axes[weight.into[0][0]] = axes.pop(weight.axis)
    elif isinstance(weight, Merge) and weight.axes[0] in axes:
        axes[weight.into] = axes.pop(weight.axes[0])
    return {n: names for n, names in axes.items() if n in weight.type}


def is_sharded(array: AnyArray) -> bool:
    """Return whether an array lies on several devices."""
    return isinstance(array, jax.Array) and len(array.sharding.device_set) > 1


# Arrays: weight expressions evaluated where the leaves lie.


class LeafEvaluator(Evaluator):
    """Evaluates weight expressions whose sources are leaves, from what this process has of them.

    Args:
      leaves: the arrays by the names of the leaves.
    """

    def __init__(self, leaves: AnyArrays) -> None:
        super().__init__(lambda name, start=0, stop=None: rows_of(leaves[name], start, stop))
        self._leaves = leaves

    def block(self, expr: Expr, box: Box) -> Array:
        """Return the elements of `expr` in `box`; of a leaf without putting its shards together.

        Raises:
          InputError: another process has some of them.
        """
        if not isinstance(expr, Source):
            return super().block(expr, box)
        leaf = self._leaves[expr.name]
        if not is_sharded(leaf):
            return np.asarray(leaf)[tuple(slice(*ends) for ends in box)]
        part: Array = np.empty(extents(box), leaf.dtype)
        missing = np.ones(extents(box), bool)
        for shard in leaf.addressable_shards:
            ends = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, ends, strict=True)]
            if any(start >= stop for start, stop in both):
                continue
            into, source = (
                tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, frame, strict=True))
                for frame in (box, ends)
            )
            if missing[into].any():
                part[into] = np.asarray(shard.data)[source]
                missing[into] = False
        if missing.any():
            raise InputError(
                "another process has a part of this leaf that experts here need",
                where=f"params {expr.name}",
                expected="a leaf whose shards go where the experts' go, or a replicated one",
                found=str(leaf.sharding),
            )
        return part

    def evaluate(self, expr: Expr) -> Array:
        """Return all elements of `expr`."""
        return self.block(expr, tuple((0, n) for n in expr.type.shape))


def rows_of(leaf: AnyArray, start: int = 0, stop: int | None = None) -> Array:
    """Return rows of an array; all of one without axes."""
    array: Array = np.asarray(leaf)
    return array[start:stop] if array.ndim else array


def new_array(stored: StoredParam, leaves: Mapping[str, TreeLeaf], arrays: AnyArrays) -> AnyArray:
    """Return an array of the new parameters, or its shape where leaves are shapes.

    It lies where the dense leaf does, sharded likewise.

    Args:
      stored: what it is.
      leaves: the leaves by name.
      arrays: their arrays, or shapes.

    Raises:
      InputError: values overflow, or another process has a part that is needed here.
    """
    dtype, like = leaves[stored.like].dtype, arrays[stored.like]
    shape = stored.weight.type.shape
    sharding = sharding_of(stored.weight, like)
    if isinstance(like, jax.ShapeDtypeStruct):
        return shape_of(shape, dtype.numpy, sharding)
    weight = simplify(Cast(stored.weight, dtype))
    evaluator = LeafEvaluator(arrays)
    if sharding is not None:
        return sharded_array(
            shape, sharding, lambda box: np.array(evaluator.block(weight, box), order="C")
        )
    array = np.array(evaluator.evaluate(weight), order="C")
    if not isinstance(like, jax.Array):
        return array
    is_fixed = getattr(like, "committed", True) and not is_sharded(like)
    return jax.device_put(array, like.sharding if is_fixed else None)
