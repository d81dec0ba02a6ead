"""``decode``: tokens one by one, or several at a time, have the logits of the whole text."""

from pathlib import Path

import numpy as np
import pytest
from family_configs import small_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples, some

from moecc.errors import InputError
from moecc.families import build
from moecc.ir import Builder, parse
from moecc.ir.conventions import LOGITS
from moecc.ir.structure import clone
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing.data import params_for
from moecc.testing.laws import check_decode
from moecc.types import F64

GOLDEN = Path(__file__).parents[1] / "golden"
LONG = ("llama_dynamic", "phi3_long_v4")
"""Their rotary positions depend on the length, from 4 tokens on."""

CASES = [path.parent.name for path in sorted(GOLDEN.glob("*/logits.npy"))]
QUICK = [name for name in CASES if "window" in name or "drops" in name or "t5_square" in name]


def inputs_of(graph, texts, length, seed=0):
    """Return random inputs, with texts of `length` tokens to continue."""
    rng = np.random.default_rng(seed)
    words = graph.outputs[LOGITS].type["vocab"].size
    found = {}
    for name, value in graph.inputs.items():
        sizes = {"B": texts, "T": length, "S": 6 if "decoder_tokens" in graph.inputs else length}
        shape = [s if isinstance(s, int) else sizes.get(str(s), 6) for s in value.type.sizes]
        is_id = value.type.dtype.kind == "int"
        found[name] = rng.integers(0, int(str(words)), shape) if is_id else rng.normal(size=shape)
    return found


@pytest.mark.parametrize("case", some([c for c in CASES if c not in LONG], *QUICK))
def test_every_golden_model_in_steps(case):
    with open_model(str(GOLDEN / case)) as model:
        params = dict(model.params(dtype=F64))
        check_decode(model.graph, params, inputs_of(model.graph, 2, 9), (4, 1, 1, 2, 1))


@pytest.mark.parametrize("case", LONG)
def test_positions_that_depend_on_the_length_are_right_up_to_the_original_one(case):
    with open_model(str(GOLDEN / case)) as model:
        params = dict(model.params(dtype=F64))
        check_decode(model.graph, params, inputs_of(model.graph, 2, 4), (2, 1, 1))
        report = run_pipeline(clone(model.graph), Pipeline.parse("decode"))
        assert "rotated once" in report.preserves.reason
        with pytest.raises(AssertionError, match="logits differ"):
            check_decode(model.graph, params, inputs_of(model.graph, 2, 9), (4, 5))


@settings(max_examples=examples(15, 300))
@given(
    config=small_configs(),
    seed=st.integers(0, 99),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_any_decoder_in_any_steps(config, seed, parts):
    graph = build(config)
    params = params_for(graph, seed)
    check_decode(graph, params, inputs_of(graph, 2, sum(parts), seed), parts)


@pytest.mark.parametrize("case", ["t5_square", "llama_gqa"])
def test_an_upcycled_model_in_steps(case):
    with open_model(str(GOLDEN / case)) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse("st-moe{experts=4 layers=all},specialize{mode=eval}"))
    assert any("capacity" in str(node.attrs.get("slots")) for node in graph)
    report = run_pipeline(clone(graph), Pipeline.parse("decode"))
    assert "no capacity drops a token" in report.preserves.reason
    # With room for all tokens nothing is dropped in the whole text either.
    for node in graph:
        if node.op.assigns_slots:
            node.attrs.update(capacity_factor=64.0, cap=True)
    check_decode(graph, params_for(graph, 0), inputs_of(graph, 2, 7), (3, 1, 1, 2))


# --- what cannot be continued


def rejected(graph, options=""):
    with pytest.raises(InputError) as caught:
        run_pipeline(graph, Pipeline.parse(f"decode{options}"))
    return str(caught.value)


def test_an_encoder_is_rejected():
    with open_model(str(GOLDEN / "bert_square")) as model:
        assert "continues no text" in rejected(clone(model.graph))


ATTENTION = """
moecc 1
graph example {{
  input %tokens : i32[batch=B, seq=S]
  param %table : f32[vocab=5, embed=4] = source("table" : f32[vocab=5, embed=4])
  %x = embedding %table, %tokens {{axis=vocab}} : f32[batch=B, seq=S, embed=4]
  %k = rename %x {{axis=seq, to=kv_seq}} : f32[batch=B, kv_seq=S, embed=4]
  %p = positions %tokens {{axis=seq}} : i32[seq=S]
  %q = rename %p {{axis=seq, to=kv_seq}} : i32[kv_seq=S]
  %seen = {causal} : pred[seq=S, kv_seq=S]
  %s = contract %x, %k {{over=embed}} : f32[batch=B, seq=S, kv_seq=S]
  {masked}
  %w = softmax %m {{axis=kv_seq}} : f32[batch=B, seq=S, kv_seq=S]
  %a = contract %w, %k {{over=kv_seq}} : f32[batch=B, seq=S, embed=4]
  {after}
  %y = contract %b, %table {{over=embed}} : f32[batch=B, seq=S, vocab=5]
  output logits = %y
}}
"""
PARTS = {
    "causal": "causal %p, %q",
    "masked": "%m = mask %s, %seen {fill=-inf} : f32[batch=B, seq=S, kv_seq=S]",
    "after": "%b = silu %a : f32[batch=B, seq=S, embed=4]",
}


def attention(**parts):
    return parse(ATTENTION.format(**{**PARTS, **parts}))


MEAN = "%c = mean %a {axes=seq} : f32[batch=B, embed=4]\n"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"masked": "%m = silu %s : f32[batch=B, seq=S, kv_seq=S]"}, "not causal"),
        ({"masked": "%m = mask %s, %seen {fill=-1.0} : f32[batch=B, seq=S, kv_seq=S]"},
         "not causal"),
        ({"causal": "same_segment %p, %q"}, "not causal"),
        ({"after": f"{MEAN}  %b = broadcast %c, %a : f32[batch=B, seq=S, embed=4]"},
         "tokens meet otherwise"),
    ],
)  # fmt: skip
def test_tokens_that_see_later_ones_are_rejected(parts, says):
    assert says in rejected(attention(**parts))


def test_a_state_that_later_keys_change_is_rejected():
    with open_model(str(GOLDEN / "qwen3_5_text_square")) as model:
        graph = clone(model.graph)
    rule = next(n for n in graph if n.op.name == "delta_rule")
    causal = rule.operands[5].node
    rule.set_operand(5, Builder(graph, before=rule).causal(*reversed(causal.operands)))
    assert "a token would depend on those after it" in rejected(graph)


def test_noise_and_a_second_decode_are_rejected():
    with open_model(str(GOLDEN / "llama_gqa")) as model:
        graph = clone(model.graph)
    noisy = clone(graph)
    run_pipeline(noisy, Pipeline.parse("st-moe{experts=4 layers=all},specialize{mode=train}"))
    assert "random numbers" in rejected(noisy)
    run_pipeline(graph, Pipeline.parse("decode"))
    assert "C is a size of the graph" in rejected(graph)
