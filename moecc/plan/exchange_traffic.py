"""What the ways to the experts send: the stages of a route, forward, again and transposed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moecc.ir.graph import Node, Value
from moecc.plan.part_traffic import Moved, moved
from moecc.plan.parts import Part, Step
from moecc.plan.shapes import Shape
from moecc.plan.sharding import Sharded
from moecc.plan.strategy import StepConfig, Strategy
from moecc.sharding.collectives import Sent, sent
from moecc.sharding.routes import Slice, SparseLayer, Stage, route
from moecc.sharding.vias import Via


@dataclass(frozen=True)
class Work:
    """How often a step does what.

    Attributes:
      strategy: what is chosen.
      config: what is given.
    """

    strategy: Strategy
    config: StepConfig

    def gathers(self, part: Part) -> int:
        """Return how often parameters are gathered.

        Those of layers are gathered once more for the backward pass, whatever else is kept.
        """
        if not self.config.train or not part.in_layer:
            return 1
        return 2 + (part.onward and self.strategy.remat != "none")

    def routed(self, one: Routed) -> int:
        """Return how often a collective on the way to the experts or back runs."""
        if one.step is not None:
            return self.forward(one.step)
        runs = not one.stream or self.strategy.stream_axis in one.stream
        return int(self.config.train and runs)

    def forward(self, step: Step) -> int:
        """Return how often a step runs forward, and again for the backward pass."""
        if not self.config.train:
            return 1
        return 1 + step.computed_again(self.strategy.remat, self.strategy.in_rounds)


class Routed(NamedTuple):
    """A collective on the way to the experts or back.

    Attributes:
      moved: the collective.
      step: what it runs forward with, and again; None: once, in the backward pass.
      stream: mesh axes of which the stream between layers must be one for it to run; empty: always.
    """

    moved: Moved
    step: Step | None
    stream: tuple[str, ...] = ()


def exchange(
    layer: SparseLayer, way: Via, part: Slice | None, steps: Mapping[Node, Step], sharded: Sharded
) -> Iterator[Routed]:
    """Yield what tokens and rows of a layer go through on a way to the experts and back.

    Args:
      layer: the layer.
      way: the way.
      part: how rows are cut in slices; None: they are sent whole.
      steps: the steps of the part that has the layer, by node.
      sharded: the part under its layout.
    """
    leaves_work = _leaving_work(layer, way, steps)
    for stage in route(layer, way, sharded.found, part):
        step, shape = _subject(stage, layer, steps)
        for one in sent(stage.source, stage.steps):
            found = moved(sharded, one, shape, _why(stage, way, one.op))
            back = moved(sharded, one, shape, "", transposed=True)
            is_gate = stage.value == "gates"
            if found is not None:
                free = (stage.value, found.op) in leaves_work
                yield Routed(found._replace(is_wide=is_gate, leaves_work=free), step)
            if back is not None:
                # Where all devices have all of a gradient, they take their part of it.
                whole = stage.value == "added" and one.op == "all_gather"
                why, free = _why(stage, way, back.op), (stage.value, back.op) in leaves_work
                named = back._replace(why=why, is_wide=is_gate, leaves_work=free)
                yield Routed(named, None, one.mesh if whole else ())
    if way.tokens_everywhere:
        yield from _gradients_of_rows(layer, steps, sharded)


def _leaving_work(
    layer: SparseLayer, way: Via, steps: Mapping[Node, Step]
) -> Collection[tuple[str, str]]:
    """Return the stages, and what they do, that leave a layer products which need not wait.

    Gathered tokens are routed again.  So while sums are scattered there is the routing of the
    device's own tokens, which losses read, and while gradients are, that of the router.  And the
    gradient of what experts add to tokens is that of what leaves the layer, if nothing else is done
    with it: a turn that computes the layer again begins with it.
    """
    if way.exchanges_rows:
        return ()
    scattered = [("added", "reduce_scatter"), ("tokens", "reduce_scatter")]
    return [*scattered, *([("added", "all_gather")] if _is_last(layer, steps) else [])]


def _is_last(layer: SparseLayer, steps: Mapping[Node, Step]) -> bool:
    """Whether what experts make of tokens is only added to what leaves their part."""
    pending, seen = [layer.combine.node], set[Node]()
    while pending:
        users = {u for v in pending.pop().results for u in v.users if u in steps} - seen
        if not all(user.op.is_sum for user in users):
            return False
        seen |= users
        pending.extend(users)
    return True


def _gradients_of_rows(
    layer: SparseLayer, steps: Mapping[Node, Step], sharded: Sharded
) -> Iterator[Routed]:
    """Yield what brings together the gradients of rows, of which a device has its experts' own.

    All devices of the experts dispatch all rows, and gates that go with them.  Slots of fixed
    number are gathered from those that have their experts; as many as there are are packed
    otherwise on each device, and summed.
    """
    mesh = tuple(m for m in layer.expert_mesh if m not in layer.exchanged)
    op = "all_gather" if layer.rows.ragged is None else "all_reduce"
    sent = [(layer.dispatch.node, layer.rows, False)]
    if layer.gates is not None:
        sent.append((layer.gates.dispatch.node, layer.gates.sent, True))
    for node, type, is_gate in sent:
        shape = steps[node].results[0]
        one = Sent(op, mesh, type, is_local=False)
        found = moved(sharded, one, shape, "gradients of rows")
        if found is not None:
            yield Routed(found._replace(is_wide=is_gate), None)


def _subject(stage: Stage, layer: SparseLayer, steps: Mapping[Node, Step]) -> tuple[Step, Shape]:
    """Return the step that makes what a stage brings elsewhere, and its shape."""
    dispatch, combine = layer.dispatch.node, layer.combine.node
    if stage.value == "tokens":
        return steps[dispatch], steps[dispatch].operands[0]
    if stage.value == "rows":
        return steps[dispatch], steps[dispatch].results[0]
    if stage.value == "gates":
        assert layer.gates is not None, "they are sent"
        sent = steps[layer.gates.dispatch.node]
        return sent, sent.results[0]
    if stage.value == "added":
        return steps[combine], steps[combine].results[0]
    return steps[_maker(layer.combine.operands[0])], steps[combine].operands[0]


def _maker(value: Value) -> Node:
    assert value.node is not None, "experts make what is combined"
    return value.node


_ROWS = {"all_gather": "parts of rows", "reduce_scatter": "sums of rows"}
_SLICES = {"all_gather": "parts of tokens", "reduce_scatter": "sums of tokens"}
_TOKENS = {"all_gather": "tokens to all experts", "reduce_scatter": "sums to their tokens"}


def _why(stage: Stage, way: Via, op: str) -> str:
    """Return what a collective is for, in a few words."""
    if op == "all_reduce":
        return "sums of all experts" if way.tokens_everywhere else "partial sums"
    if not way.exchanges_rows:
        is_gradient = stage.value == "added" and op == "all_gather"
        return "gradients to all experts" if is_gradient else _TOKENS.get(op, "")
    names = _ROWS if stage.value in ("rows", "made") else _SLICES
    return names.get(op, "rows to experts and back")
