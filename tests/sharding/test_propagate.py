"""The one propagation: what it finds, that it changes nothing, and what reads it."""

from functools import cache
from math import prod

import pytest
from moecc_passes.annotate import lay
from sharding_cases import layer

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import F32, Builder, Graph, clone, print_graph, tensor
from moecc.ir.mesh import parse_mesh
from moecc.plan.memory import Sharding
from moecc.plan.search import layouts, meshes
from moecc.plan.workload import make_batch, workload
from moecc.presets import preset_config
from moecc.sharding.assign import Assigner, cuts_of, sites_of
from moecc.sharding.collectives import sent, steps
from moecc.sharding.rules import read_layouts

from .meshes import assigner, gradients_of, propagated

MEGATRON = ("batch = data", "mlp = model", "kv_head = model ?", "q = model ?")
FEW = {
    "mixtral-8x7b": {"num_hidden_layers": 2},
    "st-moe-l": {
        "num_layers": 2, "num_decoder_layers": 2,
        "sparse_encoder_layers": [1], "sparse_decoder_layers": [1],
    },
}  # fmt: skip


@cache
def model(name):
    return build(parse_config({**preset_config(name), **FEW[name]}))


def block():
    """Return a feed-forward block behind a norm, with its residual."""
    graph = Graph("block")
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F32, batch="B", seq="S", embed=16))
    scale = graph.param("scale", tensor(F32, embed=16))
    up = graph.param("up", tensor(F32, mlp=64, embed=16))
    down = graph.param("down", tensor(F32, embed=16, mlp=64))
    n = b.rms_norm(x, scale, axis="embed", name="n")
    h = b.silu(b.contract(n, up, over="embed", name="h"))
    y = b.contract(h, down, over="mlp", name="y")
    graph.set_output("z", b.add(x, y, name="z"))
    return graph


def collectives(reshard):
    """Return what is sent for a reshard: operations, mesh axes and types."""
    return list(sent(reshard.source, steps(reshard.source, reshard.target)))


def test_a_sum_over_sharded_neurons_is_carried_out_at_once_for_all():
    graph = block()
    before = print_graph(graph)
    found = propagated(graph, assigner("data:4,model:2", *MEGATRON))
    assert print_graph(graph) == before, "nothing is written"
    x, h, y, z = (graph.value(n) for n in "xhyz")
    assert str(found.types[h]) == "f32[batch@data=B, seq=S, mlp@model=64]"
    assert str(found.types[y]) == "f32[batch@data=B, seq=S, embed=16] unreduced(model)"
    (summed,) = found.reshards
    assert summed.is_sum
    assert summed.value is y
    assert found.visible[y] == summed
    assert found.operands[z.node] == (x, summed)
    assert [r.axis for r in summed.rules] == ["mlp"]
    assert [(op, mesh) for op, mesh, _ in collectives(summed)] == [("all_reduce", ("model",))]


def test_a_parameter_is_gathered_from_where_it_is_stored():
    graph = block()
    found = propagated(graph, assigner("fsdp:4", "batch = fsdp", "param embed = fsdp ?"))
    up = graph.value("up")
    assert str(found.types[up]) == "f32[mlp=64, embed@fsdp=16]"
    assert str(found.wanted[up]) == "f32[mlp=64, embed=16]"
    assert found.types[graph.value("scale")].is_sharded is False, "vectors are small"
    reshards = {reshard.value.name: reshard for reshard in found.reshards}
    assert reshards.keys() == {"up", "down"}
    assert collectives(reshards["up"]) == [("all_gather", ("fsdp",), found.wanted[up])]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("data:2,model:2", "tensor-parallel"),
        ("fsdp:2,expert:2,model:2", "fsdp,expert-parallel,tensor-parallel,zero-expert"),
        ("data:4", "st-moe"),
    ],
)
def test_the_pass_writes_what_propagation_finds(name, mesh, rules):
    graph = clone(model(name))
    for node in graph:
        if node.op.assigns_slots:
            node.attrs["groups"] = 16
    graph, read = clone(graph), read_layouts(rules.split(","))
    found = propagated(graph, Assigner(parse_mesh(mesh), read))
    nodes = list(graph)
    lay(graph, parse_mesh(mesh), read)
    for value in (*graph.inputs.values(), *graph.params.values()):
        assert value.type == found.types[value]
    for node in nodes:
        assert [v.type for v in node.results] == [found.types[v] for v in node.results]
        assert [v.type for v in node.operands] == found.used(node)
    written = [n for n in graph if n.op.name == "reshard"]
    assert len(written) == len(found.reshards)
    assert [n.result.type for n in written] == [r.target for r in found.reshards]


