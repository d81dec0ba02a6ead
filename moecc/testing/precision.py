"""Whether weights keep their element types: an oracle that computes in float64 rounds nothing.

So where a pass has given parameters other weight expressions, both graphs run once more with
parameters as a checkpoint would hold them: sources in their element types, every cast and every
product rounded.  ``exact`` means bit for bit there, too.  Real arithmetic allows what rounding to
float32 explains, and no more: weights rounded to bfloat16 are three decimal orders beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moecc.ir.graph import Graph
from moecc.support.untyped import JsonDict
from moecc.testing.comparing import (
    Trial,
    amplified,
    beyond,
    magnitude,
    run_reference,
    unequal,
)
from moecc.testing.data import inputs_for, params_for
from moecc.testing.draws import generator
from moecc.testing.weights import stored_weight
from moecc.types.arrays import Array

SINGLE = 2.0**-20
"""The relative error of a weight that float32 explains: of eight roundings."""

EDGE = 1e4 * SINGLE
"""The share of an output's magnitude that such errors move only where they tip a choice."""

_PREFIX = "with weights as they are stored, "


def weight_gaps(trial: Trial) -> list[str]:
    """Return a line for each output that weights, as they are stored, change."""
    if _expressions(trial.after) <= _expressions(trial.before):
        return []
    inputs = inputs_for(trial.before, trial.seed, trial.sizes)
    params = [_stored(g, trial) for g in (trial.before, trial.after)]
    expected, found = (
        run_reference(g, params=p, inputs=inputs)
        for g, p in zip((trial.before, trial.after), params, strict=True)
    )
    if trial.exact:
        return [_PREFIX + line for line in unequal(expected, found, trial.seed)]
    allowed: JsonDict = {n: trial.tolerance * magnitude(a) for n, a in expected.items()}
    if not any(beyond(expected, found, allowed, trial.seed)):
        return []

    def run(draw: int) -> Mapping[str, Array]:
        near = {n: _rounded(a, draw, n) for n, a in params[0].items()}
        return run_reference(trial.before, params=near, inputs=inputs)

    moved = amplified(run, expected, EDGE)
    # A sum of three draws, as it were: weights are few, and three may all round one way.
    bounds = {n: allowed[n] + 3 * moved[n] for n in expected}
    return [_PREFIX + line for line in beyond(expected, found, bounds, trial.seed)]


def _expressions(graph: Graph) -> set[object]:
    # Expressions are interned, so equal ones are one object.
    return {v.weight for v in graph.params.values() if v.weight is not None}


def _stored(graph: Graph, trial: Trial) -> dict[str, Array]:
    made = {
        n: stored_weight(v.weight, trial.seed)
        for n, v in graph.params.items()
        if v.weight is not None
    }
    return params_for(graph, trial.seed, trial.sizes) | made


def _rounded(data: Array, draw: int, name: str) -> Array:
    if data.dtype.kind not in "fV":
        return data
    noise = generator(draw, "rounded", name).uniform(-1, 1, data.shape)
    return np.asarray(data.astype(np.float64) * (1 + SINGLE * noise))
