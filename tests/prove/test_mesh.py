"""Graphs on a mesh: devices compute the values of the graph of one device, or are refuted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from sharding_cases import MESHES, layer, legal_cases

from moecc.ir import Graph, Value, clone, parse
from moecc.ir.mesh import parse_mesh
from moecc.prove import prove
from moecc.prove.mesh import Devices
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing.generate import random_graph, random_sharding
from moecc.testing.weights import Decisions
from moecc.translate.importing import import_checkpoint
from tests.support.tiers import few

from ..mutants import meshes  # noqa: TID252
from ..proof.cells import opened  # noqa: TID252


@pytest.mark.parametrize(("mesh", "rules"), MESHES[-2:])
def test_every_way_to_the_experts_is_proved(mesh: str, rules: str) -> None:
    """The last two meshes have every way and kind of slots."""
    for case, graph in legal_cases(mesh, rules):
        assert prove(layer(case.slots), graph).status == "proved", case


@pytest.mark.parametrize(("mesh", "rules"), few(MESHES))
def test_devices_of_every_legal_case_are_proved(mesh: str, rules: str) -> None:
    for case, graph in legal_cases(mesh, rules):
        assert Devices().parting(graph) is None, case


@cache
def imported(name: str) -> Graph:
    return import_checkpoint(opened(name))


def piped(graph: Graph, pipeline: str) -> Graph:
    """Return a copy of a graph after a pipeline."""
    after = clone(graph)
    run_pipeline(after, Pipeline.parse(pipeline))
    return after


LAYOUTS = (
    ("llama_gqa", "", "data:2,model:2 rules=tensor-parallel,sequence-parallel,zero"),
    ("llama_gqa", "", "data:2,fsdp:2 rules=data-parallel,fsdp"),
    ("vit_plain", "", "data:2 rules=data-parallel"),
    ("whisper_plain", "", "data:2 rules=data-parallel"),
    ("mixtral_gqa", "specialize{groups=4},add-losses", "data:2,expert:2 rules=expert-parallel"),
    ("llama_gqa", "upcycle{experts=4 slots=capacity},specialize{groups=4},add-losses",
     "data:2 rules=st-moe"),
)  # fmt: skip


ROLLED = ("", ",roll-layers")


@pytest.mark.parametrize(
    ("name", "first", "layout", "rolled"),
    few([(*row, ROLLED[(n + m) % 2]) for m in range(2) for n, row in enumerate(LAYOUTS)], 6),
)
def test_models_on_a_mesh_are_proved(name: str, first: str, layout: str, rolled: str) -> None:
    before = piped(imported(name), first) if first else imported(name)
    after = piped(before, f"annotate-sharding{{mesh={layout}}},lower-collectives{rolled}")
    verdict = prove(before, after)
    assert verdict.status == "proved", (verdict.node, verdict.terms)


@pytest.mark.parametrize("rolled", ["", ",roll-layers"])
def test_a_missing_all_reduce_is_refuted_where_it_is(rolled: str) -> None:
    before = imported("llama_gqa")
    laid = "annotate-sharding{mesh=model:2 rules=tensor-parallel},lower-collectives"
    with meshes.wrong_row("contract"):
        verdict = prove(before, piped(before, laid + rolled))
    assert verdict.status == "refuted"
    assert "= contract @layers." in verdict.node
    assert ".attention" in verdict.node


MESHES = ("a:2,b:2", "a:3,b:2", "a:4,b:1")


@pytest.mark.parametrize("start", few(range(0, 1500, 75)))
def test_devices_of_random_shardings_are_proved(start: int) -> None:
    devices = Devices()
    for number in range(start, start + 75):
        graph, mesh = random_graph(number, max_steps=5), MESHES[number % len(MESHES)]
        laid = random_sharding(graph, Decisions(number), parse_mesh(mesh))
        # Unknown: groups of a size, and windows over a sharded axis that is summed.
        is_open = any(n.attrs.get("group_size") or n.op.name == "convolve" for n in laid)
        assert is_open or devices.parting(laid) is None, number


def on_a_mesh(*lines: str) -> Graph:
    """Return a graph on two by two devices."""
    body = "".join(f"  {line}\n" for line in lines)
    return parse(f'moecc 1\ngraph g {{\n  attr mesh = {{"a": 2, "b": 2}}\n{body}}}\n')


def moved(before: str, node: str, after: str) -> Graph:
    """Return a graph that moves its input."""
    return on_a_mesh(f"input %x : f32[{before}]", f"%y = {node} : f32[{after}]", "output y = %y")


@pytest.mark.parametrize(
    "move",
    [
        ("batch@a*b=B, embed=8", "all_gather %x {axis=batch, mesh=b}", "batch@a=B, embed=8"),
        ("batch@a*b=B, embed=8", "all_gather %x {axis=batch, mesh=(a, b)}", "batch=B, embed=8"),
        ("batch@a=B, embed=8", "shard %x {axis=batch, mesh=b}", "batch@a*b=B, embed=8"),
        ("batch@a*b=B, embed=8", "all_to_all %x {mesh=b, split=embed, gather=batch}",
         "batch@a=B, embed@b=8"),
    ],
)  # fmt: skip
def test_a_collective_gives_what_its_type_says(move: tuple[str, str, str]) -> None:
    assert Devices().parting(moved(*move)) is None


SUM = (
    "input %x : f32[batch=B, embed@a*b=8]",
    "%s = sum %x {axes=embed} : f32[batch=B] unreduced(a, b)",
    "%y = all_reduce %s {mesh=a} : f32[batch=B]",
    "output y = %y",
)
WRONG = {
    "gather outermost": lambda: moved(
        "batch@a*b=B", "all_gather %x {axis=batch, mesh=b}", "batch@b=B"
    ),
    "scatter outermost": lambda: moved("batch@a=B", "shard %x {axis=batch, mesh=b}", "batch@b*a=B"),
    "scatter elsewhere": lambda: moved(
        "batch=8, embed=8", "shard %x {axis=batch, mesh=b}", "batch=8, embed@b=8"
    ),
    "reduce everywhere": lambda: on_a_mesh(*SUM),
}


@pytest.mark.parametrize("name", meshes.COLLECTIVES)
def test_a_wrong_type_of_a_collective_is_found(name: str) -> None:
    with meshes.wrong_row(name):
        parting = Devices().parting(WRONG[name]())
    assert parting is not None
    assert parting[0].startswith("%y = ")


def test_no_device_is_given_a_summand() -> None:
    graph = on_a_mesh(
        "input %x : f32[batch=B] unreduced(a)", "%y = all_reduce %x {mesh=a} : f32[batch=B]",
        "output y = %y",
    )  # fmt: skip
    parting = Devices().parting(graph)
    assert parting is not None
    assert parting[0] == "%x"


@pytest.mark.parametrize(("axis", "is_right"), [("batch", True), ("tap", False), ("embed", True)])
def test_windows_of_a_shard(axis: str, is_right: bool) -> None:
    mesh = {name: "@a" if name == axis else "" for name in ("batch", "tap", "embed")}
    # A type that says nothing of the sharded axis, as if a device had read all of the weights.
    graph = on_a_mesh(
        f"input %x : f32[batch{mesh['batch']}=B, place=8, channel=2]",
        f"param %w : f32[tap=2, channel=2, embed{mesh['embed']}=4]",
        "%y = convolve %x, %w {over=channel, along=place, taps=tap} : "
        f"f32[batch{mesh['batch']}=B, place=7, embed{mesh['embed']}=4]",
        "output y = %y",
    )
    if axis == "tap":
        weight = graph.params["w"]
        axes = [replace(a, mesh=("a",)) if a.name == axis else a for a in weight.type.axes]
        weight.type = weight.type.with_axes(axes)
    assert (Devices().parting(graph) is None) == is_right


def test_shards_that_leave_a_part_out_are_found() -> None:
    def diagonal(value: Value) -> None:
        axes = (replace(a, mesh=("a",)) for a in value.type.axes)
        value.type = value.type.with_axes(axes)

    graph = moved("batch@a=B, embed=8", "shard %x {axis=embed, mesh=b}", "batch@a=B, embed@b=8")
    (node,) = graph
    node.attrs["mesh"] = ("a",)
    diagonal(node.result)
    parting = Devices().parting(graph)
    assert parting is not None
    assert parting[0].startswith("%y = ")
    diagonal(graph.inputs["x"])
    parting = Devices().parting(graph)
    assert parting is not None
    assert parting[0] == "%x"
