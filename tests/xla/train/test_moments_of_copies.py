"""The state that training on copies would have left is the state that the formula says."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.plan.step import StepConfig
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.recipe import OptimizerSection
from moecc.train.settings import StepSpec
from moecc.train.state import CarriedMoments
from moecc.types import F32, tensor
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Source

from .small import VOCAB

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from moecc_backends.xla.train.step import make_train_step  # noqa: E402

from moecc.ir.builder import Builder  # noqa: E402
from moecc.types import I32  # noqa: E402

SIZES = {"B": 8, "S": 4}
WIDTH = 128
"""From where on Adafactor factors."""


def dense() -> Graph:
    graph = Graph("dense")
    b = Builder(graph)
    tokens = graph.input("tokens", tensor(I32, batch="B", seq="S"))

    def param(name: str, loc: str, **axes: int) -> Any:
        type = tensor(F32, **axes)
        return graph.param(name, type, Source(name, type), loc=loc)

    with b.at("embed"):
        hidden = b.embedding(
            param("table", "embed", vocab=VOCAB, embed=WIDTH), tokens, axis="vocab"
        )
    with b.at("layers.0.ffn"):
        up = param("up", b.loc, mlp=WIDTH, embed=WIDTH)
        inner = b.silu(b.contract(hidden, up, over="embed"))
        made = b.contract(inner, param("down", b.loc, embed=WIDTH, mlp=WIDTH), over="mlp")
        hidden = b.add(hidden, made)
    with b.at("head"):
        head = param("head", "head", vocab=VOCAB, embed=WIDTH)
        graph.set_output("logits", b.contract(hidden, head, over="embed"))
    return graph


def batch(seed: int) -> dict[str, Any]:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (8, 4)).astype(np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_moments_are_those_of_training_on_copies(name: str) -> None:
    """Every copy takes part in every token, by as much: no routing is left to chance."""
    section = OptimizerSection(name, clip=0.0, decay=0.0)
    spec = StepSpec(SIZES, StepConfig(dtype="f32"), section, guard=None)
    graph = dense()
    step = make_train_step(graph, spec, jax.devices()[:1])
    sparse = clone(graph)
    text = "upcycle{experts=3 top-k=3 router-init=zero},specialize{groups=1}"
    run_pipeline(sparse, Pipeline.parse(text))
    copies = make_train_step(sparse, spec, jax.devices()[:1])
    gradients = jax.jit(partial(copies.gradients, key=jax.random.key(0)))
    rng, key = np.random.default_rng(0), jax.random.key(0)
    params = {n: (rng.normal(size=p.type.shape) / 12).astype("f") for n, p in graph.params.items()}
    state, moments = step.init(params), None
    for number in range(4):
        now = {n: np.asarray(a) for n, a in state["params"].items()}
        copied = {n: evaluate(p.weight, read(now)) for n, p in sparse.params.items() if p.weight}
        moments = copies.optimizer.init(copied) if moments is None else moments
        slopes, _ = gradients(copied, {}, batch(number))
        _, moments = copies.optimizer.directions(slopes, moments, copied)
        state, _ = step.step(state, batch(number), key, 1e-3)
    saved = {
        f"moments.{kind}.{n}": np.asarray(a)
        for kind, arrays in state["moments"].items()
        if kind != "count"
        for n, a in arrays.items()
    }
    carried = CarriedMoments(sparse, step.optimizer.moment_types, 4, section.b1, section.b2)
    assert moments is not None
    for kind, types in copies.optimizer.moment_types.items():
        for parameter in ("up", "down", "table", "head"):
            if parameter not in types:
                continue
            found = evaluate(carried.moment(parameter, kind, types[parameter]), read(saved))
            expected = np.asarray(moments[kind][parameter])
            scale = np.abs(expected).max()
            assert np.abs(found - expected).max() <= 1e-5 * scale, (kind, parameter)
            assert scale > 0


def read(arrays: dict[str, Any]) -> Any:
    return lambda name, start=0, stop=None: arrays[name][start:stop]
