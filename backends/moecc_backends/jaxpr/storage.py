"""Where the parameters of a converted graph lie: in place of leaves, or beside the tree.

A leaf whose use is all converted is replaced by what became of it, stacked as it was; what has no
place in the tree, routers and parts of fused leaves, is beside it under the name of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

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
from moecc_backends.jaxpr.jaxprs import AnyArray, ranged, shape_of
from moecc_backends.jaxpr.survey import Instance, Key, Site
from moecc_backends.jaxpr.views import Leaf
from moecc_backends.xla.mesh.specs import sharded_array


@dataclass(frozen=True)
class Slot:
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
class Stored:
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
class Storage:
    """Where the parameters of converted blocks lie.

    Attributes:
      slots: by the name of the parameter in the graph.
      arrays: the arrays to make.
      gone: the leaves that nothing uses any more.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    arrays: list[Stored] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)


def plan_storage(
    graph: Graph,
    leaves: Mapping[str, Leaf],
    converted: Sequence[Instance],
    sites: Iterable[Site],
    by_key: Mapping[Key, Instance],
    still_used: set[str],
    params_of: Mapping[str, Sequence[str]],
) -> Storage:
    """Return where the parameters of converted blocks lie.

    Args:
      graph: the converted graph.
      leaves: the leaves by name.
      converted: the blocks that were converted.
      sites: where blocks run.
      by_key: blocks by their keys.
      still_used: leaves that something else uses.
      params_of: the names of the parameters of each block in the graph, by location, in order.
    """
    storage = Storage()
    dense: dict[str, dict[str, Expr]] = {}
    for instance in converted:
        for name, weight in zip(instance.params, instance.weights, strict=True):
            (source,) = sources(weight)
            dense.setdefault(source.name, {})[name] = weight
    for leaf, parts in dense.items():
        if leaf in still_used:
            continue
        storage.gone.add(leaf)
        _in_place(storage, graph, leaves[leaf], parts)
    for site in sites:
        blocks = [by_key[key] for key in site.keys]
        if all(b.loc in params_of for b in blocks):
            names = [params_of[b.loc] for b in blocks]
            _beside(storage, graph, names, _like(blocks[0]), is_stack=bool(site.loops))
    return storage


def _like(instance: Instance) -> str:
    (source, *_) = sources(instance.weights[0])
    return source.name


def _in_place(storage: Storage, graph: Graph, leaf: Leaf, parts: Mapping[str, Expr]) -> None:
    """Put what became of a leaf in its place, where that is one array."""
    if not all(name in graph.params for name in parts):
        return
    weights = {name: graph.params[name].weight for name in parts}
    made = [w for w in weights.values() if w is not None]
    whole = [_bare(w) for w in parts.values()]
    if len(made) < len(parts) or len({w.type for w in made}) != 1:
        return
    rows = {_row(w, leaf): name for w, name in zip(whole, parts, strict=True)}
    if leaf.shape and sorted(rows, key=str) == sorted(range(leaf.shape[0]), key=str):
        ordered = [weights[rows[i]] for i in range(leaf.shape[0])]
        stack = Stack(tuple(w for w in ordered if w is not None), "layer")
        for i in range(leaf.shape[0]):
            storage.slots[rows[i]] = Slot(leaf.name, in_tree=True, row=i)
        storage.arrays.append(Stored(leaf.name, True, stack, leaf.name))
    elif len(parts) == 1 and prod(whole[0].type.shape) == prod(leaf.shape):
        (name,) = parts
        storage.slots[name] = Slot(leaf.name, in_tree=True)
        storage.arrays.append(Stored(leaf.name, True, made[0], leaf.name))


def _bare(weight: Expr) -> Expr:
    """Return a weight without the names that blocks give to its axes."""
    while isinstance(weight, Rename):
        weight = weight.x
    return weight


def _row(weight: Expr, leaf: Leaf) -> int | None:
    """Return which part along the first axis of `leaf` a weight is; None if it is none."""
    is_row = isinstance(weight, Index) and weight.x is leaf.source and weight.axis == leaf.axes[0]
    return weight.at if is_row and isinstance(weight, Index) else None


def _beside(
    storage: Storage,
    graph: Graph,
    params: Sequence[Sequence[str]],
    like: str,
    *,
    is_stack: bool,
) -> None:
    """Put what has no place yet beside the tree: of a loop, one stack for each parameter."""
    for names in zip(*params, strict=True):
        missing = [n for n in names if n not in storage.slots]
        if not missing:
            continue
        weights = [graph.params[n].weight for n in names]
        made = tuple(w for w in weights if w is not None)
        assert len(made) == len(names), "parameters of blocks have weights"
        if not is_stack:
            storage.slots[names[0]] = Slot(names[0], in_tree=False)
            storage.arrays.append(Stored(names[0], False, made[0], like))
            continue
        key = ranged(names)
        for row, name in enumerate(names):
            storage.slots.setdefault(name, Slot(key, in_tree=False, row=row))
        storage.arrays.append(Stored(key, False, Stack(made, "layer"), like))


# Where new parameters lie: sharded as the dense leaf is, experts over the mesh axis for them.

