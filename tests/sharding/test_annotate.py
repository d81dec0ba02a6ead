"""Laying graphs on meshes: what follows from a layout, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moecc.errors import InputError, UsageError
from moecc.ir import clone, equal
from moecc.ir.mesh import mesh_of
from moecc.jobs.checks import check_pipeline
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import laws
from tests.support.layouts import layout_text

from .meshes import census, model, run

LAID = {
    # (case, mesh, layouts): what lower-collectives makes of it
    ("llama_gqa", "data:4", "data-parallel"): {},
    ("llama_gqa", "data:4,model:2", "tensor-parallel"): {"all_reduce": 6},
    ("llama_gqa", "data:2,fsdp:4", "data-parallel,fsdp"): {"all_gather": 23, "all_to_all": 1},
    ("llama_gqa", "data:4,model:2", "tensor-parallel,zero"): {
        "all_gather": 23, "all_reduce": 6, "all_to_all": 1,
    },
    ("bert_gelu", "data:4,model:2", "tensor-parallel"): {"all_reduce": 2},
    ("t5_relu_tied", "data:2", "data-parallel"): {},
    ("mixtral_gqa", "data:4,model:2", "st-moe"): {"all_reduce": 4, "ragged_all_to_all": 4},
    ("mixtral_gqa", "data:2,expert:4", "expert-parallel"): {"ragged_all_to_all": 4},
    ("mixtral_gqa", "outer:2,inner:4", "st-moe-outer"): {"ragged_all_to_all": 4},
    ("mixtral_gqa", "far:2,near:2", "expert-hierarchical"): {"ragged_all_to_all": 8},
    ("mixtral_gqa", "data:2,expert:4", "expert-replicated"): {"all_reduce": 2, "shard": 2},
    ("switch_half", "data:2,expert:2", "expert-parallel"): {"all_to_all": 6},
}  # fmt: skip


@pytest.mark.parametrize(("case", "mesh", "rules"), LAID)
def test_a_layout_becomes_collectives_and_can_be_taken_away(
    case: str, mesh: str, rules: str
) -> None:
    before = model(case)
    if case == "switch_half":
        run(before, "specialize{mode=train capacity-factor=2.0 groups=4}")
    graph = clone(before)
    run(graph, f"annotate-sharding{{mesh={mesh} rules={rules}}}")
    laws.check_round_trip(graph)
    run(graph, "lower-collectives")
    assert census(graph) == LAID[case, mesh, rules]
    laws.check_round_trip(graph)
    run(graph, "strip-sharding")
    assert equal(graph, before)


def test_parameters_of_one_axis_are_not_stored_in_parts() -> None:
    graph = model("llama_gqa")
    run(graph, "annotate-sharding{mesh=fsdp:4 rules=fsdp},lower-collectives")
    placed = {len(p.type.axes): p.type.is_sharded for p in graph.params.values()}
    assert placed == {1: False, 2: True}
    gathered = [n.operands[0] for n in graph if n.op.name == "all_gather"]
    assert len(gathered) == sum(len(p.type.axes) > 1 for p in graph.params.values())


def test_the_text_of_a_sequence_parallel_layer() -> None:
    """Norms lie on model by their sequence, products by their neurons (Korthikanti 2022)."""
    graph = model("llama_gqa")
    told: list[Any] = []
    layouts = "tensor-parallel,sequence-parallel"
    run(graph, f"annotate-sharding{{mesh=data:2,model:2 rules={layouts}}},lower-collectives", told)
    down = next(n for n in graph if n.op.name == "reduce_scatter" and n.loc == "layers.0.ffn")
    assert str(down.result.type) == "f32[batch@data=B, seq@model=S, embed=16]"
    assert down.origin == "lower-collectives/mlp"
    assert any("mlp = model (tensor-parallel:10)" in r.text for r in told)


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.rules"
    path.write_text(layout_text("batch = rows", "mlp = columns ?", "param q = rows"))
    graph = model("llama_gqa")
    run(graph, f"annotate-sharding{{mesh=rows:2,columns:4 rules={path}}}")
    assert str(graph.inputs["tokens"].type) == "i32[batch@rows=B, seq=S]"
    types = {str(p.type) for p in graph.params.values()}
    assert "f32[q@rows=16, embed=16]" in types
    assert any(t.startswith("f32[mlp@columns=") for t in types)
    path.write_text('rules = [{ axis = "batch" }, { axis = "a b", mesh = ["rows"] }]')
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(f"annotate-sharding{{mesh=rows:2 rules={path}}}")
    assert "a key is missing" in str(caught.value)
    assert "letters, digits and _" in str(caught.value)


def test_a_layout_in_the_earlier_format_is_told_how_it_is_spelled(tmp_path: Path) -> None:
    path = tmp_path / "mine.rules"
    path.write_text("# own\nparam embed = data*fsdp ?  # stored\n")
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(f"annotate-sharding{{mesh=data:2 rules={path}}}")
    spelled = '{ axis = "embed", mesh = ["data", "fsdp"], stored = true, optional = true }'
    assert spelled in str(caught.value)


REFUSED = {
    ("mixtral_gqa", "data:8", "st-moe"): (
        "more devices for experts than experts", "at most 4 devices", "outer:2,inner:4"
    ),
    ("mixtral_gqa", "data:2,model:3", "st-moe"): (
        "the axis 'mlp' does not divide over the mesh", "a multiple of 3 (model:3)",
        "2 parts would, or a size of 21",
    ),
    ("llama_gqa", "data:2,modle:2", "tensor-parallel"): (
        "nothing is sharded over the mesh axis 'modle'", "data, model", "leave the axis out"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "mesh", "rules"), REFUSED)
def test_a_mesh_that_does_not_suit(case: str, mesh: str, rules: str) -> None:
    graph = model(case)
    with pytest.raises(InputError) as caught:
        run(graph, f"annotate-sharding{{mesh={mesh} rules={rules}}}")
    (problem,) = caught.value.problems
    what, expected, hint = REFUSED[case, mesh, rules]
    assert what in problem.what
    assert expected in (problem.expected or "")
    assert hint in (problem.hint or "")
    assert problem.where


def test_a_capacity_counts_in_groups_that_the_mesh_must_divide() -> None:
    graph = model("llama_gqa")
    run(graph, "upcycle{experts=4 capacity-factor=2.0 groups=2},specialize{mode=train "
        "capacity-factor=2.0 groups=2}")  # fmt: skip
    with pytest.raises(InputError, match="groups of tokens do not divide over the mesh") as caught:
        run(graph, "annotate-sharding{mesh=data:4 rules=st-moe}")
    (problem,) = caught.value.problems
    assert problem.expected == "a multiple of 4 (data:4)"
    assert "specialize{groups=4} first" in (problem.hint or "")
    assert "assign_slots" in (problem.where or "")


@pytest.mark.parametrize("rules", ["expert-parallel,data-parallel", "fsdp,expert-parallel"])
def test_the_groups_that_a_hint_names_divide_over_all_axes_of_the_rule(rules: str) -> None:
    graph, shard = model("mixtral_gqa"), f"annotate-sharding{{mesh=data:2,expert:2 rules={rules}}}"
    shard = shard.replace("data:2", "fsdp:2") if "fsdp" in rules else shard
    with pytest.raises(InputError, match="groups of tokens do not divide over the mesh") as caught:
        run(graph, f"add-losses,{shard}")
    (problem,) = caught.value.problems
    hint = problem.hint or ""
    assert hint.startswith("1 part would, or specialize{groups=")
    again = model("mixtral_gqa")
    run(again, f"{hint.partition('or ')[2].partition(' first')[0]},add-losses,{shard}")
    assert mesh_of(again) is not None


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("mesh=data rules=st-moe", "not a mesh"),
        ("mesh=data:2 rules=st-mo", "unknown layout 'st-mo'"),
        ("mesh=data:2 rules=nowhere.rules", "cannot be read"),
    ],
)
def test_options_that_are_wrong_by_themselves(options: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Pipeline.parse(f"annotate-sharding{{{options}}}")


def test_a_graph_is_laid_once() -> None:
    graph = model("llama_gqa")
    run(graph, "annotate-sharding{mesh=data:2 rules=data-parallel}")
    with pytest.raises(InputError, match="is on a mesh already"):
        run(graph, "annotate-sharding{mesh=data:2 rules=data-parallel}")


KEPT = {
    "annotate-sharding{mesh=data:4,model:2 rules=st-moe},expert-parallel{via=ring},"
    "lower-collectives,strip-sharding": ["reassociation", "exact", "exact", "reassociation"],
    "specialize{mode=train capacity-factor=1.0 groups=8},"
    "annotate-sharding{mesh=data:4 rules=st-moe},expert-parallel{via=capacity chunks=2},"
    "lower-collectives": ["approximate", "exact", "reassociation", "exact"],
}


@pytest.mark.parametrize("pipeline", KEPT)
def test_promises_are_kept(pipeline: str) -> None:
    checked = check_pipeline(model("mixtral_gqa"), Pipeline.parse(pipeline))
    assert [c.promise.kind for c in checked] == KEPT[pipeline]
    assert all(c.measured <= 1e-12 for c in checked if c.promise.kind != "approximate")


def test_slots_that_are_returned_are_numbered_in_other_groups() -> None:
    with open_model(str(Path(__file__).parents[1] / "golden" / "mixtral_gqa")) as model:
        graph = model.graph
    shard = "annotate-sharding{mesh=data:2,expert:2 rules=expert-parallel,data-parallel}"
    plain, traced = clone(graph), clone(graph)
    assert run_pipeline(plain, Pipeline.parse(shard)).preserves.kind == "reassociation"
    done = run_pipeline(traced, Pipeline.parse(f"trace-routing,{shard}"))
    assert done.preserves.kind == "approximate"
    assert "slots, which are outputs" in done.preserves.reason
