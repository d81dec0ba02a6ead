"""What a conversion consists of."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir.graph import Graph
from moecc.pipeline.passes import Preserves
from moecc.pipeline.text import Pipeline
from moecc.tasks.contracts import Contracts
from moecc_backends.islands.call import State
from moecc_backends.islands.report import Report
from moecc_backends.xla.trace.typed_jax import PyTree


@dataclass(frozen=True)
class Record:
    """New parameters, the graph that they are of, and how they were made.

    Attributes:
      params: ``{"params": …, "moe": …}``, the tree with experts in place, and routers by name.
      graph: all blocks as one graph, rewritten.
      report: what was done.
      preserves: what the passes promise.
      pipeline: the passes.
      seed: of the random numbers.
      contracts: what the passes were found to keep, at reduced sizes.
      state: what functions of the parameters need to know.
    """

    params: PyTree
    graph: Graph
    report: Report
    preserves: Preserves
    pipeline: Pipeline
    seed: int
    contracts: Contracts
    state: State
