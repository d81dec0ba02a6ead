"""Every option of `upcycle`, and every dispatch, on blocks of a function.

What runs in the function is held against the reference evaluation of the converted graph in
float64, with experts and routers drawn at random: values, and the slope in a random direction.
Options come from their declarations, so that a new one is tried, or refused, or fails here.
"""

from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from moecc_backends.jaxpr.run import ConvertedParams  # noqa: E402
from moecc_backends.reference import ReferenceBackend  # noqa: E402
from moecc_passes.upcycle.options import UpcycleOptions  # noqa: E402

from moecc import jax as mx  # noqa: E402
from moecc.errors import MoeccError  # noqa: E402
from moecc.ir.conventions import STRATEGIES  # noqa: E402
from tests.support.tiers import some  # noqa: E402

from .mixtures import apart, drawn  # noqa: E402

E, F = 8, 12
rng = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)


X = draw(2, 6, E)
DENSE = {"layers": {"gu": draw(2, E, 2 * F), "c": draw(2, F), "w": draw(2, F, E)}}


def block(p, x):
    """A gated block, both of whose first products are halves of one."""
    gate, up = jnp.split(x @ p["gu"], 2, -1)
    return (jax.nn.silu(gate + p["c"]) * up) @ p["w"]


def function(p, x):
    """Both layers on the same tokens, in a scan."""
    return jax.lax.scan(lambda n, q: (n, block(q, x)), 0, p["layers"])[1]


def reference(moe, params):
    """Return what the converted graph computes of its parameters, in float64."""
    storage = moe.state.storage
    given, slots = ConvertedParams.of(moe.state.tree, storage, params), storage.slots
    arrays = {}
    for name in moe.graph.params:
        whole = np.asarray(given.array(slots[name]), np.float64)
        arrays[name] = whole if slots[name].row is None else whole[slots[name].row]
    inputs = {name: np.asarray(X, np.float64) for name in moe.graph.inputs}
    found = ReferenceBackend().compile(moe.graph).run(arrays, inputs)
    return np.stack([found[f"y.layers.{i}"] for i in range(2)])


def slope(moe, params, way, step=1e-6):
    """Return the derivative of the reference in a direction, by differences."""
    ends = [
        reference(
            moe, jax.tree.map(lambda p, w, s=s: np.float64(p) + s * np.float64(w), params, way)
        )
        for s in (step, -step)
    ]
    return (ends[0] - ends[1]) / (2 * step)


def check(moe, *, dispatch="auto", gradient=True):
    params, way = drawn(moe.params, 1), drawn(moe.params, 2)
    run = moe(function, dispatch=dispatch)
    value, push = jax.jit(lambda p, w: jax.value_and_grad(weighted(run), has_aux=True)(p))(
        params, way
    )
    assert apart(value[1], reference(moe, params)) < 1e-6
    if gradient:
        pairs = zip(jax.tree.leaves(push), jax.tree.leaves(way), strict=True)
        along = sum(np.vdot(np.float64(g), np.float64(w)) for g, w in pairs)
        terms = np.float64(WEIGHTS) * slope(moe, params, way)
        assert abs(along - terms.sum()) < 1e-5 * np.abs(terms).sum()


WEIGHTS = draw(2, 2, 6, E)


def weighted(run):
    def total(params):
        made = run(params, X)
        return jnp.sum(WEIGHTS * made), made

    return total


def _values(name):
    """Return values to try of an option, by its declaration."""
    (kind, *_) = get_args(get_type_hints(UpcycleOptions, include_extras=True)[name])
    if get_origin(kind) is Literal:
        return get_args(kind)
    return {bool: ("true",), int: (2, 4), float: (0.5,)}.get(kind, ("all",))


WITH = {
    "granularity": "top-k=4", "noise-std": "init=noise", "noise": "init=noise",
    "drop-ratio": "init=drop", "scale-placement": "gates=softmax", "groups": "slots=capacity",
    "capacity-factor": "slots=capacity", "soft-slots": "routing=soft", "shared-gate": "shared=0.5",
    "router-ridge": "router-init=ridge", "rest": "sources=base,a,b,c",
}  # fmt: skip
"""What an option needs beside it."""

VALUES = {"sources": ("base,a,b,c",)}
"""Values that no declaration tells."""

WITHOUT = {"gates=switch": "top-k=1"}

REFUSED = {
    "split=activation": "needs statistics",
    "router-init=centroids": "needs statistics",
    "router-init=ridge": "needs statistics",
    "router-ridge=0.5": "needs statistics",
    "sources=base,a,b,c": "--experts",
    "rest=base": "--experts",
    "rest=mean": "--experts",
    "routing=hash": "needs the ids of the tokens",
    "decoder-layers=all": "is about the decoder of an encoder-decoder",
    "extra-ffn=before": "nothing adds its output to a residual stream",
    "extra-ffn=after": "nothing adds its output to a residual stream",
}
"""What cannot be said of the blocks of a function, and why."""

ESTIMATED = ("gates=sparsemixer",)
"""Gates whose gradient is an estimate by design, and not that of the values."""


def _settings():
    for field in fields(UpcycleOptions):
        name = field.name.replace("_", "-")
        for value in VALUES.get(name, _values(field.name)):
            yield f"{name}={value}"


def _pipeline(setting):
    name = setting.partition("=")[0]
    more = [WITH.get(name, ""), WITHOUT.get(setting, ""), "" if name == "experts" else "experts=4"]
    return f"upcycle{{{' '.join(filter(None, [setting, *more]))}}}"


QUICK = ("shared=0.5", *REFUSED)


@pytest.mark.parametrize("setting", some(_settings(), *QUICK))
def test_an_option_applies_or_is_refused(setting):
    looks_ahead = "choice" in setting or "soft" in setting
    arguments = (function, DENSE, X, _pipeline(setting))
    if setting in REFUSED:
        with pytest.raises(MoeccError, match=REFUSED[setting]):
            mx.convert(*arguments)
        return
    moe = mx.convert(*arguments, causal=not looks_ahead)
    assert all(b.is_converted for b in moe.report.blocks)
    check(moe, gradient=setting not in ESTIMATED)
    if moe.preserves.kind != "approximate":
        assert apart(jax.jit(moe(function))(moe.params, X), function(DENSE, X)) < 1e-6


@pytest.mark.parametrize("name", some([row.name for row in STRATEGIES], "ragged_dot"))
def test_every_dispatch_has_the_same_values_and_gradients(name):
    """Under a capacity some tokens are dropped; which, the graph says."""
    in_slots = next(row.in_slots for row in STRATEGIES if row.name == name)
    more = " slots=capacity capacity-factor=0.75 groups=2" if in_slots else ""
    moe = mx.convert(function, DENSE, X, f"upcycle{{experts=4 top-k=2 shared=0.5{more}}}")
    check(moe, dispatch=name)
