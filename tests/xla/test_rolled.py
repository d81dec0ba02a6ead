"""Rolled layers: outputs, losses, metrics and gradients are those of the layers written out."""

from functools import cache

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from moecc_backends.xla.backend import function, jax_inputs  # noqa: E402

from moecc.families import build  # noqa: E402
from moecc.families.registry import parse_config  # noqa: E402
from moecc.ir import clone  # noqa: E402
from moecc.presets import preset_config  # noqa: E402
from moecc.rewrite.pipeline import Pipeline  # noqa: E402
from moecc.rewrite.runner import run_pipeline  # noqa: E402
from moecc.support.ranges import element, lengths  # noqa: E402
from moecc.testing import inputs_for, params_for, run_reference  # noqa: E402

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
    run_pipeline(graph, Pipeline.parse(f"{pipeline}{{metrics={metrics}}}"))
    return graph


@cache
def rolled(model, remat="none", metrics="false"):
    graph = clone(written_out(model, metrics))
    run_pipeline(graph, Pipeline.parse(f"roll-layers{{remat={remat}}}"))
    runs = [node.attrs["over"][0][1] for node in graph if node.body is not None]
    assert runs == MODELS[model][2]
    return graph


def data(model):
    """Return parameters, of experts that differ, and inputs."""
    graph = written_out(model)
    rng = np.random.default_rng(0)
    params = {
        n: (rng.normal(size=a.shape) * 0.3 + ("norm" in n)).astype("f4")
        for n, a in params_for(graph, 0, SIZES).items()
    }
    return params, inputs_for(graph, 0, SIZES)


def stacked(graph, params):
    """Return the parameters of a rolled graph, made of those of its layers."""
    found = {}
    for name in graph.params:
        (count,) = lengths(name) or {0}
        parts = [params[element(name, i)] for i in range(count)]
        found[name] = np.stack(parts) if parts else params[name]
    return found


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


def outcome(graph, params, inputs):
    """Return the outputs and the gradients of a training loss."""
    run = function(graph)
    given = jax_inputs(graph, inputs)

    def loss(params):
        outputs = run(params, given)
        logits = jnp.sum(jnp.square(outputs["logits"]))
        return logits + outputs["loss.auxiliary"], outputs

    results = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (_, outputs), gradients = jax.tree.map(np.asarray, results)
    return outputs, gradients


@cache
def expected(model):
    return outcome(written_out(model), *data(model))


@pytest.mark.parametrize(
    ("model", "remat"),
    [
        ("decoder", "save save=router,rows,experts"),
        pytest.param("encoder-decoder", "block", marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients(model, remat):
    params, inputs = data(model)
    graph = rolled(model, remat)
    outputs, gradients = expected(model)
    found, slopes = outcome(graph, stacked(graph, params), inputs)
    for name, array in outputs.items():
        check_close(found[name], array, name)
    for name, array in stacked(graph, gradients).items():
        check_close(slopes[name], array, name)


def check_close(found, array, name):
    scale = max(float(np.abs(array).max()), 1e-3)
    np.testing.assert_allclose(found, array, rtol=0, atol=1e-5 * scale, err_msg=name)
