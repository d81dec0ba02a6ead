"""Graphs that tests lay on meshes, and what devices make of them."""

from collections import Counter
from pathlib import Path

import numpy as np
from family_configs import read_config

from moecc.families import build
from moecc.ir.devices import assembled, simulate
from moecc.ir.interpreter import ReferenceProgram
from moecc.ir.mesh import parse_mesh
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.assign import Assigner, sites_of
from moecc.sharding.collectives import dependence, gradients
from moecc.sharding.propagate import propagate
from moecc.sharding.rules import parse_layout
from moecc.testing import inputs_for, params_for, run_reference, sizes_for
from tests.support.layouts import layout_text

GOLDEN = Path(__file__).parents[1] / "golden"


def model(case):
    """Return the graph of a golden config."""
    return build(read_config(GOLDEN / case))


def run(graph, pipeline):
    """Run a pipeline on `graph`, in place."""
    return run_pipeline(graph, Pipeline.parse(pipeline))


def census(graph):
    """Return how often each collective stands in `graph`."""
    return Counter(node.op.name for node in graph if node.op.places)


def assigner(mesh, *rules):
    """Return what lays values on a mesh by rules in the short spelling."""
    return Assigner(parse_mesh(mesh), parse_layout(layout_text(*rules), "test"))


def propagated(graph, by):
    return propagate(sites_of(graph), graph.inputs.values(), graph.params.values(), by)


def gradients_of(graph, found):
    """Return the sums of gradients that a propagation needs."""
    sites = sites_of(graph)
    return gradients(sites, found, dependence(sites, graph.inputs.values()))


def data_for(graph, batch):
    """Return parameters and inputs, with `batch` sequences of six tokens."""
    sizes = dict.fromkeys(sizes_for(graph, 0), 6) | {"B": batch}
    return params_for(graph, 1, sizes), inputs_for(graph, 1, sizes)


def largest_difference(expected, found):
    """Return the largest difference of outputs, relative to their largest number, at least 1."""
    worst = 0.0
    for name, a in expected.items():
        b = found[name]
        assert a.shape == b.shape
        if a.dtype.kind != "f":
            assert (a == b).all()
            continue
        assert (np.isnan(a) == np.isnan(b)).all()
        same = np.isnan(a) | (a == b)
        apart = np.where(same, 0, a) - np.where(same, 0, b)
        scale = max(1.0, float(np.abs(a[np.isfinite(a)]).max(initial=0)))
        worst = max(worst, float(np.abs(apart).max(initial=0)) / scale)
    return worst


def check_every_value(graph, params, inputs, found):
    """Check that what devices hold of each value, put together, is the value."""
    for value, array in ReferenceProgram(graph).trace(params, inputs):
        if value in found.held and value.type.ragged is None:
            whole = assembled(value.type, found.held[value], found.mesh)
            difference = largest_difference({"v": array.to(whole.axes)}, {"v": whole.data})
            assert difference <= 1e-11, f"%{value.name}"


def check_on_devices(graph, whole, params, inputs, case=""):
    """Check that devices compute what one does; return the outputs of both."""
    found = simulate(graph, params, inputs)
    expected = run_reference(whole, params=params, inputs=inputs)
    assert largest_difference(expected, found.outputs) <= 1e-12, case
    check_every_value(graph, params, inputs, found)
    return found.outputs, expected
