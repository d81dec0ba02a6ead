"""Proofs of whole graphs: golden checkpoints before and after passes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import moecc
from moecc.ir.graph import Node
from moecc.ir.text import parse
from moecc.prove import prove
from moecc.prove.evaluation import Evaluation
from moecc.prove.prover import OF_TABLES
from moecc.terms import term

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def model(name: str) -> moecc.Model:
    return moecc.open(str(GOLDEN / name))


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        *(("llama_gqa", p) for p in ("upcycle{experts=8 top-k=2}", "cse", "canonicalize", "dce")),
        ("phi3_square", "upcycle{experts=4 granularity=2},to-dense{how=concat}"),
        ("mixtral_top1_head_dim", "grow{times=2}"),
    ],
)
def test_the_same_function_is_proved(name: str, pipeline: str) -> None:
    before = model(name)
    verdict = prove(before.graph, before.apply(pipeline).graph)
    assert verdict.status == "proved", (verdict.node, verdict.terms)


def test_slots_and_shares_prove_an_upcycled_model() -> None:
    dense = model("llama_gqa")
    lemmas = prove(dense.graph, dense.apply("upcycle{experts=8 top-k=2}").graph).lemmas
    assert lemmas["slot of a choice"] > 0
    assert lemmas["shares add up"] > 0


def test_other_experts_are_refuted_at_their_first_matrix() -> None:
    dense = model("llama_gqa")
    noisy = dense.apply("upcycle{experts=8 top-k=2 init=noise noise-std=0.1}")
    verdict = prove(dense.graph, noisy.graph)
    assert verdict.status == "refuted"
    assert verdict.node == "%gate3 = contract @layers.0.ffn by upcycle/lift"
    assert verdict.counterexample is not None
    assert verdict.counterexample.output == "logits"


ADMISSIBLE = {
    "numbers that bf16 holds": (
        """  input %x : bf16[a=4]
  %y = cast %x {dtype=f32} : f32[a=4]""",
        """
  %z = cast %y {dtype=bf16} : bf16[a=4]
  %w = cast %z {dtype=f32} : f32[a=4]""",
    ),
    "ids within an axis": (
        """  input %x : i32[a=4]
  %y = one_hot %x {into=(vocab=1)} : f32[a=4, vocab=1]""",
        """
  %z = constant {value=1.0} : f32[]
  %w = maximum %y, %z : f32[a=4, vocab=1]""",
    ),
    "divisors that are not 0": (
        """  input %x : f32[a=4]
  %y = tanh %x : f32[a=4]""",
        """
  %z = scale %x {by=0.0} : f32[a=4]
  %v = div %x, %z : f32[a=4]
  %w = tanh %v : f32[a=4]""",
    ),
}


@pytest.mark.parametrize("name", ADMISSIBLE)
def test_graphs_that_differ_on_no_data_that_count_are_not_refuted(name: str) -> None:
    first, more = ADMISSIBLE[name]
    texts = [f"moecc 1\ngraph g {{\n{first}{b}\n  output y = %{o}\n}}\n"
             for b, o in (("", "y"), (more, "w"))]  # fmt: skip
    assert prove(*map(parse, texts)).status == "unknown"


def test_slots_without_experts_part_at_their_node() -> None:
    text = """moecc 1
