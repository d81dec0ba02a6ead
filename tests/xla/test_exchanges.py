"""Every way to bring rows to experts, on eight devices: values, gradients, drops, collectives."""

from functools import cache

import numpy as np
import pytest
from moecc_backends.xla.backend import function
from moecc_backends.xla.dispatch import choose as dispatches
from moecc_backends.xla.lower.function import device_mesh, sharded_function
from moecc_backends.xla.trace.context import DEFAULTS, Options
from sharding_cases import MESHES, Case, layer, legal_cases, outcome
from tiers import few, some

from moecc.ir import clone
from moecc.testing import run_reference

from .models import apply_passes, assert_near, census, normal, values_and_gradients


@cache
def data(slots):
    """Parameters, experts that differ among them, and tokens."""
    rng = np.random.default_rng(0)
    params = normal(rng, layer(slots).params, "f4")
    return params, {"x": rng.normal(size=(8, 8, 8)).astype("f4")}


@cache
def expected(slots):
    outputs, slopes, _ = values_and_gradients(function(layer(slots)), *data(slots))
    assert all(np.abs(a).max() > 0 for a in slopes.values()), "every gradient counts"
    return outputs, slopes


def on_mesh(graph, operands, options=DEFAULTS):
    run = sharded_function(graph, device_mesh(graph), options=options)
    return values_and_gradients(run, *operands)


def assert_is_the_layer_on_one_device(case):
    """Compare, and return the program."""
    graph, _ = outcome(case)
    assert graph is not None
    *results, program = on_mesh(graph, data(case.slots))
    assert_near(expected(case.slots), tuple(results))
    return program


EXCHANGES = {
    Case("capacity", "data:8", "st-moe", "via=capacity"): {"all-to-all": 4},
    Case("ragged", "data:4,model:2", "st-moe", "via=ring"): {
        "all-gather": 2,
        "reduce-scatter": 2,
    },
}
"""The collectives of a way there and one back, and the same for gradients."""


@pytest.mark.parametrize("case", EXCHANGES, ids=str)
def test_a_way_is_the_layer_on_one_device_with_the_collectives_of_the_graph(case):
    collectives = census(assert_is_the_layer_on_one_device(case))
    del collectives["all-reduce"]  # gradients of the router are summed
    assert collectives == EXCHANGES[case]


def test_experts_that_choose_are_the_layer_on_one_device():
    replicated = ("data:2,expert:4", "expert-replicated", "via=replicated")
    assert_is_the_layer_on_one_device(Case("expert-choice", *replicated))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "rules"), MESHES)
def test_every_legal_way_is_the_layer_on_one_device(mesh, rules):
    for case, _ in legal_cases(mesh, rules):
        assert_is_the_layer_on_one_device(case)


def ragged_layer(mesh, way):
    sharding = f"annotate-sharding{{{mesh} rules=st-moe}},expert-parallel{{{way}}}"
    return apply_passes(layer("ragged"), f"{sharding},lower-collectives")


@pytest.mark.parametrize("way", few(["ragged", "ring"]))
def test_kernels_of_accelerators_may_leave_anything_in_rows_that_hold_nothing(monkeypatch, way):
    """Room for the worst case is mostly empty; with NaN there the layer is that of one device."""
    monkeypatch.setattr(dispatches, "why_no_kernel", lambda *_: None)
    graph = ragged_layer("mesh=data:4,model:2", f"via={way}")
    *results, _ = on_mesh(graph, data("ragged"), Options(poison=True))
    assert_near(expected("ragged"), tuple(results))


@pytest.mark.parametrize("factor", few([0.75, 1.5]))
@pytest.mark.parametrize(
    ("mesh", "way"), few([("mesh=data:4,model:2", "via=ragged"), ("mesh=data:8", "via=ring")])
)
def test_a_bounded_buffer_drops_what_the_reference_drops(mesh, way, factor):
    graph = ragged_layer(mesh, f"{way} buffer-factor={factor}")
    params, inputs = data("ragged")
    reference = run_reference(graph, params=params, inputs=inputs)
    outputs, slopes, _ = on_mesh(graph, (params, inputs))
    assert_near({n: reference[n] for n in outputs}, outputs)
    assert outputs["dropped.layers.0.ffn"] == reference["dropped.layers.0.ffn"]
    assert (factor > 1) or outputs["dropped.layers.0.ffn"] > 0
    *whole, _ = values_and_gradients(function(graph), params, inputs)
    assert_near(tuple(whole), (outputs, slopes))


