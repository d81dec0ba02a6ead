"""The balance bias of a step, and experts in turn."""

import numpy as np
import pytest

from moecc.plan.step import StepConfig
from moecc.train.graphs import Bound, StepPasses, step_graph
from moecc.train.recipe import OptimizerSection
from moecc.train.settings import StepSpec

from .small import BATCH, EXPERTS, SEQ, SIZES, batch_of, params_of, sparse

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from moecc_backends.xla.train.step import make_train_step  # noqa: E402

RATE = 0.01


def test_the_bias_moves_by_what_the_whole_batch_chose():
    dense = sparse("top-2", padded=True, bias=True)
    passes = StepPasses(bound=Bound(0.5), groups=8, losses={"parts": 1}, rolled=False)
    config = StepConfig(dtype="f32", micro_batches=1)
    spec = StepSpec(SIZES, config, OptimizerSection("adamw"), bias_rate=RATE)
    step = make_train_step(step_graph(dense, passes), spec, jax.devices()[:1])
    params, batch = params_of(dense), batch_of(dense, 1, padding=0.2)
    before = np.array([0.3, -0.1, -0.1, -0.1])
    state = step.init({**params, "bias": before})
    assert "bias" not in state["params"]
    state, metrics = step.step(state, batch, jax.random.key(0), 1e-3)
    bias = np.asarray(state["bias"]["bias"])
    chosen = np.asarray(metrics["metric.layers.0.ffn.chosen"])
    moved = before + RATE * np.sign(chosen.mean() - chosen)
    np.testing.assert_allclose(bias, moved - moved.mean(), atol=1e-7)
    assert abs(bias.sum()) < 1e-6
    assert chosen.sum() == 2 * batch["mask"].sum()


def test_experts_in_turn_have_equal_loads():
    graph = step_graph(sparse(), StepPasses(groups=1, losses={"parts": 1}, balanced=True))
    spec = StepSpec(SIZES, StepConfig(dtype="f32"), OptimizerSection("sgd"))
    step = make_train_step(graph, spec, jax.devices()[:1])
    params, batch = params_of(sparse()), batch_of(sparse(), 0)
    fixed = {}
    slopes, sums = jax.jit(step.gradients)(params, fixed, batch, jax.random.key(0))
    rows = np.asarray(sums["metric.layers.0.ffn.rows"])
    assert (rows == 2 * BATCH * SEQ / EXPERTS).all()
    assert np.abs(np.asarray(slopes["router"])).max() > 0
