"""Dropless rows exchanged in rounds: no row is lost, and as many rounds are done as rows need."""

from functools import cache

import numpy as np
import pytest
from sharding_cases import layer
from tiers import some

from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import run_reference

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.lower.function import (  # noqa: E402
    device_mesh,
    sharded_function,
)
from moecc_backends.xla.trace.context import Options  # noqa: E402

from .test_exchanges import assert_near, compiled  # noqa: E402

TOKENS, EXPERTS = 128, 8
LAID = "annotate-sharding{mesh=data:8 rules=st-moe},expert-parallel{via=ragged},lower-collectives"
WEIGHTED = f"weight-rows,{LAID}"
FAVOURED = {"balanced": 0, "half to three": 3, "all to two": 2}
"""How many experts the routers of a case favour; 0: tokens take experts in turn."""


def mixture(experts):
    return layer("ragged", embed=experts, experts=experts)


def tokens(case, experts=EXPERTS):
    """Parameters and tokens: the elements of ``x`` choose the experts of each token."""
    rng = np.random.default_rng(1)
    graph = mixture(experts)
    params = {n: rng.normal(size=v.type.shape).astype("f") for n, v in graph.params.items()}
    params["router"] = np.eye(experts, dtype="f")
    x = rng.normal(size=(8, TOKENS // 8, experts)).astype("f") * 0.1
    each = np.arange(TOKENS).reshape(8, TOKENS // 8)
    if case == "balanced":
        for step, logit in ((0, 3.0), (1, 2.0)):
            np.put_along_axis(x, ((2 * each + step) % experts)[..., None], logit, axis=2)
    elif case == "half to three":
        x[::2, :, :3] += np.array([3.0, 2.0, 1.0])
    else:
        x[..., :2] += np.array([3.0, 2.0])
    return params, {"x": x}


@cache
def expected(case, experts=EXPERTS):
    operands = tokens(case, experts)
    (_, outputs), slopes = compiled(function(mixture(experts)), *operands)(*operands)
    return outputs, slopes


def on_mesh(pipeline, case, poison=True, experts=EXPERTS):
    graph, operands = mixture(experts), tokens(case, experts)
    run_pipeline(graph, Pipeline.parse(pipeline))
    run = sharded_function(graph, device_mesh(graph), options=Options(poison=poison))
    (_, outputs), slopes = compiled(run, *operands)(*operands)
    return outputs, slopes


@pytest.mark.parametrize("pipeline", [WEIGHTED, pytest.param(LAID, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", some(FAVOURED, "all to two"))
def test_no_row_is_lost_whatever_the_routing(case, pipeline):
    """Values and gradients are those of one device, and values those of the reference."""
    outputs, slopes = on_mesh(pipeline, case)
    assert_near(expected(case), (outputs, slopes))
    params, inputs = tokens(case)
    assert_near(run_reference(layer("ragged"), params=params, inputs=inputs), outputs)


@pytest.mark.slow
def test_a_device_has_the_rows_of_all_its_experts():
    """With 16 experts on 8 devices an expert's number is not its device's."""
    case, experts = "half to three", 16
    outputs, slopes = on_mesh(WEIGHTED, case, experts=experts)
    assert_near(expected(case, experts), (outputs, slopes))
