"""What is a block, what its operations are, and why something else is none: traced, never run."""

import re
from pathlib import Path
from sysconfig import get_paths

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from moecc_backends.jaxpr.views import user_line  # noqa: E402

from moecc import jax as mx  # noqa: E402
from moecc.errors import InputError  # noqa: E402

E, F, B, S = 8, 12, 2, 3


def shapes(**sizes):
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in sizes.items()}


X = jax.ShapeDtypeStruct((B, S, E), jnp.float32)
PLAIN = {"w1": (E, F), "w2": (F, E)}
GATED = {**PLAIN, "w3": (E, F)}
BIASED = {**PLAIN, "b1": (F,), "b2": (E,)}


def found(function, params, **options):
    options.setdefault("pipeline", "upcycle{experts=4}")
    return mx.convert(function, shapes(**params), X, **options)


def act(function):
    return lambda p, x: function(x @ p["w1"]) @ p["w2"]


def biased(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def flat(p, x):
    return (jax.nn.silu(x.reshape(-1, E) @ p["w1"]) @ p["w2"]).reshape(x.shape)


def by_vector(p, x):
    def one(v):
        return p["w2"].T @ jax.nn.relu(p["w1"].T @ v + p["b1"]) + p["b2"]

    return jax.vmap(jax.vmap(one))(x)


def clamped(p, x):
    gate, up = jnp.minimum(x @ p["w1"], 7.0), jnp.clip(x @ p["w3"], -7.0, 7.0)
    return (gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)) @ p["w2"]


def prelu(p, x):
    h = x @ p["w1"]
    return (jnp.maximum(h, 0.0) + p["b1"] * jnp.minimum(h, 0.0)) @ p["w2"]


@jax.checkpoint
def passing(p, x):
    return act(jax.nn.silu)(p, x), p


