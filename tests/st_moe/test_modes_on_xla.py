"""The modes of a model mean the same to XLA as to the reference, random numbers included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moecc.ir import F64, Graph
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import params_for, run_reference

from .layers import transformer

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function, jax_inputs  # noqa: E402

MODES = {
    "token choice": (
        "upcycle{experts=4},specialize{capacity-factor=1.25 minimum=1 group-size=4 policy=random "
        "priority after-drop=rescale padding-mask=true jitter=0.2 input-dropout=0.1 "
        "router-noise=0.3 dropout=0.2 expert-dropout=0.4}"
    ),
    "hash": (
        "upcycle{experts=4 routing=hash},"
        "specialize{padding-mask=true capacity-factor=1.0 minimum=1 after-drop=rescale}"
    ),
}


def trained(text: str) -> tuple[Graph, dict[str, Any], dict[str, Any]]:
    """Return a small encoder in a mode, with weights and inputs; copies are made to differ."""
    graph = transformer(1, causal=False)
    run_pipeline(graph, Pipeline.parse(f"{text},add-losses{{metrics=false}}"))
    rng = np.random.default_rng(0)
    inputs = {
        "ids": rng.integers(0, 11, (2, 8)).astype(np.int32),
        "mask": np.arange(8) < np.array([[8], [5]]),
        "key": np.uint64(2**63 + 5),
    }
    return graph, params_for(graph, 1), {n: inputs[n] for n in graph.inputs}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_is_the_same_on_xla(name: str) -> None:
    graph, params, inputs = trained(MODES[name])
    expected = run_reference(graph, params=params, inputs=inputs)
    with jax.enable_x64(True):
        run = function(graph, dtype=F64)
        given = jax_inputs(graph, inputs)

        def loss(weights: dict[str, Any]) -> Any:
            outputs = run(weights, given)
            return (outputs["logits"] ** 2).sum(), outputs

        gradient, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    for output, value in expected.items():
        np.testing.assert_allclose(found[output], value, rtol=1e-10, atol=1e-12, err_msg=output)
    norms = {n: np.abs(g).sum() for n, g in gradient.items()}
    assert np.isfinite(list(norms.values())).all()
    assert all(norms[n] > 0 for n in norms if n.endswith(("up", "down", "gate")))
