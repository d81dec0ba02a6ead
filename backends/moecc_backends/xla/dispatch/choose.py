"""The dispatch strategies by name, where each is legal, and which is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax

from moecc.errors import InputError, Problem
from moecc.ir.conventions import DISPATCHES
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.slots import is_slots
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.all_experts import AllExperts, PerTokenWeights, UsedExperts
from moecc_backends.xla.dispatch.blocks import ExpertBlocks
from moecc_backends.xla.dispatch.capacity_slots import CapacitySlots, OneHotSlots, PoisonedSlots
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.kernels.grouped_matmul import grouped_matmul, ragged_matmul, why_no_kernel
from moecc_backends.xla.trace.context import AUTO, Options
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import MOST_LISTED, SLOT_AXES, DispatchLayout, SlotLayout

# What stands between dispatch and combine, and whether each row stands by itself.
#
# Under a capacity, rows may meet: a graph can sum over the slots of an expert, or return them.
# Then
# they have to be in slots, empty ones included.  Where no row meets another, they can be sorted,
# or
# never be made at all.

_SLOTS = frozenset(SLOT_AXES)


def is_ragged(slots: Value) -> bool:
    """Whether `slots` gives as many slots as there are choices."""
    return slots.node is not None and slots.node.attrs.get("slots") == "ragged"


def why_rows_meet(slots: Value) -> str | None:
    """Return why the rows of `slots` have to be in slots, or None if each stands by itself."""
    for node in region(slots):
        reason = _why_not_alone(node, slots)
        if reason is not None:
            return f"{where(node)}: {reason}"
    return None


def region(slots: Value) -> Iterator[Node]:
    """Yield the nodes that work on the rows of `slots`, and on what is made of them."""
    left = [n for n in slots.users if _dispatches(n, slots)]
    seen = set(left)
    while left:
        node = left.pop()
        yield node
        for value in node.results:
            new = [n for n in value.users if not _ends(n, value) and n not in seen]
            seen.update(new)
            left.extend(new)


def _dispatches(node: Node, slots: Value) -> bool:
    return node.op.moves is RowMove.TO_SLOTS and node.operands[2] is slots


def _ends(node: Node, rows: Value) -> bool:
    combines = node.op.moves is RowMove.TO_TOKENS and node.operands[0] is rows
    return combines or node is rows.graph.terminator


def _why_not_alone(node: Node, slots: Value) -> str | None:
    return "rows go to other devices" if node.op.places else why_meets(node, slots)


def why_meets(node: Node, slots: Value) -> str | None:
    """Return why `node`, which works on the rows of `slots`, does not do so row by row, or None."""
    if node.op.moves is RowMove.TO_SLOTS:
        return _why_leaves(node) if _dispatches(node, slots) else "rows are dispatched again"
    if node.op.moves is RowMove.TO_TOKENS:
        return "the gates or slots are made of rows"
    if node.body is not None:
        return "rows enter a body"
    return _why_mixed(node) or _why_leaves(node)


def _why_mixed(node: Node) -> str | None:
    """Return why `node` takes rows together, or the axes of their slots apart."""
    mixed = _SLOTS & set(node.mixes)
    if node.op.name == "positions" and "slot" not in mixed:
        # It reads no row: which expert or group a row belongs to is known wherever the row is.
        return None
    if mixed:
        return f"{node.op} mixes the rows along {', '.join(sorted(mixed))}"
    rows = any(set(v.type.names) >= _SLOTS for v in node.operands)
    if rows and not all(set(v.type.names) >= _SLOTS for v in node.results):
        return f"{node.op} takes the axes {', '.join(SLOT_AXES)} apart"
    return None


def _why_leaves(node: Node) -> str | None:
    if any(value.is_output for value in node.results):
        return "rows are returned by the graph"
    if not any(value.users for value in node.results):
        return "rows are never combined"
    return None


_MOST_EMPTY = 1.5
"""Slots for each choice from which on rows are sorted: empty slots cost as much as full ones.
Measured on a CPU (``benchmarks/moe_layer.py``)."""

_FEW_CHOICES = 8
"""Up to this many choices an accelerator gathers weights: one step of decoding."""

_ROWS_OF_A_BLOCK = 64
"""From this mean number of an expert's rows on, a CPU takes a block of them through all products;
below that, one product at a time is as quick (``benchmarks/moe_layer.py``)."""

_FEW_TOKENS = 4
"""Up to this many tokens a CPU runs the experts that are used on all of them."""


@dataclass(frozen=True)
class SlotStrategy:
    """A strategy that lays out rows in slots, as many for each expert.

    Attributes:
      plan: lays out the rows of a routing.
    """

    plan: Callable[[Routing], SlotLayout]
    in_slots = True

    def layout(self, routing: Routing, options: Options) -> DispatchLayout:
        """Return the layout of the rows of `routing`."""
        layout = self.plan(routing)
        return PoisonedSlots(layout) if options.poison else layout

    def why_not(self, slots: Value) -> str | None:
        """Return why the routing of `slots` cannot be lowered this way, or None."""
        return "slots=ragged sets no capacity" if is_ragged(slots) else None


@dataclass(frozen=True)
class RowStrategy:
    """A strategy for which each row stands by itself.

    Attributes:
      plan: lays out the rows of a routing.
    """

    plan: Callable[[Routing], DispatchLayout]
    in_slots = False

    def layout(self, routing: Routing, options: Options) -> DispatchLayout:
        """Return the layout of the rows of `routing`."""
        return self.plan(routing)

    def why_not(self, slots: Value) -> str | None:
        """Return why the routing of `slots` cannot be lowered this way, or None."""
        return why_rows_meet(slots)


TABLE: dict[str, SlotStrategy | RowStrategy] = {
    "scan": RowStrategy(AllExperts),
    "einsum": SlotStrategy(OneHotSlots),
    "gather": SlotStrategy(CapacitySlots),
    "grouped": RowStrategy(partial(SortedRows.of, kernel=grouped_matmul)),
    "blocks": RowStrategy(ExpertBlocks),
    "ragged_dot": RowStrategy(partial(SortedRows.of, kernel=ragged_matmul)),
    "gathered": RowStrategy(PerTokenWeights.of),
    "used": RowStrategy(UsedExperts),
}
"""By name: all experts on all tokens, one after the other (the oracle); one-hot products; gathers
into slots; for each product a loop over blocks of sorted rows, or one loop for all products; JAX's
product of sorted rows; weights by row; the experts that are used."""

assert tuple(TABLE) == DISPATCHES, "options name what there is"


def plan_dispatch(
    slots: Value, routing: Routing, options: Options, dtype: jax.typing.DTypeLike
) -> DispatchLayout:
    """Lay out the rows of `routing`, by platform and shape, or as `options` force."""
    name = choose(slots, routing, options, dtype) if options.dispatch == AUTO else options.dispatch
    return TABLE[name].layout(routing, options)


def choose(slots: Value, routing: Routing, options: Options, dtype: jax.typing.DTypeLike) -> str:
    """Return the name of the dispatch lowering for `routing`.

    ``scan`` is an oracle, and ``einsum`` was slower than ``gather`` at every size measured
    (``benchmarks/moe_layer.py``): neither is chosen.
    """
    count = routing.num_slots
    if count is not None and (
        count <= _MOST_EMPTY * routing.num_choices or why_rows_meet(slots) is not None
    ):
        return "gather"
    if why_rows_meet(slots) is None:
        few = min(_FEW_CHOICES, routing.num_experts)
        if options.target != "cpu" and routing.num_choices <= few:
            return "gathered"
        if options.target == "cpu" and options.in_place and _is_a_step(routing):
            return "used"
        if options.target == "cpu" and not options.in_place and _fills_blocks(routing):
            return "blocks"
    return "grouped" if why_no_kernel(options.target, dtype) else "ragged_dot"


def _is_a_step(routing: Routing) -> bool:
    """Whether tokens are so few that reading weights is what costs, and experts can be listed."""
    return routing.num_tokens <= _FEW_TOKENS and routing.num_experts <= MOST_LISTED


def _fills_blocks(routing: Routing) -> bool:
    """Whether an expert's rows are enough for a block that goes through all of its products."""
    return routing.num_choices >= _ROWS_OF_A_BLOCK * routing.num_experts


def dispatch_problems(graph: Graph, options: Options) -> list[Problem]:
    """Return the routings of `graph` that the forced dispatch lowering does not fit."""
    if options.dispatch == AUTO:
        return []
    assigned = (v for node in graph.every_node() for v in node.results[-1:] if is_slots(v))
    return [p for slots in assigned if (p := _problem(slots, options.dispatch)) is not None]


def check_dispatch(graph: Graph, options: Options) -> None:
    """Check that the forced dispatch lowering fits every routing of `graph`.

    Raises:
      InputError: with every routing that it does not fit, why, and what does.
    """
    problems = dispatch_problems(graph, options)
    if problems:
        raise InputError(problems)


def _problem(slots: Value, name: str) -> Problem | None:
    reason = TABLE[name].why_not(slots)
    if reason is None:
        return None
    legal = [other for other, way in TABLE.items() if way.why_not(slots) is None]
    assert slots.node is not None, "slots are made"
    return Problem(
        f"this routing cannot be lowered with dispatch={name}",
        where(slots.node),
        expected=f"auto, {', '.join(legal)}",
        found=reason,
    )
