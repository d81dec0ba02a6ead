"""Parameters of a loop's layers are cast a layer at a time, which changes no gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_configs import read_config
from moecc_backends.xla.lower.scan import _worth_keeping
from moecc_backends.xla.trace.host_arrays import Master, stored_order
from moecc_backends.xla.train import gradients
from tiers import few

from moecc.families import build
from moecc.testing import params_for
from moecc.train.graphs import Bound, MeshPasses, StepPasses, step_graph
from tests.xla.models import GOLDEN

from .small import make_step

BATCH, SEQ = 16, 8
MESHES = {
    "one device": None,
    "stored in parts": MeshPasses("fsdp:4,expert:2", ("fsdp", "expert-parallel"), "capacity"),
    "dropless": MeshPasses("fsdp:4,expert:2", ("fsdp", "expert-parallel"), "ragged"),
}


def step_of(mesh, remat="full", **config):
    passes = StepPasses(
        bound=None if mesh == "dropless" else Bound(1.25), groups=8, losses=None,
        mesh=MESHES[mesh], remat=remat, weighted=True,
    )  # fmt: skip
    graph = step_graph(build(read_config(GOLDEN / "mixtral_gqa")), passes)
    devices = 1 if passes.mesh is None else 8
    config = {"dtype": "bf16", **config}
    return make_step(graph, {"B": BATCH, "S": SEQ}, devices=devices, config=config)


def run(step):
    rng = np.random.default_rng(0)
    drawn = params_for(step.graph)
    params = {n: np.float32(drawn[n]) for n in step.trained}
    batch = {n: np.int32(rng.integers(0, 16, a.shape)) for n, a in step.abstract_batch.items()}
    results = jax.jit(partial(step.gradients, key=jax.random.key(0)))(params, {}, batch)
    return jax.tree.map(np.asarray, results)


@pytest.mark.parametrize(
    ("shape", "platform", "order"),
    [
        # As libtpu had them in steps of SmolLM2 and ST-MoE-32B.
        ((1536, 576), "tpu", (1, 0)),
        ((576, 1536), "tpu", (0, 1)),
        ((192, 576), "tpu", (0, 1)),
        ((1, 1280, 5120), "tpu", (0, 1, 2)),
        ((1536, 576), "gpu", (0, 1)),
        ((576,), "tpu", (0,)),
    ],
)
def test_a_tpu_stores_what_pads_less(shape, platform, order):
    assert stored_order(shape, platform) == order


def test_no_run_of_a_loop_keeps_a_cast_parameter():
    def run(x, weight):
        return jnp.tanh(x @ weight.cast()), ()

    def loss(slope, stored, x):
        step = jax.checkpoint(run, policy=_worth_keeping, prevent_cse=False)
        return jax.lax.scan(step, x, Master(stored, slope))[0].sum()

    narrow = partial(jnp.ones, dtype=jnp.bfloat16)
    given = narrow((5, 8, 8)), jnp.ones((5, 8, 8)), narrow((4, 8))
    loops = [e for e in jax.make_jaxpr(jax.grad(loss))(*given).eqns if e.primitive.name == "scan"]
    forward = [str(v.aval) for v in loops[0].outvars]
    assert "bfloat16[5,4,8]" in forward
    assert "bfloat16[5,8,8]" not in forward


CASES = [
    ("one device", {}),
    ("one device", {"remat": "none"}),
    ("one device", {"remat": "save", "micro_batches": 2}),
    ("stored in parts", {}),
    ("stored in parts", {"reduce_dtype": "f32", "micro_batches": 2}),
    ("dropless", {}),
]


@pytest.mark.parametrize(("mesh", "options"), few(CASES))
def test_values_and_gradients_are_those_of_parameters_cast_at_once(mesh, options, monkeypatch):
    by_layer = run(step_of(mesh, **options))
    monkeypatch.setattr(gradients, "is_cast_by_layer", lambda value: False)
    expected = run(step_of(mesh, **options))
    for found, wanted in zip(by_layer, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert np.array_equal(found[name], value), name
    assert any(np.any(slope) for slope in expected[0].values())
