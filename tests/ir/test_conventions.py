"""Gate conventions, ways to the experts and dispatch strategies: rows that hold, and meanings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moecc_passes.upcycle.gates import MEANINGS, GateLaw
from moecc_passes.upcycle.gates import gates_of as promised_gates
from sharding_cases import layer

from moecc.backend import get_backend
from moecc.ir import Builder, Graph
from moecc.ir.conventions import (
    CONVENTIONS,
    DISPATCHES,
    GATES,
    GateConvention,
)
from moecc.ir.mesh import parse_mesh
from moecc.ir.ops import routing as reference
from moecc.sharding.assign import Assigner, sites_of
from moecc.sharding.collectives import route, sent, sparse_layer
from moecc.sharding.propagate import propagate
from moecc.sharding.rules import read_layouts
from moecc.sharding.vias import WAYS, Via
from moecc.types import F64, tensor

Array = np.ndarray[Any, np.dtype[np.float64]]

EXPERTS = 5


def gates_of(row: GateConvention, logits: Array, top_k: int) -> Array:
    """Return the gates that the reference makes of ``[tokens, expert]``."""
    graph = Graph("g")
    x = graph.input("x", tensor(F64, batch="B", expert=logits.shape[1]))
    _, gates = Builder(graph).route(x, top_k=top_k, gates=row.name)
    graph.set_output("y", gates)
    found: Array = get_backend("reference").compile(graph).run({}, {"x": logits})["y"]
    return found


def choices(row: GateConvention) -> range:
    return range(1, 1 + min(row.max_top_k or EXPERTS, EXPERTS))


def drawn(tokens: int = 64) -> Array:
    """Return logits far apart, and logits so near to one another that sparsemixer mixes them."""
    rng = np.random.default_rng(0)
    far = rng.normal(0, 2, (tokens, EXPERTS))
    return np.concatenate([far, 1 + rng.normal(0, 0.005, (tokens, EXPERTS))])


ROWS = pytest.mark.parametrize("row", CONVENTIONS, ids=lambda row: str(row.name))


@ROWS
def test_no_convention_lacks_a_meaning(row: GateConvention) -> None:
    pytest.importorskip("jax")
    from moecc_backends.xla.lower import routing as route

    for table in (reference.GATE_FUNCTIONS, route.GATES, MEANINGS):
        assert set(table) == set(GATES)
    assert row.score is None or row.score in reference.SCORES


@ROWS
def test_equal_logits_have_the_sum_that_the_row_says(row: GateConvention) -> None:
    for top_k in choices(row):
        total = gates_of(row, np.zeros((1, EXPERTS)), top_k).sum()
        assert total == pytest.approx(row.zero_router_sum(EXPERTS, top_k), rel=1e-14)


@ROWS
def test_the_sum_is_constant_where_the_row_says_so_and_nowhere_else(row: GateConvention) -> None:
    for top_k in choices(row):
        sums = gates_of(row, drawn(), top_k).sum(1)
        is_constant = bool(np.ptp(sums) < 1e-12)
        assert is_constant == row.sum_is_constant(EXPERTS, top_k), top_k
        if row.constant_sum:
            assert sums[0] == pytest.approx(row.zero_router_sum(EXPERTS, top_k), rel=1e-12)


@ROWS
def test_a_router_learns_at_top_1_where_the_row_says_so(row: GateConvention) -> None:
    logits = drawn()
    moved = logits.copy()
    moved[:, 0] += 1e-3
    changes = np.abs(gates_of(row, moved, 1) - gates_of(row, logits, 1)).max()
    assert bool(changes > 1e-9) == row.learns_at_top_1


@ROWS
def test_the_law_of_upcycle_has_the_gates_of_the_reference(row: GateConvention) -> None:
    for top_k in choices(row):
        law = GateLaw(row.name, EXPERTS, top_k)
        found = promised_gates(law, drawn())
        assert np.allclose(found, gates_of(row, drawn(), top_k), rtol=1e-12, atol=1e-12)


@ROWS
def test_a_bias_needs_a_score(row: GateConvention) -> None:
    graph = Graph("g")
    x = graph.input("x", tensor(F64, batch="B", expert=EXPERTS))
    bias = graph.param("bias", tensor(F64, expert=EXPERTS))
    build = Builder(graph)

    def biased() -> object:
        return build.route(x, bias, top_k=1, gates=row.name, using=("bias",))

    if row.score is None:
        with pytest.raises(Exception, match="no score"):
            biased()
    else:
        assert biased()


# --- ways to the experts


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.name))
def test_a_route_has_the_collectives_of_the_row(way: Via) -> None:
    """The passes write what a route has into graphs, and the plan prices it."""
    rules = "expert-replicated" if way.tokens_everywhere else "expert-hierarchical"
    mesh = "data:2,expert:2" if way.tokens_everywhere else "far:2,near:2"
    for bound, slots in (("capacity", "fixed"), ("ragged", "ragged")):
        if slots not in way.to_experts:
            continue
        graph = layer(bound)  # type: ignore[arg-type]
        sites, by = sites_of(graph), Assigner(parse_mesh(mesh), read_layouts([rules]))
        found = propagate(sites, graph.inputs.values(), graph.params.values(), by)
        sparse = sparse_layer(sites, found)
        assert sparse is not None
        stages = route(sparse, way, found, None)
        ops = {op for s in stages for op, _, _ in sent(s.source, s.steps)} - {"shard"}
        assert ops == {op for op in (way.to_experts[slots], way.back[slots]) if op}


# --- dispatch strategies


def test_no_strategy_lacks_a_lowering() -> None:
    pytest.importorskip("jax")
    from moecc_backends.xla.dispatch.choose import LAYOUTS

    assert tuple(LAYOUTS) == DISPATCHES
