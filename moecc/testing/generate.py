"""Random graphs: steps and blocks in random order, then what no output needs is removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.slots import is_slots
from moecc.testing.blocks import BLOCKS
from moecc.testing.draws import Decisions
from moecc.testing.growth import Growth, Step
from moecc.testing.planting import Example, plant
from moecc.testing.steps import SIMPLE
from moecc.types import BF16, F32, F64, TensorType

MAX_STEPS = 8
"""The most steps of a graph; a step is an operation or a block."""


def random_graph(
    seed: int,
    *,
    steps: Sequence[Step] | None = None,
    max_steps: int = MAX_STEPS,
    dead: bool = False,
    like: Example | Sequence[Example] = (),
) -> Graph:
    """Return a well-typed graph whose outputs depend on everything in it.

    Args:
      seed: chooses the graph.
      steps: what may be appended, from simple to complex; a step is a function of a `Growth`.
        None means operations, and in a third of the cases a whole block.
      max_steps: the most steps.
      dead: whether nodes that no output needs stay.
      like: rules, patterns or graphs, one or several; what one of them matches is planted among
        the steps.
    """
    examples = tuple(like) if isinstance(like, Sequence) else (like,)
    choices = Decisions(seed)
    growth = Growth(choices, (F32, F32, BF16, F64)[choices.below(4)])
    growth.input("x", TensorType(growth.dtype, (*growth.tokens, growth.embed)))
    count = 1 + choices.below(max_steps)
    at = choices.below(count) if examples else -1
    for number in range(count):
        growth.relocate()
        if number == at:
            plant(growth, growth.pick(examples))
            continue
        kinds = steps or (BLOCKS if growth.chance(35) else SIMPLE)
        since = len(growth.values)
        growth.pick(kinds)(growth)
        growth.tap(since, 20)
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
    returned: list[Value] = [*(sinks[(first + i) % len(sinks)] for i in range(count)), *growth.taps]
    for number, value in enumerate(dict.fromkeys(returned)):
        graph.set_output(f"y{number}", value)


def remove_dead(graph: Graph) -> None:
    """Remove the nodes, parameters and inputs that no output needs."""
    for node in graph.walk_back():
        if node.is_dead:
            node.erase()
    for name in [n for n, v in graph.params.items() if not v.users]:
        graph.erase_param(name)
    for name in [n for n, v in graph.inputs.items() if not v.users]:
        graph.erase_input(name)


def keep_only(graph: Graph, keep: Callable[[int], bool]) -> None:
    """Cut nodes out of `graph`: what they took is returned, what they gave becomes an input.

    So a graph shrinks from all sides to the few nodes that matter.  Rows in slots cannot be an
    input: an operand of the same type stands in; without one the node stays.

    Args:
      graph: is changed in place.
      keep: whether the node of a position stays.
    """
    cut = [node for position, node in enumerate(graph) if not keep(position)]
    for node in reversed(cut):
        _cut(graph, node)
    if not cut:
        return
    results = {n: v for n, v in graph.outputs.items() if v.node is not None}
    for name in graph.outputs.keys() - results.keys() if results else ():
        graph.drop_output(name)
    remove_dead(graph)


def _cut(graph: Graph, node: Node) -> None:
    used = [v for v in node.results if v.users.keys() - {graph.terminator}]
    stand_ins = {v: _stand_in(v) for v in used}
    operands = list(dict.fromkeys(node.operands))
    if None in stand_ins.values() or not (operands or graph.inputs):
        return
    for name in [n for n, v in graph.outputs.items() if v in node.results]:
        graph.drop_output(name)
    for value, stand_in in stand_ins.items():
        name = graph.fresh(f"{value.name}_in")
        value.replace_by(stand_in if isinstance(stand_in, Value) else graph.input(name, value.type))
    node.erase()
    for operand in operands:
        if not operand.users and operand.node is not None:
            graph.set_output(_free_output(graph), operand)
    if not graph.output_names:
        graph.set_output("y0", next(iter([*operands, *graph.inputs.values()])))


def _stand_in(value: Value) -> Value | str | None:
    """Return what `value` may be exchanged for: an operand, ``"input"``, or None for nothing."""
    assert value.node is not None
    if is_slots(value):
        return None
    if not value.type.extents:
        return "input"
    return next((v for v in value.node.operands if v.type == value.type), None)


def _free_output(graph: Graph) -> str:
    number = 0
    while f"y{number}" in graph.output_names:
        number += 1
    return f"y{number}"
