"""The ways to bring tokens to their experts and back, where each is legal, and which is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from moecc.errors import InputError, Problem
from moecc.ir.dispatch_strategies import DISPATCHES
from moecc.ir.graph import Graph, Value
from moecc.ir.table.slots import is_slots
from moecc.ir.verify import where
from moecc_backends.xla.dispatch.all_experts import Dense
from moecc_backends.xla.dispatch.capacity_slots import GatheredSlots, OneHotSlots
from moecc_backends.xla.dispatch.layout import Packing, Routing
from moecc_backends.xla.dispatch.legality import is_ragged, why_rows_meet
from moecc_backends.xla.dispatch.per_token_weights import ChosenRows
from moecc_backends.xla.dispatch.sorted_rows import RaggedRows, SortedRows
from moecc_backends.xla.kernels.ragged_dot import why_no_kernel
from moecc_backends.xla.trace.options import AUTO, Options

_MOST_EMPTY = 1.5
"""Slots for each choice from which on rows are packed: empty slots cost as much as full ones."""

_FEW_CHOICES = 8
"""Up to this many choices an accelerator gathers weights: one step of decoding."""


@dataclass(frozen=True)
class Dispatch:
    """A dispatch lowering.

    Attributes:
      packs: settles how the rows of a routing lie.
      in_slots: whether rows lie in slots, as many for each expert, or each by itself.
    """

    packs: Callable[[Routing], Packing | Dense]
    in_slots: bool = False

    def why_not(self, place: Value) -> str | None:
        """Return why the routing of `place` cannot be lowered this way, or None."""
        if self.in_slots:
            return "slots=ragged sets no capacity" if is_ragged(place) else None
        return why_rows_meet(place)


TABLE: dict[str, Dispatch] = {
    "scan": Dispatch(Dense),
    "einsum": Dispatch(OneHotSlots, in_slots=True),
    "gather": Dispatch(GatheredSlots, in_slots=True),
    "grouped": Dispatch(SortedRows.of),
    "ragged_dot": Dispatch(RaggedRows.of),
    "gathered": Dispatch(ChosenRows.of),
}
"""By name: all experts on all tokens, one after the other (the oracle); one-hot products; gathers
into slots; a loop over blocks of sorted rows; JAX's product of sorted rows; weights by row."""

assert tuple(TABLE) == DISPATCHES, "options name what there is"


def packed(
    place: Value, routing: Routing, options: Options, dtype: jax.typing.DTypeLike
) -> Packing | Dense:
    """Settle how the rows of `routing` lie, by platform and shape, or as `options` force."""
    name = choose(place, routing, options, dtype) if options.dispatch == AUTO else options.dispatch
    return TABLE[name].packs(routing)


def choose(place: Value, routing: Routing, options: Options, dtype: jax.typing.DTypeLike) -> str:
    """Return the name of the dispatch lowering for `routing`.

    ``scan`` is an oracle, and ``einsum`` was slower than ``gather`` at every size measured
    (``benchmarks/moe_layer.py``): neither is chosen.
    """
    slots = routing.num_slots
    if slots is not None and (
        slots <= _MOST_EMPTY * routing.num_choices or why_rows_meet(place) is not None
    ):
        return "gather"
    if options.target != "cpu" and routing.num_choices <= min(_FEW_CHOICES, routing.num_experts):
        return "gathered"
    return "grouped" if why_no_kernel(options.target, dtype) else "ragged_dot"


def dispatch_problems(graph: Graph, options: Options) -> list[Problem]:
    """Return the routings of `graph` that the forced dispatch lowering does not fit."""
    if options.dispatch == AUTO:
        return []
    places = (v for node in graph.every_node() for v in node.results[-1:] if is_slots(v))
    return [p for place in places if (p := _problem(place, options.dispatch)) is not None]


def check_dispatch(graph: Graph, options: Options) -> None:
    """Check that the forced dispatch lowering fits every routing of `graph`.

    Raises:
      InputError: with every routing that it does not fit, why, and what does.
    """
    problems = dispatch_problems(graph, options)
    if problems:
        raise InputError(problems)


def _problem(place: Value, name: str) -> Problem | None:
    reason = TABLE[name].why_not(place)
    if reason is None:
        return None
    legal = [other for other, way in TABLE.items() if way.why_not(place) is None]
    assert place.node is not None, "slots are made"
    return Problem(
        f"this routing cannot be lowered with dispatch={name}",
        where(place.node),
        expected=f"auto, {', '.join(legal)}",
        found=reason,
    )
