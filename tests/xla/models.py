"""Graphs for the tests of the xla backend, and what the reference says of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from family_configs import read_config
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.backend import get_backend
from moecc.families import build
from moecc.ir import F64, Graph, Value
from moecc.model.open import open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import run_reference

GOLDEN = Path(__file__).parents[1] / "golden"
Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]


def decoder(case: str, seq: int = 6, **upcycle) -> tuple[Graph, Arrays, Arrays]:
    """Return the graph of a golden config, converted where options are given, and small data.

    Parameters are random, so experts differ: among copies much would be vacuous.
    """
    config = read_config(GOLDEN / case)
    graph = build(config)
    if upcycle:
        UpcyclePass(**upcycle).apply(graph, Context())
    rng = np.random.default_rng(0)
    params = {n: _drawn(rng, n, p.type.shape) for n, p in graph.params.items()}
    tokens = rng.integers(0, config.vocab_size, (2, seq)).astype(np.int32)
    return graph, params, {"tokens": tokens}


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    drawn = rng.normal(size=shape)
    if "norm" in name:
        return 1 + 0.2 * drawn
    return drawn * (0.5 if "router" in name else shape[-1] ** -0.5)


def open_golden(case: str):
    return open_model(str(GOLDEN / case))


def apply_passes(graph: Graph, pipeline: str) -> Graph:
    """Return the graph after the passes, which change it in place."""
    run_pipeline(graph, Pipeline.parse(pipeline))
    return graph


def normal(rng: np.random.Generator, values: Mapping[str, Value], dtype="f8") -> Arrays:
    """Return normal arrays for the values, by name."""
    return {n: rng.normal(size=v.type.shape).astype(dtype) for n, v in values.items()}


def random_params(graph: Graph, seed: int = 0) -> Arrays:
    """Return parameters under which experts differ, and norms multiply by about 1."""
    drawn = normal(np.random.default_rng(seed), graph.params)
    return {n: (a * 0.3 + ("norm" in n)).astype("f4") for n, a in drawn.items()}


def assert_close(
    graph: Graph, params: Arrays, inputs: Arrays, found: Mapping[str, Any], tolerance: float
):
    """Check outputs against the reference: within `tolerance` of the largest finite number.

    A graph that amplifies a change of its data in the tenth digit may differ by as much.
    """
    expected = run_reference(graph, params=params, inputs=inputs)
    allowed = {n: tolerance * max(1.0, _largest(a)) for n, a in expected.items()}
    if any(_apart(a, found[n]).max(initial=0) > allowed[n] for n, a in expected.items()):
        near = run_reference(graph, params=_nudged(params), inputs=_nudged(inputs))
        allowed = {n: allowed[n] + 10 * _apart(a, near[n]) for n, a in expected.items()}
    for name, a in expected.items():
        assert np.shape(found[name]) == a.shape
        assert (_apart(a, found[name]) <= allowed[name]).all(), name


def _largest(a: Array) -> float:
    finite = np.abs(a[np.isfinite(a)]) if a.dtype.kind == "f" else np.abs(a.astype(float))
    return float(finite.max(initial=0))


def _apart(expected: Array, found) -> Array:
    a, b = expected.astype(float), np.asarray(found).astype(float)
    with np.errstate(all="ignore"):
        # What is not a number in the reference may be anything.
        return np.where((a == b) | np.isnan(a), 0, np.nan_to_num(np.abs(a - b), nan=np.inf))


def _nudged(arrays: Arrays) -> Arrays:
    rng = np.random.default_rng(7)
    return {
        n: a if a.dtype.kind in "iub" else a.astype(float) * (1 + 1e-10 * rng.normal(size=a.shape))
        for n, a in arrays.items()
    }


def relative(found, expected: Array) -> float:
    """Return the largest difference, relative to the largest number expected."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def compiled(graph: Graph, dtype, **options):
    return get_backend("xla").compile(graph, dtype=dtype, **options)


def run_both(graph: Graph, params: Arrays, inputs: Arrays, dtype=F64):
    """Return the outputs of XLA, and those of the reference."""
    found = compiled(graph, dtype).run(params, inputs)
    return found, run_reference(graph, params=params, inputs=inputs)


def weighed(array):
    """Return a mean to which every element contributes something else."""
    return (array * np.random.default_rng(5).normal(size=array.shape).astype("f")).mean()


def values_and_gradients(run, params, inputs, total=lambda outputs: weighed(outputs["y"])):
    """Return the outputs, the gradients of `total` of them by name, and the program.

    Gradients are those of parameters and of inputs that are floating-point numbers.
    """
    floats = {n: a for n, a in inputs.items() if jnp.issubdtype(a.dtype, jnp.floating)}

    def loss(params, floats):
        outputs = run(params, {**inputs, **floats})
        return total(outputs), outputs

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    program = step.lower(params, floats).compile()
    (_, outputs), (by_params, by_floats) = jax.tree.map(np.asarray, program(params, floats))
    return outputs, {**by_params, **by_floats}, program.as_text()


def assert_near(expected, found, least=0.0):
    """Compare trees of arrays, within 1e-5 of the largest element of each, or of `least`."""

    def compare(path, a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        bound = 1e-5 * max(np.abs(a).max(initial=0), least)
        assert np.abs(a - b).max(initial=0) <= bound, jax.tree_util.keystr(path)

    jax.tree.map_with_path(compare, expected, found)


def census(program: str) -> Counter[str]:
    kinds = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\("
    return Counter(re.findall(kinds, program))
