"""What the ways to the experts send: the stages of a route, forward, again and transposed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moecc.ir.graph import Node, Value
from moecc.plan.part_traffic import Moved, moved
from moecc.plan.shapes import Shape
from moecc.plan.sharding import Sharded
from moecc.plan.strategy import Setting, Strategy
from moecc.plan.workload import Part, Step
from moecc.sharding.collectives import Sent, sent
from moecc.sharding.routes import Slice, SparseLayer, Stage, route
from moecc.sharding.vias import Via


@dataclass(frozen=True)
class Work:
    """How often a step does what.

    Attributes:
      strategy: what is chosen.
      setting: what is given.
    """

    strategy: Strategy
    setting: Setting

    def gathers(self, part: Part) -> int:
        """Return how often parameters are gathered.

        Those of layers are gathered once more for the backward pass, whatever else is kept.
        """
        if not self.setting.train or not part.in_layer:
            return 1
        return 2 + (part.onward and self.strategy.remat != "none")

    def forward(self, step: Step) -> int:
        """Return how often a step runs forward, and again for the backward pass."""
        if not self.setting.train:
            return 1
        again = {"none": 0, "save": step.saved_again, "full": step.again}
        return 1 + again[self.strategy.remat]


def exchange(
    layer: SparseLayer, way: Via, work: Work, steps: Mapping[Node, Step], sharded: Sharded
) -> Iterator[tuple[Moved, int]]:
    """Yield what tokens and rows of a layer go through on a way to the experts, and how often.

    Args:
      layer: the layer.
      way: the way.
      work: how often what is done.
      steps: the steps of the part that has the layer, by node.
      sharded: the part under its layout.
    """
    strategy, train = work.strategy, work.setting.train
    part = Slice(layer.width, strategy.layout.tensor_axes[0]) if strategy.sliced else None
    for stage in route(layer, way, sharded.found, part):
        step, shape = _subject(stage, layer, steps)
        for one in sent(stage.source, stage.steps):
            found = moved(sharded, one, shape, _why(stage, way, one.op))
            if found is not None:
                yield found, work.forward(step)
            if train:
                yield from _back(one, stage, way, shape, strategy, sharded)
    if train and way.tokens_everywhere:
        # Each device has the gradient of what its own experts made of the tokens.
        shape = steps[layer.dispatch.node].operands[0]
        mesh = tuple(m for m in layer.expert_mesh if m not in layer.exchanged)
        one = Sent("all_reduce", mesh, layer.tokens, is_local=False)
        found = moved(sharded, one, shape, _WHY[way.exchanges_rows, False, "all_reduce"])
        if found is not None:
            yield found, 1


def _back(
    one: Sent, stage: Stage, way: Via, shape: Shape, strategy: Strategy, sharded: Sharded
) -> Iterator[tuple[Moved, int]]:
    """Yield what brings the gradient back past a collective."""
    found = moved(sharded, one, shape, _why(stage, way, one.op), transposed=True)
    if found is None:
        return
    whole = stage.value == "added" and one.op == "all_gather"
    if whole and strategy.stream_axis not in one.mesh:
        # All devices have all of the gradient, and take their part of it.
        return
    yield Moved(found.op, found.axes, found.elements, _why(stage, way, found.op), found.of_rows), 1


def _subject(stage: Stage, layer: SparseLayer, steps: Mapping[Node, Step]) -> tuple[Step, Shape]:
    """Return the step that makes what a stage brings elsewhere, and its shape."""
    dispatch, combine = layer.dispatch.node, layer.combine.node
    if stage.value == "tokens":
        return steps[dispatch], steps[dispatch].operands[0]
    if stage.value == "rows":
        return steps[dispatch], steps[dispatch].results[0]
    if stage.value == "added":
        return steps[combine], steps[combine].results[0]
    return steps[_maker(layer.combine.operands[0])], steps[combine].operands[0]


def _maker(value: Value) -> Node:
    assert value.node is not None, "experts make what is combined"
    return value.node


_WHY = {
    (True, True, "all_gather"): "parts of rows",
    (True, True, "reduce_scatter"): "sums of rows",
    (True, True, "all_reduce"): "partial sums",
    (True, False, "all_gather"): "parts of tokens",
    (True, False, "reduce_scatter"): "sums of tokens",
    (False, False, "all_gather"): "tokens to all experts",
    (False, False, "reduce_scatter"): "sums to their tokens",
    (False, False, "all_reduce"): "what the experts of each device say",
}
"""What a collective is for, by whether rows are exchanged, whether it moves them, and its name."""


def _why(stage: Stage, way: Via, op: str) -> str:
    of_rows = stage.value in ("rows", "made")
    return _WHY.get((way.exchanges_rows, of_rows, op), "rows to experts and back")
