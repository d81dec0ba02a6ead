"""Passes that do not keep what they promise, or leave a graph that is not one."""

from __future__ import annotations

from moecc.ir import Builder, Graph

from .rewriting import EXACT, RewritePass, before, each, named, nodes
from .sound import commute, reassociate


def say_nothing_changed(graph: Graph) -> int:
    """Commute an addition, and do not tell."""
    commute(graph)
    return 0


def say_something_changed(graph: Graph) -> int:
    return 1


def negate_twice(graph: Graph) -> int:
    """Sound, and never done."""
    for value in list(graph.outputs.values())[:1]:
        if value.type.dtype.is_float:
            b = Builder(graph)
            name = graph.output_names[0]
            graph.set_output(name, b.neg(b.neg(value)))
            return 1
    return 0


def leave_a_stale_type(graph: Graph) -> int:
    """Change an operand's type and infer nothing again."""
    for node in nodes(graph, "relu", "silu", "neg", "square"):
        x = node.operands[0]
        if x.type.axes:
            name = x.type.axes[0].name
            node.set_operand(0, before(node).rename(x, axis=name, to="stale_"))
            return 1
    return 0


def use_before_definition(graph: Graph) -> int:
    """Insert a node behind its user."""
    for node in nodes(graph, "add", "mul", "contract"):
        made = node.graph.append("stop_gradient", [node.operands[0]])
        node.set_operand(0, made.result)
        return 1
    return 0


MUTANTS = {
    **named(
        say_nothing_changed,
        say_something_changed,
        negate_twice,
        leave_a_stale_type,
        use_before_definition,
    ),
    "reassociate_and_promise_exact": RewritePass(each(reassociate, "add", "mul"), EXACT),
}

CAUGHT_BY_IDEMPOTENCE = ("negate_twice",)
"""The others may well change their own result."""
