"""Blocks in loops, branches and checkpoints: equal to mixtures by hand, the loops as they were."""

from functools import partial

import pytest

from moecc.errors import InputError

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from moecc import jax as mx  # noqa: E402

from . import decoder  # noqa: E402
from .mixtures import apart, drawn, mixture  # noqa: E402

LAYERS = 2
PIPELINE = "upcycle{experts=4 top-k=2},add-losses"
TOKENS = decoder.tokens()


def layer(p, x, ffn):
    """A layer without attention: the loops are what is tested."""
    return x + ffn(p["mlp"], decoder.norm(x, p["norm2"]))


def stacked():
    params = decoder.init(LAYERS)
    layers = jax.tree.map(lambda *each: jnp.stack(each), *params["layers"])
    return {**params, "layers": layers}


def scanned(params, tokens, remat=False, routers=None, **options):
    """A decoder whose layers are one scan; with `routers`, its mixtures by hand."""

    def step(x, each):
        p, router = each
        return layer(p, x, partial(expert, router=router)), None

    if remat:
        step = jax.checkpoint(step, prevent_cse=False, **options)
    x, _ = jax.lax.scan(step, params["embed"][tokens], (params["layers"], routers))
    return x @ params["head"]


def expert(p, x, router):
    return decoder.swiglu(p, x) if router is None else mixture(decoder.swiglu, p, router, x, 2)


@pytest.fixture(scope="module")
def moe():
    return mx.convert(scanned, stacked(), TOKENS, PIPELINE)


def total(function):
    return lambda params, tokens: jnp.sum(jnp.sin(function(params, tokens)))


def by_hand(params, tokens):
    routers = params["moe"][f"layers.{{0..{LAYERS - 1}}}.mlp.router.weight"]
    return scanned(params["params"], tokens, routers=routers)


def test_experts_and_routers_are_stacked(moe):
    shape = (LAYERS, 4, decoder.EMBED, decoder.MLP)
    assert moe.params["params"]["layers"]["mlp"]["up"].shape == shape
    assert [b.loc for b in moe.report.blocks] == ["layers.0.mlp", "layers.1.mlp"]
    (router,) = moe.params["moe"].values()
    assert router.shape == (LAYERS, 4, decoder.EMBED)
    assert bool(jnp.any(router[0] != router[1]))


def test_a_scan_of_checkpoints_is_the_mixture_by_hand(moe):
    policy = jax.checkpoint_policies.dots_saveable
    function = partial(scanned, remat=True, policy=policy)
    params = drawn(moe.params)
    converted = jax.value_and_grad(total(moe(function, dispatch="gathered")))
    found = jax.jit(converted)(params, TOKENS)
    assert apart(found, jax.jit(jax.value_and_grad(total(by_hand)))(params, TOKENS)) < 1e-5
    text = str(jax.make_jaxpr(converted)(params, TOKENS))
    assert "policy=" in text
    assert "length=2" in text


def test_a_checkpoint_that_returns_its_weights_is_the_one_that_does_not():
    def passing(params, tokens):
        @jax.checkpoint
        def block(p, x):
            return decoder.swiglu(p, x), p

        x, again = params["embed"][tokens], None
        for number in range(LAYERS):
            p = jax.tree.map(lambda a, number=number: a[number] * 1.0, params["layers"]["mlp"])
            y, again = block(p, x)
            x = x + y + decoder.swiglu(again, y)
        return x @ params["head"]

    dense = stacked()
    moe = mx.convert(passing, dense, TOKENS, "upcycle{experts=4 top-k=2}")
    assert [b.loc for b in moe.report.blocks] == ["layers.0.mlp", "layers.1.mlp"]
    found = jax.jit(moe(passing, dispatch="gathered"))(moe.params, TOKENS)
    assert apart(found, jax.jit(passing)(dense, TOKENS)) < 1e-5


def halves(params, tokens):
    """Two scans, one after the other, each over a part of the stack."""
    x = params["embed"][tokens]
    for part in (slice(0, 1), slice(1, LAYERS)):
        layers = jax.tree.map(lambda a, part=part: a[part], params["layers"])
        x, _ = jax.lax.scan(lambda x, p: (layer(p, x, decoder.swiglu), None), x, layers)
    return x @ params["head"]


def test_a_scan_that_was_split_converts_in_part():
    dense = stacked()
    moe = mx.convert(halves, dense, TOKENS, "upcycle{experts=4 layers=1}")
    assert moe.params["params"]["layers"]["mlp"]["up"] is dense["layers"]["mlp"]["up"]
    assert moe.params["moe"]["layers.1.mlp.up"].shape == (1, 4, decoder.EMBED, decoder.MLP)
    found = jax.jit(moe(halves, dispatch="gathered"))(moe.params, TOKENS)
    assert apart(found, jax.jit(halves)(dense, TOKENS)) < 1e-5


def test_layers_of_one_scan_become_alike_or_nothing_does():
    with pytest.raises(InputError, match="blocks of one scan would differ") as error:
        mx.convert(scanned, stacked(), TOKENS, "upcycle{experts=4 layers=every:2}")
    assert "split the scan" in str(error.value)
