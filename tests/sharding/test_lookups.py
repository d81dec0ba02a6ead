"""Tables that are looked up where their columns are stored, and which are not."""

import pytest

from moecc.ir import Graph
from moecc.ir.builder import Builder
from moecc.ir.mesh import parse_mesh
from moecc.sharding.assign import Assigner, sites_of
from moecc.sharding.collectives import dependence, gradients, steps
from moecc.sharding.propagate import propagate
from moecc.sharding.rules import parse_layout
from moecc.types import F32, I32, tensor
from tests.support.layouts import layout_text

VOCAB, EMBED = 48, 16


def looking_up(vocab=VOCAB, *, tied=False):
    graph = Graph("looking_up")
    b = Builder(graph, loc="embed")
    ids = graph.input("ids", tensor(I32, batch="B", seq="S"))
    table = graph.param("table", tensor(F32, vocab=vocab, embed=EMBED))
    x = b.embedding(table, ids, axis="vocab", name="x")
    graph.set_output("y", b.scale(x, by=2.0, name="y"))
    if tied:
        head = Builder(graph, loc="head")
        graph.set_output("logits", head.contract(x, table, over="embed", name="logits"))
    return graph


def found_in(graph, mesh, lines):
    by = Assigner(parse_mesh(mesh), parse_layout(layout_text(*lines.split(";")), "test"))
    return propagate(sites_of(graph), graph.inputs.values(), graph.params.values(), by)


def done(graph, found):
    """Return the collectives that each value goes through, and their mesh axes."""
    return {
        r.value.name: [(op, attrs["mesh"]) for op, attrs in steps(r.source, r.target)]
        for r in found.reshards
    }


BOTH = ("fsdp", "expert")
COLUMNS = {
    # mesh, rules: where the rows of a batch are, what they cross
    "one axis": ("fsdp:4", "batch=fsdp; param embed=fsdp", ("fsdp",), ("fsdp",)),
    "the innermost": (
        "data:2,fsdp:4", "batch=data*fsdp; param embed=fsdp", ("data", "fsdp"), ("fsdp",),
    ),
    "two axes": ("fsdp:2,expert:4", "batch=fsdp*expert; param embed=fsdp*expert", BOTH, BOTH),
    "two axes of two rules": (
        "fsdp:2,expert:4", "batch=fsdp*expert; param embed=fsdp; param embed=expert", BOTH, BOTH,
    ),
    "the first of two": (
        "fsdp:2,expert:4", "batch=fsdp; param embed=fsdp*expert", ("fsdp",), ("fsdp",),
    ),
    "the first of two that are crossed otherwise": (
        "fsdp:2,expert:4", "batch=expert*fsdp; param embed=fsdp*expert", ("expert", "fsdp"),
        ("fsdp",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_tokens_come_to_the_columns_of_a_table_and_rows_go_back(case):
    mesh, lines, batch, crossed = COLUMNS[case]
    graph = looking_up()
    found = found_in(graph, mesh, lines)
    ids, table, x, y = (graph.value(n) for n in ("ids", "table", "x", "y"))
    assert x.node is not None
    used, tokens = found.used(x.node)
    assert used["embed"].mesh == crossed == found.types[x]["embed"].mesh
    assert tokens["batch"].mesh == batch[: -len(crossed)]
    assert found.types[y]["batch"].mesh == found.types[ids]["batch"].mesh == batch
    assert found.types[y]["embed"].mesh == ()
    stored = found.types[table]["embed"].mesh
    gathered = {"table": [("all_gather", stored[len(crossed) :])]} if stored != crossed else {}
    assert done(graph, found) == {
        **gathered, "ids": [("all_gather", crossed)], "x": [("all_to_all", crossed)],
    }  # fmt: skip
    made = gradients(sites_of(graph), found, dependence(sites_of(graph), graph.inputs.values()))
    assert made.params[table] == set(batch) - set(crossed), "of the others each has all tokens"


def test_a_tied_table_is_gathered_for_the_head_alone():
    graph = looking_up(tied=True)
    found = found_in(graph, "fsdp:4", "batch=fsdp; param embed=fsdp")
    (gathered,) = (r for r in found.reshards if r.value.is_param)
    assert gathered.node.op.name == "contract"
    assert found.wanted[graph.value("table")] == gathered.target, "for a plan, that it is gathered"
    made = gradients(sites_of(graph), found, dependence(sites_of(graph), graph.inputs.values()))
    assert made.params[graph.value("table")] == {"fsdp"}, "what the head adds is scattered"