BLOCKS = {
    "silu": (act(jax.nn.silu), PLAIN, "contract silu contract"),
    "gelu": (act(lambda h: jax.nn.gelu(h, approximate=False)), PLAIN, "contract gelu contract"),
    "squared relu": (
        act(lambda h: jnp.square(jax.nn.relu(h))), PLAIN, "contract relu square contract",
    ),
    "mish": (act(jax.nn.mish), PLAIN, "contract pointwise contract"),
    "where": (act(lambda h: jnp.where(h > 0, h, 0.1 * h)), PLAIN, "contract pointwise contract"),
    "biases": (biased, BIASED, "contract add relu contract add"),
    "clamped": (
        clamped, GATED,
        "contract pointwise constant constant contract maximum minimum constant add mul contract",
    ),
    "trained activation": (
        prelu, BIASED, "contract constant maximum constant minimum mul add contract",
    ),
    "flat tokens": (flat, PLAIN, "contract silu contract"),
    "a vector at a time": (by_vector, BIASED, "contract add relu contract add"),
    "halves": (
        lambda p, x: (lambda g, u: jax.nn.silu(g) * u)(*jnp.split(x @ p["w1"], 2, -1)) @ p["w2"],
        {"w1": (E, 2 * F), "w2": (F, E)}, "contract silu contract mul contract",
    ),
    "every other": (
        lambda p, x: (lambda h: jax.nn.silu(h[..., ::2]) * h[..., 1::2])(x @ p["w1"]) @ p["w2"],
        {"w1": (E, 2 * F), "w2": (F, E)}, "contract silu contract mul contract",
    ),
    "an axis of two": (
        lambda p, x: (lambda h: jax.nn.silu(h[..., 0, :]) * h[..., 1, :])(
            jnp.einsum("bsd,dcf->bscf", x, p["w1"])) @ p["w2"],
        {"w1": (E, 2, F), "w2": (F, E)}, "contract silu contract mul contract",
    ),
    "a weight times one": (
        lambda p, x: jax.nn.silu(x @ (p["w1"] * 1.0)) @ (1.0 * p["w2"] / 1.0), PLAIN,
        "contract silu contract",
    ),
    "a checkpoint that returns its weights": (
        lambda p, x: passing(p, x)[0], PLAIN, "contract silu contract",
    ),
    "a reshaped weight": (
        lambda p, x: jax.nn.silu(x @ p["w1"].reshape(E, F)) @ p["w2"].reshape(F, E),
        {"w1": (2, E // 2, F), "w2": (3, 4, E)}, "contract silu contract",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_these_operations(name):
    function, params, operations = BLOCKS[name]
    (block,) = found(function, params).report.blocks
    assert block.operations == operations
    assert block.is_converted


@pytest.mark.parametrize("name", ["mish", "gelu", "where"])
def test_axes_of_equal_sizes_are_different_axes(name):
    """As many texts as tokens, as neurons, as the width: an activation is the same."""
    function, _, operations = BLOCKS[name]
    x = jax.ShapeDtypeStruct((4, 4, 4), jnp.float32)
    moe = mx.convert(function, shapes(w1=(4, 4), w2=(4, 4)), x, "upcycle{experts=4}")
    assert moe.report.blocks[0].operations == operations


@jax.custom_vjp
def straight(h):
    return jax.nn.relu(h)


straight.defvjp(lambda h: (straight(h), None), lambda _, g: (g,))


@jax.custom_jvp
def through(h):
    """ReLU with the derivative of the identity."""
    return jax.nn.relu(h)


through.defjvp(lambda primals, tangents: (through(*primals), tangents[0]))


def with_dropout(p, x):
    h = jax.nn.relu(x @ p["w1"])
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0.0) @ p["w2"]


def with_norm(p, x):
    h = jax.nn.silu(x @ p["w1"])
    return (h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True))) @ p["w2"]


def on_the_host(p, x):
    made = jax.ShapeDtypeStruct((B, S, F), jnp.float32)
    return jax.pure_callback(lambda h: h, made, x @ p["w1"]) @ p["w2"]


def decayed(p, x):
    return act(jax.nn.silu)(p, x).sum() + sum(jnp.sum(w**2) for w in p.values())


def hidden_used(p, x):
    h = jax.nn.silu(x @ p["w1"])
    return h @ p["w2"], h.mean()


def heads(p, x):
    h = jax.nn.silu(jnp.einsum("bsgd,gdf->bsgf", x.reshape(B, S, 2, E // 2), p["w1"]))
    return jnp.einsum("bsgf,gfd->bsgd", h, p["w2"])


def gradient(p, x):
    return jax.grad(lambda p: act(jax.nn.silu)(p, x).sum())(p)


def two_ways(p, x):
    return act(jax.nn.silu)(p, x) + act(jax.nn.relu)(p, x)


def rounded(p, x):
    w1, w2 = (p[n].astype(jnp.float8_e4m3fn).astype(jnp.float32) for n in ("w1", "w2"))
    return jax.nn.silu(x @ w1) @ w2


def fused_late(p, x):
    gate, up = jnp.split(x @ jnp.concatenate([p["w1"], p["w3"]], 1), 2, -1)
    return (jax.nn.silu(gate) * up) @ p["w2"]


def convolved(p, x):
    def conv(x, kernel):
        order = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=order)

    return conv(jax.nn.silu(conv(x, p["w1"])), p["w2"])


def picked(p, x):
    def step(i, x):
        return x + jax.nn.silu(x @ p["w1"][i]) @ p["w2"][i]

    return jax.lax.fori_loop(0, 3, step, x)


def pallas_inside(p, x):
    from jax.experimental import pallas as pl

    def kernel(h, out):
        out[...] = jax.nn.relu(h[...])

    h = x @ p["w1"]
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(h) @ p["w2"]


@jax.custom_vjp
def whole_layer(p, x):
    return act(jax.nn.silu)(p, x)


whole_layer.defvjp(lambda p, x: (whole_layer(p, x), None), lambda _, g: (g, g))

KERNELS = {"w1": (1, E, F), "w2": (1, F, E)}
STACKS = {"w1": (3, E, F), "w2": (3, F, E)}

MISSES = {
    "dropout": (with_dropout, PLAIN, "dropout is inside it: trace the function without"),
    "a norm inside": (with_norm, PLAIN, "`reduce_sum` inside it mixes its hidden values"),
    "the host": (on_the_host, PLAIN, "a call of the host is inside it"),
    "a gradient by hand": (act(straight), PLAIN, "a function with a gradient of its own"),
    "weight decay": (decayed, PLAIN, "`w1` is also used by `integer_pow` at test_find.py"),
    "a hidden value": (hidden_used, PLAIN, "a hidden value is also used by `reduce_sum`"),
    "another width": (act(jax.nn.silu), {"w1": (E, F), "w2": (F, 5)}, "it maps 8 numbers to 5"),
    "a matrix a head": (heads, {"w1": (2, 4, F), "w2": (2, F, 4)}, "a matrix for each of several"),
    "two inputs": (
        lambda p, x: (jax.nn.silu(x @ p["w1"]) * (jnp.sin(x) @ p["w3"])) @ p["w2"], GATED,
        "its products take 2 different values",
    ),
    "a choice of two": (
        lambda p, x: (lambda a, b: jnp.where(a > b, a, b))(x @ p["w1"], x @ p["w3"]) @ p["w2"],
        GATED, "`where` inside it takes several hidden values",
    ),
    "weights times a number": (
        lambda p, x: act(jax.nn.silu)({n: 0.5 * w for n, w in p.items()}, x), PLAIN,
        "its weight is computed by `mul`",
    ),
    "rounded weights": (rounded, PLAIN, "its weight w1 is rounded to float8_e4m3fn first"),
    "fused when it runs": (fused_late, GATED, "its weight is computed by `concatenate`"),
    "a convolution": (convolved, KERNELS, "write it as a product"),
    "picked by index": (picked, STACKS, "use a scan"),
    "pallas inside": (pallas_inside, PLAIN, "a Pallas kernel is inside it"),
    "a gradient": (gradient, PLAIN, "differentiate the converted function"),
    "two blocks, one weight": (two_ways, PLAIN, "another block uses `w1`, too"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_what_is_no_block_has_a_reason_and_a_line(name):
    function, params, reason = MISSES[name]
    with pytest.raises(InputError, match="no feed-forward block") as error:
        found(function, params)
    reasons = [p for p in error.value.problems if reason in p.message]
    assert reasons, str(error.value)
    assert str(reasons[0].where).startswith("test_find.py:")
    assert ": " in reasons[0].message.removeprefix("not a block: "), "there is a way out"


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ({"x": ("a", "b", "c", "d")}, "fewer dimensions than axes are named"),
        ({"x": ("batch", "expert")}, "not names of axes of tokens"),
    ],
)
def test_tokens_that_do_not_fit(tokens, problem):
    with pytest.raises(InputError, match=problem) as error:
        found(biased, BIASED, tokens=tokens)
    assert re.search(r"test_find.py:\d+ in biased, tokens\[", str(error.value))


def test_a_use_whose_result_nothing_takes_is_none():
    """As haliax takes the first layer of a stack, to see its shape."""

    def function(p, x):
        jax.tree.map(lambda w: jnp.take(w, 0, axis=0), p)

        def layer(x, p):
            return x + jax.nn.silu(x @ p["w1"]) @ p["w2"], None

        return jax.lax.scan(layer, x, p)[0]

    report = found(function, {"w1": (3, E, F), "w2": (3, F, E)}).report
    assert [block.is_converted for block in report.blocks] == [True] * 3


def test_a_key_that_is_a_path_names_the_block():
    def gemma(p, x):
        return act(jax.nn.silu)(
            {"w1": p["layer_0/mlp/gate"]["w"], "w2": p["layer_0/mlp/~/out"]["w"]}, x
        )

    params = {"layer_0/mlp/gate": shapes(w=(E, F)), "layer_0/mlp/~/out": shapes(w=(F, E))}
    (block,) = mx.convert(gemma, params, X, "upcycle{experts=4}").report.blocks
    assert block.loc == "layer_0.mlp"


@pytest.mark.parametrize(("package", "line"), [("gemma", "net.py:1 in f"), ("flax", "")])
def test_lines_are_of_models_and_not_of_frameworks(package, line):
    file = Path(get_paths()["purelib"], package, "net.py")
    names = {}
    exec(compile("def f(x): return x + 1", str(file), "exec"), names)
    jaxpr = jax.make_jaxpr(names["f"])(1.0)
    here = user_line(jaxpr.eqns[0])
    assert here == line or (not line and here.startswith("test_find.py:"))


def test_a_deep_model_is_surveyed_in_one_pass():
    """What grows faster than the program would not end for 64 layers."""
    names = ("gate", "up", "down")
    square = dict.fromkeys((*"qkv", *names), (E, E))

    def deep(p, x):
        for layer in p["layers"]:
            q, k, v = (x @ layer[n] for n in "qkv")
            x = x + jax.nn.softmax(q @ k.mT) @ v
            x = x + (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
        return x

    layers = [shapes(**square) for _ in range(64)]
    report = mx.convert(deep, {"layers": layers}, X, "upcycle{experts=4}").report
    assert len(report.blocks) == 64
    assert report.misses == ()


def test_a_near_miss_that_runs_again_is_reported_once():
    def halting(p, x):
        for _ in range(3):
            h = jnp.tanh(x)
            x = x + jax.nn.sigmoid(h @ p["halt"]) * (jax.nn.silu(h @ p["w1"]) @ p["w2"])
        return x

    report = mx.convert(halting, shapes(**PLAIN, halt=(E, 1)), X, "upcycle{experts=4}").report
    assert len(report.blocks) == 1
    assert len(report.misses) == len(set(report.misses)) > 0


def test_names_of_tokens_reach_the_graph():
    moe = found(flat, PLAIN, tokens={"x": ("batch", "patch")})
    assert moe.graph.inputs["x.ffn"].type.names == ("batch_patch", "embed")
    moe = found(biased, BIASED, tokens={"x": ("batch", "patch")})
    assert moe.graph.inputs["x.ffn"].type.names == ("batch", "patch", "embed")


def mixer(p, x):
    y = x + jnp.swapaxes(jax.nn.gelu(jnp.swapaxes(x, 1, 2) @ p["t1"]) @ p["t2"], 1, 2)
    return y + jax.nn.gelu(y @ p["w1"]) @ p["w2"]


def test_a_product_over_tokens_is_no_block_where_tokens_are_named():
    params = {"t1": (S, 5), "t2": (5, S), **PLAIN}
    with pytest.raises(InputError, match="sum over dimension 1 of x, along which other blocks"):
        found(mixer, params)
    named = found(mixer, params, tokens={"x": ("batch", "patch")}).report
    assert [b.loc for b in named.blocks] == ["ffn"]
    assert "its products sum over patch, an axis of tokens" in named.misses[0]


def test_a_leaf_that_joins_gate_and_up_is_no_stack_of_layers():
    shapes = {"in": (8, 2, 12), "bias": (2, 12), "out": (12, 8)}
    params = {"layers": [{"ffn": {name: jnp.ones(shape) for name, shape in shapes.items()}}]}

    def function(params, x):
        layer = params["layers"][0]["ffn"]
        hidden = jnp.einsum("td,dgh->tgh", x, layer["in"]) + layer["bias"]
        return (jnp.tanh(hidden[:, 0]) * hidden[:, 1]) @ layer["out"]

    moe = mx.convert(function, params, jnp.ones((3, 8)), "upcycle{experts=2}")
    assert [block.loc for block in moe.report.blocks] == ["layers.0.ffn"]
    assert {f"layers.0.ffn.in.{part}" for part in (0, 1)} <= moe.params["moe"].keys()
