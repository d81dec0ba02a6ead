"""Balancing losses and z-losses are those of transformers, whose golden values are checked in.

The normalisations differ in one thing.  transformers joins the tokens of all layers to one batch:
its f and P are means over layers, and their product is taken last.  Here each layer has its own
f · P, as in the paper, and losses are summed or averaged over layers.  So a layer alone has the
same loss in both, and the joint loss is that of one layer with all the tokens.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from moecc_passes.add_losses import AddLossesPass

from moecc.ir import F64

from .layers import applied, evaluated, router

GOLDEN = Path(__file__).parents[1] / "golden"
VALUES = json.loads((GOLDEN / "losses.json").read_text())
ARRAYS = np.load(GOLDEN / "losses.npz")
LOGITS, MASK = ARRAYS["logits"], ARRAYS["mask"]

MIXTRAL = {"balance": "k-hot", "over": "global"}
SWITCH = {"balance": "top-1", "over": "sequence"}
EXACT = 1e-13


def losses(logits, top_k=1, mask=None, **options):
    """Return the losses of one layer with these logits, ``[batch, seq, expert]``."""
    graph = router(logits.shape[-1], top_k, mask=mask is not None)
    applied(AddLossesPass(metrics=False, **options), graph)
    return evaluated(graph, logits=logits, **({} if mask is None else {"mask": mask}))


def joint(logits, axis):
    """Return the logits of all layers as those of one, along the batch or the sequence."""
    return np.concatenate(logits, axis)


# --- of logits at random


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_loss_of_mixtral(top_k):
    golden = VALUES["logits"]
    found = [losses(x, top_k, **MIXTRAL)["loss.balance"] for x in LOGITS]
    np.testing.assert_allclose(found, golden[f"mixtral.top-{top_k}"], rtol=EXACT)
    padded = [losses(x, top_k, MASK, **MIXTRAL)["loss.balance"] for x in LOGITS]
    np.testing.assert_allclose(padded, golden[f"mixtral.top-{top_k}.masked"], rtol=EXACT)
    whole = losses(joint(list(LOGITS), 0), top_k, **MIXTRAL)["loss.balance"]
    assert whole == pytest.approx(golden[f"mixtral.top-{top_k}.joint"], rel=EXACT)
    # The difference is no rounding.
    assert abs(np.mean(found) - whole) > 0.05


def test_losses_of_switch_transformers():
    golden = VALUES["logits"]
    found = [losses(x, **SWITCH) for x in LOGITS]
    for name, ours in (("balance", "loss.balance"), ("z", "loss.router_z")):
        np.testing.assert_allclose([f[ours] for f in found], golden[f"switch.{name}"], rtol=EXACT)
        whole = losses(joint(list(LOGITS), 1), **SWITCH)[ours]
        assert whole == pytest.approx(golden[f"switch.{name}.joint"], rel=EXACT)
    # A z-loss is a mean over tokens, so the joint one is the mean over layers.
    assert np.mean(golden["switch.z"]) == pytest.approx(golden["switch.z.joint"], rel=EXACT)


@pytest.mark.parametrize(
    ("gradient", "loss", "top_k", "options"),
    [
        ("mixtral.top-2", "balance", 2, MIXTRAL),
        ("switch.balance", "balance", 1, SWITCH),
        ("switch.z", "router_z", 1, SWITCH),
    ],
)
def test_gradients(gradient, loss, top_k, options):
    jax = pytest.importorskip("jax")
    from moecc_backends.xla.backend import function

    graph = router(LOGITS.shape[-1], top_k)
    applied(AddLossesPass(metrics=False, **options), graph)
    with jax.enable_x64(True):
        run = function(graph, dtype=F64)
        x = np.zeros((*LOGITS.shape[1:3], 2))
        slope = jax.grad(lambda given: run({}, {"x": x, "logits": given})[f"loss.{loss}"])
        found = jax.jit(slope)(LOGITS[0])
        np.testing.assert_allclose(found, ARRAYS[f"{gradient}.gradient"], rtol=1e-10, atol=1e-16)
