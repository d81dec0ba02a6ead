"""Gate conventions, ways to the experts and dispatch strategies: rows that hold, and meanings."""

from contextlib import nullcontext

import numpy as np
import pytest
from moecc_passes.upcycle.rewrite import MEANINGS, GateLaw
from moecc_passes.upcycle.rewrite import gates_of as promised_gates

from moecc.errors import InputError
from moecc.ir import F64, Builder, Graph, tensor
from moecc.ir.conventions import CONVENTIONS, DISPATCHES, GATES
from moecc.ir.ops import routing as reference
from moecc.testing import run_reference

EXPERTS = 5


def gates_of(row, logits, top_k):
    """Return the gates that the reference makes of ``[tokens, expert]``."""
    graph = Graph("g")
    x = graph.input("x", tensor(F64, batch="B", expert=logits.shape[1]))
    graph.set_output("y", Builder(graph).route(x, top_k=top_k, gates=row.name)[1])
    return run_reference(graph, inputs={"x": logits})["y"]


def choices(row):
    return range(1, 1 + min(row.max_top_k or EXPERTS, EXPERTS))


def drawn():
    """Return logits far apart, and logits so near to one another that sparsemixer mixes them."""
    rng = np.random.default_rng(0)
    far = rng.normal(0, 2, (64, EXPERTS))
    return np.concatenate([far, 1 + rng.normal(0, 0.005, (64, EXPERTS))])


ROWS = pytest.mark.parametrize("row", CONVENTIONS, ids=lambda row: str(row.name))


@ROWS
def test_no_convention_lacks_a_meaning(row):
    pytest.importorskip("jax")
    from moecc_backends.xla.lower import routing as route

    for table in (reference.GATE_FUNCTIONS, route.GATES, MEANINGS):
        assert set(table) == set(GATES)
    assert row.score is None or row.score in reference.SCORES


@ROWS
def test_equal_logits_have_the_sum_that_the_row_says(row):
    for top_k in choices(row):
        total = gates_of(row, np.zeros((1, EXPERTS)), top_k).sum()
        assert total == pytest.approx(row.zero_router_sum(EXPERTS, top_k), rel=1e-14)


@ROWS
def test_the_sum_is_constant_where_the_row_says_so_and_nowhere_else(row):
    for top_k in choices(row):
        sums = gates_of(row, drawn(), top_k).sum(1)
        assert (np.ptp(sums) < 1e-12) == row.sum_is_constant(EXPERTS, top_k), top_k
        if row.constant_sum:
            assert sums[0] == pytest.approx(row.zero_router_sum(EXPERTS, top_k), rel=1e-12)


@ROWS
def test_a_router_learns_at_top_1_where_the_row_says_so(row):
    moved = drawn()
    moved[:, 0] += 1e-3
    changes = np.abs(gates_of(row, moved, 1) - gates_of(row, drawn(), 1)).max()
    assert (changes > 1e-9) == row.learns_at_top_1


@ROWS
def test_the_law_of_upcycle_has_the_gates_of_the_reference(row):
    for top_k in choices(row):
        gates = promised_gates(GateLaw(row.name, EXPERTS, top_k), drawn())
        assert np.allclose(gates, gates_of(row, drawn(), top_k), rtol=1e-12, atol=1e-12)


@ROWS
def test_a_bias_needs_a_score(row):
    graph = Graph("g")
    x = graph.input("x", tensor(F64, batch="B", expert=EXPERTS))
    bias = graph.param("bias", tensor(F64, expert=EXPERTS))
    refusal = pytest.raises(InputError, match="no score") if row.score is None else nullcontext()
    with refusal:
        Builder(graph).route(x, bias, top_k=1, gates=row.name, using="bias")


def test_no_strategy_lacks_a_lowering():
    pytest.importorskip("jax")
    from moecc_backends.xla.dispatch.choose import LAYOUTS

    assert tuple(LAYOUTS) == DISPATCHES
