"""Rolled layers compute what the layers did; what is rolled, and why not; unrolling undoes it."""

import pytest
from hypothesis import given, settings
from moecc_passes.roll_layers import (
    LayerNodes,
    Repeated,
    RollLayersPass,
    UnrollLayersPass,
    repetitions_in,
)
from tiers import examples

from moecc.errors import UsageError
from moecc.ir import F32, Builder, Graph, clone, equal, parse, print_graph, tensor
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.testing import assert_same, laws
from moecc.types import KEY, TensorType

from .model_graphs import SMALL, apply_passes, preset_graph
from .stacks import stacks


def roll(graph):
    told = []
    result = RollLayersPass().apply(graph, Context(remark=told.append))
    return result, [str(r) for r in told]


def roll_into_one(graph):
    """Roll the layers of `graph`, and return the one repetition, which comes apart again."""
    rolled, _ = laws.applied(RollLayersPass(), graph)
    (scan,) = (node for node in rolled if node.body is not None)
    laws.check_round_trip(rolled)
    assert_same(graph, rolled, exact=True)
    assert equal(laws.applied(UnrollLayersPass(), rolled)[0], graph)
    return rolled, scan


@settings(max_examples=examples(40, 150))
@given(stacks())
def test_rolling_is_exact(graph):
    laws.check_pass(RollLayersPass(), graph)
    laws.check_graph(laws.applied(RollLayersPass(), graph)[0])


@settings(max_examples=examples(40, 150))
@given(stacks())
def test_unrolling_is_the_inverse(graph):
    rolled, result = laws.applied(RollLayersPass(), graph)
    laws.check_pass(UnrollLayersPass(), rolled)
    again, _ = laws.applied(UnrollLayersPass(), rolled)
    if any(v.is_param for n in rolled if n.op.name == "stack" for v in n.operands):
        # One that is stacked with other values stays apart, and keeps no place among the others.
        again.order_params([again.params[name] for name in graph.params])
    if not result.stats["hoisted"]:
        assert equal(graph, again), print_graph(again)
    assert [(n.op.name, n.loc) for n in again if n.op.name != "constant"] == [
        (n.op.name, n.loc) for n in graph if n.op.name != "constant"
    ]
    assert list(again.params) == list(graph.params)
    assert [p.loc for p in again.params.values()] == [p.loc for p in graph.params.values()]


def chain(*kinds):
    """Return a graph with a layer for each of `kinds`, an operation on the stream of the last."""
    graph = Graph()
    h = graph.input("x", tensor(F32, batch="B"))
    for number, kind in enumerate(kinds):
        b = Builder(graph, loc=f"layers.{number}.ffn")
        h = b.node(kind, h).result
    graph.set_output("y", h)
    return graph


