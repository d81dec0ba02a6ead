"""Where values and parameters lie on a mesh under a layout of the plan, by the names of their axes.

`moecc.plan.layout.Layout` says which mesh axes split the batch, the experts, the neurons and the
parameters; what stands here applies that to one array.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.ir.graph import Graph, Node
from moecc.plan.layout import TENSOR_AXES, Layout

Parts = dict[str, tuple[str, ...]]
"""For each axis that is split, the mesh axes that it lies on, outermost first."""

Sizes = Mapping[str, int]
"""The sizes of the axes of an array, by name."""


def value_parts(layout: Layout, sizes: Sizes) -> Parts:
    """Return the parts of a value whose axes have `sizes`.

    Rows of experts lie with their experts, and their groups on what is left of the batch.
    """
    parts: Parts = {}
    if "slot" in sizes and "expert" in sizes:
        rest = tuple(n for n in layout.batch_axes if n not in layout.expert_axes)
        _split(layout, parts, sizes, "expert", layout.expert_axes)
        _split(layout, parts, sizes, "group", rest)
    _split(layout, parts, sizes, "batch", layout.batch_axes)
    _split_tensor(layout, parts, sizes)
    return parts


def group_parts(layout: Layout, sizes: Sizes) -> Parts:
    """Return the parts of what lies with its token groups, before or after an exchange."""
    parts: Parts = {}
    _split(layout, parts, sizes, "group", layout.batch_axes)
    return parts


def weight_parts(layout: Layout, sizes: Sizes, *, stored: bool, layers: str = "") -> Parts:
    """Return the parts of a parameter.

    Args:
      layout: the layout.
      sizes: of its axes.
      stored: where it lies, or else where it is used.
      layers: the axis along which layers are stacked, which is never split.
    """
    parts: Parts = {}
    inner = {name: size for name, size in sizes.items() if name != layers}
    of_experts = "expert" in inner
    if of_experts:
        _split(layout, parts, inner, "expert", layout.expert_axes)
    _split_tensor(layout, parts, inner)
    if stored:
        taken = [m for axes in parts.values() for m in axes]
        here = {n: size / layout.mesh.size(parts.get(n, ())) for n, size in inner.items()}
        for name, axes in layout.stored_parts(here, taken).items():
            parts[name] = (*parts.get(name, ()), *axes)
    return parts


def _split_tensor(layout: Layout, parts: Parts, sizes: Sizes) -> None:
    for name in sizes:
        if name in TENSOR_AXES and _split(layout, parts, sizes, name, layout.tensor_axes):
            return


def _split(layout: Layout, parts: Parts, sizes: Sizes, name: str, axes: tuple[str, ...]) -> bool:
    if name not in sizes or not axes or sizes[name] % layout.mesh.size(axes):
        return False
    parts[name] = axes
    return True


def group_counts(graph: Graph) -> set[int]:
    """Return the numbers of token groups in which slots are counted under a capacity."""
    return {
        int(node.attrs["groups"])
        for node in _all_nodes(graph)
        if node.op.name == "assign_slots" and node.attrs["slots"] == "capacity"
    }


def _all_nodes(graph: Graph) -> Iterator[Node]:
    for node in graph:
        yield node
        if node.body is not None:
            yield from node.body
