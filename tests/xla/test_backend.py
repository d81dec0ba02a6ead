"""The xla backend gives what the reference gives: random graphs, and models of every family."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from moecc_backends.xla.backend import function, jax_inputs
from moecc_backends.xla.trace.host_arrays import to_numpy
from tiers import examples, some

from moecc.errors import InputError
from moecc.ir import DTYPES, F32, F64, Builder, Graph, TensorType, parse, tensor
from moecc.testing import graphs, inputs_for, params_for, run_reference
from moecc.types import KEY

from .models import GOLDEN, assert_close, compiled, decoder, open_golden, relative, run_both

EXACT = 1e-9
"""For float64; `assert_close` allows more where a graph amplifies rounding."""


# --- random graphs


@given(graphs())
@settings(max_examples=examples(5, 12))
def test_random_graphs(graph):
    """As one function, and cut into segments."""
    assume(not any(v.type.ragged for v in graph.outputs.values()))
    params, inputs = params_for(graph), inputs_for(graph)
    assert_close(graph, params, inputs, compiled(graph, F64).run(params, inputs), EXACT)
    with jax.enable_x64(True):
        whole = jax.jit(function(graph, dtype=F64))(params, jax_inputs(graph, inputs))
        whole = {n: to_numpy(a) for n, a in whole.items()}
    assert_close(graph, params, inputs, whole, EXACT)


# --- whole models

MODELS = {
    "biases": ("llama_biases_head_dim", {}),
    "window and sparse": ("mixtral_window_tied", {}),
    "shared expert": ("qwen2_moe_plain", {}),
    "ragged, groups of slices": (
        "qwen3_head_dim_tied", {"experts": 4, "granularity": 2, "router_std": 1.0},
    ),
    "capacity": (
        "llama_gqa",
        {"experts": 4, "slots": "capacity", "capacity_factor": 1.0, "groups": 2, "shared": 0.25},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_in_float64(name):
    case, options = MODELS[name]
    found, expected = run_both(*decoder(case, **options))
    assert relative(found["logits"], expected["logits"]) <= 1e-12


FEW = ["llama_dynamic", "mistral_window", "qwen2_yarn", "mixtral_bfloat16", "qwen3_moe_norm"]
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("case", some(CASES, *FEW))
def test_golden_checkpoints(case):
    """Checkpoints as written by transformers give its outputs, in float32."""
    with open_golden(case) as model:
        (output,) = model.graph.outputs
        inputs = {n: np.load(GOLDEN / case / f"{n}.npy") for n in model.graph.inputs}
        found = compiled(model.graph, F32).run(model.params(), inputs)[output]
    assert relative(found, np.load(GOLDEN / case / f"{output}.npy")) <= 1e-5


# --- keys


def test_a_key_of_a_number_makes_the_same_draws_as_the_reference():
    """Inside ``jax.jit`` a 64-bit number would lose half of its bits, so keys are made before."""
    graph = Graph()
    b = Builder(graph)
    key = b.fold_key(graph.input("key", TensorType(KEY)), by=3)
    x = graph.input("x", tensor(F32, batch="B"))
    graph.set_output("y", b.random_normal(key, x))
    inputs = {"key": np.uint64(0xFEDCBA9876543210), "x": np.zeros(7)}
    expected = run_reference(graph, inputs=inputs)["y"]
    run = jax.jit(function(graph))
    found = run({}, jax_inputs(graph, inputs))["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    again = run({}, jax_inputs(graph, jax_inputs(graph, inputs)))["y"]
    np.testing.assert_array_equal(found, again)
    with pytest.raises(InputError, match="is no key of jax"):
        run({}, {**inputs, "x": np.zeros(7, np.float32)})


# --- what bad arrays get


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
def test_a_finite_number_is_finite_in_every_type(name):
    """−1e30 is not −∞ in float16, whose product with zero would be NaN; a true −∞ stays."""
    graph = parse(
        """
moecc 1
graph bounds {
  input %x : f32[batch=B]
  %low = constant {value=-1e+30} : f32[]
  %none = constant {value=-inf} : f32[]
  %a = maximum %x, %low : f32[batch=B]
  %b = maximum %x, %none : f32[batch=B]
  output finite = %a
  output open = %b
}
"""
    )
    inputs = {"x": np.array([-np.inf, 1.0], np.float32)}
    found = compiled(graph, DTYPES[name]).run({}, inputs)
    assert found["finite"][0] == pytest.approx(max(-1e30, DTYPES[name].limits[0]), rel=2**-8)
    assert np.isneginf(found["open"][0])
