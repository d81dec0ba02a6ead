"""The rules that stand for a layout of the plan place as many bytes as the plan says."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod
from typing import Any

import pytest

from moecc.errors import InputError
from moecc.families import build
from moecc.families.configs import parse_config
from moecc.ir import Graph
from moecc.ir.local import local_type
from moecc.ir.mesh import mesh_of
from moecc.ir.structure import clone
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.plan.batches import make_batch
from moecc.plan.layout import DENSE_WEIGHTS, Layout, problems
from moecc.plan.meshes import meshes, plan_mesh
from moecc.plan.rules import rules_of
from moecc.plan.sharding import Sharding
from moecc.plan.workload import Workload, workload
from moecc.presets import preset_config

DEVICES = 16
FEW: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"num_hidden_layers": 1},
    "llama-3.1-8b": {"num_hidden_layers": 1},
    "st-moe-l": {
        "num_layers": 2, "num_decoder_layers": 2,
        "sparse_encoder_layers": [1], "sparse_decoder_layers": [1],
    },
}  # fmt: skip


@cache
def known(model: str) -> tuple[Graph, Workload]:
    graph = build(parse_config({**preset_config(model), **FEW[model]}))
    lengths = (64, 32) if model.startswith("st-moe") else (64,)
    return graph, workload(graph, make_batch(graph, DEVICES, 64 * sum(lengths), lengths))


def layouts(model: str) -> list[Layout]:
    _, work = known(model)
    found = []
    for mesh, dense, replicated in product(meshes(DEVICES), DENSE_WEIGHTS, (False, True)):
        layout = Layout(mesh, work.experts, dense, replicated)
        split = bool(layout.expert_axes) or "data" in mesh.names
        fits = split if dense == "split" else True
        if replicated and layout.expert_axes != ("expert",):
            continue
        if fits and not any(problems(layout, work)):
            found.append(layout)
    return found


def held(model: str, layout: Layout) -> tuple[int, int]:
    """Return the elements that a device holds of the laid graph: of matrices, of vectors."""
    graph = clone(known(model)[0])
    groups = layout.mesh.size(layout.batch_axes)
    passes = f"annotate-sharding{{mesh={layout.mesh} rules={','.join(rules_of(layout))}}}"
    if layout.experts:
        passes = f"specialize{{groups={groups}}},{passes}"
    run_pipeline(graph, Pipeline.parse(passes))
    mesh = mesh_of(graph)
    assert mesh is not None
    shapes = [local_type(p.type, mesh).shape for p in graph.params.values()]
    return sum(prod(s) for s in shapes if len(s) > 1), sum(s[0] for s in shapes if len(s) == 1)


@pytest.mark.parametrize("model", FEW)
def test_a_device_holds_what_the_plan_says(model: str) -> None:
    work = known(model)[1]
    wrong = []
    for layout in layouts(model):
        local = Sharding(layout)
        matrices = sum(n * local.stored(w) for w, n in work.weights if len(w.shape.axes) > 1)
        vectors = sum(n * local.stored(w) for w, n in work.weights if len(w.shape.axes) == 1)
        found = held(model, layout)
        if found != (matrices, vectors):
            wrong.append((str(layout.mesh), layout.dense_weights, rules_of(layout), found,
                          (matrices, vectors)))  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize(
    ("mesh", "experts", "dense", "replicated", "rules"),
    [
        ("data=64,model=16", 64, "split", False, "st-moe,zero"),
        ("fsdp=8,expert=8", 8, "split", False, "fsdp,expert-parallel,zero-expert"),
        ("data=8,expert=8", 8, "whole", False, "expert-parallel"),
        ("data=8,expert=8,model=2", 8, "whole", True, "expert-replicated,tensor-parallel"),
        ("data=16", 8, "split", False, "data-parallel,zero"),
        ("fsdp=4,model=4", 0, "whole", False, "fsdp,tensor-parallel"),
        ("model=4", 0, "whole", False, "tensor-parallel"),
    ],
)
def test_the_names_of_a_layout(
    mesh: str, experts: int, dense: str, replicated: bool, rules: str
) -> None:
    assert ",".join(rules_of(Layout(plan_mesh(mesh), experts, dense, replicated))) == rules


def test_rows_of_data_have_tokens_of_their_own() -> None:
    with pytest.raises(InputError, match="cannot all have the same tokens"):
        rules_of(Layout(plan_mesh("data=8"), 8, "whole", replicated=True))
