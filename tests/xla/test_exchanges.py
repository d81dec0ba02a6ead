"""Every way to bring rows to experts, on eight devices: values, gradients, drops, collectives."""

from functools import cache

import numpy as np
import pytest
from sharding_cases import MESHES, Case, layer, legal_cases, outcome
from tiers import few

from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import run_reference

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.dispatch import choose as dispatches  # noqa: E402
from moecc_backends.xla.lower.function import (  # noqa: E402
    device_mesh,
    sharded_function,
)
from moecc_backends.xla.trace.context import DEFAULTS, Options  # noqa: E402

from .test_shard_map import census  # noqa: E402


@cache
def data(slots):
    """Parameters, experts that differ among them, and tokens."""
    rng = np.random.default_rng(0)
    drawn = {n: rng.normal(size=v.type.shape) for n, v in layer(slots).params.items()}
    params = {n: jax.numpy.asarray(a, "float32") for n, a in drawn.items()}
    return params, {"x": jax.numpy.asarray(rng.normal(size=(8, 8, 8)), "float32")}


def compiled(run, params, inputs):
    """Return the values and the gradients, by parameters and tokens, as one program."""

    def loss(params, inputs):
        outputs = run(params, inputs)
        weights = np.random.default_rng(5).normal(size=outputs["y"].shape).astype("f")
        return (outputs["y"] * weights).mean(), outputs

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return program.lower(params, inputs).compile()


@cache
def expected(slots):
    results = compiled(function(layer(slots)), *data(slots))(*data(slots))
    (_, outputs), slopes = jax.tree.map(np.asarray, results)
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(slopes)), "every gradient counts"
    return outputs, slopes


def on_mesh(graph, slots, options=DEFAULTS):
    operands = data(slots)
    program = compiled(sharded_function(graph, device_mesh(graph), options=options), *operands)
    (_, outputs), slopes = program(*operands)
    return outputs, slopes, program.as_text()


def assert_near(expected, found):
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(t)) for t in (expected, found)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def assert_is_the_layer_on_one_device(case):
    """Compare, and return the program."""
    graph, _ = outcome(case)
    assert graph is not None
    outputs, slopes, program = on_mesh(graph, case.slots)
    assert_near(expected(case.slots), (outputs, slopes))
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


def laid(slots, text):
    graph = layer(slots)
    run_pipeline(graph, Pipeline.parse(text))
    return graph


@pytest.mark.parametrize("way", few(["ragged", "ring"]))
def test_kernels_of_accelerators_may_leave_anything_in_rows_that_hold_nothing(monkeypatch, way):
    """Room for the worst case is mostly empty; with NaN there the layer is that of one device."""
    monkeypatch.setattr(dispatches, "why_no_kernel", lambda *_: None)
    graph = laid("ragged", "annotate-sharding{mesh=data:4,model:2 rules=st-moe},"
                 f"expert-parallel{{via={way}}},lower-collectives")  # fmt: skip
    outputs, slopes, _ = on_mesh(graph, "ragged", Options(poison=True))
    assert_near(expected("ragged"), (outputs, slopes))


@pytest.mark.parametrize("factor", [0.75, pytest.param(1.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("mesh", "way"),
    [
        ("mesh=data:4,model:2 rules=st-moe", "via=ragged"),
        pytest.param("mesh=data:8 rules=st-moe", "via=ring", marks=pytest.mark.slow),
    ],
)
def test_a_bounded_buffer_drops_what_the_reference_drops(mesh, way, factor):
    graph = laid("ragged", f"annotate-sharding{{{mesh}}},"
                 f"expert-parallel{{{way} buffer-factor={factor}}},lower-collectives")  # fmt: skip
    params, inputs = data("ragged")
    wide = ({n: np.asarray(a, float) for n, a in d.items()} for d in (params, inputs))
    reference = run_reference(graph, **dict(zip(("params", "inputs"), wide, strict=True)))
    outputs, slopes, _ = on_mesh(graph, "ragged")
    assert_near({n: reference[n] for n in outputs}, outputs)
    assert outputs["dropped.layers.0.ffn"] == reference["dropped.layers.0.ffn"]
    assert (factor > 1) or outputs["dropped.layers.0.ffn"] > 0
    (_, values), gradients = compiled(function(graph), params, inputs)(params, inputs)
    assert_near((values, gradients), (outputs, slopes))
