"""Rows weighted at their experts: the same layer, by every strategy and on every way."""

from functools import cache

import pytest
from sharding_cases import Case, layer
from tiers import few

from moecc.ir.structure import clone
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.trace.context import Options  # noqa: E402

from .test_exchanges import assert_near, compiled, data, expected, on_mesh  # noqa: E402

CASES = [
    Case("capacity", "data:4,model:2", "st-moe", "via=capacity slice=model"),
    Case("ragged", "data:4,expert:2", "expert-parallel", "via=ragged"),
    Case("expert-choice", "data:2,expert:4", "expert-replicated", "via=replicated"),
    Case("capacity", "far:2,near:4", "expert-hierarchical", "via=hierarchical chunks=2"),
    Case("ragged", "data:4,model:2", "st-moe", "via=ragged slice=model"),
    Case("ragged", "data:2,expert:2,model:2", "expert-parallel,tensor-parallel", "via=ring"),
]  # fmt: skip


@cache
def weighted(slots):
    """Return the layer with its rows weighted; everybody's, so clone it before you change it."""
    graph = layer(slots)
    run_pipeline(graph, Pipeline.parse("weight-rows"))
    return graph


def laid(case):
    graph = clone(weighted(case.slots))
    run_pipeline(graph, Pipeline.parse(case.pipeline))
    return graph


@pytest.mark.parametrize("case", few(CASES), ids=str)
def test_on_a_mesh_it_is_the_layer_on_one_device(case):
    outputs, slopes, _ = on_mesh(laid(case), case.slots, Options(poison=True))
    assert_near(expected(case.slots), ({"y": outputs["y"]}, slopes))


@pytest.mark.parametrize(
    ("slots", "dispatch"),
    few([("ragged", "blocks"), ("capacity", "gather")]),
)
def test_every_strategy_weights_rows(slots, dispatch):
    options = Options(dispatch=dispatch, poison=True)
    operands = data(slots)
    program = compiled(function(weighted(slots), options=options), *operands)
    (_, outputs), slopes = program(*operands)
    assert_near(expected(slots), (outputs, slopes))
