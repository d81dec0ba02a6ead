"""How a layout of the plan shards values and parameters, by the names of their axes.

`moecc.plan.layout.Layout` says which mesh axes shard the batch, the experts, the neurons and the
parameters; what stands here applies that to one array.
"""

from __future__ import annotations

from collections.abc import Mapping

from moecc.ir.attributes import SlotAttrs
from moecc.ir.graph import Graph
from moecc.plan.layout import TENSOR_AXES, Layout

AxisSpec = dict[str, tuple[str, ...]]
"""For each axis that is sharded, the mesh axes, outermost first."""

Sizes = Mapping[str, int]
"""The sizes of the axes of an array, by name."""


def value_spec(layout: Layout, sizes: Sizes) -> AxisSpec:
    """Return how a value is sharded whose axes have `sizes`.

    Slots are sharded as their experts, and their groups over what is left of the batch's axes.
    """
    spec: AxisSpec = {}
    if "slot" in sizes and "expert" in sizes:
        rest = tuple(n for n in layout.batch_axes if n not in layout.expert_axes)
        _shard(layout, spec, sizes, "expert", layout.expert_axes)
        _shard(layout, spec, sizes, "group", rest)
    _shard(layout, spec, sizes, "batch", layout.batch_axes)
    _shard_tensor(layout, spec, sizes)
    return spec


def group_spec(layout: Layout, sizes: Sizes) -> AxisSpec:
    """Return how slots are sharded that are with their tokens, before or after an exchange."""
    spec: AxisSpec = {}
    _shard(layout, spec, sizes, "group", layout.batch_axes)
    return spec


def param_spec(layout: Layout, sizes: Sizes, *, stored: bool, layers: str = "") -> AxisSpec:
    """Return how a parameter is sharded.

    Args:
      layout: the layout.
      sizes: of its axes.
      stored: as it is stored, or else as it is used.
      layers: the axis along which layers are stacked, which is never sharded.
    """
    spec: AxisSpec = {}
    inner = {name: size for name, size in sizes.items() if name != layers}
    of_experts = "expert" in inner
    if of_experts:
        _shard(layout, spec, inner, "expert", layout.expert_axes)
    _shard_tensor(layout, spec, inner)
    if stored:
        taken = [m for axes in spec.values() for m in axes]
        here = {n: size / layout.mesh.size(spec.get(n, ())) for n, size in inner.items()}
        for name, axes in layout.stored_parts(here, taken).items():
            spec[name] = (*spec.get(name, ()), *axes)
    return spec


def _shard_tensor(layout: Layout, spec: AxisSpec, sizes: Sizes) -> None:
    for name in sizes:
        if name in TENSOR_AXES and _shard(layout, spec, sizes, name, layout.tensor_axes):
            return


def _shard(layout: Layout, spec: AxisSpec, sizes: Sizes, name: str, axes: tuple[str, ...]) -> bool:
    if name not in sizes or not axes or sizes[name] % layout.mesh.size(axes):
        return False
    spec[name] = axes
    return True


def group_counts(graph: Graph) -> set[int]:
    """Return the numbers of token groups in which slots are counted under a capacity."""
    nodes = (node for node in graph.every_node() if node.op.assigns_slots and not node.op.chooses)
    bounded = (attrs for attrs in map(SlotAttrs.of_node, nodes) if attrs.slots == "capacity")
    return {attrs.groups for attrs in bounded}
