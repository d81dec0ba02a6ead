"""Laws of the sparse block itself, with experts that differ: among copies they would be vacuous."""

import numpy as np
import pytest

from tests.st_moe.layers import softmax

from .dense_blocks import EXACT, Dense, Tensors, relative, run, shown, tokens, upcycled

PREFIX = "layers.0"
GATES = ["renormalised", "softmax", "sigmoid-renormalised", "sigmoid", "ones"]


BIASED = Dense(bias_in=True, bias_out=True)


def sparse(**options):
    """Return a converted graph and parameters of it, whose experts are all different."""
    graph = BIASED.graph()
    after, _ = upcycled(graph, experts=3, router_std=0.5, **options)
    rng = np.random.default_rng(0)
    params = Tensors(graph).params(after)
    return after, {n: a + rng.normal(0, 0.3, a.shape) for n, a in params.items()}


def expert_outputs(x, params):
    """Return ``[batch, seq, expert, embed]``: every expert of a gated block with biases on all."""

    def linear(rows, name, spec):
        return np.einsum(spec, rows, params[f"{PREFIX}.{name}"]) + params[f"{PREFIX}.{name}.bias"]

    gate, up = (linear(x, name, "bsd,efd->bsef") for name in ("gate", "up"))
    return linear(gate / (1 + np.exp(-gate)) * up, "down", "bsef,edf->bsed")


@pytest.mark.parametrize("gates", GATES)
def test_with_all_experts_chosen_the_block_is_their_weighted_sum(gates):
    graph, params = sparse(top_k=3, gates=gates)
    x = tokens(BIASED)["x"]
    logits = np.einsum("bsd,ed->bse", x, params[f"{PREFIX}.ffn.router.weight"])
    sigmoid = 1 / (1 + np.exp(-logits))
    weights = {
        "softmax": softmax(logits),
        "renormalised": softmax(logits),
        "sigmoid": sigmoid,
        "sigmoid-renormalised": sigmoid / sigmoid.sum(-1, keepdims=True),
        "ones": np.ones_like(logits),
    }
    expected = np.einsum("bse,bsed->bsd", weights[gates], expert_outputs(x, params))
    assert relative(run(graph, params, {"x": x})["y"], expected) <= EXACT


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gates", GATES)
def test_the_error_under_a_capacity_is_what_was_dropped(gates, groups):
    options = {"top_k": 2, "gates": gates}
    whole, params = sparse(**options)
    limited, _ = sparse(**options, slots="capacity", capacity_factor=1.5, groups=groups)
    inputs = tokens(BIASED, 24)
    found = run(shown(limited, "route", "assign_slots"), params, inputs)
    experts, weights, slots = (found[n] for n in ("route.0", "route.1", "assign_slots.0"))
    dropped = slots < 0
    assert 0 < dropped.mean() < 1, "the case must have choices of both kinds"
    outputs = expert_outputs(inputs["x"], params)
    chosen = np.take_along_axis(outputs, experts[..., None].astype(int), 2)
    lost = np.sum(np.where(dropped, weights, 0)[..., None] * chosen, axis=2)
    full = run(whole, params, inputs)["y"]
    assert relative(full - found["y"], lost) <= 10 * EXACT
    untouched = ~dropped.any(-1)
    assert untouched.any()
    assert relative(found["y"][untouched], full[untouched]) <= EXACT
