"""A layout of the plan in the names of the layouts that ``annotate-sharding`` knows."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.plan.layout import Layout


def rules_of(layout: Layout) -> tuple[str, ...]:
    """Return the names of the rules that lay a graph as `layout` does, the first in front.

    ``fsdp`` comes first, so that the batch lies on the experts' axis innermost and rows reach
    their experts by one exchange.

    Raises:
      InputError: tokens are to be the same along the axis of data.
    """
    if layout.replicated and layout.expert_axes == ("data",):
        raise InputError(
            "the rows of data cannot all have the same tokens",
            where=f"mesh {layout.mesh}",
            hint="experts on an axis of their own: expert=8",
        )
    names = [n for n in ("fsdp",) if n in layout.mesh.names]
    names += _of_rows(layout)
    if layout.tensor_axes and "st-moe" not in names:
        names.append("tensor-parallel")
    if layout.dense_weights == "split":
        names.append("zero-expert" if layout.expert_axes == ("expert",) else "zero")
    return tuple(names)


def _of_rows(layout: Layout) -> list[str]:
    """Return what says where the batch lies besides, and the experts."""
    if layout.expert_axes == ("expert",):
        return ["expert-replicated" if layout.replicated else "expert-parallel"]
    if layout.expert_axes:
        return ["st-moe"]
    return ["data-parallel"] if "data" in layout.mesh.names else []