EXPERT = "expert"
"""The axis of experts, and the mesh axis that it is sharded over where there is one."""

MeshAxes = tuple[str, ...]
Spec = dict[str, MeshAxes]
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
    mesh = sharding.mesh
    spec = _spec(weight, sharding)
    if EXPERT in mesh.shape and EXPERT in weight.type.names:
        spec = {EXPERT: (EXPERT,), **spec}
    taken: set[str] = set()
    parts: list[MeshAxes | None] = []
    for axis, size in zip(weight.type.names, weight.type.shape, strict=True):
        wanted = tuple(m for m in spec.get(axis, ()) if m not in taken)
        count = 1
        for name in wanted:
            count *= mesh.shape[name]
        fits = bool(wanted) and size % count == 0
        parts.append(wanted if fits else None)
        taken.update(wanted if fits else ())
    return NamedSharding(mesh, PartitionSpec(*parts))


def _spec(weight: Expr, sharding: NamedSharding) -> Spec:
    """Return the mesh axes of the axes of a weight."""
    if isinstance(weight, Source):
        entries = (*sharding.spec, *(None for _ in weight.type.names))
        pairs = zip(weight.type.names, entries, strict=False)
        return {n: _mesh_axes(e) for n, e in pairs if e is not None}
    if isinstance(weight, Stack):
        return _stacked(weight, sharding)
    found: Spec = {}
    for operand in weight.operands:
        found |= _spec(operand, sharding)
    if isinstance(weight, Rename) and weight.old in found:
        found[weight.new] = found.pop(weight.old)
    elif isinstance(weight, Index | Tile):
        found.pop(weight.axis, None)
    elif isinstance(weight, Split) and weight.axis in found:
        found[weight.into[0][0]] = found.pop(weight.axis)
    elif isinstance(weight, Merge) and weight.axes[0] in found:
        found[weight.into] = found.pop(weight.axes[0])
    return {n: axes for n, axes in found.items() if n in weight.type}


def _stacked(weight: Stack, sharding: NamedSharding) -> Spec:
    """Return those of a stack: its own axis is that along which the leaf was taken apart."""
    found = _spec(weight.xs[0], sharding)
    inner: Expr = weight.xs[0]
    while inner.operands and not isinstance(inner, Index):
        inner = inner.operands[0]
    if isinstance(inner, Index):
        whole = _spec(inner.x, sharding)
        if inner.axis in whole:
            found[weight.axis] = whole[inner.axis]
    return found


def _mesh_axes(entry: Any) -> MeshAxes:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def is_sharded(array: AnyArray) -> bool:
    """Return whether an array lies on several devices."""
    return isinstance(array, jax.Array) and len(array.sharding.device_set) > 1


# Arrays of new parameters from leaves: weight expressions evaluated where the leaves lie.


class LeafEvaluator(Evaluator):
    """Evaluates weight expressions whose sources are leaves, from what this process has of them.

    Args:
      leaves: the arrays by the names of the leaves.
    """

    def __init__(self, leaves: Mapping[str, AnyArray]) -> None:
        super().__init__(self._rows)
        self._leaves = leaves

    def _rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        whole: Array = np.asarray(self._leaves[name])
        return whole[start:stop] if whole.ndim else whole

    def block(self, expr: Expr, box: Box) -> Array:
        """Return the elements of `expr` in `box`.

        Raises:
          InputError: another process has some of them.
        """
        if isinstance(expr, Source):
            return _part(expr.name, self._leaves[expr.name], box)
        return super().block(expr, box)


def _part(name: str, leaf: AnyArray, box: Box) -> Array:
    """Return a box of a leaf from the shards that are here, without putting the leaf together."""
    if not is_sharded(leaf):
        whole: Array = np.asarray(leaf)[tuple(slice(*ends) for ends in box)]
        return whole
    made: Array = np.empty(extents(box), leaf.dtype)
    missing = np.ones(extents(box), bool)
    for shard in leaf.addressable_shards:
        ends = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, ends, strict=True)]
        if any(start >= stop for start, stop in both):
            continue
        into = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, box, strict=True))
        if missing[into].any():
            from_ = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, ends, strict=True))
            made[into] = np.asarray(shard.data)[from_]
            missing[into] = False
    if missing.any():
        raise InputError(
            "another process has a part of this leaf that experts here need",
            where=f"params {name}",
            expected="a leaf whose shards go where the experts' go, or a replicated one",
            found=str(leaf.sharding),
        )
    return made


def make_array(
    stored: Stored, leaves: Mapping[str, Leaf], arrays: Mapping[str, AnyArray]
) -> AnyArray:
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
    wanted = simplify(Cast(stored.weight, dtype))
    evaluator = LeafEvaluator(arrays)
    if sharding is not None:
        return sharded_array(evaluator, wanted, shape, sharding)
    whole = np.array(evaluator.block(wanted, tuple((0, n) for n in shape)), order="C")
    if not isinstance(like, jax.Array):
        return whole
    is_fixed = getattr(like, "committed", True) and not is_sharded(like)
    return jax.device_put(whole, like.sharding if is_fixed else None)
