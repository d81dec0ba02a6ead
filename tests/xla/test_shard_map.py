"""A graph on a mesh of eight devices computes what the graph on one does, gradients included."""

import re
from collections import Counter

import numpy as np
import pytest
from tiers import some

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import Graph
from moecc.ir.structure import clone
from moecc.ir.text import print_graph
from moecc.presets import preset_config
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline

from .models import decoder

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function, jax_inputs  # noqa: E402
from moecc_backends.xla.lower.function import (  # noqa: E402
    device_mesh,
    sharded_function,
)

DENSE = "llama_biases_head_dim"
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
    copy = clone(graph)
    text = f"annotate-sharding{{rules={layout}}},lower-collectives"
    run_pipeline(copy, Pipeline.parse(text, installed()))
    return copy


def data_for(graph, inputs, batch=8, seq=8):
    vocabulary = next(
        a.size for v in graph.params.values() for a in v.type.axes if a.name == "vocab"
    )
    tokens = np.random.default_rng(1).integers(0, vocabulary, (batch, seq)).astype(np.int32)
    return jax_inputs(graph, {n: tokens if n == "tokens" else 3 for n in graph.inputs})


def of(run, params, inputs):
    """Return the outputs, the gradients of a loss of all of them, and the program."""

    def loss(params):
        outputs = run(params, inputs)
        parts = [
            (out * np.random.default_rng(5).normal(size=out.shape).astype("f")).mean()
            for _, out in sorted(outputs.items())
            if np.issubdtype(out.dtype, np.floating)
        ]
        return sum(parts), outputs

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
    (_, outputs), gradients = jax.tree.map(np.asarray, compiled(params))
    return outputs, gradients, compiled.as_text()


def assert_same(graph, params, inputs, layout):
    """Compare values and gradients within 1e-5, and return the program on the mesh."""
    weights = {n: jax.numpy.asarray(a, "float32") for n, a in params.items()}
    given = data_for(graph, inputs)
    on_mesh = laid(graph, layout)
    expected, slopes = _on_one_device(print_graph(graph), graph, weights, given)
    run = sharded_function(on_mesh, device_mesh(on_mesh))
    found, found_slopes, program = of(run, weights, given)
    for name, value in expected.items():
        assert_near(value, found[name], name)
    for name, value in slopes.items():
        assert np.abs(value).max() > 0, f"the gradient of {name} is zero"
        assert_near(value, found_slopes[name], name)
    return program


_KNOWN = {}


def _on_one_device(text, graph, weights, given):
    # Several layouts ask for the same graph with the same data.
    if text not in _KNOWN:
        _KNOWN[text] = of(function(graph), weights, given)[:2]
    return _KNOWN[text]


def assert_near(expected, found, name):
    a, b = np.asarray(expected, float), np.asarray(found, float)
    assert np.abs(a - b).max(initial=0) <= 1e-5 * max(np.abs(a).max(initial=0), 1e-3), name


def census(program):
    kinds = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\("
    return Counter(re.findall(kinds, program))


@pytest.mark.parametrize("name", some(LAYOUTS, "fsdp"))
def test_a_dense_model_is_the_same_on_a_mesh(name):
    assert_same(*decoder(DENSE, seq=8), LAYOUTS[name])


@pytest.mark.parametrize("name", some(EXPERTS, "rows, columns"))
def test_experts_are_the_same_on_a_mesh_with_what_they_drop(name):
    graph, params, inputs = decoder(DENSE, seq=8, **SPARSE)
    losses = Pipeline.parse("add-losses{metrics=true}", installed())
    run_pipeline(graph, losses)
    assert_same(graph, params, inputs, EXPERTS[name])


@pytest.mark.slow
def test_experts_on_rows_take_two_exchanges_each_way_and_gather_no_weights():
    program = assert_same(*decoder(DENSE, seq=8, **SPARSE), EXPERTS["rows"])
    found = census(program)
    assert found["all-to-all"] == 4
    assert not found["all-gather"] + found["reduce-scatter"]


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_a_row_that_many_tokens_look_up_has_all_of_their_gradients(kind):
    """Numbers of eight bits stay where they are beyond 256 when one is added."""
    from moecc.ir.builder import Builder
    from moecc.types import DTYPES, F32, I32, tensor

    graph = Graph("table")
    tokens = graph.input("tokens", tensor(I32, batch=8, seq=64))
    table = graph.param("table", tensor(F32, vocab=16, embed=8))
    graph.set_output("rows", Builder(graph).embedding(table, tokens, axis="vocab"))
    on_mesh = laid(graph, LAYOUTS["fsdp"])
    run = sharded_function(on_mesh, device_mesh(on_mesh), dtype=DTYPES[kind])
    given = {"tokens": np.full((8, 64), 3, np.int32)}
    weights = {"table": jax.numpy.ones((16, 8), DTYPES[kind].numpy)}
    slopes = jax.jit(jax.grad(lambda w: run(w, given)["rows"].astype("f").sum()))(weights)
    expected = np.zeros((16, 8))
    expected[3] = 8 * 64
    assert (np.asarray(slopes["table"], float) == expected).all()


def test_what_is_not_ready_for_a_mesh_is_refused():
    graph, _, _ = decoder(DENSE, seq=8)
    with pytest.raises(InputError, match="the graph has no mesh"):
        device_mesh(graph)
    annotated = clone(graph)
    text = "annotate-sharding{mesh=data:4,model:2 rules=tensor-parallel}"
    run_pipeline(annotated, Pipeline.parse(text, installed()))
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
    run_pipeline(graph, Pipeline.parse(f"{text},add-losses", installed()))
    on_mesh = laid(graph, EXPERTS["rows, columns"])
    run_pipeline(graph, Pipeline.parse("roll-layers", installed()))
    run_pipeline(on_mesh, Pipeline.parse(f"roll-layers{{remat={remat}}}", installed()))
    rng = np.random.default_rng(0)
    params = {
        n: (rng.normal(size=v.type.shape) * 0.3 + ("norm" in n)).astype("f")
        for n, v in graph.params.items()
    }
    given = data_for(graph, {})
    expected, slopes = of(function(graph), params, given)[:2]
    found, found_slopes, _ = of(sharded_function(on_mesh, device_mesh(on_mesh)), params, given)
    for name, value in (*expected.items(), *slopes.items()):
        assert_near(value, {**found, **found_slopes}[name], name)


def test_elements_that_32_bits_do_not_count_are_rejected():
    """Else two elements would draw the same number."""
    from moecc_backends.xla.trace.context import DeviceView

    from moecc.ir.mesh import parse_mesh
    from moecc.types import F32, Axis, TensorType

    view = DeviceView(parse_mesh("data:8"))
    large = TensorType(F32, (Axis("batch", 2**23, ("data",)), Axis("mlp", 2**10)))
    with pytest.raises(InputError, match="32 bits"):
        view.element_numbers(large, (2**20, 2**10))
