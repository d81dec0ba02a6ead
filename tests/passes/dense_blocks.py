"""Dense models of feed-forward blocks, their weights drawn in float64, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.backend import get_backend
from moecc.ir import Graph
from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.structure import clone
from moecc.rewrite.passes import Context, PassResult
from moecc.types import F64, DType, tensor
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Source, sources

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]


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
        parts = [self._linear(builder, x, f"{prefix}.{n}", "embed", "mlp") for n in names]
        act, parts[0] = ("relu", parts[0]) if self.act == "relu2" else (self.act, parts[0])
        parts[0] = getattr(builder, act)(parts[0])
        if self.act == "relu2":
            parts[0] = builder.square(parts[0])
        inner = builder.mul(*parts) if self.gated else parts[0]
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

    def __init__(self, graph: Graph, seed: int = 0, *, gain: float = 1.0):
        self.arrays: Arrays = {}
        for param in graph.params.values():
            for source in sources(param.weight) if param.weight is not None else ():
                rng = np.random.default_rng([seed, *source.name.encode()])
                fan_in = source.type["embed"].size if "embed" in source.type else 1
                if source.name.endswith("down"):
                    fan_in = source.type["mlp"].size
                drawn = gain * rng.normal(0, fan_in**-0.5, source.type.shape)
                drawn = 1 + 0.1 * drawn if source.name.endswith("norm") else drawn
                self.arrays[source.name] = drawn.astype(source.type.dtype.numpy)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return self.arrays[name][start:stop] if self.arrays[name].ndim else self.arrays[name]

    def params(self, graph: Graph) -> Arrays:
        """Return the parameters of `graph` as their expressions make them, in float64."""
        made = {}
        for name, param in graph.params.items():
            assert param.weight is not None
            made[name] = evaluate(param.weight, self.read, F64)
        return made


def tokens(dense: Dense, count: int = 12, seed: int = 1) -> Arrays:
    """Return normal inputs for `count` tokens in two sequences."""
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(2, count // 2, dense.embed))}


def run(graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> Arrays:
    return get_backend("reference").compile(graph).run(params, inputs)


def upcycled(graph: Graph, seed: int = 0, **options) -> tuple[Graph, PassResult]:
    """Return a copy of `graph` after the pass, and what the pass says."""
    item = UpcyclePass(**options)
    assert item.validate() == []
    after = clone(graph)
    return after, item.apply(after, Context(seed=seed))


def relative(found: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest number expected."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


def rms_error(found: Array, expected: Array) -> float:
    """Return the root mean square of the difference, relative to that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
