"""Dropless rows exchanged in rounds: no row is lost, and as many rounds are done as rows need."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from moecc_passes.sharding.legal import layer
from tiers import some

from moecc.ir import Graph
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.testing import run_reference

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.dispatch import rounds  # noqa: E402
from moecc_backends.xla.lower.shard_map import sharded_function  # noqa: E402
from moecc_backends.xla.mesh.specs import device_mesh  # noqa: E402
from moecc_backends.xla.trace.options import Options  # noqa: E402

from .test_exchanges import assert_near  # noqa: E402

TOKENS, EXPERTS, EMBED = 128, 8, 8
LAID = "annotate-sharding{mesh=data:8 rules=st-moe},expert-parallel{via=ragged},lower-collectives"
WEIGHTED = f"weight-rows,{LAID}"
FAVOURED = {"balanced": 0, "half to three": 3, "all to two": 2}
"""How many experts the routers of a case favour; 0: tokens take experts in turn."""


def tokens(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and tokens: ``x[0]`` to ``x[7]`` choose the experts of each token."""
    rng = np.random.default_rng(1)
    graph = layer("ragged")
    params = {n: rng.normal(size=v.type.shape).astype("f") for n, v in graph.params.items()}
    params["router"] = np.eye(EXPERTS, EMBED, dtype="f")
    x = rng.normal(size=(8, TOKENS // 8, EMBED)).astype("f") * 0.1
    each = np.arange(TOKENS).reshape(8, TOKENS // 8)
    if case == "balanced":
        for step, logit in ((0, 3.0), (1, 2.0)):
            np.put_along_axis(x, ((2 * each + step) % EXPERTS)[..., None], logit, axis=2)
    elif case == "half to three":
        x[::2, :, :3] += np.array([3.0, 2.0, 1.0])
    else:
        x[..., :2] += np.array([3.0, 2.0])
    return params, {"x": x}


def compiled(run: Any, case: str) -> Any:
    def loss(params: Any, inputs: Any) -> tuple[Any, Any]:
        outputs = run(params, inputs)
        weights = np.random.default_rng(5).normal(size=outputs["y"].shape).astype("f")
        return (outputs["y"] * weights).mean(), outputs

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return program.lower(*tokens(case)).compile()


def laid(pipeline: str) -> Graph:
    graph = layer("ragged")
    run_pipeline(graph, Pipeline.parse(pipeline))
    return graph


@cache
def expected(case: str) -> Any:
    (_, outputs), slopes = compiled(function(layer("ragged")), case)(*tokens(case))
    return outputs, slopes


def on_mesh(pipeline: str, case: str, poison: bool = True) -> Any:
    graph = laid(pipeline)
    run = sharded_function(graph, device_mesh(graph), options=Options(poison=poison))
    (_, outputs), slopes = compiled(run, case)(*tokens(case))
    return outputs, slopes


@pytest.mark.parametrize("pipeline", [WEIGHTED, pytest.param(LAID, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", some(FAVOURED, "all to two"))
def test_no_row_is_lost_whatever_the_routing(case: str, pipeline: str) -> None:
    """Values and gradients are those of one device, and values those of the reference."""
    outputs, slopes = on_mesh(pipeline, case)
    assert_near(expected(case), (outputs, slopes))
    params, inputs = tokens(case)
    assert_near(run_reference(layer("ragged"), params=params, inputs=inputs), outputs)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "most"), [("balanced", 1), ("all to two", 4)])
def test_as_many_rounds_are_done_as_the_busiest_device_needs(
    case: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device sends 4 rows to each where routing is balanced, and 16 where all go to two."""
    done: list[tuple[str, int]] = []
    turn = rounds.InRounds._turn

    def noted(self: Any, number: Any, routed: Any) -> Any:
        jax.debug.callback(lambda n: done.append((case, int(n))), number)
        return turn(self, number, routed)

    monkeypatch.setattr(rounds, "_TILE", 1)
    monkeypatch.setattr(rounds.InRounds, "_turn", noted)
    outputs, _ = on_mesh(WEIGHTED, case, poison=False)
    jax.effects_barrier()
    assert_near(expected(case)[0], outputs)
    assert {number for _, number in done} == set(range(most))
    # Eight devices, forward and for the gradient.
    assert len(done) == 8 * 2 * most
