"""Rows weighted before the last product of their experts: where, and that nothing else changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.routed import WeightRowsPass, routed_layers
from tiers import examples

from moecc.errors import InputError
from moecc.ir import clone, equal, parse, print_graph
from moecc.rewrite.passes import Context
from moecc.testing import laws
from moecc.testing.generate import random_graph
from moecc.testing.steps import experts, feed_forward

from .dense_blocks import Dense, Tensors, relative, run, tokens, upcycled

ITEM = WeightRowsPass()


def weighted(graph):
    after = clone(graph)
    ITEM.apply(after, Context())
    laws.check_graph(after)
    return after


def operations(graph):
    """The operations from the last product on."""
    names = [n.op.name for n in graph]
    first = names.index("dispatch_gates")
    return names[first : names.index("combine_weighted") + 1]


@pytest.mark.parametrize("options", [{}, {"slots": "capacity", "capacity_factor": 1.0}])
@pytest.mark.parametrize(
    ("bias", "after"),
    [
        (False, ["dispatch_gates", "weight_rows", "contract", "combine_weighted"]),
        # A bias is weighted as well.
        (True, ["dispatch_gates", "weight_rows", "combine_weighted"]),
    ],
)
def test_what_is_weighted(options, bias, after):
    dense = Dense(bias_out=bias)
    sparse, _ = upcycled(dense.graph(), experts=4, init="noise", shared=0.5, **options)
    made = weighted(sparse)
    assert operations(made) == after
    tensors, inputs = Tensors(sparse), tokens(dense)
    expected = run(sparse, tensors.params(sparse), inputs)["y"]
    assert relative(run(made, tensors.params(made), inputs)["y"], expected) < 1e-14


def test_a_layer_is_weighted_once_and_keeps_its_gates():
    sparse, _ = upcycled(Dense(layers=2).graph(), experts=4)
    gates = [layer.gates.name for layer in routed_layers(sparse)]
    made = weighted(sparse)
    assert [layer.gates.name for layer in routed_layers(made)] == gates
    again = clone(made)
    assert not ITEM.apply(again, Context()).changed
    assert equal(made, again)
    assert equal(parse(print_graph(made)), made)


def test_passes_on_routing_need_gates():
    sparse, _ = upcycled(Dense().graph(), experts=4)
    made = weighted(sparse)
    (layer,) = routed_layers(made)
    product = layer.combine.operands[0].node
    row = product.operands[0].node
    product.set_operand(0, row.operands[0])
    row.erase()
    sent = layer.gate_dispatch
    sent.erase()
    with pytest.raises(InputError, match="a routed layer has no gates"):
        _ = layer.gates


# --- laws


@settings(max_examples=examples(20, 100))
@given(seed=st.integers(0, 2**24 - 1))
def test_laws(seed):
    laws.check_pass(ITEM, random_graph(seed, steps=(feed_forward, experts)))