graph g {
  input %x : f32[b=B, embed=4]
  input %c : i32[b=B, k=2]
  %s = assign_slots %c {tokens=b, experts=4, slots=capacity, capacity_factor=1.0} : i32[b=B, k=2]
  %r = dispatch %x, %c, %s : f32[group=1, expert=4, slot=capacity(%s), embed=4]
  %t = sum %r {axes=expert} : f32[group=1, slot=capacity(%s), embed=4]
  %y = scale %t {by=2.0} : f32[group=1, slot=capacity(%s), embed=4]
  output y = %y
}
"""
    verdict = prove(parse(text), parse(text.replace("sum", "max")))
    assert verdict.status in ("refuted", "unknown")
    assert str(verdict.node).startswith("%t = max")


def test_graphs_too_large_to_compare_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(term, "MOST_TERMS", 100)
    dense = model("llama_gqa")
    verdict = prove(dense.graph, dense.apply("cse").graph)
    assert (verdict.status, verdict.node) == ("unknown", "the graphs")


def test_rolled_layers_are_compared_by_their_bodies() -> None:
    dense = model("llama_gqa")
    rolled = dense.apply("roll-layers")
    sparse = dense.apply("upcycle{experts=4 top-k=2},roll-layers")
    assert prove(rolled.graph, sparse.graph).log["rolled"] is True
    assert prove(dense.graph, sparse.graph).log["rolled"] is False


@pytest.mark.parametrize("exact", [False, True])
def test_a_proof_assumes_that_no_integer_wraps_around(exact: bool) -> None:
    dense = model("llama_gqa")
    verdict = prove(dense.graph, dense.apply("cse").graph, exact=exact)
    assert "no integer wraps around" in verdict.assumptions


def test_a_proof_assumes_that_tokens_are_rows_of_their_table() -> None:
    # Programs differ in what they make of an id below 0: the last rows, or the first one.
    dense = model("llama_gqa")
    assert OF_TABLES in prove(dense.graph, dense.apply("cse").graph).assumptions
    pixels = model("vit_plain")
    assert OF_TABLES not in prove(pixels.graph, pixels.apply("cse").graph).assumptions


def test_a_constant_as_a_fraction_is_an_assumption() -> None:
    dense = model("llama_gqa")
    scaled = dense.apply("upcycle{experts=4 gate-scale=2.5}")
    assert any("fractions" in a for a in prove(dense.graph, scaled.graph).assumptions)
    plain = dense.apply("upcycle{experts=4}")
    assert not any("fractions" in a for a in prove(dense.graph, plain.graph).assumptions)


def test_a_stopped_gradient_is_another_function() -> None:
    lines = (
        "%y = mul %x, %x : f32[embed=4]",
        "%s = stop_gradient %x : f32[embed=4]\n  %y = mul %s, %x : f32[embed=4]",
    )
    plain, stopped = (
        parse(f"moecc 1\ngraph g {{\n  input %x : f32[embed=4]\n  {t}\n  output y = %y\n}}\n")
        for t in lines
    )
    assert prove(plain, plain).status == "proved"
    verdict = prove(plain, stopped)
    assert verdict.status == "refuted"
    assert verdict.counterexample is not None
    assert verdict.counterexample.output == "the gradient"


def test_exact_is_equality_of_bits() -> None:
    dense = model("llama_gqa")
    for pipeline in ("cse,dce", "roll-layers", "canonicalize{exact=true}"):
        assert prove(dense.graph, dense.apply(pipeline).graph, exact=True).status == "proved"
    sparse = dense.apply("upcycle{experts=4 top-k=2}")
    assert prove(dense.graph, sparse.graph, exact=True).status != "proved"


@pytest.mark.parametrize("name", ["gpt_oss_limits", "gemma2_caps"])
def test_fused_attention_has_the_terms_of_its_parts(name: str) -> None:
    source = model(name)
    assert prove(source.graph, source.apply("fuse-attention").graph).status == "proved"


def test_a_log_does_not_depend_on_the_seed_of_hashes() -> None:
    program = (
        "import json, moecc; from moecc.prove import prove; "
        f"dense = moecc.open({str(GOLDEN / 'llama_gqa')!r}); "
        "sparse = dense.apply('upcycle{experts=8 granularity=2 top-k=4}'); "
        "print(json.dumps(prove(dense.graph, sparse.graph).log))"
    )
    logs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(logs) == 1


def test_operations_on_equal_operands_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    evaluate = Evaluation.computed

    def counted(self: Evaluation, node: Node, *operands: Any) -> Any:
        names.append(node.op.name)
        return evaluate(self, node, *operands)

    monkeypatch.setattr(Evaluation, "computed", counted)
    dense = model("llama_gqa")
    assert prove(dense.graph, dense.apply("upcycle{experts=4 top-k=2}").graph)
    assert names.count("attention") == sum(n.op.name == "attention" for n in dense.graph)


def test_a_place_beyond_a_stack_stands_where_nothing_reads_it() -> None:
    """Of a joined slice that another slice follows, all places are written, and some are read."""
    text = """moecc 1
graph g {{
  input %x : f32[batch=B]
  %y, %all = scan %x {{over=(layer=3), carries=1}} : f32[batch=B], f32[layer=3, batch=B] {{
    input %x : f32[batch=B]
    %y = {op} %x, %x : f32[batch=B]
    output y = %y
    output each = %y
  }}
  %a = slice %all {{axis=layer, start=0, stop=2}} : f32[layer=2, batch=B]
  %b = slice %all {{axis=layer, start=2, stop=3}} : f32[layer=1, batch=B]
  %joined = join %a, %b {{axis=layer}} : f32[layer=3, batch=B]
  %last = index %joined {{axis=layer, at=2}} : f32[batch=B]
  output y = %last
}}
"""
    add, maximum = (parse(text.format(op=op)) for op in ("add", "maximum"))
    assert prove(add, parse(text.format(op="add"))).status == "proved"
    assert prove(add, maximum).status == "refuted"


def test_an_axis_without_elements_is_no_bug() -> None:
    lines = ("input %x : f32[a=0, b=3]", "%y = merge %x {axes=(b, a), into=c} : f32[c=0]")
    empty = parse("moecc 1\ngraph g {\n" + "\n".join(lines) + "\n  output y = %y\n}\n")
    assert prove(empty, empty).terms[0].endswith("an axis without elements")
