"""Metrics of routing, made of the sums that the graphs of micro-batches return.

They work on numbers and arrays of NumPy and of jax alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from moecc.ir.graph import Graph
from moecc.support.untyped import Json, JsonDict

PREFIX = "metric."
LOSSES = "losses"
"""The graph attribute with the options with which ``add-losses`` added losses."""

LONG = {"z": "router_z"}
"""Losses that an option abbreviates."""

ROWS, ASKED = "rows", "asked"


def coefficients(graph: Graph) -> dict[str, float]:
    """Return the coefficients of the losses of routers, by the output that is the loss."""
    options = graph.attrs.get(LOSSES)
    found = options if isinstance(options, Mapping) else {}
    return {
        f"loss.{LONG.get(name, name)}": float(value)
        for key, value in found.items()
        if (name := key.removesuffix("_coef")) != key and value
    }


def finished(sums: Json) -> JsonDict:
    """Return what the sums over a batch say of each routed layer, beside all other outputs.

    ``loads``: each expert's share of the rows with a slot; ``dropped``: the share of the choices
    that got none; ``max_violation``: the largest load over the mean, less 1 (Wang et al. 2024);
    ``dead_experts``: those without a row.

    Args:
      sums: the outputs of the graph of a micro-batch, added.
    """
    found = dict(sums)
    for name, rows in sums.items():
        if not (name.startswith(PREFIX) and name.endswith(f".{ROWS}")):
            continue
        layer = name.removesuffix(ROWS)
        total = rows.sum()
        loads = rows / (total + (total == 0))
        found[f"{layer}loads"] = loads
        found[f"{layer}max_violation"] = loads.max() * rows.shape[0] - 1
        found[f"{layer}dead_experts"] = (rows == 0).sum()
        if f"{layer}{ASKED}" in sums:
            asked = sums[f"{layer}{ASKED}"]
            found[f"{layer}dropped"] = (asked - total) / (asked + (asked == 0))
    return found
