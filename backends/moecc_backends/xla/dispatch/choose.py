"""The dispatch strategies by name, where each is legal, and which is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax

from moecc.errors import Problem, raise_problems
from moecc.ir.conventions import STRATEGIES
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.slots import is_slots
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.blocks import ExpertBlocks, UsedExperts
from moecc_backends.xla.dispatch.sorted_rows import CapacitySlots, PermutedRows, SortedRows
from moecc_backends.xla.kernels.grouped_matmul import grouped_matmul, ragged_matmul, why_no_kernel
from moecc_backends.xla.trace.context import AUTO, Options
from moecc_backends.xla.trace.values import MOST_LISTED, SLOT_AXES, DispatchLayout, Routing

# The operations between dispatch and combine, and whether each row stands by itself.
#
# Under a capacity, rows may meet: a graph can sum over the slots of an expert, or return them.
# Then they have to be in slots, empty ones included.  Where no row meets another, they can be
# sorted, or never be made at all.


def why_rows_meet(slots: Value) -> str | None:
    """Return why the rows of `slots` have to be in slots, or None if each stands by itself."""
    for node in region(slots):
        reason = "rows go to other devices" if node.op.places else why_meets(node, slots)
        if reason is not None:
            return f"{where(node)}: {reason}"
    return None


def region(slots: Value) -> Iterator[Node]:
    """Yield the nodes that work on the rows of `slots`, and on the results of such nodes."""
    pending = [n for n in slots.users if _dispatches(n, slots)]
    visited = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for value in node.results:
            for user in value.users:
                combines = user.op.moves is RowMove.TO_TOKENS and user.operands[0] is value
                if not combines and user is not value.graph.terminator and user not in visited:
                    visited.add(user)
                    pending.append(user)


def _dispatches(node: Node, slots: Value) -> bool:
    return node.op.moves is RowMove.TO_SLOTS and node.operands[2] is slots


def why_meets(node: Node, slots: Value) -> str | None:
    """Return why `node`, which works on the rows of `slots`, does not do so row by row, or None."""
    if node.op.moves is RowMove.TO_SLOTS and not _dispatches(node, slots):
        return "rows are dispatched again"
    if node.op.moves is RowMove.TO_TOKENS:
        return "the gates or slots are made of rows"
    if node.body is not None:
        return "rows enter a body"
    mixed, axes = set(SLOT_AXES) & set(node.mixes), set(SLOT_AXES)
    # Positions read no row: the expert and group of a row are known wherever the row is.
    if node.op.moves is not RowMove.TO_SLOTS and (node.op.name != "positions" or "slot" in mixed):
        if mixed:
            return f"{node.op} mixes the rows along {', '.join(sorted(mixed))}"
        takes_rows = any(axes <= set(v.type.names) for v in node.operands)
        if takes_rows and not all(axes <= set(v.type.names) for v in node.results):
            return f"{node.op} takes the axes {', '.join(SLOT_AXES)} apart"
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

LAYOUTS: dict[str, Callable[[Routing], DispatchLayout]] = {
    "gather": CapacitySlots,
    "grouped": partial(SortedRows.of, kernel=grouped_matmul),
    "blocks": ExpertBlocks,
    "ragged_dot": partial(SortedRows.of, kernel=ragged_matmul),
    "gathered": PermutedRows.unsorted,
    "used": UsedExperts,
}
"""How each strategy lays out the rows of a routing, by the names of `moecc.ir.conventions`."""

_IN_SLOTS = {row.name for row in STRATEGIES if row.in_slots}


def why_not(name: str, slots: Value) -> str | None:
    """Return why the routing of `slots` cannot be lowered with the strategy `name`, or None."""
    if name not in _IN_SLOTS:
        return why_rows_meet(slots)
    is_ragged = slots.node is not None and slots.node.attrs.get("slots") == "ragged"
    return "slots=ragged sets no capacity" if is_ragged else None


def plan_dispatch(
    slots: Value, routing: Routing, options: Options, dtype: jax.typing.DTypeLike
) -> DispatchLayout:
    """Lay out the rows of `routing`, by platform and shape, or as `options` force."""
    name = choose(slots, routing, options, dtype) if options.dispatch == AUTO else options.dispatch
    return CapacitySlots(routing, options.poison) if name == "gather" else LAYOUTS[name](routing)


def choose(slots: Value, routing: Routing, options: Options, dtype: jax.typing.DTypeLike) -> str:
    """Return the name of the dispatch strategy for `routing`."""
    meets, count = why_rows_meet(slots) is not None, routing.num_slots
    if count is not None and (count <= _MOST_EMPTY * routing.num_choices or meets):
        return "gather"
    if not meets:
        is_cpu, experts = options.target == "cpu", routing.num_experts
        if not is_cpu and routing.num_choices <= min(_FEW_CHOICES, experts):
            return "gathered"
        # Tokens are so few that reading weights is the cost, and experts can be listed.
        if is_cpu and options.in_place:
            if routing.num_tokens <= _FEW_TOKENS and experts <= MOST_LISTED:
                return "used"
        elif is_cpu and routing.num_choices >= _ROWS_OF_A_BLOCK * experts:
            return "blocks"
    return "grouped" if why_no_kernel(options.target, dtype) else "ragged_dot"


def dispatch_problems(graph: Graph, options: Options) -> list[Problem]:
    """Return the routings of `graph` that the forced dispatch strategy does not fit."""
    if options.dispatch == AUTO:
        return []
    problems = []
    for node in graph.every_node():
        for slots in filter(is_slots, node.results[-1:]):
            reason = why_not(options.dispatch, slots)
            if reason is not None:
                legal = [name for name in LAYOUTS if why_not(name, slots) is None]
                problems.append(
                    Problem(
                        f"this routing cannot be lowered with dispatch={options.dispatch}",
                        where(node),
                        expected=f"auto, {', '.join(legal)}",
                        found=reason,
                    )
                )
    return problems


def check_dispatch(graph: Graph, options: Options) -> None:
    """Check that the forced dispatch strategy fits every routing of `graph`.

    Raises:
      InputError: with every routing that it does not fit, why, and which strategies do.
    """
    problems = dispatch_problems(graph, options)
    raise_problems(problems)
