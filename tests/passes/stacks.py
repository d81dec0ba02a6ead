"""Random stacks of layers, which may repeat: what ``roll-layers`` may meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types import F32, TensorType, tensor
from moecc.weights.draws import Normal
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Tile

EMBED = 4
EXPERTS = 3

STEPS = (
    *("norm", "dense", "bias", "tied", "memory", "scale", "swap", "experts"),
    *("loss", "output", "constant"),
)
"""What a layer may do, one after the other."""

WEIGHTS = ("none", "source", "tile", "normal")
"""How its parameters are made."""


@dataclass
class _Stack:
    """A graph that grows layer by layer.

    Attributes:
      graph: the graph.
      state: what goes from layer to layer: the stream, and a second one.
      weight: how parameters are made.
      losses: the loss of each layer that has one.
    """

    graph: Graph
    state: list[Value]
    weight: str
    memory: Value
    tied: Value
    losses: list[Value] = field(default_factory=list)

    def layer(self, number: int, steps: tuple[str, ...]):
        """Add a layer that does `steps`."""
        b = Builder(self.graph, loc=f"layers.{number}.ffn")
        for at, step in enumerate(steps):
            self.step(b, step, f"layers.{number}.{step}{at}")

    def step(self, b: Builder, step: str, name: str):
        h = self.state[0]
        if step == "norm":
            h = b.rms_norm(h, self.param(name, b.loc, embed=EMBED), axis="embed")
        elif step == "dense":
            up = b.contract(h, self.param(name, b.loc, mlp=5, embed=EMBED), over="embed")
            down = self.param(f"{name}.down", b.loc, embed=EMBED, mlp=5)
            h = b.add(h, b.contract(b.silu(up), down, over="mlp"))
        elif step == "bias":
            h = b.add(h, self.param(name, b.loc, embed=EMBED))
        elif step == "tied":
            h = b.mul(h, self.tied)
        elif step == "memory":
            h = b.add(h, self.memory)
        elif step == "scale":
            h = b.scale(h, by=0.5)
        elif step == "swap":
            self.state[1] = b.tanh(b.add(h, self.state[1]))
        elif step == "experts":
            h = b.add(h, self.experts(b, h, name))
        elif step == "loss":
            self.losses.append(b.mean(b.square(h), axes=("batch", "embed")))
        elif step == "output":
            self.graph.set_output(f"{name}.mean", b.mean(h, axes="embed"))
        elif step == "constant":
            h = b.mul(h, b.constant(value=1.5, dtype="f32"))
        self.state[0] = h

    def experts(self, b: Builder, h: Value, name: str) -> Value:
        router = self.param(f"{name}.router", b.loc, expert=EXPERTS, embed=EMBED)
        experts, gates = b.route(b.contract(h, router, over="embed"), top_k=2)
        slots = b.assign_slots(experts, tokens="batch", experts=EXPERTS)
        weight = self.param(name, b.loc, expert=EXPERTS, mlp=2, embed=EMBED)
        rows = b.silu(b.contract(b.dispatch(h, experts, slots), weight, over="embed"))
        down = self.param(f"{name}.down", b.loc, expert=EXPERTS, embed=EMBED, mlp=2)
        return b.combine(b.contract(rows, down, over="mlp"), experts, slots, gates)

    def param(self, name: str, loc: str, **axes: int) -> Value:
        type = tensor(F32, **axes)
        return self.graph.param(name, type, self.expr(name, type), loc=loc)

    def expr(self, name: str, type: TensorType) -> Expr | None:
        if self.weight == "none":
            return None
        if self.weight == "normal":
            return Normal(type, 0.5, sum(map(ord, name)))
        if self.weight == "tile":
            first, *remaining = type.axes
            inner = Source(name, type.with_axes(remaining))
            return Tile(inner, first.name, first.size)
        return Source(name, type)


def stack_graph(weight: str, layers: Sequence[tuple[str, ...]], *, second: bool) -> Graph:
    """Return a graph with a stack of layers.

    Args:
      weight: how its parameters are made.
      layers: what each layer does.
      second: whether the second stream is returned.
    """
    graph = Graph("stack")
    stream = tensor(F32, batch="B", embed=EMBED)
    state = [graph.input("x", stream), graph.input("second", stream)]
    memory = graph.input("memory", tensor(F32, embed=EMBED))
    tied = graph.param("tied", tensor(F32, embed=EMBED))
    stack = _Stack(graph, state, weight, memory, tied)
    for number, steps in enumerate(layers):
        stack.layer(number, steps)
    b = Builder(graph, loc="end")
    graph.set_output("y", stack.state[0])
    if second:
        graph.set_output("second", stack.state[1])
    if len(stack.losses) > 1:
        graph.set_output("loss", b.sum(b.stack(*stack.losses, axis="layer"), axes="layer"))
    return graph


@st.composite
def stacks(draw: st.DrawFn) -> Graph:
    """Draw a graph with a stack of layers, of which some may repeat others every few layers."""
    weight = draw(st.sampled_from(WEIGHTS))
    layers = draw(_layers())
    return stack_graph(weight, layers, second=draw(st.booleans()))


@st.composite
def _layers(draw: st.DrawFn) -> list[tuple[str, ...]]:
    few = st.lists(st.sampled_from(STEPS), min_size=1, max_size=4)
    steps = few.map(tuple)
    odd = st.lists(steps, max_size=1)
    period = draw(st.lists(steps, min_size=1, max_size=3))
    return [*draw(odd), *(period * draw(st.integers(1, 4))), *draw(odd)]
