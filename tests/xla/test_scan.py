"""Repetition through XLA: the values and gradients of the reference's loop, whatever is kept."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moecc_backends.xla.backend import function, jax_inputs
from moecc_backends.xla.lower.contract import softmax
from tiers import few

from moecc.backend import get_backend
from moecc.ir import BF16, F32, Builder, Graph, TensorType, tensor
from moecc.types import KEY

from .models import normal, run_both, values_and_gradients

RUNS = 3


def sparse_body():
    """Return a body with attention and a mixture of experts, and a loss beside its carry."""
    body = Graph("body")
    h = body.input("h", tensor(F32, batch="B", seq="S", embed=6))
    q, k, v = (body.input(n, tensor(F32, q=6, embed=6)) for n in "qkv")
    o = body.input("o", tensor(F32, embed=6, q=6))
    router = body.input("router", tensor(F32, expert=4, embed=6))
    up = body.input("up", tensor(F32, expert=4, mlp=8, embed=6))
    down = body.input("down", tensor(F32, expert=4, embed=6, mlp=8))
    b = Builder(body, loc=f"layers.{{0..{RUNS - 1}}}.attention")
    query = b.contract(h, q, over="embed")
    keys, values = (b.rename(b.contract(h, w, over="embed"), axis="seq", to="kv_seq")
                    for w in (k, v))  # fmt: skip
    weights = b.softmax(b.contract(query, keys, over="q"), axis="kv_seq")
    h = b.add(h, b.contract(b.contract(weights, values, over="kv_seq"), o, over="q"))
    b.loc = f"layers.{{0..{RUNS - 1}}}.ffn"
    logits = b.contract(h, router, over="embed", precision="f32")
    experts, gates = b.route(logits, top_k=2)
    place = b.assign_slots(experts, tokens=("batch", "seq"), experts=4)
    rows = b.contract(b.dispatch(h, experts, place), up, over="embed")
    made = b.combine(b.contract(b.silu(rows), down, over="mlp"), experts, place, gates)
    body.set_output("h", b.add(h, made))
    loss = b.mean(b.square(b.logsumexp(logits, axes="expert")), axes=("batch", "seq"))
    body.set_output("loss", loss)
    return body


def scanned(remat="none", save=()):
    """Return a graph that repeats the body, with stacked parameters of all its weights."""
    body, graph = sparse_body(), Graph()
    h, *weights = body.inputs.values()
    layer = tensor(F32, layer=RUNS).axes
    # The axis need not come first.
    stacks = [graph.param(w.name, w.type.with_axes((*w.type.axes, *layer))) for w in weights]
    b = Builder(graph)
    y, losses = b.scan(graph.input("h", h.type), *stacks, over=(("layer", RUNS),), carries=1,
                       stacked=len(stacks), remat=remat, save=save, body=body)  # fmt: skip
    graph.set_output("y", y)
    graph.set_output("loss", b.sum(losses, axes="layer"))
    return graph


def data(graph):
    rng = np.random.default_rng(0)
    params = {n: a / 2 for n, a in normal(rng, graph.params, "f4").items()}
    return params, {"h": rng.normal(size=(2, 5, 6)).astype("f4") / 2}


CASES = [("none", ()), ("full", ()), ("save", ("router", "rows", "experts"))]


@pytest.mark.parametrize(("remat", "save"), CASES)
def test_values_are_those_of_the_reference(remat, save):
    graph = scanned(remat, save)
    found, expected = run_both(graph, *data(graph), F32)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)


@cache
def gradients(remat, save):
    graph = scanned(remat, save)

    def total(outputs):
        return jnp.sum(jnp.square(outputs["y"])) + outputs["loss"]

    return values_and_gradients(function(graph), *data(graph), total)[1]


@pytest.mark.parametrize(("remat", "save"), few(CASES[:0:-1]))
def test_what_is_kept_changes_no_gradient(remat, save):
    expected, found = gradients("none", ()), gradients(remat, save)
    for name, array in expected.items():
        scale = np.abs(array).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(found[name], array, atol=1e-5 * scale)


def test_of_the_values_of_a_body_only_those_of_the_graph_are_kept():
    """Once each, in the type of the computation: no copy in float32, no denominator of softmax."""
    graph = scanned("none")
    params, inputs = data(graph)
    run = function(graph, dtype=BF16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: run(p, inputs)["y"].astype("f4").sum()))(params)
    forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    weights = [v.aval for v in forward.outvars if v.aval.shape == (RUNS, 2, 5, 5)]
    assert [str(a.dtype) for a in weights] == ["bfloat16"], "what the softmax makes, once"
    # The sum over the keys would be a number for each query.
    assert all(v.aval.shape != (RUNS, 2, 5, 1) for v in forward.outvars)


def test_the_derivative_of_a_softmax():
    x = np.random.default_rng(0).normal(size=(3, 7))
    x[1] = [*x[1][:4], *[-np.inf] * 3]
    x[2] = -np.inf
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(jax.jacobian(lambda v: softmax(v, -1)))(x))
    for row in range(2):
        p = np.exp(x[row]) / np.exp(x[row]).sum()
        np.testing.assert_allclose(found[row, :, row], np.diag(p) - np.outer(p, p), atol=1e-12)
    assert not found[2].any(), "where nothing may be chosen"


def test_keys_are_stacked_and_captured():
    body = Graph("body")
    h = body.input("h", tensor(F32, batch=4))
    own, shared = (body.input(n, TensorType(KEY)) for n in ("own", "shared"))
    b = Builder(body)
    body.set_output("h", b.add(b.add(h, b.random_normal(own, h)), b.random_uniform(shared, h)))
    graph = Graph()
    x, key = graph.input("x", tensor(F32, batch=4)), graph.input("key", TensorType(KEY))
    b = Builder(graph)
    keys = b.stack(*(b.fold_key(key, by=i) for i in range(3)), axis="layer")
    (y,) = b.scan(x, keys, key, over=(("layer", 3),), carries=1, stacked=1, body=body)
    graph.set_output("y", y)
    inputs = {"x": np.zeros(4, "f4"), "key": np.array(7, np.uint64)}
    found, expected = run_both(graph, {}, inputs, F32)
    traced = jax.jit(function(graph))({}, jax_inputs(graph, inputs))
    for outputs in (found, traced):
        np.testing.assert_allclose(outputs["y"], expected["y"], rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_picking_from_a_stack(backend):
    graph = Graph()
    b = Builder(graph)
    x, y = (graph.input(n, tensor(F32, batch=2, embed=3)) for n in "xy")
    whole = b.stack(x, y, axis="layer")
    graph.set_output("all", whole)
    for axis, at in (("layer", 1), ("embed", 2)):
        graph.set_output(axis, b.index(whole, axis=axis, at=at))
    arrays = np.arange(12, dtype="f4").reshape(2, 2, 3)
    found = get_backend(backend).compile(graph).run({}, {"x": arrays[0], "y": arrays[1]})
    np.testing.assert_array_equal(found["all"], arrays)
    np.testing.assert_array_equal(found["layer"], arrays[1])
    np.testing.assert_array_equal(found["embed"], arrays[..., 2])
