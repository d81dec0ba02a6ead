"""Every legal way to bring rows to their experts computes what one device does."""

import numpy as np
import pytest
from sharding_cases import SPREAD, Case, layer, legal_cases
from tiers import few

from moecc.errors import InputError, UsageError
from moecc.ir import clone, equal
from moecc.rewrite.pipeline import Pipeline
from moecc.testing import laws

from .meshes import census, check_on_devices, data_for, model, run


@pytest.mark.parametrize(("mesh", "rules"), few(SPREAD, 6))
def test_devices_compute_what_one_does(mesh, rules):
    legal = legal_cases(mesh, rules)
    assert len(legal) >= 3
    for case, shared in legal:
        graph, whole = clone(shared), layer(case.slots)
        check_on_devices(graph, whole, *data_for(whole, batch=8), case)
        laws.check_round_trip(graph)
        run(graph, "strip-sharding")
        assert equal(graph, whole), case


def test_drops_are_those_of_one_device():
    """Capacities are those of local groups, so what finds no slot is the same, exactly."""
    whole = layer("capacity")
    run(whole, "trace-routing")
    graph = clone(whole)
    run(graph, Case("capacity", "data:4,model:2", "st-moe", "via=capacity").pipeline)
    results = check_on_devices(graph, whole, *data_for(whole, batch=8))
    slots, expected = (outputs["trace.layers.0.ffn.slots"] for outputs in results)
    assert np.array_equal(slots, expected)
    assert (expected < 0).any()


CENSUS = {
    # of two layers on data:4
    "via=capacity": {"all_to_all": 4},
    "via=ring": {"all_gather": 2, "reduce_scatter": 2, "shard": 2},
    "via=replicated": {"all_gather": 2, "all_reduce": 2, "shard": 4},
}


@pytest.mark.parametrize("way", CENSUS)
def test_the_collectives_of_a_model(way):
    """Two all-to-alls a layer; one gather and one scattered sum in a ring; losses add no more."""
    graph, pipeline = model("mixtral_gqa"), Case("capacity", "data:4", "st-moe", way).pipeline
    run(graph, "specialize{mode=train capacity-factor=1.25 groups=4}")
    with_losses = clone(graph)
    run(graph, pipeline)
    assert census(graph) == CENSUS[way]
    run(with_losses, "add-losses{metrics=true}")
    whole = clone(with_losses)
    run(with_losses, pipeline)
    more = census(with_losses)
    for op in ("all_to_all", "all_gather", "reduce_scatter"):
        assert more[op] == CENSUS[way].get(op, 0)
    run(with_losses, "strip-sharding")
    assert equal(with_losses, whole)


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


@pytest.mark.parametrize(
    ("slots", "way", "first"),
    [("ragged", "capacity", "{capacity-factor=1.25}"), ("capacity", "ragged", "{dropless}")],
)
def test_the_hint_of_a_refusal_helps(slots, way, first):
    case = Case(slots, "data:8", "st-moe", f"via={way}")
    with pytest.raises(InputError) as refusal:
        run(layer(slots), case.pipeline)
    hint = refusal.value.problems[0].hint
    assert hint == f"specialize{first} before it, or via={slots}"
    run(layer(slots), f"specialize{first[:-1]} groups=8}},{case.pipeline}")


def test_options_and_graphs_that_do_not_suit():
    with pytest.raises(UsageError, match="sliced where they are exchanged"):
        Pipeline.parse("expert-parallel{via=ring slice=model}")
    graph = layer("capacity")
    with pytest.raises(InputError, match="has no mesh"):
        run(graph, "expert-parallel{via=ring}")
    dense = model("llama_gqa")
    run(dense, "annotate-sharding{mesh=data:2 rules=data-parallel}")
    with pytest.raises(InputError, match="no layer has experts that are chosen"):
        run(dense, "expert-parallel{via=ring}")
    run(graph, "annotate-sharding{mesh=data:2 rules=data-parallel}")
    with pytest.raises(InputError, match="every device has all experts"):
        run(graph, "expert-parallel{via=ring}")
