"""Eight devices: the user's sharding kept, experts over a mesh, equal to one device."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from moecc import jax as mx  # noqa: E402
from moecc.errors import InputError  # noqa: E402

from .mixtures import apart, drawn  # noqa: E402

E, F = 8, 16
UPCYCLE = "upcycle{experts=4 top-k=2}"
SHARD = "annotate-sharding{mesh=data:2,expert:4 rules=expert-parallel}"


def loss(params, x):
    def layer(x, p):
        return x + jax.nn.silu(jnp.tanh(x) @ p["w1"]) @ p["w2"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    # No sum that cancels: its rounding would be larger than itself.
    return jnp.sum(jnp.square(x @ params["out"]))


def draw(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(0, 0.3, shape), jnp.float32)


DENSE = {"layers": {"w1": draw(2, E, F), "w2": draw(2, F, E)}, "out": draw(E, E)}
X = draw(8, 4, E)


@pytest.fixture(scope="module")
def mesh():
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("data", "expert"), axis_types=types)


@pytest.fixture(scope="module")
def alone():
    """A conversion on one device, drawn parameters, and the loss of them with gradients."""
    moe = mx.convert(loss, DENSE, X, UPCYCLE)
    some = drawn(moe.params)
    found = jax.jit(jax.value_and_grad(moe(loss, dispatch="gathered")))(some, X)
    return moe, some, found


def placed(mesh):
    specs = {"layers": {"w1": (None, None, "data"), "w2": (None, "data", None)}, "out": ()}
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(*s)), specs, is_leaf=lambda s: type(s) is tuple
    )
    return jax.device_put(DENSE, shardings)


def test_new_parameters_lie_where_the_dense_ones_did(mesh, alone):
    moe = mx.convert(loss, placed(mesh), X, UPCYCLE)
    layers, beside = moe.params["params"]["layers"], moe.params["moe"]
    assert layers["w1"].sharding.spec == PartitionSpec(None, "expert", None, "data")
    assert layers["w2"].sharding.spec == PartitionSpec(None, "expert", "data", None)
    assert next(iter(beside.values())).sharding.spec == PartitionSpec(None, "expert", None)
    assert layers["w1"].addressable_shards[0].data.shape == (2, 1, E, F // 2)
    assert apart(moe.params, alone[0].params) == 0.0


VIAS = ["ragged", pytest.param("ring", marks=pytest.mark.slow)]


@pytest.mark.parametrize("via", VIAS)
def test_experts_over_a_mesh_by_the_collectives_of_the_graph(mesh, alone, via):
    pipeline = f"{UPCYCLE},{SHARD},expert-parallel{{via={via}}},lower-collectives"
    moe = mx.convert(loss, DENSE, X, pipeline)
    with pytest.raises(InputError, match="the blocks lie on a mesh of devices"):
        jax.eval_shape(moe(loss), moe.params, X)
    compiled = jax.jit(jax.value_and_grad(moe(loss, mesh=mesh))).lower(alone[1], X).compile()
    assert apart(compiled(alone[1], X), alone[2]) < 1e-5
    assert "all-" in compiled.as_text()


@pytest.mark.slow
def test_inside_a_shard_map_of_the_user(mesh, alone):
    """Tokens and experts are those of each device; the collectives are those of the graph."""
    pipeline = f"{UPCYCLE},{SHARD},expert-parallel{{via=ragged}},lower-collectives"
    moe = mx.convert(loss, DENSE, X, pipeline)
    params = jax.tree.map(lambda _: PartitionSpec(), moe.params)
    params["params"]["layers"] = dict.fromkeys(("w1", "w2"), PartitionSpec(None, "expert"))
    tokens = PartitionSpec(("data", "expert"))

    def one(some, x):
        return jax.lax.psum(moe(loss)(some, x), ("data", "expert"))

    run = jax.shard_map(one, mesh=mesh, in_specs=(params, tokens), out_specs=PartitionSpec())
    assert apart(jax.jit(run)(alone[1], X), alone[2][0]) < 1e-5
