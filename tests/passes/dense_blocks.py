"""Dense models of feed-forward blocks, their weights drawn in float64, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.ir import F64, Builder, DType, Graph, Value, clone, tensor
from moecc.rewrite.passes import Context, Pass, PassResult
from moecc.testing import laws, run_reference
from moecc.types import Array, Arrays
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Source, source_types

EXACT = 1e-12
"""The error of a conversion that keeps the function, relative to the largest output."""


@dataclass(frozen=True)
class Dense:
    """What kind of blocks: sizes, gate, activation (``relu2`` is squared ReLU), biases."""

    embed: int = 8
    mlp: int = 12
    layers: int = 1
    gated: bool = True
    act: str = "silu"
    bias_in: bool = False
    bias_out: bool = False
    residual: bool = False
    transposed: bool = False
    dtype: DType = F64

    def graph(self) -> Graph:
        """Return layers one after the other, each reading a normalised value."""
        graph = Graph("dense")
        builder = Builder(graph)
        hidden = graph.input("x", tensor(self.dtype, batch="B", seq="S", embed=self.embed))
        for layer in range(self.layers):
            with builder.at(f"layers.{layer}.ffn"):
                hidden = self._layer(builder, hidden, layer)
        graph.set_output("y", hidden)
        return graph

    def _layer(self, builder: Builder, hidden: Value, layer: int) -> Value:
        x = hidden
        if self.residual:
            scale = self._param(builder, f"layers.{layer}.norm", embed=self.embed)
            x = builder.rms_norm(hidden, scale, axis="embed")
        y = self.block(builder, x, f"layers.{layer}")
        return builder.add(hidden, y) if self.residual else y

    def block(self, builder: Builder, x: Value, prefix: str) -> Value:
        """Append one block that reads `x`."""
        names = ("gate", "up") if self.gated else ("up",)
        first, *second = (self._linear(builder, x, f"{prefix}.{n}", "embed", "mlp") for n in names)
        is_squared = self.act == "relu2"
        inner = getattr(builder, "relu" if is_squared else self.act)(first)
        inner = builder.square(inner) if is_squared else inner
        inner = builder.mul(inner, *second) if self.gated else inner
        return self._linear(builder, inner, f"{prefix}.down", "mlp", "embed")

    def _linear(self, builder: Builder, x: Value, name: str, old: str, new: str) -> Value:
        sizes = {"embed": self.embed, "mlp": self.mlp}
        order = (old, new) if self.transposed else (new, old)
        weight = self._param(builder, name, **{n: sizes[n] for n in order})
        y = builder.contract(x, weight, over=old)
        if self.bias_out if new == "embed" else self.bias_in:
            y = builder.add(y, self._param(builder, f"{name}.bias", **{new: sizes[new]}))
        return y

    def _param(self, builder: Builder, name: str, **sizes: int) -> Value:
        type = tensor(self.dtype, **sizes)
        loc = f"layers.{name.split('.')[1]}.ffn"
        return builder.graph.param(name, type, Source(name, type), loc=loc)


class Tensors:
    """A checkpoint in memory: normal numbers by name; matrices keep the size of what they read."""

    def __init__(self, graph: Graph, seed: int = 0):
        self.arrays: dict[str, Array] = {}
        weights = (param.weight for param in graph.params.values())
        for name, type in source_types(weights).items():
            rng = np.random.default_rng([seed, *name.encode()])
            summed = "mlp" if name.endswith("down") else "embed"
            fan_in = type[summed].size if summed in type else 1
            drawn = rng.normal(0, fan_in**-0.5, type.shape)
            drawn = 1 + 0.1 * drawn if name.endswith("norm") else drawn
            self.arrays[name] = drawn.astype(type.dtype.numpy)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        array = self.arrays[name]
        return array[start:stop] if array.ndim else array

    def params(self, graph: Graph) -> dict[str, Array]:
        """Return the parameters of `graph` as their expressions make them, in float64."""
        return {n: evaluate(p.weight, self.read, F64) for n, p in graph.params.items()}


def tokens(dense: Dense, count: int = 12, seed: int = 1) -> Arrays:
    """Return normal inputs for `count` tokens in two sequences."""
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(2, count // 2, dense.embed))}


def run(graph: Graph, params: Arrays, inputs: Arrays) -> Arrays:
    return run_reference(graph, params=params, inputs=inputs)


def applied(item: Pass, graph: Graph, seed: int = 0) -> tuple[Graph, PassResult]:
    """Return a copy of `graph` after the pass, which obeys the laws of graphs, and its result."""
    assert item.validate() == []
    after = clone(graph)
    result = item.apply(after, Context(seed=seed))
    laws.check_graph(after)
    return after, result


def upcycled(graph: Graph, seed: int = 0, **options) -> tuple[Graph, PassResult]:
    """Return a copy of `graph` after ``upcycle``, and its result."""
    return applied(UpcyclePass(**options), graph, seed)


def shown(graph: Graph, *operations: str) -> Graph:
    """Let `graph` return the results of some operations of its last layer, too."""
    for node in [*graph]:
        if node.op.name in operations:
            for value in node.results:
                graph.set_output(f"{node.op.name}.{value.index}", value)
    return graph


def relative(found: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest number expected."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


def rms_error(found: Array, expected: Array) -> float:
    """Return the root mean square of the difference, relative to that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def error(
    before: Graph,
    after: Graph,
    inputs: Arrays,
    seed: int = 0,
    measure: Callable[[Array, Array], float] = relative,
) -> float:
    """Return how far ``y`` of `after` is from that of `before`, on drawn weights of `before`."""
    tensors = Tensors(before, seed)
    expected, found = (run(graph, tensors.params(graph), inputs)["y"] for graph in (before, after))
    return measure(found, expected)
