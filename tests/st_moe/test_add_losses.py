"""``add-losses``: which outputs a graph gets, and what it rejects."""

import numpy as np
import pytest
from moecc_passes.add_losses import AddLossesPass

from moecc.errors import InputError
from moecc.ir import F64, Builder, clone, tensor
from moecc.rewrite.passes import Context
from moecc.testing import run_reference
from tests.passes.model_graphs import apply_passes

from .layers import applied, logsumexp, nodes, router, softmax, transformer


def test_the_output_z_loss():
    graph = router(4)
    with pytest.raises(InputError, match="one output with an axis vocab"):
        AddLossesPass(output_z_coef=1e-4).apply(clone(graph), Context())
    b = Builder(graph)
    table = graph.param("table", tensor(F64, vocab=5, embed=2))
    graph.set_output("logits_out", b.contract(graph.outputs["y"], table, over="embed"))
    applied(AddLossesPass(output_z_coef=1e-4, balance="none", z_coef=0.0, metrics=False), graph)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 2)), rng.normal(size=(5, 2))
    found = run_reference(
        graph, params={"table": w}, inputs={"x": x, "logits": np.zeros((2, 3, 4))}
    )
    z_loss = (logsumexp(found["logits_out"]) ** 2).mean()
    assert found["loss.output_z"] == pytest.approx(z_loss, rel=1e-10)
    assert found["loss.auxiliary"] == pytest.approx(1e-4 * z_loss, rel=1e-10)


def test_prototypes_are_routers_of_their_own():
    """Each has its own balance and z-loss, and the layer the mean of them (M6-T has k routers)."""
    graph = transformer(1)
    apply_passes(graph, "upcycle{experts=6 top-k=2 routing=prototypes},add-losses,trace-routing")
    (route,) = (n for n in nodes(graph, "route") if n.origin.startswith("upcycle"))
    graph.set_output("logits_of", route.operands[0])
    ids = np.random.default_rng(0).integers(0, 11, (2, 8)).astype(np.int32)
    found = run_reference(graph, inputs={"ids": ids})
    logits = found["logits_of"].reshape(16, 2, 3)
    z_loss = (logsumexp(logits) ** 2).mean()
    assert found["loss.router_z"] == pytest.approx(z_loss, rel=1e-12)
    p = softmax(logits)
    share = np.eye(3)[p.argmax(-1)].mean(0)
    balance = 3 * (share * p.mean(0)).sum(-1)
    assert found["loss.balance"] == pytest.approx(balance.mean(), rel=1e-12)
    top = np.sort(p, -1)
    margin = (top[..., -1] - top[..., -2]).mean()
    assert found["metric.layers.0.ffn.margin"] == pytest.approx(margin, rel=1e-12)
    loads = np.eye(6)[found["trace.layers.0.ffn.experts"]].mean((0, 1, 2))
    np.testing.assert_allclose(found["metric.layers.0.ffn.loads"], loads, rtol=1e-12)