def test_gradients_are_summed_where_an_operand_has_no_axis_that_is_sharded():
    graph = block()
    sums = gradients_of(graph, propagated(graph, assigner("data:4,model:2", *MEGATRON)))
    axes = {value.name: axes for value, axes in sums.params.items()}
    assert axes == {name: {"data"} for name in ("scale", "up", "down")}
    (summed,) = sums.values
    assert summed.site.operands[summed.number].name == "n", "made of it, a part on each device"
    assert summed.axes == {"model"}


def test_what_parameters_alone_make_is_summed_in_their_gradients():
    """A table of biases is looked up by positions, and its rows meet the batch afterwards."""
    graph = model("st-moe-l")
    by = Assigner(
        parse_mesh("data:4,model:2"), read_layouts(["st-moe"]), frozenset(("group", "groups"))
    )
    sums = gradients_of(graph, propagated(graph, by))
    (table,) = (
        v for v in sums.params if "relative_attention_bias" in v.name and "encoder" in v.name
    )
    assert sums.params[table] == {"data"}
    assert all("relative" not in s.site.operands[s.number].name for s in sums.values)


def test_cuts_are_read_from_the_axes_that_one_dimension_has():
    graph = Graph("cuts")
    b = Builder(graph)
    x = graph.input("x", tensor(F32, batch="B", q=24, kv_head=2, head=3))
    cut = b.split(x, axis="q", into=(("a", 6), ("c", 4)))
    graph.set_output("y", b.merge(cut, axes=("kv_head", "head"), into="joined"))
    assert cuts_of(sites_of(graph)) == {"q": {6}, "joined": {2}}


def test_rows_are_brought_to_their_experts_and_back():
    graph = layer("capacity")
    by = Assigner(parse_mesh("data:4"), read_layouts(["st-moe"]))
    found = propagated(graph, by)
    kinds = [[op for op, _, _ in collectives(r)] for r in found.reshards if "slot" in r.source]
    assert kinds == [["all_to_all"], ["all_to_all"]]
    sharded = prod(by.mesh.size(a.mesh) for a in found.reshards[0].target)
    assert sharded == 4


@pytest.mark.parametrize("name", FEW)
def test_a_value_by_itself_has_as_much_on_a_device_as_in_its_layer(name):
    """The plan's memory looks at shapes alone."""
    graph = model(name)
    lengths = (64, 32) if name == "st-moe-l" else (64,)
    work = workload(graph, make_batch(graph, 8, 64 * sum(lengths), lengths))
    values = [
        (value, shape)
        for part in work.parts
        for node, step in zip(part.nodes, part.steps, strict=True)
        for value, shape in zip(node.results, step.results, strict=True)
        if value.type.dtype.is_float and "batch" in shape.names
    ]
    for layout in (found for mesh in meshes(8) for found in layouts(mesh, work)):
        local = Sharding.of(layout, work)
        # A table that is looked up again, and stored over an axis that the batch leaves free, is
        # not gathered: what is looked up is sharded as it is.
        free = layout.replicated and layout.dense_weights == "split"
        for value, shape in values:
            shards = layout.shards_of(local.sharded.propagation.types[value])
            alone = shape.elements / local.values.elements(shape)
            wrong = f"{layout.names} {layout.mesh} {value}"
            assert shards == alone or (free and shards > alone), wrong