PATTERNS = {
    "aaabaaab": [(0, 4, 2)],
    "abbbb": [(1, 1, 4)],
    "abcd": [],
    "aabb": [(0, 1, 2), (2, 1, 2)],
    "ababa": [(0, 2, 2)],
    "aaabaaabaa": [(0, 4, 2), (8, 1, 2)],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_repeats(pattern):
    kinds = {"a": "silu", "b": "tanh", "c": "relu", "d": "gelu"}
    graph = chain(*map(kinds.get, pattern))
    layers = [LayerNodes("layers", f"layers.{i}", [node]) for i, node in enumerate(graph)]
    assert repetitions_in(layers) == [Repeated(*found) for found in PATTERNS[pattern]]


def test_what_is_left_is_told_with_the_reason():
    graph = chain("tanh", "silu", "silu", "silu", "relu")
    result, told = roll(graph)
    assert result.stats == {"scans": 1, "layers-rolled": 3, "layers-left": 2, "hoisted": 0}
    assert told == [
        "layers.{1..3}: rolled: one layer, repeated 3 times",
        "layers.0: not rolled with layers.1: it has tanh @layers.0.ffn where layers.1.ffn has silu",
        "layers.4: not rolled with layers.3: it has relu @layers.4.ffn where layers.3.ffn has silu",
    ]


def test_what_skips_a_layer_is_not_rolled():
    graph = Graph()
    last, value = (graph.input(n, tensor(F32, batch="B")) for n in "xy")
    for number in range(4):
        last, value = value, Builder(graph, loc=f"layers.{number}.ffn").add(last, value)
    graph.set_output("y", value)
    before = clone(graph)
    result, told = roll(graph)
    assert not result.changed
    assert equal(graph, before)
    assert "is used farther away than in the layer after its own" in told[0]


def test_keys_and_shared_parameters_are_stacked():
    graph = Graph()
    h, key = graph.input("x", tensor(F32, batch=4)), graph.input("key", TensorType(KEY))
    two = [graph.param(f"table.{n}", tensor(F32, batch=4)) for n in "ab"]
    keys = [Builder(graph).fold_key(key, by=i) for i in range(4)]
    for number in range(4):
        b = Builder(graph, loc=f"layers.{number}.ffn")
        h = b.tanh(b.add(b.add(h, b.random_normal(keys[number], h)), two[number % 2]))
    graph.set_output("y", h)
    rolled, scan = roll_into_one(graph)
    assert [v.node.op.name if v.node else v.name for v in scan.operands] == ["x", "stack", "stack"]
    assert list(rolled.params) == ["table.a", "table.b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("save=combine", "names are saved under remat=save alone"),
        ("remat=save save=combin", "nothing is called 'combin'"),
        ("remat=all", "none, block, full, save"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(f"roll-layers{{{options}}}")


def test_operands_that_were_exchanged_are_alike():
    graph = Graph()
    h, memory = (graph.input(n, tensor(F32, batch="B", embed=4)) for n in "xm")
    for number in range(4):
        b = Builder(graph, loc=f"layers.{number}.ffn")
        w = graph.param(f"layers.{number}.w", tensor(F32, embed=4))
        for other in (w, memory):
            h = b.mul(*((h, other) if (number % 3 or other is w) else (other, h)))
            h = b.add(*((h, b.silu(h)) if number % 2 else (b.silu(h), h)))
    graph.set_output("y", h)
    before = clone(graph)
    result, _ = roll(graph)
    assert result.stats["layers-rolled"] == 4
    assert list(graph.params) == ["layers.{0..3}.w"]
    assert_same(before, graph, exact=True)


@pytest.mark.parametrize(
    "layout",
    [
        "mesh=data:2,model:2 rules=tensor-parallel",
        "mesh=data:2,expert:2 rules=expert-parallel",
    ],
)
def test_layers_on_a_mesh_are_rolled_with_their_collectives(layout):
    graph = preset_graph("smollm2-135m", **SMALL | {"num_key_value_heads": 2})
    text = "upcycle{experts=4},specialize{capacity-factor=2.0 groups=4},"
    apply_passes(graph, f"{text}annotate-sharding{{{layout}}},lower-collectives")
    _, scan = roll_into_one(graph)
    assert any(node.op.collective for node in scan.body)


def test_a_rolled_graph_that_was_written_by_hand_comes_apart():
    """Parameters without ranges in their names, and axes that do not come first, are picked."""
    graph = parse("""moecc 1
graph g {
  input %x : f32[batch=B]
  param %w : f32[batch=B, layer=3]
  %y, %s = scan %x, %w {over=(layer=3), carries=1, stacked=1} : f32[batch=B], f32[layer=3, batch=B] {
    input %x : f32[batch=B]
    input %w : f32[batch=B]
    %m = mul %x, %w : f32[batch=B]
    output m = %m
    output s = %m
  }
  %t = sum %s {axes=layer} : f32[batch=B]
  %z = index %s {axis=layer, at=1} : f32[batch=B]
  output y = %y
  output t = %t
  output z = %z
  output s = %s
}
""")  # noqa: E501
    laws.check_pass(UnrollLayersPass(), graph)
    after, _ = laws.applied(UnrollLayersPass(), graph)
    names = [node.op.name for node in after]
    assert names == [*["index"] * 3, *["mul"] * 3, "stack", "sum"]