# --- rows weighted at their experts

WEIGHTED = [
    Case("capacity", "data:4,model:2", "st-moe", "via=capacity slice=model"),
    Case("ragged", "data:4,expert:2", "expert-parallel", "via=ragged"),
    Case("expert-choice", "data:2,expert:4", "expert-replicated", "via=replicated"),
    Case("capacity", "far:2,near:4", "expert-hierarchical", "via=hierarchical chunks=2"),
    Case("ragged", "data:4,model:2", "st-moe", "via=ragged slice=model"),
    Case("ragged", "data:2,expert:2,model:2", "expert-parallel,tensor-parallel", "via=ring"),
]


@cache
def weighted(slots):
    """Return the layer with its rows weighted; everybody's, so clone it before you change it."""
    return apply_passes(layer(slots), "weight-rows")


@pytest.mark.parametrize("case", few(WEIGHTED), ids=str)
def test_weighted_rows_on_a_mesh_are_the_layer_on_one_device(case):
    graph = apply_passes(clone(weighted(case.slots)), case.pipeline)
    outputs, slopes, _ = on_mesh(graph, data(case.slots), Options(poison=True))
    assert_near(expected(case.slots), ({"y": outputs["y"]}, slopes))


@pytest.mark.parametrize(("slots", "dispatch"), few([("ragged", "blocks"), ("capacity", "gather")]))
def test_every_strategy_weights_rows(slots, dispatch):
    run = function(weighted(slots), options=Options(dispatch, poison=True))
    *results, _ = values_and_gradients(run, *data(slots))
    assert_near(expected(slots), tuple(results))


# --- dropless rows in rounds: as many as rows need

TOKENS = 128
LAID = "annotate-sharding{mesh=data:8 rules=st-moe},expert-parallel{via=ragged},lower-collectives"
ROUTINGS = ("balanced", "half to three", "all to two")


def tokens(routing, experts):
    """Parameters and tokens: the elements of ``x`` choose the experts of each token."""
    rng = np.random.default_rng(1)
    params = normal(rng, layer("ragged", embed=experts, experts=experts).params, "f4")
    params["router"] = np.eye(experts, dtype="f")
    x = rng.normal(size=(8, TOKENS // 8, experts)).astype("f") * 0.1
    each = np.arange(TOKENS).reshape(8, TOKENS // 8)
    if routing == "balanced":
        for step, logit in ((0, 3.0), (1, 2.0)):
            np.put_along_axis(x, ((2 * each + step) % experts)[..., None], logit, axis=2)
    elif routing == "half to three":
        x[::2, :, :3] += np.array([3.0, 2.0, 1.0])
    else:
        x[..., :2] += np.array([3.0, 2.0])
    return params, {"x": x}


def check_rounds(routing, pipeline, experts=8):
    """Compare with one device and with the reference: no row is lost."""
    graph = layer("ragged", embed=experts, experts=experts)
    operands = params, inputs = tokens(routing, experts)
    *whole, _ = values_and_gradients(function(graph), *operands)
    reference = run_reference(graph, params=params, inputs=inputs)
    outputs, slopes, _ = on_mesh(apply_passes(graph, pipeline), operands, Options(poison=True))
    assert_near(tuple(whole), (outputs, slopes))
    assert_near(reference, outputs)


@pytest.mark.parametrize("pipeline", few([f"weight-rows,{LAID}", LAID]))
@pytest.mark.parametrize("routing", some(ROUTINGS, "all to two"))
def test_no_row_is_lost_whatever_the_routing(routing, pipeline):
    check_rounds(routing, pipeline)


@pytest.mark.slow
def test_a_device_has_the_rows_of_all_its_experts():
    """With 16 experts on 8 devices an expert's number is not its device's."""
    check_rounds("half to three", f"weight-rows,{LAID}", experts=16)
