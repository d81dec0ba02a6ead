"""The main road: a function converted, equal to the dense one, to a mixture by hand, trained."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from moecc import jax as mx  # noqa: E402

from . import decoder  # noqa: E402
from .mixtures import apart, drawn, mixture  # noqa: E402

PIPELINE = "upcycle{experts=4 top-k=2},add-losses"


@pytest.fixture(scope="module")
def dense():
    return decoder.init()


@pytest.fixture(scope="module")
def moe(dense):
    return mx.convert(decoder.loss, dense, decoder.tokens(), PIPELINE)


@pytest.fixture(scope="module")
def value(moe):
    """The loss of converted parameters with gradients, a part of the routers' in it; compiled."""
    whole = moe(decoder.loss, losses=True, dispatch="gathered")

    def weighted(params, tokens, weight):
        total, found = whole(params, tokens)
        return found["loss.model"] + weight * found["loss.auxiliary"], (total, found)

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def by_hand(params, tokens):
    """The decoder on converted parameters, its mixtures written by hand."""
    routers = iter(params["moe"][f"layers.{i}.mlp.router.weight"] for i in range(2))

    def ffn(experts, x):
        return mixture(decoder.swiglu, experts, next(routers), x, 2)

    return decoder.loss(params["params"], tokens, ffn)


def test_the_converted_function_is_the_dense_one(moe, dense, value):
    tokens = decoder.tokens()
    (_, (total, found)), _ = value(moe.params, tokens, 1.0)
    assert apart(found["loss.model"], jax.jit(decoder.loss)(dense, tokens)) < 1e-6
    assert apart(total, found["loss.model"] + found["loss.auxiliary"]) < 1e-6
    assert float(found["loss.auxiliary"]) > 0.01
    assert found["metric.layers.1.mlp.loads"].shape == (4,)


def test_drawn_experts_and_routers_are_the_mixture_by_hand(moe, value):
    params, tokens = drawn(moe.params), decoder.tokens()
    (loss, _), gradients = value(params, tokens, 0.0)
    expected = jax.jit(jax.value_and_grad(by_hand))(params, tokens)
    assert apart((loss, gradients), expected) < 1e-5


def test_a_few_steps_train(moe, value):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, state, gradients):
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    params, state, losses = moe.params, optimizer.init(moe.params), []
    for _ in range(4):
        (loss, _), gradients = value(params, decoder.tokens(), 1.0)
        params, state = update(params, state, gradients)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1
    router = "layers.0.mlp.router.weight"
    assert bool(jnp.any(params["moe"][router] != moe.params["moe"][router]))
