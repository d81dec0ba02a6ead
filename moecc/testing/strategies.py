"""Hypothesis strategies for graphs: well typed, small, and shrinking to what matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moecc.errors import MachineError
from moecc.ir.graph import Graph
from moecc.ir.printer import print_graph
from moecc.testing.generate import MAX_STEPS, grow
from moecc.testing.growth import Step

try:
    from hypothesis import note
    from hypothesis import strategies as st
except ImportError:
    raise MachineError(
        "the strategies need Hypothesis, which is not installed",
        hint="pip install 'moecc[testing]'",
    ) from None

_BYTE = st.integers(0, 255)


class _Drawn:
    """Decisions that Hypothesis draws and shrinks."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def below(self, count: int) -> int:
        # Modulo, so that a decision keeps its meaning when Hypothesis deletes an earlier one.
        return int(self.draw(_BYTE)) % count


@st.composite
def graphs(
    draw: Any,
    *,
    steps: Sequence[Step] | None = None,
    max_steps: int = MAX_STEPS,
    dead: bool = False,
) -> Graph:
    """Draw a well-typed graph whose outputs depend on everything in it.

    Operations and whole blocks (feed-forward, attention, mixture of experts) are appended, each
    on earlier values; then some of the values that nothing uses become the outputs, and what
    they do not need is removed.  Inside a block, a value has another user in 30 % of the cases.

    Args:
      draw: given by Hypothesis.
      steps: what may be appended, from simple to complex; a step is a function of a `Growth`.
      max_steps: the most steps.
      dead: whether nodes that no output needs stay.
    """
    graph = grow(_Drawn(draw), steps, max_steps, dead=dead)
    note(print_graph(graph))
    return graph
