"""What a plan knows of an attention that is one operation: what decides its kernel, its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecc.ir.attention_axes import Program, facts_of
from moecc.ir.attention_blocks import are_written_out
from moecc.ir.attention_kernels import AttentionFacts, AttentionKernel
from moecc.ir.attributes import AttentionAttrs
from moecc.ir.graph import Node
from moecc.plan.shapes import Shape, Shapes

FORWARD_AND_GRADIENT = 3.0
"""Passes of a training step that computes nothing again."""


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


def passes_of_products(kernel: AttentionKernel, facts: AttentionFacts, passes: float) -> float:
    """Return how often the products of an attention are computed.

    A kernel that works in blocks meets only keys that some query sees, and its gradient makes
    scores again; where the attention is rematerialised right before it, and blocks are in no loop,
    XLA finds that both make the same ones, but on CPUs, where a gradient has the key first unless
    there is a bias.

    Args:
      kernel: what computes it.
      facts: what is known of it.
      passes: how often its arrays are gone through: 1 for inference, 3 and more for training.
    """
    return (passes + _scores_again(kernel, facts, passes)) * kernel.share(facts)


def _scores_again(kernel: AttentionKernel, facts: AttentionFacts, passes: float) -> float:
    if passes < FORWARD_AND_GRADIENT:
        return 0.0
    is_made_right_before = passes > FORWARD_AND_GRADIENT and kernel.name == "blocks"
    is_alike = facts.platform != "cpu" or "bias" in facts.given
    if is_made_right_before and is_alike and are_written_out(facts.queries, causal=facts.causal):
        return 0.0
    return kernel.again
