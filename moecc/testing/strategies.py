"""Hypothesis strategies for graphs: well typed, small, and shrinking to what matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from moecc.errors import MachineError
from moecc.ir.graph import Graph
from moecc.ir.mesh import Mesh, parse_mesh
from moecc.ir.structure import clone
from moecc.ir.text import print_graph
from moecc.support.extras import install_hint
from moecc.testing.generate import (
    MAX_STEPS,
    Example,
    keep_only,
    random_graph,
    random_sharding,
    steps_by_operation,
)
from moecc.testing.growth import Step
from moecc.testing.weights import Decisions

try:
    from hypothesis import note
    from hypothesis import strategies as st
except ImportError:
    raise MachineError(
        "the strategies need Hypothesis, which is not installed",
        hint=install_hint("testing"),
    ) from None

_SEEDS = st.integers(0, 2**24 - 1)
_KEPT = st.binary(min_size=96, max_size=96)


def graphs(
    *,
    steps: Sequence[Step] | None = None,
    max_steps: int = MAX_STEPS,
    dead: bool = False,
    like: Example | Sequence[Example] = (),
    mesh: str = "",
) -> st.SearchStrategy[Graph]:
    """Draw a well-typed graph whose outputs depend on everything in it.

    Operations and whole blocks (feed-forward, attention, mixture of experts) are appended, each
    on earlier values; then some of the values that nothing uses become the outputs, and what
    they do not need is removed.  Inside a block, a value has another user in 30 % of the cases.

    Hypothesis draws the seed of a graph and the nodes to cut out of it, next to none at first;
    to shrink a counterexample is to cut out more.  Drawn decision by decision, half of the
    graphs would be nearly empty or repeat an earlier one, and the rest would stop shrinking at
    the block that has the fault.

    Args:
      steps: what may be appended, from simple to complex; a step is a function of a `Growth`.
      max_steps: the most steps.
      dead: whether nodes that no output needs stay.
      like: rules, patterns or graphs, one or several: what one of them matches is planted in every
        graph, as far as it can be made; at times with another user of what is inside.
      mesh: a mesh, ``a:2,b:2``, over which the graph is sharded at random; empty: none.
    """
    examples = tuple(like) if isinstance(like, Sequence) else (like,)
    if examples:
        # Here, not while Hypothesis takes the time of what it draws.
        steps_by_operation()
    options = _Options(None if steps is None else tuple(steps), max_steps, dead, examples)
    return _graphs(options, parse_mesh(mesh) if mesh else None)


@dataclass(frozen=True)
class _Options:
    """What `random_graph` takes beside the seed."""

    steps: tuple[Step, ...] | None
    max_steps: int
    dead: bool
    like: tuple[Example, ...]


@lru_cache(maxsize=4)
def _grown(options: _Options, seed: int) -> Graph:
    """Return the graph of a seed; to shrink is, most of the time, to cut up the same one."""
    return random_graph(seed, **vars(options))


@st.composite
def _graphs(draw: st.DrawFn, options: _Options, mesh: Mesh | None) -> Graph:
    seed = draw(_SEEDS)
    graph = clone(_grown(options, seed))
    share = draw(_KEPT)
    if 0 in share:
        keep_only(graph, lambda position: share[position % len(share)] > 0)
    if mesh is not None:
        graph = random_sharding(graph, Decisions(seed), mesh)
    note(print_graph(graph))
    return graph
