"""The collectives that a plan prices are those that the passes write into the graph."""

from collections import Counter
from functools import cache
from math import prod

import pytest
from sharding_cases import SPREAD, cases, layer
from tiers import few

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import clone
from moecc.ir.mesh import mesh_of, parse_mesh
from moecc.ir.ops.slots import assigner, capacity
from moecc.ir.traits import CollectiveKind
from moecc.plan.machines import parse_machine
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.time import Estimator
from moecc.plan.workload import Batch, workload
from moecc.presets import preset_config
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.layout import Layout
from moecc.sharding.vias import LOCAL
from moecc.types import F32, Extent

SIZES = {"B": 64, "S": 16, "T": 32}


def size_of(axis, type):
    """Return the global size of an axis; of ragged slots the mean."""
    if not isinstance(axis.size, Extent):
        return float(SIZES[axis.size] if isinstance(axis.size, str) else axis.size)
    node = assigner(axis.size.value)
    place, attrs = axis.size.value.type, node.attrs
    tokens = prod(int(size_of(place[n], place)) for n in attrs["tokens"]) // attrs["groups"]
    choices = prod(int(size_of(a, place)) for a in place if a.name not in attrs["tokens"])
    if axis.is_ragged:
        return tokens * choices / type["expert"].size
    return float(capacity(attrs, tokens, choices))


def bytes_of(type, mesh):
    elements = prod(size_of(a, type) / mesh.size(a.mesh) for a in type)
    return elements * F32.itemsize_bytes


def written(graph):
    """Return the collectives of a graph."""
    mesh = mesh_of(graph)
    found = Counter()
    for node in graph:
        if node.op.collective not in (None, CollectiveKind.LOCAL):
            axes = tuple(n for n in mesh.names if n in node.attrs["mesh"])
            found[node.op.name, axes, round(larger(node, mesh))] += 1
    return found


def larger(node, mesh):
    return max(bytes_of(v.type, mesh) for v in (*node.operands, *node.results))


def planned(graph, mesh, rules, via, sliced):
    """Return the collectives of a forward pass that the plan prices."""
    sizes = tuple((n, s) for n, s in SIZES.items() if n != "B")
    work = workload(graph, Batch(SIZES["B"], sizes))
    layout = Layout.ruled(mesh, work.experts, rules)
    estimator = Estimator(
        work, parse_machine(f"cpu:{mesh.devices}"), StepConfig("forward", dtype="f32")
    )
    found = Counter()
    for part in estimator.estimate(Strategy(layout, via, "index", "none", sliced)).parts:
        for one in part.collectives:
            found[one.op, one.axes, round(one.tensor_bytes)] += int(part.count * one.times)
    return found


def through(graph, pipeline):
    """Return what passes write into a copy of `graph`, or None where they refuse it."""
    copy = clone(graph)
    try:
        run_pipeline(copy, Pipeline.parse(pipeline))
    except InputError:
        return None
    return written(copy)


@pytest.mark.parametrize(("mesh", "rules"), few(SPREAD, 6))
@pytest.mark.parametrize("slots", ["capacity", "ragged"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_plan_prices_what_passes_write_into_a_sparse_layer(weighted, slots, mesh, rules):
    graph, compared = layer(slots, embed=32, mlp=64), 0
    if weighted:
        run_pipeline(graph, Pipeline.parse("weight-rows"))
    for case in cases():
        if (case.slots, case.mesh, case.rules) != (slots, mesh, rules) or "chunks" in case.way:
            continue
        expected = through(graph, case.pipeline)
        if expected is None:
            continue
        via, *options = case.way.removeprefix("via=").split(" ")
        names = tuple(rules.split(","))
        found = planned(graph, parse_mesh(mesh), names, via, "slice=model" in options)
        assert found == expected, case.way
        compared += 1
    assert compared


FEW = {
    "mixtral-8x7b": {"num_hidden_layers": 3},
    "llama-3.1-8b": {"num_hidden_layers": 3},
    "smollm2-135m": {"num_hidden_layers": 3},
    "st-moe-l": {
        "num_layers": 4, "num_decoder_layers": 4,
        "sparse_encoder_layers": [1, 3], "sparse_decoder_layers": [1, 3],
    },
}  # fmt: skip


@cache
def model(name):
    graph = build(parse_config({**preset_config(name), **FEW[name]}))
    if name == "st-moe-l":
        run_pipeline(graph, Pipeline.parse("specialize{groups=8}"))
    return graph


LAYOUTS = [
    ("mixtral-8x7b", "fsdp:2,expert:4", "fsdp,expert-parallel,zero-expert", "ragged"),
    ("mixtral-8x7b", "data:4,model:2", "st-moe,zero", "ring"),
    ("mixtral-8x7b", "data:2,expert:2,model:2", "expert-replicated,tensor-parallel", "replicated"),
    ("mixtral-8x7b", "expert:8", "expert-replicated,zero-expert", "replicated"),
    ("llama-3.1-8b", "fsdp:8", "fsdp", LOCAL),
    ("smollm2-135m", "fsdp:4,model:3", "fsdp,tensor-parallel", LOCAL),
    ("llama-3.1-8b", "fsdp:2,data:2,model:2", "fsdp,tensor-parallel,zero", LOCAL),
    ("llama-3.1-8b", "fsdp:4,model:2", "fsdp,tensor-parallel,sequence-parallel", LOCAL),
    (
        "mixtral-8x7b",
        "expert:4,model:2",
        "expert-parallel,tensor-parallel,sequence-parallel",
        "ragged",
    ),
    ("st-moe-l", "data:4,model:2", "st-moe,zero", "capacity slice=model"),
    ("st-moe-l", "fsdp:2,expert:4", "fsdp,expert-parallel", "ring"),
]


@pytest.mark.parametrize(("name", "mesh", "rules", "way"), LAYOUTS)
def test_a_plan_prices_what_passes_write_into_a_model(name, mesh, rules, way):
    """Every kind of layer, parameters that are gathered and sums over neurons included."""
    graph = model(name)
    chosen = f"expert-parallel{{via={way}}}," if way != LOCAL else ""
    passes = f"annotate-sharding{{mesh={mesh} rules={rules}}},{chosen}lower-collectives,cse"
    via, *options = way.split(" ")
    names = tuple(rules.split(","))
    found = planned(graph, parse_mesh(mesh), names, via, bool(options))
    assert found == through(graph, passes)
    assert found
