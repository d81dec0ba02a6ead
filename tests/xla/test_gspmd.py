"""What XLA's partitioner lays out on a mesh, layers and training steps, is that on one device."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from moecc_backends.xla.backend import function
from moecc_backends.xla.census import census
from moecc_backends.xla.lower.function import GspmdLowering
from sharding_cases import layer
from tiers import few

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.plan.step import StepConfig, plan_mesh
from moecc.presets import preset_config
from moecc.sharding.layout import Layout
from moecc.train.recipe import OptimizerSection
from moecc.train.settings import StepSpec

from .models import apply_passes, assert_near, normal, values_and_gradients

EXPERTS = 8


@pytest.mark.parametrize("slots", few(["capacity", "expert-choice", "ragged"]))
def test_a_layer_exchanges_slots_group_by_group(slots):
    graph, grid = layer(slots), plan_mesh("data=8")
    devices = np.array(jax.devices()[:8]).reshape(grid.shape)
    lowering = GspmdLowering(jax.sharding.Mesh(devices, grid.names), Layout(grid, EXPERTS))
    rng = np.random.default_rng(0)
    params, x = normal(rng, graph.params, "f4"), rng.normal(size=(16, 4, 8)).astype("f4")
    *whole, _ = values_and_gradients(function(graph), params, {"x": x})
    on_mesh = function(graph, interceptor=lowering)
    *found, program = values_and_gradients(on_mesh, params, {"x": x})
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(whole))
    assert_near(whole, found)
    exchanges = census(program).by_kind().get("all-to-all", {"runs": 0})["runs"]
    # There and back, and the same for the gradient; rows without slots are gathered.
    assert exchanges == (0 if slots == "ragged" else 4)


CONFIG = {
    "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
    "sparse_encoder_layers": [1], "sparse_decoder_layers": [1], "num_experts": EXPERTS,
    "vocab_size": 64, "train_capacity_factor": 1.25,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "dense_weights"), [("data=2,expert=4", "split"), ("fsdp=2,expert=2,model=2", "whole")]
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(mesh, dense_weights):
    """Rows are exchanged, and the weights of experts are gathered nowhere."""
    pytest.importorskip("optax")
    from moecc_backends.xla.train.step import make_train_step

    graph = build(parse_config({**preset_config("st-moe-base"), **CONFIG}))
    apply_passes(graph, "specialize{mode=train capacity-factor=1.25 groups=8},add-losses,cse")
    update = OptimizerSection("sgd", clip=0.0, decay=0.0)
    spec = StepSpec({"B": 16, "S": 8, "T": 4}, StepConfig(dtype="f64"), update, guard=None)
    layout = Layout(plan_mesh(mesh), EXPERTS, dense_weights)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(0, CONFIG["vocab_size"], leaf.shape).astype(np.int32)
        return ((0.2 if leaf.ndim > 1 else 1.0) * rng.normal(size=leaf.shape)).astype(np.float32)

    with jax.enable_x64(True):
        step = make_train_step(graph, replace(spec, layout=layout), jax.devices()[:8])
        single = make_train_step(graph, spec, jax.devices()[:1])
        params = jax.tree.map(draw, step.abstract_state["params"])
        batch = jax.tree.map(draw, step.abstract_batch)
        more = jax.random.key(0), jax.numpy.float32(1.0)
        expected, metrics = single.step(single.init(params), batch, *more)
        laid = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), batch, step.abstract_batch)
        compiled = step.function.lower(step.init(params), laid, *more).compile()
        after, on_mesh = compiled(step.init(params), laid, *more)
    assert float(on_mesh["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-9)
    assert float(metrics["loss.auxiliary"]) > 0
    for name, array in expected["params"].items():
        change = np.abs(np.asarray(array) - params[name]).max()
        assert change > 0
        difference = np.abs(np.asarray(array) - np.asarray(after["params"][name])).max()
        assert difference < 1e-5 * max(change, 1e-3), name
    program = census(compiled.as_text())
    assert program.by_kind()["all-to-all"]["runs"] >= 8
    gathered = (c.size_bytes for c in program.collectives if c.kind == "all-gather")
    assert max(gathered, default=0) < 3 * 8 * 64 * 32 * 8 / 4
