"""What a plan knows of the head, whose logits are in memory a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moecc.analysis.head import is_trainable, split_head
from moecc.ir.graph import Graph, Value
from moecc.plan.parts import Weight
from moecc.plan.shapes import Shape


@dataclass(frozen=True)
class PlannedHead:
    """The head of a model.

    Attributes:
      logits: the shape of what it makes.
      weights: the parameters that it reads.
      is_cut: whether it may run over a chunk of tokens at a time.
    """

    logits: Shape
    weights: tuple[Weight, ...]
    is_cut: bool


def head_of(
    graph: Graph, shape: Callable[[Value], Shape], weight: Callable[[Value], Weight]
) -> PlannedHead | None:
    """Return the head of `graph`; None where it has no logits to train.

    Args:
      graph: the graph.
      shape: returns the global shape of a value.
      weight: returns what a plan knows of a parameter.
    """
    if not is_trainable(graph):
        return None
    head = split_head(graph)
    params = dict.fromkeys(p for value in head.weights for p in _params(value))
    return PlannedHead(shape(head.logits), tuple(map(weight, params)), head.is_cut)


def _params(value: Value) -> Iterator[Value]:
    """Yield the parameters that `value` is made of."""
    if value.is_param:
        yield value
    elif value.node is not None:
        for operand in value.node.operands:
            yield from _params(operand)
