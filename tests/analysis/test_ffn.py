"""Feed-forward blocks are found by their dataflow, whatever their names, order and company."""

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given

from moecc.analysis import find_ffn_blocks
from moecc.ir import F32, Builder, Graph, tensor
from moecc.model.open import open_model
from moecc.testing import graphs
from moecc.testing.steps import attention, binary, contract, experts, feed_forward, unary

UP = "mlp embed"


def graph_of(build, embed=4, **axes):
    """Return the graph whose output `build` makes of ``x``, ``up``, ``down`` and more parameters.

    Args:
      build: takes a builder, ``x``, and the parameters by name.
      embed: the size of this axis.
      axes: the axes of the other parameters, by name.
    """
    graph = Graph("odd")
    sizes = {"batch": "B", "seq": "S", "embed": embed, "mlp": 6}

    def type_of(names):
        return tensor(F32, **{name: sizes[name] for name in names.split()})

    x = graph.input("x", type_of("batch seq embed"))
    axes |= {"up": UP, "down": "embed mlp"}
    params = {name: graph.param(name, type_of(names)) for name, names in axes.items()}
    graph.set_output("y", build(Builder(graph, loc="layers.3.ffn"), x, **params))
    return graph


def plain(b, x, up, down):
    return b.contract(b.silu(b.contract(x, up, over="embed")), down, over="mlp")


def gated(b, x, gate, up, down, act="silu"):
    a, u = (b.contract(x, w, over="embed") for w in (gate, up))
    return b.contract(b.mul(getattr(b, act)(a), u), down, over="mlp")


def only_block(graph):
    search = find_ffn_blocks(graph)
    assert search.refusals == []
    (block,) = search.blocks
    return block


def only_refusal(graph):
    search = find_ffn_blocks(graph)
    assert search.blocks == []
    (refusal,) = search.refusals
    assert refusal.layer == 3
    return refusal.reason


def degrees_of(block):
    return {param.name: degree for param, degree in block.degrees().items()}


# --- what a block is


def test_a_gated_block_and_its_parts():
    graph = graph_of(gated, gate=UP)
    block = only_block(graph)
    nodes = list(graph)
    assert block.nodes == tuple(nodes)
    assert block.ups == tuple(nodes[:2])
    assert block.down is nodes[-1]
    assert block.x is graph.inputs["x"]
    assert block.output is graph.outputs["y"]
    assert (block.outer, block.inner, block.embed, block.width) == ("embed", "mlp", 4, 6)
    assert [p.name for p in block.params] == ["gate", "up", "down"]
    assert (block.loc, block.layer) == ("layers.3.ffn", 3)
    assert block.output_bias is None
    assert [block.biases_of(up) for up in block.ups] == [(), ()]


def test_biases_belong_to_the_block():
    def biased(b, x, up, p, down, q):
        h = b.gelu(b.add(p, b.contract(x, up, over="embed")))
        return b.mul(b.add(q, b.contract(h, down, over="mlp")), b.relu(x))

    graph = graph_of(biased, p="mlp", q="embed")
    block = only_block(graph)
    assert block.output_bias is graph.params["q"]
    assert block.biases_of(block.ups[0]) == (graph.params["p"],)
    assert block.output.node.op.name == "add"
    assert len(block.nodes) == 5


def test_parameters_may_be_transformed_and_constants_taken_inside():
    def built(b, x, up, m, down):
        low, one = b.exp(m), b.constant(value=1.0)
        hidden = b.silu(b.contract(x, up, over="embed"))
        return b.contract(b.mul(hidden, b.add(low, one)), down, over="mlp")

    block = only_block(graph_of(built, m="mlp"))
    assert [n.op.name for n in block.nodes] == ["exp", "contract", "silu", "add", "mul", "contract"]


