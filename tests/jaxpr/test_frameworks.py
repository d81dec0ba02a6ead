"""Models of flax, equinox and haiku, where these are installed: converted, and equal to the dense.

Converted mixtures are held against mixtures by hand in the tests of other models; here it is
trees of parameters, loops and calls as frameworks write them.
"""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")


from moecc import jax as mx  # noqa: E402

from .decoder import EMBED, MLP, VOCAB, tokens  # noqa: E402
from .mixtures import apart  # noqa: E402

TOKENS = tokens()


def check(model, params, locations):
    """Convert `model`, whose functions among the leaves stay out of jit, and compare."""
    moe = mx.convert(model, params, TOKENS, "upcycle{experts=4 top-k=2},add-losses")
    assert [b.loc for b in moe.report.blocks] == locations
    leaves, tree = jax.tree.flatten(moe.params)
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape")}

    def run(arrays, ids):
        filled = [arrays.get(i, x) for i, x in enumerate(leaves)]
        return moe(model, dispatch="gathered")(jax.tree.unflatten(tree, filled), ids)

    assert apart(jax.jit(run)(arrays, TOKENS), model(params, TOKENS)) < 1e-5


@pytest.mark.parametrize("scan", [False, True])
def test_linen(scan):
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(MLP, name="up")(nn.LayerNorm()(x)))
            return x + nn.Dense(EMBED, name="down")(hidden), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(VOCAB, EMBED)(ids)
            if scan:
                layers = nn.scan(
                    nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
                    length=2,
                )  # fmt: skip
                x, _ = layers(name="layers")(x, None)
            else:
                for i in range(2):
                    x, _ = Block(name=f"layers_{i}")(x)
            return nn.Dense(VOCAB)(x)

    params = Model().init(jax.random.key(0), TOKENS)
    locations = [f"params.layers{'.' if scan else '_'}{i}" for i in range(2)]
    check(lambda p, ids: Model().apply(p, ids), params, locations)


@pytest.mark.parametrize("remat", [False, True])
def test_nnx(remat):
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(EMBED, rngs=rngs)
            self.up = nnx.Linear(EMBED, MLP, rngs=rngs)
            self.down = nnx.Linear(MLP, EMBED, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.gelu(self.up(self.norm(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
            self.block = Block(rngs)

        def __call__(self, ids):
            call = nnx.remat(Block.__call__) if remat else Block.__call__
            return call(self.block, self.embed(ids))

    definition, state = nnx.split(Model(nnx.Rngs(0)))
    check(lambda s, ids: nnx.merge(definition, s)(ids), state, ["block"])


def test_equinox():
    """Layers made by vmap and run by scan, vectors by vmap; functions are leaves of the tree."""
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        mlp: Any
        norm: Any

        def __init__(self, key):
            self.mlp = eqx.nn.MLP(EMBED, EMBED, MLP, 1, activation=jax.nn.gelu, key=key)
            self.norm = eqx.nn.LayerNorm(EMBED)

        def __call__(self, x):
            return x + self.mlp(self.norm(x))

    keys = jax.random.split(jax.random.key(0), 2)
    table = jax.random.normal(jax.random.key(1), (VOCAB, EMBED))
    params = {"layers": eqx.filter_vmap(Block)(keys), "table": table}

    def model(params, ids):
        arrays, functions = eqx.partition(params["layers"], eqx.is_array)

        def layer(x, layer):
            return jax.vmap(jax.vmap(eqx.combine(layer, functions)))(x), None

        x, _ = jax.lax.scan(layer, params["table"][ids], arrays)
        return x @ params["table"].T

    check(model, params, ["layers.0.mlp.layers", "layers.1.mlp.layers"])


def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(ids):
        x = hk.Embed(VOCAB, EMBED)(ids)
        norm = hk.LayerNorm(-1, True, True)(x)
        return x + hk.nets.MLP([MLP, EMBED], activation=jax.nn.gelu)(norm)

    transformed = hk.without_apply_rng(hk.transform(forward))
    check(transformed.apply, transformed.init(jax.random.key(0), TOKENS), ["mlp"])
