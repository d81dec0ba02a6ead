"""What a step computes, as a plan counts it: parameters, operations, sublayers and layers.

Sizes are global; a layout divides them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from moecc.ir.graph import Node
from moecc.ir.traits import Cost, RowMove
from moecc.plan.attention import PlannedAttention
from moecc.plan.residuals import Residuals
from moecc.plan.shapes import Shape


@dataclass(frozen=True)
class Weight:
    """A parameter: its name and shape, and whether it is a part of experts, and trained."""

    name: str
    shape: Shape
    of_experts: bool
    trained: bool = True

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return int(self.shape.elements)


@dataclass(frozen=True)
class Step:
    """An operation that moves or multiplies something.

    Attributes:
      cost: what it costs.
      moves: whether it takes tokens to experts, or back.
      operands: the shapes of its operands.
      results: the shapes of its results.
      over: of a contraction, the axes that it sums over.
      weights: the parameters among the operands, by position.
      again: how often full rematerialisation computes it again.
      block_again: how often rematerialisation of whole blocks does.
      saved_again: how often rematerialisation that saves attention and combine does.
      source: the number of what its first operand is, by whatever name, in its part.
      source_share: of an operand from another stack, one part for each layer of a unit; else 1.
      shares: of each operand, one part for each layer that takes the same value.
      exact_rows: by how much less rows there would be if a capacity did not pad them.
      axes: those of all operands, each once.
      attention: of an attention, what decides its kernel, and its scores.
    """

    cost: Cost
    moves: RowMove | None
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    over: tuple[str, ...]
    weights: tuple[Weight | None, ...]
    again: int
    block_again: int
    saved_again: int
    source: int
    source_share: float
    shares: tuple[float, ...]
    exact_rows: float
    axes: Shape
    attention: PlannedAttention | None = None

    @cached_property
    def flops(self) -> float:
        """Two for each multiplication of its products, of all devices together."""
        return 2.0 * self.cost.products * self.axes.elements

    @cached_property
    def backward(self) -> int:
        """How many times its work the backward pass is: a gradient of each of two operands.

        That of a frozen parameter is not computed.
        """
        return 1 if self.flops and any(w and not w.trained for w in self.weights) else 2

    def computed_again(self, remat: str, in_rounds: bool = False) -> int:
        """Return how often it is computed again for the backward pass, by what is kept.

        Args:
          remat: what is kept.
          in_rounds: whether nothing of rows is kept from one round of an exchange to the next.
        """
        goes = self.moves in (RowMove.TO_SLOTS, RowMove.GATES_TO_SLOTS)
        if remat == "full" or (in_rounds and (self.has_rows or goes)):
            return self.again
        return {"save": self.saved_again, "block": self.block_again}.get(remat, 0)

    @property
    def has_rows(self) -> bool:
        """Whether it works on the rows of experts."""
        return any(name == "slot" for shape in self.operands for name, _ in shape)


@dataclass(frozen=True)
class Part:
    """A run of equal sublayers.

    Attributes:
      name: ``layers.ffn``, ``encoder.layers.attention``, ``head``.
      count: how many there are.
      steps: the operations of one.
      weights: the parameters of one that no earlier part has.
      top_k: of experts: choices a token, 0 in a dense part.
      in_layer: whether it is a part of a layer, which rematerialisation computes again.
      onward: whether it is one of a loop in its unit, and computed once more for that.
      nodes: the node of each step in the sample.
    """

    name: str
    count: int
    steps: tuple[Step, ...]
    weights: tuple[Weight, ...]
    top_k: int = 0
    in_layer: bool = True
    onward: bool = False
    nodes: tuple[Node, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def is_sparse(self) -> bool:
        """Whether tokens are sent to experts here."""
        return any(step.moves is RowMove.TO_SLOTS for step in self.steps)


@dataclass(frozen=True)
class Layer:
    """Equal layers.

    Attributes:
      name: ``layers``, ``encoder.layers``.
      count: how many there are.
      residuals: what the backward pass of one keeps.
      inputs: the shapes of what one takes from the layer before.
      is_first: whether it is the first of its unit, of which full rematerialisation keeps no more
        than the input.
      beside: what there is of earlier layers of its unit, computed again, when it is
        differentiated: the inputs of those of a loop, what the others need; where all of it is
        arrays, and where what is computed entry by entry is not.
      block_beside: the same where loops keep what their gradients need.
    """

    name: str
    count: int
    residuals: Residuals
    inputs: tuple[Shape, ...]
    is_first: bool = True
    beside: tuple[tuple[Shape, ...], tuple[Shape, ...]] = ((), ())
    block_beside: tuple[tuple[Shape, ...], tuple[Shape, ...]] = ((), ())
