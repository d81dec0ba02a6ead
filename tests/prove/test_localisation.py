"""The node that a verdict names: each case makes one mistake in a fused mixture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import moecc
from moecc.ir import F32, Builder, Graph, clone, tensor
from moecc.prove import prove

MIXTURE = Path(__file__).parents[1] / "golden" / "mixtral_gqa"


@cache
def graphs() -> tuple[Graph, Graph]:
    mixture = moecc.open(str(MIXTURE))
    return mixture.graph, mixture.apply("fuse-gate-up").graph


def exchange_keys_and_values(graph: Graph) -> str:
    keys, values = (
        graph.params[f"model.layers.1.self_attn.{name}_proj.weight"] for name in ("k", "v")
    )
    keys.weight, values.weight = values.weight, keys.weight
    return next(n.results[0].name for n in graph if keys in n.operands)


def exchange_experts_of_layers(graph: Graph) -> str:
    name = "model.layers.{}.block_sparse_moe.experts.w1.weight.fused"
    first, second = (graph.params[name.format(layer)] for layer in (0, 1))
    first.weight, second.weight = second.weight, first.weight
    return next(n.results[0].name for n in graph if first in n.operands)


def read_the_scores_of_another_layer(graph: Graph) -> str:
    scores = [n for n in graph if n.op.name == "scale"]
    scores[1].set_operand(0, scores[0].operands[0])
    return scores[1].results[0].name


def return_another_value(graph: Graph) -> str:
    hidden = next(n for n in graph if n.op.name == "add").result
    logits = graph.outputs["logits"].node
    assert logits is not None
    logits.set_operand(0, hidden)
    return logits.results[0].name


@pytest.mark.parametrize(
    "mistake",
    [
        exchange_keys_and_values,
        exchange_experts_of_layers,
        read_the_scores_of_another_layer,
        return_another_value,
    ],
)
def test_the_node_of_a_mistake_is_named(mistake: Callable[[Graph], str]) -> None:
    before, right = graphs()
    after = clone(right)
    name = mistake(after)
    verdict = prove(before, after, refute=False)
    assert verdict.node.startswith(f"%{name} = "), verdict.node


def test_terms_are_those_of_values_that_stand_for_one_another() -> None:
    def graph(*, gated: bool) -> Graph:
        b = Builder(Graph())
        x = b.graph.input("x", tensor(F32, batch="B"))
        y = b.mul(x, b.sigmoid(x)) if gated else b.silu(x)
        b.graph.set_output("y", b.neg(y))
        return b.graph

    verdict = prove(graph(gated=False), graph(gated=True), refute=False)
    assert verdict.node == "%v = sigmoid"
    x = "source input x(batch)"
    before, after = verdict.terms
    assert (before, {*after.split("·")}) == (f"silu({x})", {x, f"sigmoid({x})"})


def test_an_output_of_another_right_value_is_named() -> None:
    before, right = graphs()
    before, after = clone(before), clone(right)
    hidden = [n for n in after if n.op.name == "add"][:2]
    for graph in (before, after):
        for at, name in enumerate(("first", "second")):
            graph.set_output(name, graph.value(hidden[at].result.name))
    after.set_output("first", hidden[1].result)
    verdict = prove(before, after, refute=False)
    assert verdict.node.endswith(", returned as %first")
