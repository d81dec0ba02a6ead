"""The rules that stand for a layout of the plan place as many bytes as the plan says."""

from functools import cache
from math import prod

import pytest
from tiers import some

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir.mesh import mesh_of, parse_mesh
from moecc.ir.structure import clone, local_size
from moecc.plan.memory import Sharding
from moecc.plan.search import layouts, meshes
from moecc.plan.workload import make_batch, workload
from moecc.presets import preset_config
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.layout import Layout
from moecc.sharding.rules import read_layout
from tests.support.layouts import layout_text

DEVICES = 16
FEW = {
    "mixtral-8x7b": {"num_hidden_layers": 1},
    "llama-3.1-8b": {"num_hidden_layers": 1},
    "st-moe-l": {
        "num_layers": 2, "num_decoder_layers": 2,
        "sparse_encoder_layers": [1], "sparse_decoder_layers": [1],
    },
}  # fmt: skip


@cache
def known(model):
    graph = build(parse_config({**preset_config(model), **FEW[model]}))
    lengths = (64, 32) if model.startswith("st-moe") else (64,)
    return graph, workload(graph, make_batch(graph, DEVICES, 64 * sum(lengths), lengths))


def held(model, layout):
    """Return the elements that a device holds of the laid graph: of matrices, of vectors."""
    graph = clone(known(model)[0])
    groups = layout.mesh.size(layout.batch_axes)
    passes = f"annotate-sharding{{mesh={layout.mesh} rules={','.join(layout.names)}}}"
    if layout.experts:
        passes = f"specialize{{groups={groups}}},{passes}"
    run_pipeline(graph, Pipeline.parse(passes))
    mesh = mesh_of(graph)
    assert mesh is not None
    shapes = [[local_size(a, a.size, mesh) for a in p.type.axes] for p in graph.params.values()]
    return sum(prod(s) for s in shapes if len(s) > 1), sum(s[0] for s in shapes if len(s) == 1)


@pytest.mark.parametrize("model", some(FEW, "mixtral-8x7b"))
def test_a_device_holds_what_the_plan_says(model):
    work = known(model)[1]
    wrong = []
    for layout in (found for mesh in meshes(DEVICES) for found in layouts(mesh, work)):
        local = Sharding.of(layout, work)
        matrices = sum(n * local.stored(w) for w, n in work.weights if len(w.shape.axes) > 1)
        vectors = sum(n * local.stored(w) for w, n in work.weights if len(w.shape.axes) == 1)
        found = held(model, layout)
        if found != (matrices, vectors):
            wrong.append((str(layout.mesh), layout.dense_weights, layout.names, found,
                          (matrices, vectors)))  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize(
    ("lines", "stored"),
    [
        (("expert with slot = rows", "group = rows"), ()),
        # What stands first takes the mesh axis: experts are everywhere, and gathered for use.
        (("group = rows", "expert with slot = rows"), ("rows",)),
    ],
)
def test_rules_of_a_file_are_planned_and_laid_alike(tmp_path, lines, stored):
    """Under mesh axes of other names: rows and columns."""
    file = tmp_path / "grid.rules"
    file.write_text(layout_text("batch = rows", *lines, "mlp = columns", "param embed = rows ?"))
    work = known("mixtral-8x7b")[1]
    layout = Layout.ruled(parse_mesh("rows=8,columns=2"), work.experts, (str(file),))
    local = Sharding.of(layout, work)
    planned = sum(n * local.stored(w) for w, n in work.weights)
    assert planned == sum(held("mixtral-8x7b", layout))
    weight = next(w for w, _ in work.weights if w.of_experts)
    sharded = local.sharded
    at_rest, in_use = (
        {m for a in t for m in a.mesh} for t in (sharded.stored(weight), sharded.used(weight))
    )
    assert at_rest - in_use == set(stored)
    assert layout.expert_axes == (("rows",) if not stored else ())


def test_files_of_rules_are_bounded(tmp_path):
    with pytest.raises(InputError, match="not a regular file"):
        read_layout("/dev/zero")
    file = tmp_path / "my.rules"
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InputError, match="the layout cannot be read"):
        read_layout(str(file))
    # Neither long lines of the earlier format nor many take long.
    file.write_bytes(b"batch = " + b" " * (1 << 19) + b"!\n" + b"x\n" * (1 << 17))
    with pytest.raises(InputError, match="not TOML") as caught:
        read_layout(str(file))
    assert len(str(caught.value)) < 100_000
    file.write_bytes(b"batch = \xff")
    with pytest.raises(InputError, match="cannot be read"):
        read_layout(str(file))
