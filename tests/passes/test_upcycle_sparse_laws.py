"""Laws of the sparse block itself, with experts that differ: among copies they would be vacuous."""

import numpy as np
import pytest

from .dense_blocks import Dense, Tensors, relative, run, tokens, upcycled

EXACT = 1e-12
PREFIX = "layers.0"
ROUTER = "layers.0.ffn.router.weight"
GATES = ["renormalised", "softmax", "sigmoid-renormalised", "sigmoid", "ones"]


def perturbed(params, seed=0):
    """Return parameters whose experts are all different."""
    rng = np.random.default_rng(seed)
    return {n: a + rng.normal(0, 0.3, a.shape) for n, a in params.items()}


def sparse(dense, seed=0, **options):
    """Return a converted graph and perturbed parameters of it."""
    graph = dense.graph()
    after, _ = upcycled(graph, **{"router_std": 0.5, **options})
    return after, perturbed(Tensors(graph).params(after), seed)


def silu(x):
    return x / (1 + np.exp(-x))


def expert_outputs(x, params):
    """Return ``[batch, seq, expert, embed]``: every expert of a gated block with biases on all."""
    gate, up, down = (params[f"{PREFIX}.{n}"] for n in ("gate", "up", "down"))
    a = np.einsum("bsd,efd->bsef", x, gate) + params[f"{PREFIX}.gate.bias"]
    u = np.einsum("bsd,efd->bsef", x, up) + params[f"{PREFIX}.up.bias"]
    return np.einsum("bsef,edf->bsed", silu(a) * u, down) + params[f"{PREFIX}.down.bias"]


BIASED = Dense(bias_in=True, bias_out=True)


@pytest.mark.parametrize("gates", GATES)
def test_with_all_experts_chosen_the_block_is_their_weighted_sum(gates):
    graph, params = sparse(BIASED, experts=3, top_k=3, gates=gates)
    x = tokens(BIASED)["x"]
    logits = np.einsum("bsd,ed->bse", x, params[ROUTER])
    weights = {
        "softmax": np.exp(logits) / np.exp(logits).sum(-1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "ones": np.ones_like(logits),
    }
    weights["renormalised"] = weights["softmax"]
    sigmoid = weights["sigmoid"]
    weights["sigmoid-renormalised"] = sigmoid / sigmoid.sum(-1, keepdims=True)
    expected = np.einsum("bse,bsed->bsd", weights[gates], expert_outputs(x, params))
    assert relative(run(graph, params, {"x": x})["y"], expected) <= EXACT


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gates", GATES)
def test_the_error_under_a_capacity_is_what_was_dropped(gates, groups):
    options = {"experts": 3, "top_k": 2, "gates": gates}
    whole, params = sparse(BIASED, **options)
    bound = {"slots": "capacity", "capacity_factor": 1.5, "groups": groups}
    limited, _ = sparse(BIASED, **options, **bound)
    for node in limited:
        if node.op.name in ("route", "assign_slots"):
            for value in node.results:
                limited.set_output(value.name, value)
    inputs = tokens(BIASED, 24)
    found = run(limited, params, inputs)
    dropped = found["slots"] < 0
    assert 0 < dropped.mean() < 1, "the case must have choices of both kinds"
    outputs = expert_outputs(inputs["x"], params)
    chosen = np.take_along_axis(outputs, found["experts"][..., None].astype(int), 2)
    lost = np.sum(np.where(dropped, found["gates"], 0)[..., None] * chosen, axis=2)
    full = run(whole, params, inputs)["y"]
    assert relative(full - found["y"], lost) <= 10 * EXACT
    untouched = ~dropped.any(-1)
    assert untouched.any()
    assert relative(found["y"][untouched], full[untouched]) <= EXACT
