"""What one part of a model sends under a layout, whatever is computed again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moecc.ir.graph import Node, Value
from moecc.plan.parts import Part, Step, Weight
from moecc.plan.residuals import root_of
from moecc.plan.shapes import Shape
from moecc.plan.sharding import Sharded
from moecc.sharding.collectives import TRANSPOSED, Sent
from moecc.sharding.gradients import GradientSum
from moecc.sharding.propagate import Ref, Reshard
from moecc.sharding.routes import SparseLayer, sparse_layer

PARAMETERS = "parameters"
"""Why a parameter that is stored in parts is gathered."""


class Moved(NamedTuple):
    """A collective.

    Attributes:
      op: its name.
      axes: the mesh axes that it runs over, in the order of the mesh.
      elements: of the tensor that it moves, on one device.
      why: what for, in a few words.
      of_rows: whether it moves rows of experts, of which there may be more than in the graph.
      odd: whether it gathers shards with odd numbers of rows.
      is_wide: whether an element has four bytes at least: gates are float32, token ids int32.
      weight: the parameter that it gathers, or whose gradient it sums.
      leaves_work: see `Transfer`.
    """

    op: str
    axes: tuple[str, ...]
    elements: float
    why: str
    of_rows: bool = False
    odd: bool = False
    is_wide: bool = False
    weight: str = ""
    leaves_work: bool = False


class Carried(NamedTuple):
    """What is done with a value that a step of a part makes or takes.

    Attributes:
      step: the step.
      moved: the collectives.
      share: of what several parts have in common, the share of one.
      in_route: whether the way to the experts has it instead.
    """

    step: Step
    moved: tuple[Moved, ...]
    share: float = 1.0
    in_route: bool = False


@dataclass(frozen=True)
class PartTraffic:
    """What a part sends under a layout.

    Attributes:
      params: what gathers its parameters.
      gradients: what sums their gradients.
      forward: what carries out its sums and brings values elsewhere.
      backward: what sums gradients of values of which several devices made something.
      layer: its routed layer, if it has one.
      steps: its steps by node.
    """

    params: tuple[Moved, ...]
    gradients: tuple[Moved, ...]
    forward: tuple[Carried, ...]
    backward: tuple[Carried, ...]
    layer: SparseLayer | None
    steps: dict[Node, Step]


def traffic_of(part: Part, sharded: Sharded) -> PartTraffic:
    """Return what `part` sends."""
    sites = (sharded.work.sample.sites[node] for node in part.nodes)
    layer = sparse_layer(sites, sharded.found) if part.is_sparse else None
    reader = _Reader(part, sharded, layer)
    gathers = [(w, tuple(reader.gathers(w))) for w in part.weights]
    return PartTraffic(
        params=tuple(m for _, found in gathers for m in found),
        gradients=tuple(m for w, found in gathers if w.trained for m in reader.summed(w, found)),
        forward=tuple(reader.forward()),
        backward=tuple(reader.backward()),
        layer=layer,
        steps=reader.steps,
    )


def moved(
    sharded: Sharded, one: Sent, shape: Shape, why: str, transposed: bool = False
) -> Moved | None:
    """Return a collective on a value of `shape`, or its transpose; None where nothing is sent."""
    op = TRANSPOSED.get(one.op) if transposed else None if one.is_local else one.op
    axes = sharded.layout.ordered(one.mesh)
    if op is None or sharded.layout.size(axes) == 1:
        return None
    elements = shape.elements / sharded.shards(one.type)
    return Moved(op, axes, elements, why, shape.has_slots, is_wide=not one.type.dtype.is_float)


class _Reader:
    """Reads of a propagation what one part sends."""

    def __init__(self, part: Part, sharded: Sharded, layer: SparseLayer | None) -> None:
        self.sharded = sharded
        self.layer = layer
        self.in_layer = part.in_layer
        self.steps = dict(zip(part.nodes, part.steps, strict=True))

    def gathers(self, weight: Weight) -> Iterator[Moved]:
        """Yield how a parameter that is stored in parts is gathered."""
        stored, used = self.sharded.stored(weight), self.sharded.used(weight)
        for one in self.sharded.work.sample.resharded(stored, used):
            found = moved(self.sharded, one, weight.shape, PARAMETERS)
            if found is not None:
                yield found._replace(odd=self.sharded.is_odd(weight), weight=weight.name)

    def summed(self, weight: Weight, gathers: Iterable[Moved]) -> Iterator[Moved]:
        """Yield how a gradient is summed: scattered where it is stored in parts, else reduced."""
        left = set(self.sharded.summed(weight))
        for gathered in gathers:
            axes = tuple(n for n in gathered.axes if n in left)
            left.difference_update(gathered.axes)
            if axes:
                elements = gathered.elements
                yield Moved("reduce_scatter", axes, elements, "gradients", weight=weight.name)
        axes = self.sharded.layout.ordered(left)
        if self.sharded.layout.size(axes) > 1:
            elements = weight.shape.elements / self.sharded.shards(self.sharded.stored(weight))
            yield Moved("all_reduce", axes, elements, "gradients", weight=weight.name)

    def forward(self) -> Iterator[Carried]:
        """Yield what carries out the sums of the part, and brings other values elsewhere."""
        for node, step in self.steps.items():
            operands = self.sharded.found.operands[node]
            for ref, shape, share in zip(operands, step.operands, step.shares, strict=True):
                if isinstance(ref, Reshard) and ref.node is node and not ref.value.is_param:
                    carried = self._carried(ref, step, shape, "values to where they are used")
                    # What is brought to the first of several layers is there for the others.
                    yield carried._replace(share=share if self.in_layer else 1.0)
            for value, shape in zip(node.results, step.results, strict=True):
                seen = self.sharded.found.visible[value]
                if isinstance(seen, Reshard):
                    why = "partial sums" if seen.is_sum else "what was looked up"
                    yield self._carried(seen, step, shape, why)

    def _carried(self, reshard: Reshard, step: Step, shape: Shape, why: str) -> Carried:
        done = self.sharded.work.sample.resharded(reshard.source, reshard.target)
        found = (moved(self.sharded, one, shape, why) for one in done)
        return Carried(
            step, tuple(m for m in found if m is not None), in_route=self._routed(reshard)
        )

    def _routed(self, reshard: Reshard) -> bool:
        """Whether a reshard brings rows to experts or back, or sums what they make."""
        if self.layer is None:
            return False
        dispatch, combine = self.layer.dispatch.node, self.layer.combine.node
        ends: set[Ref] = {dispatch.result, combine.result}
        if self.layer.gates is not None:
            ends.add(self.layer.gates.dispatch.node.result)
        last: Ref = self.sharded.found.operands[combine][0]
        while isinstance(last, Reshard):
            ends |= {last, last.operand}
            last = last.operand
        return reshard in ends or reshard.operand in ends

    def backward(self) -> Iterator[Carried]:
        """Yield the sums of gradients of values that several operations may take.

        Those of one value are added first, and summed once.
        """
        found: dict[Value, tuple[GradientSum, set[str]]] = {}
        for node in self.steps:
            for one in self.sharded.gradient_sums.get(node, ()):
                root = root_of(one.site.operands[one.number])
                known = found[root][1] if root in found else set()
                found[root] = one, known | one.axes
        for one, axes in found.values():
            node, number = one.site.node, one.number
            step, shape = self.steps[node], self.steps[node].operands[number]
            share, rows = step.source_share if number == 0 else 1.0, shape.has_slots
            yield Carried(step, tuple(self._gradient(one, axes, shape)), share, rows)
        yield from self._returned_gradients()

    def _gradient(self, one: GradientSum, axes: set[str], shape: Shape) -> Iterator[Moved]:
        """Yield how the gradient of a value is summed: scattered where the value was gathered."""
        node, number, why = one.site.node, one.number, "gradients of partial sums"
        ref, layout = self.sharded.found.operands[node][number], self.sharded.layout
        elements = shape.elements / self.sharded.shards(self.sharded.found.used(node)[number])
        scattered = axes & self._gathered_over(ref)
        if scattered:
            mesh = layout.ordered(scattered)
            yield Moved("reduce_scatter", mesh, elements, why, shape.has_slots)
            elements /= layout.size(mesh)
        if axes - scattered:
            mesh = layout.ordered(axes - scattered)
            yield Moved("all_reduce", mesh, elements, why, shape.has_slots)

    def _gathered_over(self, ref: Ref) -> set[str]:
        """Return the mesh axes over which a value is gathered for an operation."""
        if not isinstance(ref, Reshard):
            return set()
        done = self.sharded.work.sample.resharded(ref.source, ref.target)
        return {m for one in done if one.op == "all_gather" for m in one.mesh}

    def _returned_gradients(self) -> Iterator[Carried]:
        """Yield what brings back gradients of what was scattered, or exchanged but for experts."""
        for carried in self.forward():
            if carried.in_route:
                continue
            back = tuple(
                m._replace(op=TRANSPOSED[m.op], why=f"gradients of {m.why}")
                for m in carried.moved
                if m.op in ("reduce_scatter", "all_to_all") and not m.is_wide
            )
            if back:
                yield carried._replace(moved=back)
