"""Laying graphs on meshes: what follows from a layout, and what is told."""

import pytest

from moecc.errors import InputError, UsageError
from moecc.ir import clone, equal
from moecc.jobs.checks import check_pipeline
from moecc.rewrite.pipeline import Pipeline
from moecc.testing import laws
from tests.support.layouts import layout_text

from .meshes import census, model, run

LAID = {
    ("llama_gqa", "data:4,model:2", "tensor-parallel"): {"all_reduce": 6},
    ("llama_gqa", "data:2,fsdp:4", "data-parallel,fsdp"): {"all_gather": 23, "all_to_all": 1},
    ("llama_gqa", "data:4,model:2", "tensor-parallel,zero"): {
        "all_gather": 23, "all_reduce": 6, "all_to_all": 1,
    },
    ("bert_gelu", "data:4,model:2", "tensor-parallel"): {"all_reduce": 2},
    ("mixtral_gqa", "data:4,model:2", "st-moe"): {"all_reduce": 4, "ragged_all_to_all": 4},
    ("mixtral_gqa", "outer:2,inner:4", "st-moe-outer"): {"ragged_all_to_all": 4},
    ("mixtral_gqa", "far:2,near:2", "expert-hierarchical"): {"ragged_all_to_all": 8},
    ("mixtral_gqa", "data:2,expert:4", "expert-replicated"): {"all_reduce": 2, "shard": 2},
    ("switch_half", "data:2,expert:2", "expert-parallel"): {"all_to_all": 6},
}  # fmt: skip


@pytest.mark.parametrize(("case", "mesh", "rules"), LAID)
def test_a_layout_becomes_collectives_and_can_be_taken_away(case, mesh, rules):
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


def test_parameters_of_one_axis_are_not_stored_in_parts():
    graph = model("llama_gqa")
    run(graph, "annotate-sharding{mesh=fsdp:4 rules=fsdp},lower-collectives")
    matrices = [p for p in graph.params.values() if len(p.type.axes) == 2]
    assert matrices == [p for p in graph.params.values() if p.type.is_sharded]
    assert census(graph)["all_gather"] == len(matrices) < len(graph.params)


def test_a_layout_of_ones_own(tmp_path):
    path = tmp_path / "mine.rules"
    path.write_text(layout_text("batch = rows", "mlp = columns ?", "param q = rows"))
    graph = model("llama_gqa")
    run(graph, f"annotate-sharding{{mesh=rows:2,columns:4 rules={path}}}")
    assert str(graph.inputs["tokens"].type) == "i32[batch@rows=B, seq=S]"
    types = {str(p.type) for p in graph.params.values()}
    assert "f32[q@rows=16, embed=16]" in types
    assert any(t.startswith("f32[mlp@columns=") for t in types)
    path.write_text('rules = [{ axis = "batch" }, { axis = "a b", mesh = ["rows"] }]')
    with pytest.raises(UsageError, match=r"mine.rules:1: (?s:.*)a key (?s:.*)digits and _"):
        Pipeline.parse(f"annotate-sharding{{mesh=rows:2 rules={path}}}")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("param embd = rows", "did you mean 'embed'"),
        ("expert with slto = rows", "did you mean 'slot'"),
        ("wings = rows", "optional = true for models that lack it"),
        ("wings = rows ?", None),
        ("vocab = columns", None),  # of other models' rules
    ],
)
def test_a_rule_for_an_axis_that_no_model_has(tmp_path, rule, told):
    path = tmp_path / "mine.rules"
    path.write_text(layout_text("batch = rows", rule))
    passes = f"annotate-sharding{{mesh=rows:2 rules={path}}}"
    if told is None:
        run(model("llama_gqa"), passes)
        return
    with pytest.raises(InputError, match="the model has no axis") as caught:
        run(model("llama_gqa"), passes)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}:3"
    assert told in problem.hint


@pytest.mark.parametrize("groups", [(), ("group = data*fsdp",)])
def test_a_remark_on_groups_that_no_rule_shards(tmp_path, groups):
    path = tmp_path / "mine.rules"
    path.write_text(layout_text("batch = data*fsdp", "expert with slot = data", *groups))
    report = run(model("mixtral_gqa"), f"annotate-sharding{{mesh=data:2,fsdp:2 rules={path}}}")
    remarks = [remark.text for remark in report.runs[0].result.remarks]
    wanted = '{ axis = "group", mesh = ["data", "fsdp"] }'
    assert any(wanted in remark for remark in remarks) == (not groups)


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
def test_a_mesh_that_does_not_suit(case, mesh, rules):
    graph = model(case)
    with pytest.raises(InputError) as caught:
        run(graph, f"annotate-sharding{{mesh={mesh} rules={rules}}}")
    (problem,) = caught.value.problems
    texts = (problem.message, problem.expected, problem.hint)
    for text, words in zip(texts, REFUSED[case, mesh, rules], strict=True):
        assert words in text
    assert problem.where


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("mesh=data rules=st-moe", "not a mesh"),
        ("mesh=data:2 rules=st-mo", "unknown layout 'st-mo'"),
        ("mesh=data:2 rules=nowhere.rules", "cannot be read"),
    ],
)
def test_options_that_are_wrong_by_themselves(options, what):
    with pytest.raises(UsageError, match=what):
        Pipeline.parse(f"annotate-sharding{{{options}}}")


KEPT = {
    "annotate-sharding{mesh=data:4,model:2 rules=st-moe},expert-parallel{via=ring},"
    "lower-collectives,strip-sharding": ["reassociation", "exact", "exact", "reassociation"],
    "specialize{mode=train capacity-factor=1.0 groups=8},"
    "annotate-sharding{mesh=data:4 rules=st-moe},expert-parallel{via=capacity chunks=2},"
    "lower-collectives": ["approximate", "exact", "reassociation", "exact"],
}


@pytest.mark.parametrize("pipeline", KEPT)
def test_promises_are_kept(pipeline):
    checked = check_pipeline(model("mixtral_gqa"), Pipeline.parse(pipeline))
    assert [c.promise.kind for c in checked] == KEPT[pipeline]
    assert all(c.measured <= 1e-12 for c in checked if c.promise.kind != "approximate")


def test_slots_that_are_returned_are_numbered_in_other_groups():
    shard = "annotate-sharding{mesh=data:2,expert:2 rules=expert-parallel,data-parallel}"
    assert run(model("mixtral_gqa"), shard).preserves.kind == "reassociation"
    promise = run(model("mixtral_gqa"), f"trace-routing,{shard}").preserves
    assert promise.kind == "approximate"
    assert "slots, which are outputs" in promise.reason
