"""Models of flax, equinox and haiku, where these are installed: converted, and drawn at random.

Drawn mixtures are compared with a model of the same framework whose block is written by hand.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from moecc import jax as mx  # noqa: E402

from .decoder import EMBED, MLP, VOCAB, tokens  # noqa: E402
from .mixtures import apart, drawn, mixture  # noqa: E402

TOKENS = tokens()
PIPELINE = "upcycle{experts=4 top-k=2},add-losses"


def check(model: Any, params: Any, by_hand: Any) -> Any:
    """Convert `model`; compare it dense, and drawn at random with `by_hand`."""
    moe = mx.convert(model, params, TOKENS, PIPELINE)
    run = jax.jit(moe(model, dispatch="gathered"))
    assert apart(run(moe.params, TOKENS), jax.jit(model)(params, TOKENS)) < 1e-5
    some = drawn(moe.params)
    assert apart(run(some, TOKENS), jax.jit(by_hand)(some, TOKENS)) < 1e-5
    return moe


def routers(params: Any) -> Any:
    return list(params["moe"].values())


def two_matrices(p: Any, x: Any) -> Any:
    return jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def expert(p: Any, x: Any, router: Any) -> Any:
    return two_matrices(p, x) if router is None else mixture(two_matrices, p, router, x, 2)


def linen_model(scan: bool, router: Any = None) -> Any:
    """A decoder of flax.linen; its blocks are mixtures by hand where it is given routers."""
    nn = pytest.importorskip("flax.linen")

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x: Any, router: Any = None) -> Any:
            if router is None:
                hidden = nn.gelu(nn.Dense(MLP, name="up")(x))
                return nn.Dense(EMBED, name="down")(hidden)
            p = {}
            for name in ("up", "down"):
                inner = self.scope.get_variable("params", name)
                p |= {name: inner["kernel"], f"{name}_bias": inner["bias"]}
            return expert(p, x, router)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, router: Any = None) -> Any:
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            return x + Mlp(name="mlp")(nn.LayerNorm()(x), router), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids: Any, routers: Any = None) -> Any:
            x = nn.Embed(VOCAB, EMBED)(ids)
            if scan:
                layers = nn.scan(
                    nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
                    length=2,
                )  # fmt: skip
                x, _ = layers(name="layers")(x, routers)
            else:
                for i in range(2):
                    x, _ = Block(name=f"layers_{i}")(x, None if routers is None else routers[i])
            return nn.Dense(VOCAB)(x)

    return Model()


@pytest.mark.parametrize("scan", [False, True])
def test_linen(scan: bool) -> None:
    model = linen_model(scan)
    params = model.init(jax.random.key(0), TOKENS)

    def by_hand(params: Any, ids: Any) -> Any:
        given = routers(params)
        return model.apply(params["params"], ids, given[0] if scan else given)

    moe = check(lambda p, ids: model.apply(p, ids), params, by_hand)
    assert len(moe.report.blocks) == 2


def test_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):  # type: ignore[misc,name-defined]
        def __init__(self, rngs: Any) -> None:
            self.norm = nnx.RMSNorm(EMBED, rngs=rngs)
            self.up = nnx.Linear(EMBED, MLP, rngs=rngs)
            self.down = nnx.Linear(MLP, EMBED, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + self.down(nnx.gelu(self.up(self.norm(x))))

    class Model(nnx.Module):  # type: ignore[misc,name-defined]
        def __init__(self, rngs: Any) -> None:
            self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
            self.block = Block(rngs)
            self.head = nnx.Linear(EMBED, VOCAB, rngs=rngs)

        def __call__(self, ids: Any) -> Any:
            return self.head(self.block(self.embed(ids)))

    definition, state = nnx.split(Model(nnx.Rngs(0)))

    def by_hand(params: Any, ids: Any) -> Any:
        (router,) = routers(params)
        model = nnx.merge(definition, params["params"])
        block = model.block
        p = {"up": block.up.kernel[...], "up_bias": block.up.bias[...],
             "down": block.down.kernel[...], "down_bias": block.down.bias[...]}  # fmt: skip
        x = model.embed(ids)
        return model.head(x + expert(p, block.norm(x), router))

    moe = check(lambda s, ids: nnx.merge(definition, s)(ids), state, by_hand)
    assert [b.loc for b in moe.report.blocks] == ["block"]


def test_equinox() -> None:
    """Layers made by vmap and run by scan, vectors by vmap; functions are leaves of the tree."""
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):  # type: ignore[misc,name-defined]
        mlp: Any
        norm: Any

        def __init__(self, key: Any) -> None:
            self.mlp = eqx.nn.MLP(EMBED, EMBED, MLP, 1, activation=jax.nn.gelu, key=key)
            self.norm = eqx.nn.LayerNorm(EMBED)

        def __call__(self, x: Any) -> Any:
            return x + self.mlp(self.norm(x))

    keys = jax.random.split(jax.random.key(0), 2)
    table = jax.random.normal(jax.random.key(1), (VOCAB, EMBED))
    params = {"layers": eqx.filter_vmap(Block)(keys), "table": table}

    def model(params: Any, ids: Any, ffn: Any = None) -> Any:
        arrays, rest = eqx.partition(params["layers"], eqx.is_array)

        def layer(x: Any, each: Any) -> Any:
            arrays, router = each
            block = eqx.combine(arrays, rest)
            if router is None:
                return jax.vmap(jax.vmap(block))(x), None
            up, down = block.mlp.layers
            p = {"up": jnp.swapaxes(up.weight, 1, 2), "up_bias": up.bias,
                 "down": jnp.swapaxes(down.weight, 1, 2), "down_bias": down.bias}  # fmt: skip
            return x + expert(p, jax.vmap(jax.vmap(block.norm))(x), router), None

        x, _ = jax.lax.scan(layer, params["table"][ids], (arrays, ffn))
        return x @ params["table"].T

    def by_hand(params: Any, ids: Any) -> Any:
        return model(params["params"], ids, routers(params)[0])

    moe = check_filtered(model, params, by_hand)
    assert [b.loc for b in moe.report.blocks] == ["layers.0.mlp.layers", "layers.1.mlp.layers"]


def check_filtered(model: Any, params: Any, by_hand: Any) -> Any:
    """Compare as `check` does; functions among the leaves stay out of jit."""
    moe = mx.convert(model, params, TOKENS, PIPELINE)
    leaves, tree = jax.tree.flatten(moe.params)
    is_array = [hasattr(x, "shape") for x in leaves]
    arrays = [x for x, array in zip(leaves, is_array, strict=True) if array]

    def whole(given: Any) -> Any:
        rest = iter(given)
        every = [next(rest) if a else x for x, a in zip(leaves, is_array, strict=True)]
        return jax.tree.unflatten(tree, every)

    run = jax.jit(lambda a, t: moe(model, dispatch="gathered")(whole(a), t))
    assert apart(run(arrays, TOKENS), jax.jit(partial(model, params))(TOKENS)) < 1e-5
    some = drawn(arrays)
    assert apart(run(some, TOKENS), jax.jit(lambda a, t: by_hand(whole(a), t))(some, TOKENS)) < 1e-5
    return moe


def test_haiku() -> None:
    hk = pytest.importorskip("haiku")

    def forward(ids: Any) -> Any:
        x = hk.Embed(VOCAB, EMBED)(ids)
        norm = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(VOCAB)(x + hk.nets.MLP([MLP, EMBED], activation=jax.nn.gelu)(norm))

    transformed = hk.without_apply_rng(hk.transform(forward))
    params = transformed.init(jax.random.key(0), TOKENS)

    def by_hand(params: Any, ids: Any) -> Any:
        p, (router,) = params["params"], routers(params)
        up, down = p["mlp/~/linear_0"], p["mlp/~/linear_1"]
        block = {"up": up["w"], "up_bias": up["b"], "down": down["w"], "down_bias": down["b"]}
        x = p["embed"]["embeddings"][ids]
        mean = jnp.mean(x, -1, keepdims=True)
        scaled = (x - mean) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
        norm = scaled * p["layer_norm"]["scale"] + p["layer_norm"]["offset"]
        return (x + expert(block, norm, router)) @ p["linear"]["w"] + p["linear"]["b"]

    check(transformed.apply, params, by_hand)


PAGE = Path(__file__).parents[2] / "docs" / "any-jax-model.md"


@pytest.mark.parametrize("name", ["flax", "equinox"])
def test_the_model_of_the_page_trains(name: str) -> None:
    pytest.importorskip(name)
    section = PAGE.read_text("utf-8").split(f"## {name}\n")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python sketch\n(.*?)```", section, re.DOTALL)
    found: dict[str, Any] = {"__name__": name}
    exec(compile(program, PAGE.name, "exec"), found)
    assert all(b.is_converted for b in found["moe"].report.blocks)
    assert len(found["losses"]) == 5
