"""What a plan knows of an attention that is one operation: what decides its kernel, its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecc.ir.attention_axes import Program, facts_of
from moecc.ir.attention_kernels import AttentionFacts
from moecc.ir.attributes import AttentionAttrs
from moecc.ir.graph import Node
from moecc.plan.shapes import Shape, Shapes


@dataclass(frozen=True)
class PlannedAttention:
    """An attention, as a plan sees it.

    Attributes:
      facts: what decides its kernel, but for the program that it is in.
      scores: the shape of its scores, which are in no operand.
    """

    facts: AttentionFacts
    scores: Shape


def attention_of(
    node: Node, size: Callable[[object], float], shapes: Shapes
) -> PlannedAttention | None:
    """Return what a plan knows of an attention; None of any other node.

    Args:
      node: the node.
      size: the size that the size of an axis stands for.
      shapes: makes shapes.
    """
    if not node.op.attends:
        return None
    attrs = AttentionAttrs.of_node(node)
    query, key, value = (
        {a.name: int(size(a.size)) for a in v.type.axes} for v in node.operands[:3]
    )
    scores = {n: float(s) for n, s in (query | key).items() if n != attrs.over}
    # Of the program the machine decides, which is not known here.
    facts = facts_of(query, key, value, attrs, Program("", ""))
    return PlannedAttention(facts, shapes.of(tuple(scores.items())))
