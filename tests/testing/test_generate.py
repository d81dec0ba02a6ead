"""The random graphs: valid, varied, quick to make, and still valid when cut to pieces."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from tiers import few

from moecc.ir import OPS, clone, print_graph, verify
from moecc.testing import graphs, laws, random_graph, run_reference
from moecc.testing.generate import keep_only
from moecc.testing.steps import BLOCKS, SIMPLE, split

# From some random starts shrinking stops a node above the least, so they are the same every time.
SHRINKING = settings(
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=500,
    derandomize=True,
)


def test_a_seed_is_a_graph():
    assert print_graph(random_graph(7)) == print_graph(random_graph(7))
    assert len({print_graph(random_graph(s)) for s in range(50)}) > 45


NOT_DRAWN = {
    *("attention", "chunk", "index", "jax", "join", "scan", "stack", "update_slice"),
    *("within_buffer", "dispatch_gates", "weight_rows", "combine_weighted", "delta_rule"),
}
"""What no model begins with: work that is sharded, cut, fused, repeated, sent or unknown; and a
delta rule, whose graphs `tests/xla/test_delta_rule.py` makes."""


def test_every_operation_and_every_gate_convention_occurs():
    many = [random_graph(s) for s in range(400)]
    counts = Counter(n.op.name for g in many for n in g)
    local = {name for name, entry in OPS.items() if entry.collective is None}
    assert set(counts) == local - NOT_DRAWN
    routes = [n for g in many for n in g if n.op.name == "route"]
    assert len({n.attrs["gates"] for n in routes}) == 6
    places = [n for g in many for n in g if n.op.name == "assign_slots"]
    for name in ("slots", "order", "convention", "rounding", "groups"):
        assert len({n.attrs[name] for n in places}) > 1


@pytest.mark.parametrize("step", [*SIMPLE, *BLOCKS], ids=lambda s: s.__name__)
def test_each_step_makes_valid_graphs(step):
    drawn = [random_graph(s, steps=[step, split], max_steps=3) for s in range(8)]
    for graph in drawn:
        verify(graph)
    assert any(len(graph) for graph in drawn)


@given(graphs(), st.binary(min_size=1, max_size=8))
def test_a_graph_cut_to_pieces_is_valid_and_runs(graph, kept):
    whole = clone(graph)
    keep_only(graph, lambda position: kept[position % len(kept)] > 100)
    laws.check_graph(graph)
    run_reference(graph)
    assert len(graph) <= len(whole)
    assert all(v.users for v in [*graph.inputs.values(), *graph.params.values()])


@pytest.mark.parametrize(
    ("ops", "most"),
    few([(("combine",), 5), (("softmax",), 1), (("rope",), 1), (("silu", "rms_norm"), 6)]),
)
def test_counterexamples_shrink_to_what_matters(ops, most):
    smallest = find(graphs(), lambda g: {*ops} <= {n.op.name for n in g}, settings=SHRINKING)
    assert len(smallest) <= most


def test_the_rest_works_without_hypothesis(tmp_path):
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import moecc.testing as t\n"
        "t.laws.check_graph(t.random_graph(1)); t.run_reference(t.random_graph(1))\n"
        "from moecc.errors import MachineError\n"
        "try: t.graphs\n"
        "except MachineError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "need Hypothesis, which is not installed" in done.stdout
    assert "pip install 'hypothesis>=" in done.stdout
