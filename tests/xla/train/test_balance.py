"""The balance bias of a step, and experts in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moecc.plan.step import StepConfig
from moecc.train.graphs import Bound, MeshPasses, StepPasses, step_graph
from moecc.train.recipe import OptimizerSection
from moecc.train.settings import StepSpec

from .small import BATCH, EXPERTS, SEQ, SIZES, batch_of, params_of, sparse

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from moecc_backends.xla.train.step import make_train_step  # noqa: E402

RATE = 0.01


def state_after(parts: int, mesh: MeshPasses | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """Return the biases of a step with a padded batch, its metrics, and what it chose."""
    dense = sparse("top-2", padded=True, bias=True)
    passes = StepPasses(bound=Bound(0.5), groups=8 // parts, losses={"parts": parts}, mesh=mesh,
                        **{"rolled": False, **options})  # fmt: skip
    evaluated = StepPasses("eval", bound=Bound(2.0), groups=8 // parts, rolled=False,
                           losses={"parts": parts}, mesh=mesh)  # fmt: skip
    spec = StepSpec(
        SIZES,
        StepConfig(dtype="f32", micro_batches=parts),
        OptimizerSection("adamw"),
        bias_rate=RATE,
    )
    devices = jax.devices()[: 1 if mesh is None else 2]
    step = make_train_step(step_graph(dense, passes), spec, devices, step_graph(dense, evaluated))
    params, batch = params_of(dense), batch_of(dense, 1, padding=0.2)
    params["bias"] = np.array([0.3, -0.1, -0.1, -0.1])
    state = step.init(params)
    assert "bias" not in state["params"]
    before = np.asarray(state["bias"]["bias"])
    told = step.evaluate(step.model_params(state), batch)
    assert (np.asarray(state["bias"]["bias"]) == before).all()
    state, metrics = step.step(state, batch, jax.random.key(0), 1e-3)
    chosen = metrics["metric.layers.0.ffn.chosen"]
    return np.asarray(state["bias"]["bias"]), np.asarray(chosen), {**metrics, "told": told}


def test_the_bias_moves_by_what_the_whole_batch_chose() -> None:
    bias, chosen, _ = state_after(1)
    moved = np.array([0.3, -0.1, -0.1, -0.1]) + RATE * np.sign(chosen.mean() - chosen)
    np.testing.assert_allclose(bias, moved - moved.mean(), atol=1e-7)
    assert abs(bias.sum()) < 1e-6
    dense = sparse("top-2", padded=True, bias=True)
    assert chosen.sum() == 2 * batch_of(dense, 1, padding=0.2)["mask"].sum()


def test_experts_in_turn_have_equal_loads() -> None:
    graph = step_graph(sparse(), StepPasses(groups=1, losses={"parts": 1}, balanced=True))
    spec = StepSpec(SIZES, StepConfig(dtype="f32"), OptimizerSection("sgd"))
    step = make_train_step(graph, spec, jax.devices()[:1])
    params, batch = params_of(sparse()), batch_of(sparse(), 0)
    fixed: dict[str, Any] = {}
    slopes, sums = jax.jit(step.gradients)(params, fixed, batch, jax.random.key(0))
    rows = np.asarray(sums["metric.layers.0.ffn.rows"])
    assert (rows == 2 * BATCH * SEQ / EXPERTS).all()
    assert np.abs(np.asarray(slopes["router"])).max() > 0
