"""Random architectures: equal when dense, equal to mixtures by hand when drawn at random.

Drawn parts of fused leaves are held against the reference in `test_options`.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from moecc import jax as mx  # noqa: E402

from .architectures import Architecture, architectures  # noqa: E402
from .mixtures import apart, drawn  # noqa: E402


def check(one: Architecture) -> None:
    """Compare values and gradients of a converted model, copies and drawn."""
    dense = one.init()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, one.embed)), jnp.float32)
    moe = mx.convert(one.model, dense, x, one.pipeline)
    assert len(moe.report.blocks) == one.depth, str(moe.report)

    def loss(function: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.square(function(p, x)))))

    converted = loss(moe(one.model, dispatch="gathered"))
    assert apart(converted(moe.params, x)[0], jnp.sum(jnp.square(one.model(dense, x)))) < 1e-5
    if one.gating != "fused":
        some = drawn(moe.params)
        assert apart(converted(some, x), loss(one.by_hand)(some, x)) < 1e-5


def test_a_scan_of_vectors_with_equal_widths() -> None:
    check(Architecture(2, 4, 4, "mish", True, "two", "vector", "scan", False, 3, 2))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(architectures())
def test_random_architectures(one: Architecture) -> None:
    check(one)
