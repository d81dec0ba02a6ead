"""Graphs for the tests of the xla backend, and what the reference says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from family_configs import read_config
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.backend import get_backend
from moecc.families import build
from moecc.ir import Graph
from moecc.rewrite.passes import Context
from moecc.testing import inputs_for, params_for, run_reference

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


def random_data(graph: Graph, seed: int) -> tuple[Arrays, Arrays]:
    return params_for(graph, seed), inputs_for(graph, seed)


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
