"""Where new parameters lie: sharded as the dense leaf is, experts over the mesh axis for them."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding

from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Merge, Rename, Split, Stack, Tile
from moecc_backends.islands.jaxprs import AnyArray
from moecc_backends.xla.trace.typed_jax import partition_spec

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
    return NamedSharding(mesh, partition_spec(*parts))


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
