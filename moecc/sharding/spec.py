"""Sharding specs of single arrays, by the names and sizes of their axes, without a graph.

XLA's partitioner receives these; they are what propagation starts from at inputs and parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moecc.sharding.assign import ROWS
from moecc.sharding.layout import Layout
from moecc.types.dtypes import F32
from moecc.types.tensor import Axis, TensorType

ShardingSpec = dict[str, tuple[str, ...]]
"""For each axis that is sharded, its mesh axes, outermost first."""

Sizes = Mapping[str, int]
"""The sizes of the axes of an array, by name."""


def spec_of(type: TensorType) -> ShardingSpec:
    """Return the spec of a type."""
    return {axis.name: axis.mesh for axis in type if axis.mesh}


def value_spec(layout: Layout, sizes: Sizes) -> ShardingSpec:
    """Return how a value is sharded whose axes have `sizes`; what does not divide is left whole."""
    return spec_of(_lone(layout, sizes))


def group_spec(layout: Layout, sizes: Sizes) -> ShardingSpec:
    """Return how rows are sharded with their token groups, before or after an exchange."""
    return value_spec(layout, {name: size for name, size in sizes.items() if name == "group"})


def param_spec(layout: Layout, sizes: Sizes, *, stored: bool, layers: str = "") -> ShardingSpec:
    """Return how a parameter is sharded.

    Args:
      layout: the layout.
      sizes: of its axes; an axis of experts meets rows.
      stored: as it is stored, or else as it is used.
      layers: the axis along which layers are stacked, which is never sharded.
    """
    inner = {name: size for name, size in sizes.items() if name != layers}
    used = _lone(layout, inner, ROWS if "expert" in inner else ())
    return spec_of(layout.assigner.stored(used) if stored else used)


def _lone(layout: Layout, sizes: Sizes, beside: Sequence[Axis] = ()) -> TensorType:
    # Sizes are known here, and so are the numbers of groups.
    assigner = replace(layout.assigner, free=frozenset())
    type = TensorType(F32, tuple(Axis(name, size) for name, size in sizes.items()))
    return assigner.lone(type, beside)
