"""Rows weighted before the last product of their experts: where, and that nothing else changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.routed import WeightRowsPass, routed_layers
from tiers import examples

from moecc.errors import InputError
from moecc.ir import equal
from moecc.testing import laws
from moecc.testing.generate import random_graph
from moecc.testing.steps import experts, feed_forward

from .dense_blocks import Dense, applied, error, tokens, upcycled

ITEM = WeightRowsPass()


def weighted(graph):
    return applied(ITEM, graph)[0]


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
    assert error(sparse, made, tokens(dense)) < 1e-14


def test_a_layer_is_weighted_once_and_keeps_its_gates():
    sparse, _ = upcycled(Dense(layers=2).graph(), experts=4)
    gates = [layer.gates.name for layer in routed_layers(sparse)]
    made = weighted(sparse)
    assert [layer.gates.name for layer in routed_layers(made)] == gates
    again, result = applied(ITEM, made)
    assert not result.changed
    assert equal(made, again)


def test_passes_on_routing_need_gates():
    sparse, _ = upcycled(Dense().graph(), experts=4)
    (layer,) = routed_layers(weighted(sparse))
    product = layer.combine.operands[0].node
    row = product.operands[0].node
    product.set_operand(0, row.operands[0])
    row.erase()
    layer.gate_dispatch.erase()
    with pytest.raises(InputError, match="a routed layer has no gates"):
        _ = layer.gates


# --- laws


@settings(max_examples=examples(20, 100))
@given(seed=st.integers(0, 2**24 - 1))
def test_laws(seed):
    laws.check_pass(ITEM, random_graph(seed, steps=(feed_forward, experts)))
