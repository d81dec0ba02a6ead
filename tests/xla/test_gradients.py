"""Gradients through whole models, against central differences of the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tiers import some

from moecc.ir import Graph
from moecc.testing import run_reference
from moecc.types import F64

from .models import Array, Arrays, decoder

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402


def loss_weights(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(5).normal(size=shape)


def reference_loss(graph: Graph, params: Arrays, inputs: Arrays) -> float:
    logits = run_reference(graph, params=params, inputs=inputs)["logits"]
    return float(np.mean(logits * loss_weights(logits.shape)))


GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ragged": ("llama_biases_head_dim", {"experts": 4, "layers": "0", "router_std": 0.5}),
    "capacity, tokens in order": (
        "qwen2_gqa_tied", {"experts": 4, "slots": "capacity", "capacity_factor": 0.75},
    ),
    "shared expert": ("qwen2_moe_plain", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", some(GRADIENTS, "ragged"))
def test_gradients_of_whole_models_are_central_differences_of_the_reference(name: str) -> None:
    case, options = GRADIENTS[name]
    graph, params, inputs = decoder(case, seq=5, **options)
    run = function(graph, dtype=F64)

    def loss(params: Mapping[str, Any]) -> Any:
        logits = run(params, inputs)["logits"]
        return jax.numpy.mean(logits * loss_weights(logits.shape))

    with jax.enable_x64(True):
        gradients = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))
    assert gradients.keys() == params.keys()
    rng = np.random.default_rng(3)
    h = 1e-5
    for param in params:
        direction = rng.normal(size=params[param].shape)
        ahead, behind = (
            reference_loss(graph, {**params, param: params[param] + s * direction}, inputs)
            for s in (h, -h)
        )
        expected = (ahead - behind) / (2 * h)
        found = float(np.sum(gradients[param] * direction))
        scale = float(np.linalg.norm(gradients[param]))
        assert scale > 0, f"the gradient of {param} is zero"
        assert abs(found - expected) <= 1e-6 * max(scale, abs(expected)), param
