"""Every legal way to bring rows to their experts computes what one device does."""

import numpy as np
import pytest
from sharding_cases import SPREAD, Case, layer, legal_cases
from tiers import few

from moecc.errors import InputError, UsageError
from moecc.ir import clone, equal
from moecc.ir.devices import simulate
from moecc.rewrite.pipeline import Pipeline
from moecc.testing import laws, run_reference

from .meshes import census, model, run
from .test_devices import check_every_value, data_for, largest_difference


@pytest.mark.parametrize(("mesh", "rules"), few(SPREAD, 6))
def test_devices_compute_what_one_does(mesh, rules):
    legal = legal_cases(mesh, rules)
    assert len(legal) >= 3
    for case, shared in legal:
        graph, whole = clone(shared), layer(case.slots)
        params, inputs = data_for(whole, batch=8)
        found = simulate(graph, params, inputs)
        expected = run_reference(whole, params=params, inputs=inputs)
        assert largest_difference(expected, found.outputs) <= 1e-12, case
        check_every_value(graph, params, inputs, found)
        laws.check_round_trip(graph)
        run(graph, "strip-sharding")
        assert equal(graph, whole), case


def test_drops_are_those_of_one_device():
    """Capacities are those of local groups, so what finds no slot is the same, exactly."""
    whole = layer("capacity")
    run(whole, "trace-routing")
    graph = clone(whole)
    case = Case("capacity", "data:4,model:2", "st-moe", "via=capacity")
    run(graph, case.pipeline)
    params, inputs = data_for(whole, batch=8)
    expected = run_reference(whole, params=params, inputs=inputs)["trace.layers.0.ffn.slots"]
    found = simulate(graph, params, inputs).outputs["trace.layers.0.ffn.slots"]
    assert np.array_equal(found, expected)
    assert (expected < 0).sum() > 0


CENSUS = {
    # two layers each
    ("via=capacity", "data:4"): {"all_to_all": 4},
    ("via=ring", "data:4"): {"all_gather": 2, "reduce_scatter": 2, "shard": 2},
    ("via=replicated", "data:4"): {"all_gather": 2, "all_reduce": 2, "shard": 4},
}


@pytest.mark.parametrize(("way", "mesh"), CENSUS)
def test_the_collectives_of_a_model(way, mesh):
    """Two all-to-alls a layer; one gather and one scattered sum in a ring; losses add no more."""
    graph = model("mixtral_gqa")
    run(graph, "specialize{mode=train capacity-factor=1.25 groups=4}")
    plain = clone(graph)
    run(graph, f"annotate-sharding{{mesh={mesh} rules=st-moe}},expert-parallel{{{way}}},"
        "lower-collectives")  # fmt: skip
    assert census(graph) == CENSUS[way, mesh]
    run(plain, "add-losses{metrics=true}")
    whole = clone(plain)
    run(plain, f"annotate-sharding{{mesh={mesh} rules=st-moe}},expert-parallel{{{way}}},"
        "lower-collectives")  # fmt: skip
    more = census(plain)
    for op in ("all_to_all", "all_gather", "reduce_scatter"):
        assert more.get(op, 0) == CENSUS[way, mesh].get(op, 0)
    run(plain, "strip-sharding")
    assert equal(plain, whole)


REFUSED = {
    ("ragged", "data:8", "st-moe", "via=capacity"): "have no fixed room",
    ("capacity", "data:8", "st-moe", "via=ragged"): "are not ragged",
    ("capacity", "data:8", "st-moe", "via=hierarchical"): "crosses mesh axes one by one",
    ("capacity", "data:2,expert:4", "expert-replicated", "via=ring"): "there is no ring",
    ("capacity", "data:2,expert:4", "expert-replicated", "via=capacity"): "both tokens and experts",
    ("capacity", "data:8", "st-moe", "via=capacity slice=model"): "the mesh has no axis 'model'",
    ("capacity", "data:8", "st-moe", "via=capacity slice=data"): "sharded over 'data' already",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_is_refused(options):
    graph = layer(options[0])
    with pytest.raises(InputError, match=REFUSED[options]):
        run(graph, Case(*options).pipeline)


def test_options_and_graphs_that_do_not_suit():
    with pytest.raises(UsageError, match="sliced where they are exchanged"):
        Pipeline.parse("expert-parallel{via=ring slice=model}")
    graph = layer("capacity")
    with pytest.raises(InputError, match="has no mesh"):
        run(graph, "expert-parallel{via=ring}")
    dense = model("llama_gqa")
    run(dense, "annotate-sharding{mesh=data:2 rules=data-parallel}")
    with pytest.raises(InputError, match="matched nothing"):
        run(dense, "expert-parallel{via=ring}")
