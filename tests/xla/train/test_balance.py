"""The balance bias of a step, and experts in turn."""

import jax
import numpy as np

from moecc.train.graphs import Bound, StepPasses, step_graph
from moecc.train.recipe import OptimizerSection

from .small import BATCH, EXPERTS, SEQ, SIZES, batch_of, make_step, params_of, sparse

RATE = 0.01


def test_the_bias_moves_by_what_the_whole_batch_chose():
    dense = sparse("top-2", padded=True, bias=True)
    passes = StepPasses(bound=Bound(0.5), groups=8, losses={"parts": 1}, rolled=False)
    graph = step_graph(dense, passes)
    step = make_step(graph, SIZES, OptimizerSection("adamw"), bias_rate=RATE)
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
    params, batch = params_of(sparse()), batch_of(sparse(), 0)
    gradients = jax.jit(make_step(graph, SIZES).gradients)
    slopes, sums = gradients(params, {}, batch, jax.random.key(0))
    rows = np.asarray(sums["metric.layers.0.ffn.rows"])
    assert (rows == 2 * BATCH * SEQ / EXPERTS).all()
    assert np.abs(np.asarray(slopes["router"])).max() > 0
