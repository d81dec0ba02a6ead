"""The evidence for the promise of a pass: a proof, or drawn data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moecc.ir.graph import Graph
from moecc.prove.prover import Prover
from moecc.rewrite.passes import Pass

Evidence = Literal["proved", "sampled", "none"]
"""The evidence for a promise: a proof for all inputs, drawn data, or nothing."""


def evidence(item: Pass, graph: Graph, seeds: Sequence[int] = (0,)) -> Evidence:
    """Prove that the pass preserves the function as it promises, or check it on drawn data.

    Args:
      item: the pass.
      graph: stays as it is.
      seeds: of the drawn data.

    Returns:
      ``proved`` for all inputs, weights and open sizes; ``sampled`` where no proof was found and
      the outputs agree on drawn data; ``none`` for an ``approximate``
      pass, which promises nothing of that kind.

    Raises:
      AssertionError: the outputs differ on drawn data.
    """
    from moecc.testing.laws import applied, check_preserves

    after, result = applied(item, graph)
    promise = result.preserves or item.preserves
    if promise.kind == "approximate":
        return "none"
    outputs = graph.outputs.keys()
    prover = Prover(exact=promise.kind == "exact")
    if prover.prove(graph, after, outputs=outputs, refute=False):
        return "proved"
    check_preserves(item, graph, seeds)
    return "sampled"
