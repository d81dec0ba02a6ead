"""Balancing losses and z-losses are those of transformers, whose golden values are checked in.

The normalisations differ in one thing.  transformers joins the tokens of all layers to one batch:
its f and P are means over layers, and their product is taken last.  Here each layer has its own
f · P, as in the paper, and losses are summed or averaged over layers.  So a layer alone has the
same loss in both, and the joint loss is that of one layer with all the tokens.
"""

import json

import numpy as np
import pytest
from moecc_passes.add_losses import AddLossesPass

from moecc.ir import F64
from tests.passes.model_graphs import GOLDEN

from .layers import applied, losses, router

VALUES = json.loads((GOLDEN / "losses.json").read_text())
ARRAYS = np.load(GOLDEN / "losses.npz")
LOGITS, MASK = ARRAYS["logits"], ARRAYS["mask"]

MIXTRAL = {"balance": "k-hot", "over": "global"}
SWITCH = {"balance": "top-1", "over": "sequence"}
EXACT = 1e-13


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_loss_of_mixtral(top_k):
    def balance(logits, mask=None):
        return losses(logits, top_k, mask, metrics=False, **MIXTRAL)["loss.balance"]

    golden = VALUES["logits"]
    layers = [balance(logits) for logits in LOGITS]
    np.testing.assert_allclose(layers, golden[f"mixtral.top-{top_k}"], rtol=EXACT)
    padded = [balance(logits, MASK) for logits in LOGITS]
    np.testing.assert_allclose(padded, golden[f"mixtral.top-{top_k}.masked"], rtol=EXACT)
    joint = balance(np.concatenate(LOGITS))
    assert joint == pytest.approx(golden[f"mixtral.top-{top_k}.joint"], rel=EXACT)
    # The difference is no rounding.
    assert abs(np.mean(layers) - joint) > 0.05


def test_losses_of_switch_transformers():
    golden = VALUES["logits"]
    layers = [losses(logits, metrics=False, **SWITCH) for logits in LOGITS]
    joint = losses(np.concatenate(LOGITS, 1), metrics=False, **SWITCH)
    for name, ours in (("balance", "loss.balance"), ("z", "loss.router_z")):
        expected = golden[f"switch.{name}"]
        np.testing.assert_allclose([layer[ours] for layer in layers], expected, rtol=EXACT)
        assert joint[ours] == pytest.approx(golden[f"switch.{name}.joint"], rel=EXACT)
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
