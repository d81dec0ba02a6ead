"""Hypothesis strategies for graphs: well typed, small, and shrinking to what matters."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.errors import MachineError
from moecc.ir.graph import Graph
from moecc.ir.printer import print_graph
from moecc.testing.generate import MAX_STEPS, keep_only, random_graph
from moecc.testing.growth import Step

try:
    from hypothesis import note
    from hypothesis import strategies as st
except ImportError:
    raise MachineError(
        "the strategies need Hypothesis, which is not installed",
        hint="pip install 'moecc[testing]'",
    ) from None

_SEEDS = st.integers(0, 2**24 - 1)
_KEPT = st.binary(min_size=96, max_size=96)


@st.composite
def graphs(
    draw: st.DrawFn,
    *,
    steps: Sequence[Step] | None = None,
    max_steps: int = MAX_STEPS,
    dead: bool = False,
) -> Graph:
    """Draw a well-typed graph whose outputs depend on everything in it.

    Operations and whole blocks (feed-forward, attention, mixture of experts) are appended, each
    on earlier values; then some of the values that nothing uses become the outputs, and what
    they do not need is removed.  Inside a block, a value has another user in 30 % of the cases.

    Hypothesis draws the seed of a graph and the nodes to cut out of it, next to none at first;
    to shrink a counterexample is to cut out more.  Drawn decision by decision, half of the
    graphs would be nearly empty or repeat an earlier one, and the rest would stop shrinking at
    the block in which the fault lies.

    Args:
      draw: given by Hypothesis.
      steps: what may be appended, from simple to complex; a step is a function of a `Growth`.
      max_steps: the most steps.
      dead: whether nodes that no output needs stay.
    """
    graph = random_graph(draw(_SEEDS), steps=steps, max_steps=max_steps, dead=dead)
    kept = draw(_KEPT)
    if 0 in kept:
        keep_only(graph, lambda position: kept[position % len(kept)] > 0)
    note(print_graph(graph))
    return graph
