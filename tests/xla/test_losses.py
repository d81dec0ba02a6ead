"""Gradients of the losses under jax, and the precision that they are computed in."""

from functools import cache

import jax
import numpy as np
import pytest
from moecc_backends.xla.backend import function
from moecc_passes.add_losses import AddLossesPass
from tiers import few

from moecc.ir import BF16, F32, F64, PRED, Builder, Graph, tensor
from moecc.rewrite.passes import Context
from moecc.testing import run_reference

from .models import run_both

EXPERTS, WIDTH = 8, 16
LOSSES = tuple(
    f"loss.{name}" for name in ("router_z", "balance", "importance", "load", "auxiliary")
)
LOGITS = np.random.default_rng(0).normal(size=(2, 12, EXPERTS))


def add_router(b, x, logits, is_masked, over="group", **slots):
    """Route ``x``, under a mask or none, and add all losses."""
    tokens = tuple(n for n in x.type.names if n != "embed")
    mask = [b.graph.input("mask", x.type.without("embed").with_dtype(PRED))] if is_masked else []
    experts, gates = b.route(logits, top_k=2)
    place = b.assign_slots(
        experts, *mask, tokens=tokens, experts=EXPERTS, using=("mask",) if is_masked else (),
        **slots,
    )  # fmt: skip
    b.graph.set_output("y", b.combine(b.dispatch(x, experts, place), experts, place, gates))
    AddLossesPass(importance_coef=1.0, load_coef=1.0, over=over).apply(b.graph, Context())


def of_sequences(over, is_masked):
    """Return a graph of top-2 routers over ``[batch, seq]``, in two groups, with all losses."""
    graph = Graph()
    x = graph.input("x", tensor(F32, batch=2, seq="S", embed=1))
    logits = graph.input("logits", tensor(F32, batch=2, seq="S", expert=EXPERTS))
    add_router(Builder(graph, loc="layers.0.ffn"), x, logits, is_masked, over, groups=2)
    return graph


def losses_of(graph, **inputs):
    """Return a function from logits to all losses."""
    run = function(graph, dtype=F64)

    def losses(logits):
        outputs = run({}, {**inputs, "logits": logits})
        return [outputs[name] for name in LOSSES]

    return losses


@cache
def gradients_of_one():
    """Return the gradient of each loss of the sequence that has no padding."""
    losses = losses_of(of_sequences("global", is_masked=False), x=np.zeros((2, 6, 1)))
    return jax.jit(jax.jacrev(losses))(LOGITS[0].reshape(2, 6, EXPERTS))


@pytest.mark.parametrize("over", few(["group", "sequence", "global"]))
@pytest.mark.parametrize("empty", [1, 2])
def test_gradients_are_finite_where_a_sequence_is_padding(over, empty):
    """The gradients are those of the tokens that are there, alone; padding has zeros."""
    mask = np.repeat(np.arange(2) < 2 - empty, 12).reshape(2, 12)
    graph = of_sequences(over, is_masked=True)
    inputs = {"x": np.zeros((2, 12, 1)), "mask": mask}
    expected = run_reference(graph, inputs={**inputs, "logits": LOGITS})
    with jax.enable_x64(True):
        losses = losses_of(graph, **inputs)
        found = jax.jit(losses)(LOGITS)
        gradients = [np.asarray(g) for g in jax.jit(jax.jacrev(losses))(LOGITS)]
        alone = gradients_of_one()
    for name, value in zip(LOSSES, found, strict=True):
        np.testing.assert_allclose(value, expected[name], rtol=1e-10, err_msg=name)
    for gradient, one in zip(gradients, alone, strict=True):
        assert (gradient[~mask] == 0).all()
        if empty == 1:
            np.testing.assert_allclose(gradient[0], one.reshape(12, -1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("is_masked", [False, True])
def test_in_bfloat16_the_losses_are_those_of_float32(is_masked):
    """Router and losses compute in float32 on the rounded tokens and weights (ST-MoE §3.4)."""
    graph = Graph()
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F32, token="T", embed=WIDTH))
    router = graph.param("w", tensor(F32, expert=EXPERTS, embed=WIDTH))
    logits = b.contract(x, router, over="embed", precision="f32")
    add_router(b, x, logits, is_masked, slots="capacity", capacity_factor=1.25)
    rng = np.random.default_rng(1)
    # More tokens than bfloat16 can count.
    tokens, weights = (
        rng.normal(size=(rows, WIDTH)).astype(BF16.numpy).astype(np.float32)
        for rows in (1000, EXPERTS)
    )
    inputs = {"x": tokens} | ({"mask": np.arange(1000) < 717} if is_masked else {})
    narrow, exact = run_both(graph, {"w": weights}, inputs, BF16)
    for name, value in exact.items():
        if name != "y":
            np.testing.assert_allclose(narrow[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
