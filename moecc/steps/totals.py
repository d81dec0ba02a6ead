"""Numbers of a whole batch that the losses of its micro-batches are divided by."""

from __future__ import annotations

from typing import Any

from moecc.ir.graph import Graph
from moecc.ir.routed import TOTALS, Total
from moecc.support.untyped import Json


def totals_of(graph: Graph) -> dict[str, Total]:
    """Return the totals that the graph of a micro-batch takes, by the names of its inputs."""
    return {name: Total(**said) for name, said in (graph.attrs.get(TOTALS) or {}).items()}


def counted(total: Total, batch: Json, parts: int) -> Any:
    """Return a total of a batch; arrays are NumPy's or jax's.

    Args:
      total: what is counted.
      batch: the masks ``[batch, seq]`` by name, and all else that it holds.
      parts: the micro-batches that it is cut into.
    """
    mask = batch[total.mask]
    if total.unit == "token":
        return mask.sum()
    if total.unit == "sequence":
        return mask.reshape(mask.shape[0], -1).any(1).sum()
    groups = mask.size // total.group_size if total.group_size else total.groups * parts
    return mask.reshape(groups, -1).any(1).sum()
