"""Gradients of the losses under jax, and the precision that they are computed in."""

from functools import cache

import numpy as np
import pytest
from tiers import few

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402
from moecc_passes.add_losses import AddLossesPass  # noqa: E402

from moecc.backend import get_backend  # noqa: E402
from moecc.ir import BF16, F32, F64, PRED, Builder, Graph, tensor  # noqa: E402
from moecc.rewrite.passes import Context  # noqa: E402
from moecc.testing import run_reference  # noqa: E402

EXPERTS, WIDTH = 8, 16


def routed(*using):
    """Return a graph with all losses, whose logits are a product over ``embed``."""
    graph = Graph()
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F32, token="T", embed=WIDTH))
    router = graph.param("w", tensor(F32, expert=EXPERTS, embed=WIDTH))
    logits = b.contract(x, router, over="embed", precision="f32")
    experts, gates = b.route(logits, top_k=2)
    place = b.assign_slots(
        experts,
        *(graph.input(word, tensor(PRED, token="T")) for word in using),
        tokens="token",
        experts=EXPERTS,
        slots="capacity",
        capacity_factor=1.25,
        using=using,
    )
    graph.set_output("y", b.combine(b.dispatch(x, experts, place), experts, place, gates))
    options = AddLossesPass(importance_coef=1.0, load_coef=1.0)
    options.apply(graph, Context())
    return graph


LOSSES = ("router_z", "balance", "importance", "load")
LOGITS = np.random.default_rng(0).normal(size=(2, 12, EXPERTS))


def of_sequences(over, masked):
    """Return a graph of top-2 routers over ``[batch, seq]``, in two groups, with all losses."""
    graph = Graph()
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F32, batch=2, seq="S", embed=1))
    logits = graph.input("logits", tensor(F32, batch=2, seq="S", expert=EXPERTS))
    mask = [graph.input("mask", tensor(PRED, batch=2, seq="S"))] if masked else []
    experts, gates = b.route(logits, top_k=2)
    place = b.assign_slots(
        experts,
        *mask,
        tokens=("batch", "seq"),
        experts=EXPERTS,
        groups=2,
        using=("mask",) if masked else (),
    )
    graph.set_output("y", b.combine(b.dispatch(x, experts, place), experts, place, gates))
    AddLossesPass(importance_coef=1.0, load_coef=1.0, over=over).apply(graph, Context())
    return graph


@cache
def _gradients_of_one():
    """Return the gradient of each loss of the sequence that has no padding."""
    run = function(of_sequences("global", masked=False), dtype=F64)

    def values(given):
        found = run({}, {"x": np.zeros((2, 6, 1)), "logits": given})
        return [found[f"loss.{n}"] for n in (*LOSSES, "auxiliary")]

    return jax.jit(jax.jacrev(values))(LOGITS[0].reshape(2, 6, EXPERTS))


@pytest.mark.parametrize("over", few(["group", "sequence", "global"]))
@pytest.mark.parametrize("empty", [1, 2])
def test_gradients_are_finite_where_a_sequence_is_padding(over, empty):
    """The gradients are those of the tokens that are there, alone; padding has zeros."""
    mask = np.repeat(np.arange(2) < 2 - empty, 12).reshape(2, 12)
    graph = of_sequences(over, masked=True)
    x = np.zeros((2, 12, 1))
    expected = run_reference(graph, inputs={"x": x, "logits": LOGITS, "mask": mask})
    with jax.enable_x64(True):
        run = function(graph, dtype=F64)

        def values(given):
            found = run({}, {"x": x, "logits": given, "mask": mask})
            return [found[f"loss.{n}"] for n in (*LOSSES, "auxiliary")]

        found = jax.jit(values)(LOGITS)
        gradients = [np.asarray(g) for g in jax.jit(jax.jacrev(values))(LOGITS)]
        alone = _gradients_of_one()
    for name, value in zip((*LOSSES, "auxiliary"), found, strict=True):
        np.testing.assert_allclose(value, expected[f"loss.{name}"], rtol=1e-10, err_msg=name)
    for gradient, one in zip(gradients, alone, strict=True):
        assert (gradient[~mask] == 0).all()
        if empty == 1:
            np.testing.assert_allclose(gradient[0], one.reshape(12, -1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("using", [(), ("mask",)])
def test_in_bfloat16_the_losses_are_those_of_float32(using):
    """Router and losses compute in float32 on the rounded tokens and weights (ST-MoE §3.4)."""
    graph = routed(*using)
    rng = np.random.default_rng(1)
    x, w = (
        np.asarray(rng.normal(size=shape), BF16.numpy).astype(np.float32)
        for shape in ((1000, WIDTH), (EXPERTS, WIDTH))
    )
    # More tokens than bfloat16 can count.
    inputs = {"x": x, **{word: np.arange(1000) < 717 for word in using}}
    narrow = get_backend("xla").compile(graph, dtype=BF16).run({"w": w}, inputs)
    exact = get_backend("reference").compile(graph).run({"w": w}, inputs)
    for name, value in exact.items():
        if name != "y":
            np.testing.assert_allclose(narrow[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
