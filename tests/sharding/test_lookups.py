"""Tables that are looked up where their columns are stored, and which are not."""

import pytest

from moecc.ir import F32, I32, Builder, Graph, tensor
from moecc.sharding.collectives import steps

from .meshes import assigner, gradients_of, propagated


def looking_up(*, tied=False):
    graph = Graph("looking_up")
    b = Builder(graph, loc="embed")
    ids = graph.input("ids", tensor(I32, batch="B", seq="S"))
    table = graph.param("table", tensor(F32, vocab=48, embed=16))
    x = b.embedding(table, ids, axis="vocab", name="x")
    graph.set_output("y", b.scale(x, by=2.0, name="y"))
    if tied:
        head = Builder(graph, loc="head")
        graph.set_output("logits", head.contract(x, table, over="embed", name="logits"))
    return graph


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
    mesh, rules, batch, crossed = COLUMNS[case]
    graph = looking_up()
    found = propagated(graph, assigner(mesh, *rules.split(";")))
    ids, table, x, y = (graph.value(n) for n in ("ids", "table", "x", "y"))
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
    summed = gradients_of(graph, found).params[table]
    assert summed == set(batch) - set(crossed), "of the others each has all tokens"


def test_a_tied_table_is_gathered_for_the_head_alone():
    graph = looking_up(tied=True)
    table = graph.value("table")
    found = propagated(graph, assigner("fsdp:4", "batch=fsdp", "param embed=fsdp"))
    (gathered,) = (r for r in found.reshards if r.value.is_param)
    assert gathered.node.op.name == "contract"
    assert found.wanted[table] == gathered.target, "for a plan, that it is gathered"
    summed = gradients_of(graph, found).params[table]
    assert summed == {"fsdp"}, "what the head adds is scattered"
