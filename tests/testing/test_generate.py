"""The random graphs: valid, varied, quick to make, and still valid when cut to pieces."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from moecc.ir import OPS, Graph, clone, equal, print_graph, verify
from moecc.rewrite import P
from moecc.testing import graphs, laws, random_graph, run_reference
from moecc.testing.blocks import BLOCKS, attention, experts, feed_forward
from moecc.testing.generate import keep_only
from moecc.testing.growth import Step
from moecc.testing.steps import BINARY, GUARDED, SIMPLE, UNARY, contract, split, unary

QUIET = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))

# From some random starts shrinking stops a node above the least, so they are the same every time.
SHRINKING = settings(QUIET, max_examples=500, derandomize=True)


def test_a_seed_is_a_graph() -> None:
    assert print_graph(random_graph(7)) == print_graph(random_graph(7))
    assert len({print_graph(random_graph(s)) for s in range(50)}) > 45


NOT_DRAWN = {
    *("attention", "chunk", "index", "jax", "join", "scan", "stack", "update_slice"),
    *("within_buffer", "dispatch_gates", "weight_rows", "combine_weighted"),
}
"""What no model begins with: work that is sharded, cut, fused, repeated, sent or unknown."""


def test_every_operation_and_every_gate_convention_occurs() -> None:
    many = [random_graph(s) for s in range(400)]
    counts = Counter(n.op.name for g in many for n in g)
    local = {name for name, entry in OPS.items() if entry.collective is None}
    assert set(counts) == local - NOT_DRAWN
    routes = [n for g in many for n in g if n.op.name == "route"]
    assert len({n.attrs["gates"] for n in routes}) == 6
    places = [n for g in many for n in g if n.op.name == "assign_slots"]
    for name in ("slots", "order", "convention", "rounding", "groups"):
        assert len({n.attrs[name] for n in places}) > 1


def test_inner_values_often_have_another_user() -> None:
    blocks = [random_graph(s, steps=[feed_forward], max_steps=1) for s in range(200)]
    shared = [
        g
        for g in blocks
        if any(sum(v.users.values()) > 1 for n in g for v in n.results if n.op.name != "route")
    ]
    assert 0.15 < len(shared) / len(blocks) < 0.7


@given(graphs())
def test_nothing_in_a_graph_is_dead(graph: Graph) -> None:
    assert not any(n.is_dead for n in graph)
    assert all(v.users for v in [*graph.inputs.values(), *graph.params.values()])


def test_dead_nodes_stay_where_they_are_asked_for() -> None:
    assert any(n.is_dead for s in range(30) for n in random_graph(s, dead=True))


@pytest.mark.parametrize("step", [*SIMPLE, *BLOCKS], ids=lambda s: s.__name__)
def test_each_step_makes_valid_graphs(step: Step) -> None:
    made = [random_graph(s, steps=[step, split], max_steps=3) for s in range(25)]
    for graph in made:
        verify(graph)
    assert any(len(g) for g in made)


@given(graphs(), st.binary(min_size=1, max_size=8))
def test_a_graph_cut_to_pieces_is_valid_and_runs(graph: Graph, kept: bytes) -> None:
    whole = clone(graph)
    keep_only(graph, lambda position: kept[position % len(kept)] > 100)
    laws.check_graph(graph)
    run_reference(graph)
    assert len(graph) <= len(whole)
    assert all(v.users for v in [*graph.inputs.values(), *graph.params.values()])


@given(graphs())
def test_keeping_all_changes_nothing(graph: Graph) -> None:
    whole = clone(graph)
    keep_only(graph, lambda position: True)
    assert equal(graph, whole)


def has(graph: Graph, *ops: str) -> bool:
    return set(ops) <= {n.op.name for n in graph}


@pytest.mark.parametrize(
    ("ops", "most"),
    [(("softmax",), 1), (("rope",), 1), (("combine",), 5), (("silu", "rms_norm"), 6)],
)
def test_counterexamples_shrink_to_what_matters(ops: tuple[str, ...], most: int) -> None:
    smallest = find(graphs(), lambda g: has(g, *ops), settings=SHRINKING)
    assert len(smallest) <= most


def test_the_steps_can_be_chosen() -> None:
    graph = random_graph(3, steps=[contract, unary], max_steps=20)
    assert {n.op.name for n in graph} <= {"contract", "relu", "scale"} | set(OPS) - {
        "route",
        "rope",
    }
    assert has(random_graph(0, steps=[attention], max_steps=1), "softmax")
    assert has(random_graph(1, steps=[experts], max_steps=1), "dispatch", "combine")


def test_thousands_of_cases_a_minute() -> None:
    """Made, verified, printed and run twice: 1,000 a minute is asked, even of a busy machine."""
    start, cases = time.process_time(), 60
    for seed in range(cases):
        graph = random_graph(seed)
        laws.check_graph(graph)
        run_reference(graph, seed=seed)
        run_reference(graph, seed=seed + 1)
    assert (time.process_time() - start) / cases < 60 / 1000


def test_the_rest_works_without_hypothesis(tmp_path: object) -> None:
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


def test_every_function_of_the_table_is_drawn_now_and_then() -> None:
    """A new row is, too: in a law of 200 graphs it stands in two at least, most of the time."""
    graphs = [random_graph(seed) for seed in range(400)]
    drawn = Counter(name for graph in graphs for name in {n.op.name for n in graph})
    functions = [*UNARY, *BINARY, *GUARDED]
    assert {n: drawn[n] for n in functions if drawn[n] < 4} == {}


def test_one_example_is_as_good_as_several() -> None:
    like = P.silu(P.any("x"))
    assert print_graph(random_graph(3, like=like)) == print_graph(random_graph(3, like=(like,)))
