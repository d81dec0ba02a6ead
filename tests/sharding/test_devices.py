"""The law of sharding: what devices compute together is what the graph means on global values."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from moecc_passes.annotate import LowerCollectivesPass, lay

from moecc.errors import InputError
from moecc.ir import clone, equal, parse, verify
from moecc.ir.devices import simulate
from moecc.ir.mesh import parse_mesh
from moecc.rewrite.passes import Context
from moecc.sharding.rules import LayoutRule
from moecc.testing import graphs, inputs_for, params_for, run_reference, sizes_for
from moecc.testing.oracle import EDGE, amplified, rerun_of

from .meshes import check_every_value, check_on_devices, data_for, largest_difference, model, run

MODELS = [
    ("llama_gqa", "", "data:4,model:2", "tensor-parallel"),
    ("llama_gqa", "", "data:4,model:2", "tensor-parallel,sequence-parallel,zero"),
    ("llama_gqa", "", "data:2,fsdp:4", "data-parallel,fsdp"),
    ("t5_relu_tied", "", "data:2,model:2", "tensor-parallel,sequence-parallel"),
    ("mixtral_gqa", "", "data:4,model:2", "st-moe"),
    ("qwen2_moe_plain", "", "data:2,expert:2", "expert-parallel"),
    ("mixtral_gqa", "specialize{mode=train capacity-factor=0.6 groups=4},add-losses{metrics=true}",
     "data:4", "st-moe"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "before", "mesh", "rules"), MODELS)
def test_models_compute_the_same_on_a_mesh(case, before, mesh, rules):
    graph = model(case)
    run(graph, before)
    whole = clone(graph)
    run(graph, f"annotate-sharding{{mesh={mesh} rules={rules}}},lower-collectives")
    check_on_devices(graph, whole, *data_for(whole, batch=8))


@st.composite
def layouts(draw, graph):
    """Draw rules for the axes of a graph, each optional, over the mesh axes a and b."""
    values = [*graph.inputs.values(), *graph.params.values()]
    values += [v for n in graph for v in n.results]
    names = sorted({n for v in values for n in v.type.names})
    picked = draw(st.lists(st.sampled_from(names), max_size=6, unique=True)) if names else []
    meshes = st.sampled_from([("a",), ("b",), ("a", "b"), ("b", "a")])
    return [
        LayoutRule(n, draw(meshes), stored=draw(st.integers(0, 5)) == 0, optional=True)
        for n in picked
    ]


@given(graphs(), st.data())
def test_random_graphs_compute_the_same_on_a_mesh(graph, data):
    whole = clone(graph)
    rules = data.draw(layouts(graph))
    lay(graph, parse_mesh("a:2,b:2"), rules)
    LowerCollectivesPass().apply(graph, Context())
    verify(graph)
    sizes = {n: 4 * s for n, s in sizes_for(whole, 0).items()}
    params, inputs = params_for(whole, 0, sizes), inputs_for(whole, 0, sizes)
    found = simulate(graph, params, inputs)
    expected = run_reference(whole, params=params, inputs=inputs)
    try:
        check_every_value(graph, params, inputs, found)
        run(graph, "strip-sharding")
        actual = run_reference(graph, params=params, inputs=inputs)
        assert largest_difference(expected, actual) <= 1e-12
    except AssertionError:
        # Rounding breaks ties in another way, and devices add in another order.
        moved = amplified(rerun_of(whole, params, inputs), expected, EDGE)
        assume(all(np.isfinite(far).all() for far in moved.values()))
        raise


TEXT = """moecc 1
graph g {
  attr mesh = {"data": 2, "model": 2}
  input %x : f32[batch@data=B, embed=6]
  input %h : bf16[batch@data=B, mlp@model=8]
  param %w : bf16[mlp@model=8, embed=6]
"""

SENT = {
    # bytes that a device sends, with B = 4
    "%v = all_gather %x {axis=batch, mesh=data} : f32[batch=B, embed=6]": 2 * 6 * 4,
    "%v = shard %x {axis=embed, mesh=model} : f32[batch@data=B, embed@model=6]": 0,
    "%v = all_to_all %x {mesh=data, split=embed, gather=batch} : f32[batch=B, embed@data=6]":
        2 * 6 * 4 // 2,
    "%s = contract %h, %w {over=mlp} : bf16[batch@data=B, embed=6] unreduced(model)\n"
    "  %v = all_reduce %s {mesh=model} : bf16[batch@data=B, embed=6]": 2 * 6 * 2,
    "%s = contract %h, %w {over=mlp} : bf16[batch@data=B, embed=6] unreduced(model)\n"
    "  %v = reduce_scatter %s {axis=embed, mesh=model} : bf16[batch@data=B, embed@model=6]":
        2 * 6 * 2 // 2,
}  # fmt: skip


@pytest.mark.parametrize("line", SENT)
def test_the_bytes_that_a_device_sends(line):
    graph = parse(f"{TEXT}  {line}\n  output y = %v\n}}")
    verify(graph)
    found = simulate(graph, *data_for(graph, batch=4))
    (op,) = (n.op.name for n in graph if n.op.places)
    assert found.sent_bytes.get(op, 0) == SENT[line]
    assert all(t.sent_bytes == (SENT[line],) * 4 for t in found.traffic)


def test_ragged_rows_are_counted_as_they_are():
    graph = model("mixtral_gqa")
    run(graph, "trace-routing,annotate-sharding{mesh=data:4 rules=st-moe},lower-collectives")
    found = simulate(graph, *data_for(graph, batch=8))
    there, back = [t for t in found.traffic if "layers.0" in t.where]
    experts = found.outputs["trace.layers.0.ffn.experts"].reshape(4, -1)
    # How many rows go from each device, by the first axis, to the expert of each other one.
    counts = (experts[:, None] == np.arange(4)[:, None]).sum(2) * (1 - np.eye(4, dtype=int))
    assert there.sent_bytes == tuple(counts.sum(1) * 16 * 4)
    assert back.sent_bytes == tuple(counts.sum(0) * 16 * 4)


def test_what_cannot_run_is_told():
    graph = model("llama_gqa")
    params, inputs = data_for(graph, batch=6)
    with pytest.raises(InputError, match="has no mesh"):
        simulate(graph, params, inputs)
    run(graph, "annotate-sharding{mesh=data:4,model:2 rules=tensor-parallel}")
    with pytest.raises(InputError, match="not lowered to collectives yet"):
        simulate(graph, params, inputs)
    run(graph, "lower-collectives")
    with pytest.raises(InputError, match="'batch' does not divide over the mesh") as caught:
        simulate(graph, params, inputs)
    (problem,) = caught.value.problems
    assert (problem.where, problem.expected, problem.hint) == (
        "%tokens", "a multiple of 4 (data)", "3 parts would, or a size of 8"
    )  # fmt: skip


def test_what_goes_from_layer_to_layer_is_kept_in_parts():
    """Each run gathers it, and so does what follows: half of the stream from the one neighbour."""
    whole = model("mixtral_gqa")
    laid = clone(whole)
    run(laid, "annotate-sharding{mesh=data:4,model:2 rules=st-moe},lower-collectives")
    simulations = []
    for split in ("", "{split=model}"):
        graph = clone(laid)
        run(graph, f"roll-layers{split}")
        params, inputs = data_for(graph, batch=8)
        simulations.append(simulate(graph, params, inputs))
        (scan,) = (node for node in graph if node.body is not None)
        stream = scan.operands[0]
        assert stream.type["embed"].mesh == (("model",) if split else ())
    expected = run_reference(whole, params=data_for(whole, batch=8)[0], inputs=inputs)
    assert largest_difference(expected, simulations[1].outputs) <= 1e-12
    sent, more = (dict(simulation.sent_bytes) for simulation in simulations)
    runs, embed = scan.attrs["over"][0][1], stream.type["embed"].size
    tokens = inputs["tokens"].size // 4
    gathered = more.pop("all_gather") - sent.pop("all_gather", 0)
    assert gathered == (runs + 1) * tokens * embed // 2 * 4
    assert sent == more
    run(graph, "strip-sharding")
    run(laid, "roll-layers,strip-sharding")
    assert equal(graph, laid)


SPLIT = {
    # what sums or counts along an axis that lies split
    "sum": "%s = sum %x {axes=batch} : f32[embed=6] unreduced(data)",
    "mean": "%s = mean %x {axes=(batch, embed)} : f32[] unreduced(data)",
    "contract": "%s = contract %h, %w {over=mlp} : bf16[batch@data=B, embed=6] unreduced(model)",
    "embedding": "%s = embedding %w, %i {axis=mlp} : bf16[batch@data=B, embed=6] unreduced(model)",
    "positions": "%s = positions %x {axis=batch} : i32[batch@data=B]",
    "random": "%s = random_normal %k, %h : bf16[batch@data=B, mlp@model=8]",
    "split": "%s = split %h {axis=mlp, into=(n=4, m=2)} : bf16[batch@data=B, n@model=4, m=2]",
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_devices_know_which_part_is_theirs(name):
    inputs = "  input %i : i32[batch@data=B]\n  input %k : key[]\n"
    reduced = SPLIT[name].partition("unreduced(")[2].strip(")")
    kind = SPLIT[name].partition(" : ")[2].partition(" unreduced")[0]
    line = f"  %r = all_reduce %s {{mesh={reduced}}} : {kind}\n" if reduced else ""
    last = "r" if reduced else "s"
    graph = parse(f"{TEXT}{inputs}  {SPLIT[name]}\n{line}  output y = %{last}\n}}")
    verify(graph)
    check_on_devices(graph, graph, *data_for(graph, batch=4))
