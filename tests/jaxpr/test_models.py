"""Programs of many kinds around blocks, each with a mixture by hand to be equal to.

A program takes its block as an argument, and parameters whose blocks are dictionaries with ``w1``
and ``w2``; a mixture by hand finds its router there.
"""

import re
from functools import partial

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from tiers import few  # noqa: E402

from moecc import jax as mx  # noqa: E402
from moecc.errors import InputError  # noqa: E402

from .mixtures import apart, drawn, mixture  # noqa: E402

E, F = 8, 12
rng = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(rng.normal(0, max(shape) ** -0.5, shape), jnp.float32)


def block(*stack):
    return {"w1": draw(*stack, E, F), "w2": draw(*stack, F, E)}


def dense(p, x):
    return jax.nn.silu(x @ p["w1"]) @ p["w2"]


def by_hand(p, x):
    return mixture(dense, {n: p[n] for n in ("w1", "w2")}, p["router"], x, 2) if "router" in p \
        else dense(p, x)  # fmt: skip


def state_space(p, x, ffn):
    """A causal convolution of each channel, and a diagonal recurrence by an associative scan."""
    u = jax.lax.conv_general_dilated(
        x, p["conv"], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=E,
    )  # fmt: skip
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), u.shape)
    join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    x = x + jax.lax.associative_scan(join, (decay, u), axis=1)[1] @ p["out"]
    return x + ffn(p["mlp"], x)


def encoder_decoder(p, x, ffn):
    memory = x[:, :4] + ffn(p["encoder"], x[:, :4])
    x = x + jax.nn.softmax((x @ p["q"]) @ memory.mT) @ memory
    return x + ffn(p["decoder"], x)


def pallas_attention(p, x, ffn):
    from jax.experimental import pallas as pl

    def kernel(q, out):
        out[...] = jax.nn.softmax(q[...] @ q[...].T) @ q[...]

    def attend(q):
        shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(q)

    x = x + jax.vmap(attend)(x @ p["q"])
    return x + ffn(p["mlp"], x)


@jax.custom_vjp
def clipped(x):
    """The identity, with a bounded gradient."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


def shared_layers(p, x, ffn):
    for _ in range(2):
        x = x + ffn(p["mlp"], x)
    return x


def branches(p, x, ffn):
    yes, no = (partial(ffn, p[n]) for n in ("yes", "no"))
    return x + jax.lax.cond(x[0, 0, 0] > 0, yes, lambda x: -no(x), x)


def dropout_behind(p, x, ffn):
    y = ffn(p["mlp"], x)
    return x + jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, y.shape), 2.0 * y, 0.0)


def scan_of_scans(p, x, ffn):
    def inner(x, q):
        return x + ffn(q, x), None

    return jax.lax.scan(lambda x, q: jax.lax.scan(inner, x, q), x, p["layers"])[0]


PROGRAMS = {
    "state space": (
        state_space, {"conv": draw(3, 1, E), "decay": draw(E), "out": draw(E, E), "mlp": block()},
    ),
    "encoder-decoder": (
        encoder_decoder, {"encoder": block(), "decoder": block(), "q": draw(E, E)},
    ),
    "pallas attention": (pallas_attention, {"q": draw(E, E), "mlp": block()}),
    "shared layers": (shared_layers, {"mlp": block()}),
    "branches": (branches, {"yes": block(), "no": block()}),
    "dropout behind": (dropout_behind, {"mlp": block()}),
    "scan of scans": (scan_of_scans, {"layers": block(2, 2)}),
}  # fmt: skip

X = draw(2, 5, E)


def everything(p, x, ffn):
    """All programs, one after the other."""
    for name, (program, _) in PROGRAMS.items():
        if name in p:
            x = jnp.tanh(program(p[name], x, ffn))
    return x


def whole(params):
    """Return the tree with the router of each block in it; of scans of scans, experts as well."""
    tree = jax.tree.map(lambda a: a, params["params"], is_leaf=lambda a: a is None)
    for name, array in params["moe"].items():
        path = re.sub(r"\.(\d+|\{[^}]*\})|\.weight", "", name).split(".")
        where = tree
        for part in path[:-1]:
            where = where[part] if part in where else where[part.replace("_", " ")]
        nested = path[0] == "scan_of_scans"
        where[path[-1]] = array.reshape(2, 2, *array.shape[1:]) if nested else array
    return tree


def test_all_programs_in_one():
    params = {n: p for n, (_, p) in PROGRAMS.items()}
    function = partial(everything, ffn=dense)
    moe = mx.convert(function, params, X, "upcycle{experts=3 top-k=2}")
    some = drawn(moe.params)
    found = jax.jit(moe(function, dispatch="gathered"))(some, X)
    expected = jax.jit(lambda p, x: everything(whole(p), x, by_hand))(some, X)
    assert apart(found, expected) < 1e-5
    assert len(moe.report.blocks) == 12
    assert all(b.is_converted for b in moe.report.blocks)


def test_half_precision_copies_have_the_same_bits():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PROGRAMS["shared layers"][1])
    function, x = partial(shared_layers, ffn=dense), X.astype(jnp.bfloat16)
    moe = mx.convert(function, params, x, "upcycle{experts=4 top-k=1}")
    assert jax.tree.leaves(moe.params["moe"])[0].dtype == jnp.bfloat16
    exact = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    found = exact(moe(function, dispatch="gathered"))(moe.params, x)
    assert bool(jnp.all(found == exact(function)(params, x)))


@pytest.mark.parametrize("dtype", few([jnp.bfloat16, jnp.float64, jnp.float16], 2))
def test_parameters_in_another_element_type_have_the_same_blocks(dtype):
    """Casts inside and rounded numbers differ from trace to trace; another function is none."""

    def one(p, x, slope=0.1):
        h = (x @ p["w1"]).astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.where(h > 0, h, slope * h).astype(x.dtype) @ p["w2"]

    params, x = block(), X[0]
    moe = mx.convert(one, params, x, "upcycle{experts=3}")
    with jax.enable_x64(dtype is jnp.float64):
        cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)  # noqa: E731
        found = jax.jit(moe(one))(cast(moe.params), cast(x))
        assert found.dtype == dtype
        assert apart(found, jax.jit(one)(cast(params), cast(x))) < 4 * jnp.finfo(dtype).eps + 1e-8
        with pytest.raises(InputError, match="is used otherwise here"):
            moe(partial(one, slope=0.3))(cast(moe.params), cast(x))
