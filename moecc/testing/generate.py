"""Random graphs: steps and blocks in random order, then what no output needs is removed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecc.ir.dtypes import BF16, F32, F64
from moecc.ir.graph import Graph, Value
from moecc.ir.types import Axis, TensorType
from moecc.testing.blocks import BLOCKS
from moecc.testing.growth import Choices, Growth, Step
from moecc.testing.steps import SIMPLE

MAX_STEPS = 8
"""The most steps of a graph; a step is an operation or a block."""


class _Random:
    """Decisions that a seed makes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, count: int) -> int:
        return int(self.rng.integers(count))


def random_graph(
    seed: int,
    *,
    steps: Sequence[Step] | None = None,
    max_steps: int = MAX_STEPS,
    dead: bool = False,
) -> Graph:
    """Return a graph as `moecc.testing.graphs` draws it, chosen by a seed."""
    return grow(_Random(seed), steps, max_steps, dead=dead)


def grow(
    choices: Choices,
    steps: Sequence[Step] | None = None,
    max_steps: int = MAX_STEPS,
    *,
    dead: bool = False,
) -> Graph:
    """Return a graph that grows as `choices` decide.

    Args:
      choices: where the decisions come from.
      steps: what may be appended; None means operations and, half of the time, blocks.
      max_steps: the most steps.
      dead: whether nodes that no output needs stay.
    """
    growth = Growth(choices, (F32, F32, BF16, F64)[choices.below(4)])
    embed = growth.size_of("embed")
    axes = (Axis("batch", "B"), Axis("seq", "S"), Axis("embed", embed))
    growth.input("x", TensorType(growth.dtype, axes))
    for _ in range(1 + choices.below(max_steps)):
        growth.relocate()
        kinds = steps or (BLOCKS if growth.chance(35) else SIMPLE)
        since = len(growth.values)
        growth.pick(kinds)(growth)
        growth.tap(since, 8)
    _return_sinks(growth)
    if not dead:
        remove_dead(growth.graph)
    return growth.graph


def _return_sinks(growth: Growth) -> None:
    """Return one to three of the values that nothing uses, and what was tapped."""
    graph = growth.graph
    sinks = [v for v in growth.values if v.node is not None and not v.users]
    sinks = sinks or [growth.values[-1]]
    count = 1 + growth.choices.below(min(3, len(sinks)))
    first = growth.choices.below(len(sinks))
    kept: list[Value] = [*(sinks[(first + i) % len(sinks)] for i in range(count)), *growth.taps]
    for number, value in enumerate(dict.fromkeys(kept)):
        graph.set_output(f"y{number}", value)


def remove_dead(graph: Graph) -> None:
    """Remove the nodes and parameters that no output needs."""
    for node in graph.walk_back():
        if node.is_dead:
            node.erase()
    for name in [n for n, v in graph.params.items() if not v.users]:
        graph.erase_param(name)
