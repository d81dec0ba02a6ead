"""Rolled layers: outputs, losses, metrics and gradients are those of the layers written out."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from moecc_backends.xla.backend import function, jax_inputs
from tiers import few

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import clone
from moecc.presets import preset_config
from moecc.support.ranges import element, lengths
from moecc.testing import inputs_for, run_reference

from .models import apply_passes, assert_near, random_params, values_and_gradients

SMALL = {
    "smollm2-135m": {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 4, "vocab_size": 32,
    },
    "st-moe-base": {
        "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 4,
        "num_decoder_layers": 4, "sparse_encoder_layers": [1, 3], "sparse_decoder_layers": [1, 3],
        "num_experts": 4, "vocab_size": 32,
    },
}  # fmt: skip

TRAIN = "specialize{mode=train capacity-factor=1.0 minimum=1 jitter=0.01},add-losses"
MODELS = {
    "decoder": ("smollm2-135m", "upcycle{experts=4 top-k=2 layers=every:2}," + TRAIN, [2]),
    "encoder-decoder": ("st-moe-base", "add-losses", [2, 2]),
}
SIZES = {"B": 2, "S": 4, "T": 3}


@cache
def written_out(model, metrics="false"):
    preset, pipeline, _ = MODELS[model]
    graph = build(parse_config({**preset_config(preset), **SMALL[preset]}))
    return apply_passes(graph, f"{pipeline}{{metrics={metrics}}}")


@cache
def rolled(model, remat="none", metrics="false"):
    graph = apply_passes(clone(written_out(model, metrics)), f"roll-layers{{remat={remat}}}")
    runs = [node.attrs["over"][0][1] for node in graph if node.body is not None]
    assert runs == MODELS[model][2]
    return graph


def data(model):
    graph = written_out(model)
    return random_params(graph), inputs_for(graph, 0, SIZES)


def stacked(graph, params):
    """Return the parameters of a rolled graph, made of those of its layers."""
    stacks = {}
    for name in graph.params:
        (count,) = lengths(name) or {0}
        parts = [params[element(name, i)] for i in range(count)]
        stacks[name] = np.stack(parts) if parts else params[name]
    return stacks


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_computes_the_same_bits(model):
    params, inputs = data(model)
    before = run_reference(written_out(model, "true"), params=params, inputs=inputs)
    graph = rolled(model, metrics="true")
    after = run_reference(graph, params=stacked(graph, params), inputs=inputs)
    names = [n for n in before if n.startswith(("loss.", "metric."))]
    assert len(names) > 8
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


def training_loss(outputs):
    return jnp.sum(jnp.square(outputs["logits"])) + outputs["loss.auxiliary"]


@pytest.mark.parametrize(
    ("model", "remat"),
    few([("decoder", "save save=router,rows,experts"), ("encoder-decoder", "block")]),
)
def test_values_and_gradients(model, remat):
    before, after = written_out(model), rolled(model, remat)
    params, inputs = data(model)
    inputs = jax_inputs(before, inputs)
    outputs, slopes, _ = values_and_gradients(function(before), params, inputs, training_loss)
    found, stacked_slopes, _ = values_and_gradients(
        function(after), stacked(after, params), inputs, training_loss
    )
    assert_near(outputs, {n: found[n] for n in outputs}, 1e-3)
    assert_near(stacked(after, slopes), stacked_slopes, 1e-3)
