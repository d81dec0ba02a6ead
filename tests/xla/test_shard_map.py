"""A graph on a mesh of eight devices computes what the graph on one does, gradients included."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moecc_backends.xla.backend import function, jax_inputs
from moecc_backends.xla.lower.function import device_mesh, sharded_function
from moecc_backends.xla.trace.context import DeviceView
from tiers import some

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import DTYPES, F32, I32, Axis, Builder, Graph, TensorType, clone, tensor
from moecc.ir.mesh import parse_mesh
from moecc.presets import preset_config

from .models import (
    apply_passes,
    assert_near,
    census,
    decoder,
    random_params,
    values_and_gradients,
    weighed,
)

DENSE, VOCABULARY = "llama_biases_head_dim", 37
SPARSE = {
    "experts": 8, "top_k": 2, "layers": "0", "router_std": 0.5,
    "slots": "capacity", "capacity_factor": 0.75, "groups": 8,
}  # fmt: skip
"""Experts that differ, a router that prefers some, and too few slots: choices are dropped."""

LAYOUTS = {
    "data": "data-parallel mesh=data:8",
    "tensor": "tensor-parallel mesh=data:4,model:2",
    "sequence": "tensor-parallel,sequence-parallel mesh=data:4,model:2",
    "zero": "tensor-parallel,zero mesh=data:4,model:2",
    "fsdp": "fsdp mesh=fsdp:8",
    "fsdp, tensor": "fsdp,tensor-parallel mesh=fsdp:4,model:2",
    "fsdp within data": "data-parallel,fsdp mesh=data:2,fsdp:4",
    "fsdp over two axes": "fsdp,expert-parallel,zero-expert mesh=fsdp:2,expert:4",
}
EXPERTS = {
    "rows": "st-moe mesh=data:8",
    "rows, columns": "st-moe mesh=data:4,model:2",
    "rows, many columns": "st-moe mesh=data:2,model:4",
    "outer rows": "st-moe-outer mesh=outer:2,inner:2,model:2",
    "an axis of their own": "expert-parallel mesh=data:4,expert:2",
    "two axes": "expert-hierarchical mesh=far:2,near:4",
    "replicated tokens": "expert-replicated mesh=data:4,expert:2",
    "nowhere": "data-parallel mesh=data:8",
}


def laid(graph, layout):
    sharding = f"annotate-sharding{{rules={layout}}},lower-collectives"
    return apply_passes(clone(graph), sharding)


def tokens_for(graph, vocabulary):
    tokens = np.random.default_rng(1).integers(0, vocabulary, (8, 8)).astype(np.int32)
    return jax_inputs(graph, {n: tokens if n == "tokens" else 3 for n in graph.inputs})


def results(run, params, inputs):
    """Return the outputs, the gradients of a loss of all of them, and the program."""

    def total(outputs):
        floats = (a for _, a in sorted(outputs.items()) if jnp.issubdtype(a.dtype, jnp.floating))
        return sum(map(weighed, floats))

    return values_and_gradients(run, params, inputs, total)


def assert_same(expected, on_mesh, params, inputs):
    """Compare values and gradients within 1e-5, and return the program on the mesh."""
    run = sharded_function(on_mesh, device_mesh(on_mesh))
    outputs, slopes, program = results(run, params, inputs)
    assert_near(expected[0], {n: outputs[n] for n in expected[0]}, 1e-3)
    assert_near(expected[1], slopes, 1e-3)
    return program


@cache
def model(is_sparse=False, losses=False):
    """Return a graph, its data, and what one device makes of them."""
    graph, params, _ = decoder(DENSE, seq=8, **(SPARSE if is_sparse else {}))
    if losses:
        apply_passes(graph, "add-losses{metrics=true}")
    params = {n: np.asarray(a, np.float32) for n, a in params.items()}
    inputs = tokens_for(graph, VOCABULARY)
    expected = results(function(graph), params, inputs)
    assert [n for n, slope in expected[1].items() if not slope.any()] == []
    return graph, params, inputs, expected


def check(layout, **options):
    graph, params, inputs, expected = model(**options)
    return assert_same(expected, laid(graph, layout), params, inputs)


@pytest.mark.parametrize("name", some(LAYOUTS, "fsdp"))
def test_a_dense_model_is_the_same_on_a_mesh(name):
    check(LAYOUTS[name])


@pytest.mark.parametrize("name", some(EXPERTS, "rows, columns"))
def test_experts_are_the_same_on_a_mesh_with_what_they_drop(name):
    check(EXPERTS[name], is_sparse=True, losses=True)


@pytest.mark.slow
def test_experts_on_rows_take_two_exchanges_each_way_and_gather_no_weights():
    collectives = census(check(EXPERTS["rows"], is_sparse=True))
    assert collectives["all-to-all"] == 4
    assert not collectives["all-gather"] + collectives["reduce-scatter"]


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_a_row_that_many_tokens_look_up_has_all_of_their_gradients(kind):
    """Numbers of eight bits stay where they are beyond 256 when one is added."""
    graph = Graph("table")
    tokens = graph.input("tokens", tensor(I32, batch=8, seq=64))
    table = graph.param("table", tensor(F32, vocab=16, embed=8))
    graph.set_output("rows", Builder(graph).embedding(table, tokens, axis="vocab"))
    on_mesh = laid(graph, LAYOUTS["fsdp"])
    run = sharded_function(on_mesh, device_mesh(on_mesh), dtype=DTYPES[kind])
    inputs = {"tokens": np.full((8, 64), 3, np.int32)}
    weights = {"table": jnp.ones((16, 8), DTYPES[kind].numpy)}
    slopes = jax.jit(jax.grad(lambda w: run(w, inputs)["rows"].astype("f").sum()))(weights)
    expected = np.zeros((16, 8))
    expected[3] = 8 * 64
    assert (np.asarray(slopes["table"], float) == expected).all()


def test_what_is_not_ready_for_a_mesh_is_refused():
    graph, _, _ = decoder(DENSE, seq=8)
    with pytest.raises(InputError, match="the graph has no mesh"):
        device_mesh(graph)
    sharding = "annotate-sharding{mesh=data:4,model:2 rules=tensor-parallel}"
    annotated = apply_passes(clone(graph), sharding)
    with pytest.raises(InputError, match="the collectives are not lowered"):
        sharded_function(annotated, device_mesh(annotated))
    on_mesh = laid(graph, LAYOUTS["tensor"])
    with pytest.raises(InputError, match="another mesh"):
        sharded_function(on_mesh, device_mesh(laid(graph, LAYOUTS["data"])))
    with pytest.raises(InputError, match="not enough devices"):
        device_mesh(on_mesh, jax.devices()[:4])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "full split=model", "save"])
def test_blocks_of_layers_are_the_same_on_a_mesh_when_computed_again(remat):
    small = {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 32,
    }  # fmt: skip
    graph = build(parse_config({**preset_config("smollm2-135m"), **small}))
    text = "upcycle{experts=8 top-k=2 layers=every:2 slots=capacity capacity-factor=0.75 groups=8}"
    apply_passes(graph, f"{text},add-losses")
    on_mesh = apply_passes(laid(graph, EXPERTS["rows, columns"]), f"roll-layers{{remat={remat}}}")
    apply_passes(graph, "roll-layers")
    params, inputs = random_params(graph), tokens_for(graph, small["vocab_size"])
    assert_same(results(function(graph), params, inputs), on_mesh, params, inputs)


def test_elements_that_32_bits_do_not_count_are_rejected():
    """Else two elements would draw the same number."""
    view = DeviceView(parse_mesh("data:8"))
    large = TensorType(F32, (Axis("batch", 2**23, ("data",)), Axis("mlp", 2**10)))
    with pytest.raises(InputError, match="32 bits"):
        view.element_numbers(large, (2**20, 2**10))