@pytest.mark.parametrize(
    ("act", "gate", "up"),
    [("silu", None, 1), ("normal_cdf", None, 1),
     ("gelu", None, 1), ("relu", 1, 1), ("square", 2, 1), ("neg", 1, 1),
     ("sigmoid", None, 1), ("stop_gradient", 1, 1), ("exp", None, 1)],
)  # fmt: skip
def test_degrees_of_a_gated_block(act, gate, up):
    block = only_block(graph_of(partial(gated, act=act), gate=UP))
    assert degrees_of(block) == {"gate": gate, "up": up}


def test_degrees_with_biases_sums_and_scales():
    def built(b, x, gate, up, p, down):
        a = b.relu(b.add(b.contract(x, gate, over="embed"), p))
        u = b.scale(b.contract(x, up, over="embed"), by=2.0)
        both = b.maximum(b.mul(a, u), b.neg(b.mul(u, a)))
        return b.contract(both, down, over="mlp")

    block = only_block(graph_of(built, gate=UP, p="mlp"))
    assert degrees_of(block) == {"gate": 1, "up": 1}

    def shifted(b, x, gate, up, p, down):
        a = b.relu(b.contract(x, gate, over="embed"))
        u = b.add(b.scale(b.contract(x, up, over="embed"), by=2.0), p)
        return b.contract(b.mul(a, u), down, over="mlp")

    # A parameter behind a scale is no bias of the product, so nothing scales with up.
    block = only_block(graph_of(shifted, gate=UP, p="mlp"))
    assert degrees_of(block) == {"gate": 1, "up": None}


# --- what is none, and why


def two_inputs(b, x, gate, up, down):
    a, u = b.contract(x, gate, over="embed"), b.contract(b.tanh(x), up, over="embed")
    return b.contract(b.mul(b.silu(a), u), down, over="mlp")


def linear(b, x, up, down):
    return b.contract(b.scale(b.contract(x, up, over="embed"), by=2.0), down, over="mlp")


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (two_inputs, {"gate": UP}, "its contractions take different values: %v1, %x"),
        (linear, {}, "it is linear: there is no activation"),
        (plain, {"embed": "D"}, "the sizes of its parameter %down are not known: "),
    ],
)
def test_near_misses_say_why(build, options, reason):
    assert only_refusal(graph_of(build, **options)).startswith(reason)


# --- whole models


def test_sparse_layers_are_no_blocks():
    with open_model(str(Path(__file__).parents[1] / "golden" / "mixtral_gqa")) as model:
        search = find_ffn_blocks(model.graph)
    assert search.blocks == []
    assert {refusal.reason for refusal in search.refusals} == {"it is sparse already"}
    assert len(search.refusals) == 2


@given(graphs(steps=[feed_forward, unary, contract, attention, binary, experts], max_steps=6))
def test_what_is_found_in_random_graphs_is_a_block(graph):
    order = {node: i for i, node in enumerate(graph)}
    seen = set()
    for block in find_ffn_blocks(graph).blocks:
        assert seen.isdisjoint(block.nodes)
        seen |= set(block.nodes)
        assert [order[n] for n in block.nodes] == sorted(order[n] for n in block.nodes)
        check_block(block)


def check_block(block):
    """Check the definition: from one value through parameters and back, closed and elementwise."""
    inside = {v for n in block.nodes for v in n.results}
    assert {up.operands[0] for up in block.ups} == {block.x}
    assert block.x not in inside
    for node in block.nodes:
        for value in node.operands:
            known = value is block.x or value in inside or value.is_param
            assert known or (value.node is not None and value.node.op.name == "constant")
        assert set(node.mixes) <= {block.outer, block.inner}
        assert node in (*block.ups, block.down) or not node.mixes
    for value in inside - {block.output}:
        if value is not block.down.result:
            assert value.users
        assert value.users.keys() <= set(block.nodes)
    for param in block.params:
        assert set(param.type.names) <= {block.outer, block.inner}
    assert set(block.output.type.names) == set(block.x.type.names)
