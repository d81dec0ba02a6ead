"""XLA's partitioner gets the same routing as one device, and exchanges slots group by group."""

import numpy as np
import pytest
from sharding_cases import layer
from tiers import few

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.census import census  # noqa: E402
from moecc_backends.xla.lower.function import GspmdLowering  # noqa: E402
from moecc_backends.xla.trace.context import DIRECT  # noqa: E402

from moecc.plan.step import plan_mesh  # noqa: E402
from moecc.sharding.layout import Layout  # noqa: E402

EXPERTS = 8


def arrays(graph):
    """Parameters, experts that differ among them, and tokens."""
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=v.type.shape).astype("f") for n, v in graph.params.items()}
    return params, {"x": rng.normal(size=(16, 4, 8)).astype("f")}


def compiled(graph, interceptor=DIRECT):
    """Return values and gradients as one program."""
    run = function(graph, interceptor=interceptor)
    weights = np.random.default_rng(1).normal(size=(16, 4, 8)).astype("f")

    def loss(params, inputs):
        y = run(params, inputs)["y"]
        return (y * weights).mean(), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step.lower(*arrays(graph)).compile()


@pytest.mark.parametrize("slots", few(["capacity", "expert-choice", "ragged"]))
def test_the_layer_is_that_of_one_device(slots):
    graph = layer(slots)
    grid = plan_mesh("data=8")
    devices = np.array(jax.devices()[:8]).reshape(grid.shape)
    lowering = GspmdLowering(jax.sharding.Mesh(devices, grid.names), Layout(grid, EXPERTS))
    program = compiled(graph, lowering)
    (_, expected), slopes = compiled(graph)(*arrays(graph))
    (_, found), others = program(*arrays(graph))
    pairs = zip(jax.tree.leaves((expected, slopes)), jax.tree.leaves((found, others)), strict=True)
    for a, b in pairs:
        assert np.abs(a).max() > 0
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(a).max()
    exchanges = census(program.as_text()).by_kind().get("all-to-all", {"runs": 0})["runs"]
    # There and back, and the same for the gradient; rows without slots are gathered.
    assert exchanges == (0 if slots == "ragged" else 4)
