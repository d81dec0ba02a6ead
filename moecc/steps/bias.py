"""The loss-free balance bias: found in a graph, and updated by what a batch chose.

It is no parameter of the optimiser: it has no gradient, and is updated once a step, by the choices
of the whole batch (Wang et al. 2024; DeepSeek-V3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moecc.ir.graph import Graph
from moecc.ir.metrics import BALANCE_BIASES
from moecc.model.balance import updated_bias
from moecc.types.ranges import element, lengths


def bias_counts(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Return the outputs that count choices, one for each layer, by the balance bias in `graph`."""
    counts: Mapping[str, str] = graph.attrs.get(BALANCE_BIASES) or {}
    found = {}
    for name in graph.params:
        layers = max(lengths(name), default=0)
        members = [element(name, at) for at in range(layers)] if layers else [name]
        if all(member in counts for member in members):
            found[name] = tuple(counts[member] for member in members)
    return found


def moved(bias: Any, counts: Any, rate: float) -> Any:
    """Return a bias after a step, with a mean of zero: a common part decides nothing.

    Args:
      bias: ``[expert]``, or ``[layer, expert]``.
      counts: how many choices of the batch name each expert, of the same shape.
      rate: the step, γ.
    """
    made = updated_bias(bias, counts, rate)
    return made - made.mean(-1)[..., None]
