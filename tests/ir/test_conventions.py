"""Gate conventions, ways to the experts and dispatch strategies: rows that hold, and meanings."""

import numpy as np
import pytest
from moecc_passes.upcycle.rewrite import MEANINGS, GateLaw
from moecc_passes.upcycle.rewrite import gates_of as promised_gates

from moecc.backend import get_backend
from moecc.ir import Builder, Graph
from moecc.ir.conventions import (
    CONVENTIONS,
    DISPATCHES,
    GATES,
)
from moecc.ir.ops import routing as reference
from moecc.types import F64, tensor

EXPERTS = 5


def gates_of(row, logits, top_k):
    """Return the gates that the reference makes of ``[tokens, expert]``."""
    graph = Graph("g")
    x = graph.input("x", tensor(F64, batch="B", expert=logits.shape[1]))
    _, gates = Builder(graph).route(x, top_k=top_k, gates=row.name)
    graph.set_output("y", gates)
    return get_backend("reference").compile(graph).run({}, {"x": logits})["y"]


def choices(row):
    return range(1, 1 + min(row.max_top_k or EXPERTS, EXPERTS))


def drawn(tokens=64):
    """Return logits far apart, and logits so near to one another that sparsemixer mixes them."""
    rng = np.random.default_rng(0)
    far = rng.normal(0, 2, (tokens, EXPERTS))
    return np.concatenate([far, 1 + rng.normal(0, 0.005, (tokens, EXPERTS))])


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
        is_constant = bool(np.ptp(sums) < 1e-12)
        assert is_constant == row.sum_is_constant(EXPERTS, top_k), top_k
        if row.constant_sum:
            assert sums[0] == pytest.approx(row.zero_router_sum(EXPERTS, top_k), rel=1e-12)


@ROWS
def test_a_router_learns_at_top_1_where_the_row_says_so(row):
    logits = drawn()
    moved = logits.copy()
    moved[:, 0] += 1e-3
    changes = np.abs(gates_of(row, moved, 1) - gates_of(row, logits, 1)).max()
    assert bool(changes > 1e-9) == row.learns_at_top_1


@ROWS
def test_the_law_of_upcycle_has_the_gates_of_the_reference(row):
    for top_k in choices(row):
        law = GateLaw(row.name, EXPERTS, top_k)
        found = promised_gates(law, drawn())
        assert np.allclose(found, gates_of(row, drawn(), top_k), rtol=1e-12, atol=1e-12)


@ROWS
def test_a_bias_needs_a_score(row):
    graph = Graph("g")
    x = graph.input("x", tensor(F64, batch="B", expert=EXPERTS))
    bias = graph.param("bias", tensor(F64, expert=EXPERTS))
    build = Builder(graph)

    def biased():
        return build.route(x, bias, top_k=1, gates=row.name, using=("bias",))

    if row.score is None:
        with pytest.raises(Exception, match="no score"):
            biased()
    else:
        assert biased()


# --- ways to the experts


# --- dispatch strategies


def test_no_strategy_lacks_a_lowering():
    pytest.importorskip("jax")
    from moecc_backends.xla.dispatch.choose import LAYOUTS

    assert tuple(LAYOUTS) == DISPATCHES
