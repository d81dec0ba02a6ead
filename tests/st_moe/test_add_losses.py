"""``add-losses``: which outputs a graph gets, and what it rejects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moecc_passes.add_losses import AddLossesPass

from moecc.errors import InputError, UsageError
from moecc.ir import F64, Builder, Graph, clone, tensor
from moecc.ir.moe import emit_expert_choice
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import laws, run_reference

from .layers import applied, evaluated, router, softmax, transformer


def test_the_pass_adds_outputs_and_changes_none() -> None:
    graph = router(4, 2, layers=2)
    before = clone(graph)
    result = applied(AddLossesPass(), graph)
    assert (result.matched, result.changed) == (2, True)
    for name in [n for n in graph.output_names if n != "y"]:
        graph.drop_output(name)
    inputs = {f"logits{i}": np.random.default_rng(i).normal(size=(2, 3, 4)) for i in range(2)}
    inputs["x"] = np.random.default_rng(2).normal(size=(2, 3, 2))
    np.testing.assert_array_equal(evaluated(graph, **inputs)["y"], evaluated(before, **inputs)["y"])


def test_a_graph_with_losses_round_trips() -> None:
    graph = router(4, 2, mask=True, slots="capacity", capacity_factor=1.25)
    applied(AddLossesPass(importance_coef=1.0, load_coef=1.0), graph)
    laws.check_graph(graph)


def test_losses_are_added_once() -> None:
    graph = router(4)
    applied(AddLossesPass(), graph)
    with pytest.raises(InputError, match="has losses or metrics already"):
        AddLossesPass().apply(graph, Context())


def test_the_output_z_loss() -> None:
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
    total = np.log(np.exp(found["logits_out"]).sum(-1))
    assert found["loss.output_z"] == pytest.approx((total**2).mean(), rel=1e-10)
    assert found["loss.auxiliary"] == pytest.approx(1e-4 * (total**2).mean(), rel=1e-10)


def test_expert_choice_needs_no_balance_loss_and_gets_none() -> None:
    graph = Graph()
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    w = graph.param("w", tensor(F64, expert=4, embed=2))
    e, g, p = emit_expert_choice(b, x, w, tokens=("batch", "seq"), capacity_factor=1.0)
    graph.set_output("y", b.combine(b.dispatch(x, e, p), e, p, g))
    told: list[Any] = []
    AddLossesPass().apply(graph, Context(remark=told.append))
    assert [str(r) for r in told] == [
        "layers.0.ffn: has no balance loss: experts choose as many tokens"
    ]
    rng = np.random.default_rng(0)
    tokens, weight = rng.normal(size=(2, 8, 2)), rng.normal(size=(4, 2))
    found = run_reference(graph, params={"w": weight}, inputs={"x": tokens})
    logits = tokens @ weight.T
    total = np.log(np.exp(logits).sum(-1))
    assert found["loss.router_z"] == pytest.approx((total**2).mean(), rel=1e-12)
    assert "loss.balance" not in found
    assert "metric.layers.0.ffn.dropped" not in found
    p = softmax(logits)
    assert found["metric.layers.0.ffn.entropy"] == pytest.approx(-(p * np.log(p)).sum(-1).mean())
    best = np.argsort(-p.reshape(16, 4), axis=0)[:4]
    left = 1 - len(np.unique(best)) / 16
    assert found["metric.layers.0.ffn.left_behind"] == pytest.approx(left)
    assert 0 < left < 1
    np.testing.assert_allclose(found["metric.layers.0.ffn.loads"], 0.25)


def test_prototypes_are_routers_of_their_own() -> None:
    """Each has its own balance and z-loss, and the layer the mean of them (M6-T has k routers)."""
    graph = transformer(1)
    text = "upcycle{experts=6 top-k=2 routing=prototypes},add-losses,trace-routing"
    run_pipeline(graph, Pipeline.parse(text))
    (route,) = (n for n in graph if n.op.name == "route" and n.origin.startswith("upcycle"))
    graph.set_output("logits_of", route.operands[0])
    ids = np.random.default_rng(0).integers(0, 11, (2, 8)).astype(np.int32)
    found = run_reference(graph, inputs={"ids": ids})
    logits = found["logits_of"].reshape(16, 2, 3)
    total = np.log(np.exp(logits).sum(-1))
    assert found["loss.router_z"] == pytest.approx((total**2).mean(), rel=1e-12)
    p = softmax(logits)
    share = np.eye(3)[p.argmax(-1)].mean(0)
    balance = 3 * (share * p.mean(0)).sum(-1)
    assert found["loss.balance"] == pytest.approx(balance.mean(), rel=1e-12)
    top = np.sort(p, -1)
    margin = (top[..., -1] - top[..., -2]).mean()
    assert found["metric.layers.0.ffn.margin"] == pytest.approx(margin, rel=1e-12)
    loads = np.eye(6)[found["trace.layers.0.ffn.experts"]].mean((0, 1, 2))
    np.testing.assert_allclose(found["metric.layers.0.ffn.loads"], loads, rtol=1e-12)


def test_a_hash_has_metrics_and_no_loss() -> None:
    graph = transformer(1)
    text = "upcycle{experts=4 routing=hash slots=capacity capacity-factor=1.0},add-losses"
    run_pipeline(graph, Pipeline.parse(text))
    found = run_reference(graph, inputs={"ids": np.full((2, 8), 3, np.int32)})
    # All 16 tokens ask for the same two experts, which have four slots each.
    assert found["metric.layers.0.ffn.dropped"] == pytest.approx(0.75)
    assert found["metric.layers.0.ffn.left_behind"] == pytest.approx(0.75)
    assert found["metric.layers.0.ffn.dead_experts"] == 2
    assert found["metric.layers.0.ffn.utilisation"] == pytest.approx(0.5)
    assert found["metric.layers.0.ffn.max_violation"] == pytest.approx(1)
    assert not any(n.startswith("loss") or n.endswith(("entropy", "margin")) for n in found)


def test_layers_of_different_kinds_are_joined_by_the_losses_they_have() -> None:
    graph = transformer(2)
    text = "upcycle{experts=4 layers=0 routing=hash},upcycle{experts=4 layers=1},add-losses"
    run_pipeline(graph, Pipeline.parse(f"{text}{{layers=mean}}"))
    alone = transformer(2)
    text = "upcycle{experts=4 layers=0 routing=hash},upcycle{experts=4 layers=1}"
    run_pipeline(alone, Pipeline.parse(text))
    applied(AddLossesPass(metrics=False), alone)
    ids = np.random.default_rng(0).integers(0, 11, (2, 8)).astype(np.int32)
    one, two = (run_reference(g, inputs={"ids": ids})["loss.balance"] for g in (graph, alone))
    assert one == two > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("add-losses{z-coef=-1.0}", "at least 0"),
        ("add-losses{balance-coef=inf}", "at least 0"),
        ("add-losses{load-noise=0.0}", "more than 0"),
        ("add-losses{balance=none z-coef=0.0 metrics=false}", "no loss and no metric is left"),
    ],
)
def test_options_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_pipeline(router(4), Pipeline.parse(text))


def test_a_graph_without_experts() -> None:
    graph = Graph()
    graph.set_output("y", Builder(graph).relu(graph.input("x", tensor(F64, a=2))))
    with pytest.raises(InputError, match="matched nothing"):
        run_pipeline(graph, Pipeline.parse("add-losses"))
