"""Pairs of graphs that a prover took for equal once, and which the reference tells apart."""

from __future__ import annotations

import pytest
from moecc_passes.cleanup import CsePass

from moecc.ir import Graph, parse
from moecc.prove import prove
from moecc.rewrite.passes import Context

from ..mutants import meshes  # noqa: TID252
from .judge import difference
from .mutations import wrong_tables


def graph(*lines: str) -> Graph:
    """Return the graph of some lines of text."""
    body = "\n".join(f"  {line}" for line in lines)
    return parse(f"moecc 1\ngraph model {{\n{body}\n}}\n")


def is_told_apart(before: Graph, after: Graph, *, exact: bool = False) -> bool:
    """Return whether the reference sees a difference, and the prover proves none."""
    assert difference(before, after, exact=exact, thorough=True) is not None
    return prove(before, after, exact=exact).status != "proved"


def test_an_operation_is_no_function_of_indices_of_its_name():
    inputs = "input %x : f32[one=1, embed=4]", "input %y : f32[one=1, embed=4]"
    before = graph(*inputs, "%a = equal %x, %y : pred[one=1, embed=4]", "output o = %a")
    after = graph(*inputs, "%a = equal %y, %y : pred[one=1, embed=4]", "output o = %a")
    assert is_told_apart(before, after, exact=True)


def test_a_moment_is_over_the_axis_that_it_names():
    def mean_of(source: str) -> Graph:
        return graph(
            "input %x : f32[b=3]",
            f"param %w : f32[b=3] = mean({source}, keep=(b))",
            "%y = mul %x, %w : f32[b=3]",
            "output y = %y",
        )

    rows = 'source("w" : f32[a=3, b=3])'
    columns = f"rename(rename(rename({rows}, a=t), b=a), t=b)"
    assert is_told_apart(mean_of(rows), mean_of(columns))


def test_a_tie_that_rounding_makes_refutes_nothing():
    types = "f32[batch=B, embed=4]"
    choice = "i32[batch=B, choice=2], f32[batch=B, choice=2]"
    first = graph(
        f"input %x : {types}",
        f"%a = scale %x {{by=1e-17}} : {types}",
        f"%e, %g = route %a {{top_k=2, axis=embed}} : {choice}",
        "output e = %e",
    )
    second = graph(
        f"input %x : {types}",
        f"%a = scale %x {{by=1e-17}} : {types}",
        f"%b = exp %a : {types}",
        f"%e, %g = route %b {{top_k=2, axis=embed}} : {choice}",
        "output e = %e",
    )
    assert prove(first, second).status != "refuted"
    assert prove(second, first).status != "refuted"


def test_a_weight_that_is_rounded_is_refuted():
    def scaled(weight: str) -> Graph:
        return graph(
            "input %x : f32[b=3]",
            f"param %w : f32[b=3] = {weight}",
            "%y = mul %x, %w : f32[b=3]",
            "output y = %y",
        )

    before = scaled('source("w" : f32[b=3])')
    rounded = scaled('cast(cast(source("w" : f32[b=3]), bf16), f32)')
    narrow = scaled('cast(source("w" : bf16[b=3]), f32)')
    wide = scaled('cast(cast(source("w" : f32[b=3]), f64), f32)')
    assert prove(before, rounded).status == "refuted"
    assert prove(before, narrow).status == "refuted"
    assert prove(before, wide).status != "refuted"


@pytest.mark.parametrize(
    "name", [*meshes.TABLES, *(n for n in meshes.COLLECTIVES if n != "reduce everywhere")]
)
def test_a_wrong_row_of_a_sharding_table_is_refuted_where_it_is(name):
    op = meshes.TABLES[name].op if name in meshes.TABLES else "shard"
    op = "all_" if name == "gather outermost" else op
    for item in wrong_tables(4, 0, only=name):
        with meshes.wrong_row(name):
            if difference(item.before, item.after, 0) is None:
                continue
            verdict = prove(item.before, item.after)
        assert verdict.status == "refuted"
        assert f"= {op}" in verdict.node
        return
    raise AssertionError("no graph shows it")


@pytest.mark.parametrize("name", ["input x", "parameter u"])
def test_a_tensor_is_no_input_or_parameter_of_its_name(name):
    def read(weight: str, value: str) -> Graph:
        types = "f32[b=3]"
        lines = f"param %w : {types}{weight}", f"param %u : {types}", f"input %x : {types}"
        return graph(*lines, f"%y = add %{value}, %w : {types}", "output y = %y")

    weight, other = f' = source("{name}" : f32[b=3])', name[-1]
    before, after = read(weight, other), read(weight, "w")
    for exact in (False, True):
        assert is_told_apart(before, after, exact=exact)


@pytest.mark.parametrize(("before", "after"), [("g", "quarter"), ("i", "k")])
def test_hidden_scores_are_no_equal_scores(before, after):
    def returning(value: str) -> Graph:
        types, choice = "f32[batch=B, expert=4]", "i32[batch=B, choice=1], f32[batch=B, choice=1]"
        return graph(
            f"input %x : {types}",
            "input %keep : pred[batch=B]",
            "%zero = constant {value=0.0} : f32[]",
            f"%zeros = broadcast %zero, %x : {types}",
            f"%keeps = broadcast %keep, %x : pred{types[3:]}",
            f"%m = mask %zeros, %keeps : {types}",
            f"%e, %g = route %m {{gates=sparsemixer, top_k=1}} : {choice}",
            "%q = constant {value=0.25} : f32[]",
            "%quarter = broadcast %q, %g : f32[batch=B, choice=1]",
            f"%i, %j = route %x, %m {{gates=sigmoid, top_k=1, using=bias}} : {choice}",
            f"%k, %l = route %x {{gates=sigmoid, top_k=1}} : {choice}",
            f"output y = %{value}",
        )

    assert is_told_apart(returning(before), returning(after))


@pytest.mark.parametrize("number", range(1, 4))
def test_no_axis_has_the_name_of_a_bound_index(number):
    axis = f"_{number}"
    inputs = f"input %x : f32[{axis}=4]", "input %z : f32[b=4]"
    before = graph(
        *inputs,
        "%s = sum %z {axes=b} : f32[]",
        f"%y = mul %x, %s : f32[{axis}=4]",
        "output y = %y",
    )
    after = graph(
        *inputs,
        f"%r = rename %z {{axis=b, to={axis}}} : f32[{axis}=4]",
        f"%m = mul %x, %r : f32[{axis}=4]",
        f"%s = sum %m {{axes={axis}}} : f32[]",
        f"%y = broadcast %s, %x : f32[{axis}=4]",
        "output y = %y",
    )
    assert is_told_apart(before, after)


def test_regions_of_another_program_are_no_equal_regions():
    regions = [f"%{n} = jax %x {{into=(b=3), lines=f.py}} : f32[b=3]" for n in "pq"]
    before, after = (
        graph("input %x : f32[b=3]", *regions, f"%y = sub %{a}, %{b} : f32[b=3]", "output y = %y")
        for a, b in ("pq", "qp")
    )
    assert prove(before, after).status != "proved"
    assert prove(before, before).status == "proved"
    CsePass().apply(before, Context())
    assert len(list(before)) == 3
