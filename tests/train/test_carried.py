"""Moments carried through a pipeline: what training on copies would have given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecc.cli.main import main
from moecc.ir import Graph
from moecc.model.open import open_model
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.steps.carried import carried_moments
from moecc.train.recipe import OptimizerSection
from moecc.train.state import canonical
from moecc.types.dtypes import F32
from moecc.types.tensor import TensorType, tensor
from moecc.weights.arithmetic import Add, Scale
from moecc.weights.draws import Normal, derive_key
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Permute, Slice, Tile

from .tiny import make_recipe

ADAMW = OptimizerSection()


def graph_of(**types: TensorType) -> Graph:
    """Return a graph in which each parameter is a matrix that a product reads."""
    from moecc.ir.builder import Builder

    graph = Graph("quadratic")
    x = graph.input("x", tensor(F32, batch="B", embed=3))
    for name, type in types.items():
        param = graph.param(name, type, Source(name, type))
        graph.set_output(name, Builder(graph).contract(x, param, over="embed"))
    return graph


def carried(weight: Expr, moments: Mapping[str, np.ndarray], section: OptimizerSection) -> Any:
    """Return the moments of a parameter that is `weight`, by kind."""
    old = graph_of(w=tensor(F32, mlp=4, embed=3))
    new = graph_of(w=weight.type.with_dtype(F32))
    made, unknown = carried_moments(new, {"w": weight}, old, section)
    assert unknown == []
    return {name.split(".")[1]: evaluate(m, reader(moments)) for name, m in made.items()}


def reader(arrays: Mapping[str, np.ndarray]) -> Any:
    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return arrays[name][start:stop]

    return read


def adam(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Adam's moments after a sequence of gradients, ``[step, …]``."""
    m, v = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    for g in gradients:
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    return m, v


def test_a_quadratic_of_copies_has_the_moments_that_are_carried() -> None:
    """f(w) = ‖a − w·s‖²/2, and F(W) = ‖a − mean of the scaled copies‖²/2, on the same path."""
    rng, experts, scale = np.random.default_rng(0), 4, 0.5
    dense, copies = [], []
    for _ in range(6):
        a, w = rng.normal(size=(2, 4, 3))
        dense.append(-(a - w))
        # W_e = s·w, and F = ‖a − Σ W_e / (s·E)‖²/2 = f(w).
        copies.append(np.stack([-(a - w) / (scale * experts)] * experts))
    m, v = adam(np.array(dense, np.float32))
    expected = adam(np.array(copies, np.float32))
    weight = Tile(Scale(Source("w", tensor(F32, mlp=4, embed=3)), scale), "expert", experts)
    found = carried(weight, {"moments.m.w": m, "moments.v.w": v}, ADAMW)
    np.testing.assert_allclose(found["m"], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found["v"], expected[1], rtol=1e-6)


def test_slices_and_permutations_have_theirs_and_noise_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    m, v = rng.normal(size=(2, 4, 3)).astype(np.float32)
    source = Source("w", tensor(F32, mlp=4, embed=3))
    part = Permute(Slice(source, "mlp", 1, 3), ("embed", "mlp"))
    noisy = Add(part, Normal(part.type, 0.1, derive_key(0, "noise")))
    found = carried(noisy, {"moments.m.w": m, "moments.v.w": v}, ADAMW)
    np.testing.assert_array_equal(found["m"], m[1:3].T)
    np.testing.assert_array_equal(found["v"], v[1:3].T)


def test_factors_of_adafactor_go_with_the_squares() -> None:
    rng, section = np.random.default_rng(2), OptimizerSection(name="adafactor")
    type = tensor(F32, mlp=256, embed=128)
    squares = rng.uniform(0.5, 2, (256, 128)).astype(np.float32)
    row, column = squares.mean(0), squares.mean(1)
    graph = Graph("wide")
    old, new = (_wide(graph_type) for graph_type in (type, _tiled(type)))
    made, unknown = carried_moments(new, {"w": Tile(Source("w", type), "expert", 2)}, old, section)
    assert unknown == []
    arrays = {"moments.v_row.w": row, "moments.v_col.w": column}
    found = {name: evaluate(m, reader(arrays)) for name, m in made.items()}
    np.testing.assert_allclose(found["moments.v_row.w"], np.stack([row / 4] * 2))
    np.testing.assert_allclose(found["moments.v_col.w"], np.stack([column / 4] * 2))
    assert graph.params == {}


def _tiled(type: TensorType) -> TensorType:
    return tensor(F32, expert=2, **{a.name: a.size for a in type.axes})


def _wide(type: TensorType) -> Graph:
    from moecc.ir.builder import Builder

    graph = Graph("wide")
    x = graph.input("x", tensor(F32, batch="B", embed=128))
    param = graph.param("w", type, Source("w", type))
    graph.set_output("y", Builder(graph).contract(x, param, over="embed"))
    return graph


@pytest.mark.parametrize("init", ["copy", "drop", "noise"])
def test_every_moment_of_an_upcycled_model_follows_or_is_drawn(init: str) -> None:
    with open_model("tests/golden/llama_gqa") as model:
        old = canonical(model.graph)
        graph = old.graph
        run_pipeline(graph, Pipeline.parse(f"upcycle{{experts=4 top-k=2 init={init}}}"))
        new = canonical(graph)
    source = canonical(_dense()).graph
    made, unknown = carried_moments(new.graph, new.weights, source, ADAMW)
    assert unknown == []
    assert {name.split(".", 2)[2] for name in made} == set(new.graph.params)


def _dense() -> Graph:
    with open_model("tests/golden/llama_gqa") as model:
        return model.graph


@pytest.mark.slow
def test_a_run_goes_on_with_the_moments_of_another(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("orbax.checkpoint")
    recipe = make_recipe(tmp_path, "steps = 30")
    dense = ["--set", "model.pipeline=''", "--set", "run.guard.sigma=0"]
    assert main(["train", str(recipe), "--out", str(tmp_path / "dense"), *dense]) == 0
    sparse = [
        "--set", f"model.source={tmp_path / 'dense'}", "--set", "model.start=source",
        "--set", "run.steps=8",
    ]  # fmt: skip
    losses = {}
    for moments in ("carry", "reset"):
        out = tmp_path / moments
        words = ["train", str(recipe), "--out", str(out), *sparse, "--set",
                 f"model.moments={moments}"]  # fmt: skip
        assert main(words) == 0, capsys.readouterr().err
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses[moments] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses["carry"][0] == losses["reset"][0]
    # A first step without moments is one of full size in every direction.
    assert losses["carry"][1] < losses["reset"][1]


def test_only_a_run_has_moments(tmp_path: Path, capsys: Any) -> None:
    recipe = make_recipe(tmp_path, "steps = 3")
    words = ["train", str(recipe), "--out", str(tmp_path / "run"), "--set", "model.moments=carry"]
    assert main(words) == 1
    assert "only a run has moments" in capsys.readouterr().err
