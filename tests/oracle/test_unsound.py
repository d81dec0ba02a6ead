"""Pairs of graphs that a prover took for equal once, and which the reference tells apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from moecc_passes.cleanup import CsePass
from safetensors.numpy import load_file, save_file

from moecc.errors import InputError
from moecc.ir import Graph, parse
from moecc.model.open import open_model
from moecc.prove import prove
from moecc.prove.prover import OF_REGIONS, OF_TABLES
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
    same = prove(before, before)
    assert same.status == "proved"
    assert OF_REGIONS in same.assumptions
    CsePass().apply(before, Context())
    assert len(list(before)) == 3


HALVES = (
    "input %x : f32[seq=S]",
    "input %t : f32[a=4, b=2]",
    "%p = positions %t {axis=a} : i32[a=4]",
    "%q = broadcast %p, %t : i32[a=4, b=2]",
    "%m = merge %q {axes=(a, b), into=v} : i32[v=8]",
    "%s = positions %x {axis=seq} : i32[seq=S]",
    "%k = embedding %m, %s {axis=v} : i32[seq=S]",
)
FAR = (
    "input %t : f32[n=4]",
    "%a = constant {value=9007199254740991.0, dtype=i64} : i64[]",
    "%b = add %a, %a : i64[]",
    "%c = add %b, %a : i64[]",
    "%z = sub %a, %a : i64[]",
    "%s = stack %z, %a, %b, %c {axis=n} : i64[n=4]",
    "%f = broadcast %c, %t : i64[n=4]",
)


@pytest.mark.parametrize(
    ("lines", "claim", "truth"),
    [
        (
            (*HALVES, "%z = index %p {axis=a, at=0} : i32[]"),
            "%o = causal %z, %k : pred[seq=S]",
            "%o = equal %k, %k : pred[seq=S]",
        ),
        (FAR, "%o = less %s, %f : pred[n=4]", "%o = equal %s, %s : pred[n=4]"),
    ],
    ids=["an open size", "numbers that no float is"],
)
def test_bounds_of_indices_are_no_floats(lines, claim, truth):
    before, after = (graph(*lines, line, "output o = %o") for line in (claim, truth))
    assert is_told_apart(before, after)


def test_a_tensor_named_stopped_has_a_gradient():
    def times(*lines: str) -> Graph:
        types = "f32[b=3]"
        weight = f'param %w : {types} = source("stopped" : {types})'
        return graph(f"input %x : {types}", weight, *lines, "output y = %y")

    stopped = "%v = stop_gradient %w : f32[b=3]", "%y = mul %x, %v : f32[b=3]"
    before, after = times("%y = mul %x, %w : f32[b=3]"), times(*stopped)
    assert is_told_apart(before, after)


def test_an_order_of_neurons_is_of_its_own_layer():
    def layers(aligned: str) -> Graph:
        def source(name: str) -> str:
            return f'source("{name}" : f32[m=4, e=2])'

        def ordered(name: str, at: str) -> str:
            order = f"aligned({source(f'a{at}')}, {source(f'r{at}')}, axis=m)"
            return f"take({source(name)}, m={order})"

        stack = f"stack({ordered('x0', '0')}, {ordered('x1', aligned)}, axis=l)"
        types = "f32[l=2, m=4, e=2]"
        weight = f"param %w : {types} = {stack}"
        product = f"%y = mul %x, %w : {types}"
        return graph(f"input %x : {types}", weight, product, "output y = %y")

    assert is_told_apart(layers("1"), layers("0"))


@pytest.mark.parametrize("stored", ["cast(full(0.3 : f8e5m2[b=3]), f32)", "full(-0.0 : f32[b=3])"])
def test_a_constant_is_what_its_type_stores(stored):
    def scaled(weight: str) -> Graph:
        lines = f"param %w : f32[b=3] = {weight}", "%y = rename %w {axis=b, to=c} : f32[c=3]"
        return graph("input %x : f32[b=3]", *lines, "output y = %y")

    is_zero = "-0.0" in stored
    before, after = scaled(f"full({'0.0' if is_zero else '0.3'} : f32[b=3])"), scaled(stored)
    for exact in (True, is_zero):
        # No search: it finds that 0.3 is 0.3125 in the narrow type before fractions are tried.
        assert prove(before, after, exact=exact, refute=False).status != "proved"


def test_a_row_of_a_smaller_table_is_an_assumption():
    def looked_up(cut: bool) -> Graph:
        lines = ["input %ids : i32[seq=S]", "param %t : f32[vocab=8, embed=2]"]
        if cut:
            lines.append("%u = slice %t {axis=vocab, start=0, stop=4} : f32[vocab=4, embed=2]")
        table = "u" if cut else "t"
        lines.append(f"%y = embedding %{table}, %ids {{axis=vocab}} : f32[seq=S, embed=2]")
        return graph(*lines, "output y = %y")

    verdict = prove(looked_up(False), looked_up(True))
    assert verdict.status == "proved"
    assert OF_TABLES in verdict.assumptions


@pytest.mark.parametrize("op", ["maximum", "minimum"])
def test_the_larger_of_two_zeros_has_the_sign_of_one_of_them(op):
    inputs = "input %x : f32[b=3]", "input %z : f32[b=3]"
    before, after = (
        graph(*inputs, f"%y = {op} {operands} : f32[b=3]", "output y = %y")
        for operands in ("%x, %z", "%z, %x")
    )
    assert prove(before, after, exact=True).status != "proved"
    assert prove(before, after).status == "proved"


@pytest.mark.parametrize(
    "last", ["%o = scale %d {by=1e17} : f32[b=8]", "%o = less %e, %h : pred[b=8]"]
)
def test_zeros_are_refuted_by_no_rounding(last):
    types = "f32[b=8]"
    inputs = f"input %x : {types}", f"input %y : {types}"
    before = graph(
        *inputs,
        f"%e = add %x, %y : {types}",
        f"%h = add %x, %y : {types}",
        f"%d = sub %e, %h : {types}",
        last,
        "output o = %o",
    )
    after = graph(
        *inputs,
        f"%p = add %x, %y : {types}",
        f"%e = exp %p : {types}",
        f"%f = exp %x : {types}",
        f"%g = exp %y : {types}",
        f"%h = mul %f, %g : {types}",
        f"%d = sub %e, %h : {types}",
        last,
        "output o = %o",
    )
    for pair in ((before, after), (after, before)):
        assert prove(*pair).status == "unknown"


@pytest.mark.parametrize(
    ("source", "keys", "index"),
    [
        ("llama_gqa", {"transformers_weights": "other.safetensors"}, False),
        ("llama_gqa", {}, True),
        ("clip_text", {"is_causal": False}, False),
        ("llama_gqa", {"rope_scaling": {"rope_type": "default"}}, False),
        ("qwen3_next_square", {"rope_scaling": {"rope_type": "default"}}, False),
        ("gpt_neox_parallel", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, False),
        ("t5_square", {"tie_encoder_decoder": True}, False),
    ],
    ids=[
        "weights of another file",
        "an index beside the one file",
        "a mask that is off",
        "a period that is not read",
        "a period that is not read beside sections",
        "a part of a head that is not read",
        "a decoder that is the encoder",
    ],
)
def test_a_folder_of_which_transformers_makes_another_model_is_refused(
    source, keys, index, tmp_path
):
    golden = Path(__file__).parents[1] / "golden" / source
    config = json.loads((golden / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    tensors = load_file(golden / "model.safetensors")
    single, *others = tensors
    files = {"model": [single] if index else tensors, "other": others}
    for name, names in files.items():
        save_file({n: tensors[n] for n in names}, tmp_path / f"{name}.safetensors")
    if index:
        weight_map = {n: f"{name}.safetensors" for name, names in files.items() for n in names}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError):
        open_model(str(tmp_path), config_alone=True, heads=True)


def test_shares_of_nothing_do_not_add_up():
    inputs = "input %x : f32[a=0, b=3]", "%t = sum %x {axes=a} : f32[b=3]"
    shares = "%s = softmax %x {axis=a} : f32[a=0, b=3]", "%y = sum %s {axes=a} : f32[b=3]"
    one = "%c = constant {value=1.0} : f32[]", "%y = broadcast %c, %t : f32[b=3]"
    before, after = (graph(*inputs, *lines, "output y = %y") for lines in (shares, one))
    assert prove(before, after).status == "unknown"


def test_a_cast_of_what_may_be_infinite_rounds_what_its_type_does_not_hold():
    """A lossless cast keeps the term of an operand; what a cast back does is another function."""
    inputs = (
        "input %x : f32[a=3]", "input %k : pred[a=3]", "param %w : f32[a=3]",
        "%v = mul %x, %w : f32[a=3]",
    )  # fmt: skip
    end = "%y = cast %m {dtype=f32} : f32[a=3]", "output y = %y"
    narrow = "%m = mask %v, %k {fill=-inf} : f32[a=3]"
    wide = "%d = cast %v {dtype=f64} : f64[a=3]", "%m = mask %d, %k {fill=-inf} : f64[a=3]"
    assert is_told_apart(graph(*inputs, narrow, *end), graph(*inputs, *wide, *end))
