"""``decode``: tokens one by one, or several at a time, have the logits of the whole text."""

from unittest.mock import patch

import numpy as np
import pytest
from family_configs import small_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples, some

from moecc.errors import InputError
from moecc.families import build
from moecc.ir import OPS, Builder, clone, parse
from moecc.ir.conventions import LOGITS
from moecc.ir.operation import AxisName, Op, operation
from moecc.model.open import open_model
from moecc.testing.data import params_for
from moecc.testing.laws import check_decode
from moecc.types import F64

from .model_graphs import GOLDEN, apply_passes, imported

LONG = ("llama_dynamic", "phi3_long_v4")
"""Their rotary positions depend on the length, from 4 tokens on."""

CASES = [path.parent.name for path in sorted(GOLDEN.glob("*/logits.npy"))]
QUICK = [name for name in CASES if "window" in name or "drops" in name or "t5_square" in name]


def check_steps(graph, params, parts, seed=0):
    """Check the logits of two random texts, of which each step takes one of `parts`."""
    rng, length = np.random.default_rng(seed), sum(parts)
    words = graph.outputs[LOGITS].type["vocab"].size
    sizes = {"B": 2, "T": length, "S": 6 if "decoder_tokens" in graph.inputs else length}
    inputs = {}
    for name, value in graph.inputs.items():
        shape = [s if isinstance(s, int) else sizes.get(str(s), 6) for s in value.type.sizes]
        is_id = value.type.dtype.kind == "int"
        inputs[name] = rng.integers(0, int(str(words)), shape) if is_id else rng.normal(size=shape)
    check_decode(graph, params, inputs, parts)


def check_golden(case, *parts):
    with open_model(str(GOLDEN / case)) as model:
        check_steps(model.graph, dict(model.params(dtype=F64)), parts)


@pytest.mark.parametrize("case", some([c for c in CASES if c not in LONG], *QUICK))
def test_every_golden_model_in_steps(case):
    check_golden(case, 4, 1, 1, 2, 1)


@pytest.mark.parametrize("case", LONG)
def test_positions_that_depend_on_the_length_are_right_up_to_the_original_one(case):
    check_golden(case, 2, 1, 1)
    assert "rotated once" in apply_passes(imported(case), "decode").preserves.reason
    with pytest.raises(AssertionError, match="logits differ"):
        check_golden(case, 4, 5)


@settings(max_examples=examples(15, 300))
@given(
    config=small_configs(),
    seed=st.integers(0, 99),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_any_decoder_in_any_steps(config, seed, parts):
    graph = build(config)
    check_steps(graph, params_for(graph, seed), parts, seed)


@pytest.mark.parametrize("case", ["t5_square", "llama_gqa"])
def test_an_upcycled_model_in_steps(case):
    graph = imported(case, "st-moe{experts=4 layers=all},specialize{mode=eval}")
    assert any("capacity" in str(node.attrs.get("slots")) for node in graph)
    report = apply_passes(clone(graph), "decode")
    assert "no capacity drops a token" in report.preserves.reason
    # With room for all tokens nothing is dropped in the whole text either.
    for node in graph:
        if node.op.assigns_slots:
            node.attrs.update(capacity_factor=64.0, cap=True)
    check_steps(graph, params_for(graph, 0), (3, 1, 1, 2))


# --- what cannot be continued


def check_rejected(graph, says):
    with pytest.raises(InputError, match=says):
        apply_passes(graph, "decode")


def test_an_encoder_is_rejected():
    check_rejected(imported("bert_square"), "continues no text")


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


HIDDEN = "%h = mask %s, %seen : f32[batch=B, seq=S, kv_seq=S]\n"
MEAN = "%c = mean %a {axes=seq} : f32[batch=B, embed=4]\n"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"masked": "%m = silu %s : f32[batch=B, seq=S, kv_seq=S]"}, "not causal"),
        ({"masked": "%m = mask %s, %seen {fill=-1.0} : f32[batch=B, seq=S, kv_seq=S]"},
         "not causal"),
        ({"causal": "same_segment %p, %q"}, "not causal"),
        *(({"masked": f"{HIDDEN}  %m = {changed} : f32[batch=B, seq=S, kv_seq=S]"}, "not causal")
          for changed in ("neg %h", "scale %h {by=-1.0}", "scale %h {by=0.0}", "square %h")),
        ({"after": f"{MEAN}  %b = broadcast %c, %a : f32[batch=B, seq=S, embed=4]"},
         "tokens meet otherwise"),
    ],
)  # fmt: skip
def test_tokens_that_see_later_ones_are_rejected(parts, says):
    check_rejected(parse(ATTENTION.format(**PARTS | parts)), says)


@pytest.mark.parametrize("is_right", [True, False])
def test_shares_of_scores_by_an_operation_of_ones_own_are_tried(is_right):
    with patch.dict(OPS):

        @operation("shares", "x", normalises=True)
        class SharesOp(Op):
            """Either softmax, or a difference from the mean, which has no number for −∞."""

            axis = AxisName("the axis")

            def infer(self, x):
                return x.type

            def mixes(self, x):
                return self.axis

            def meaning(self, x):
                at = x.axes.index(self.axis)
                powers = np.exp(x.data)
                shares = powers / powers.sum(at, keepdims=True)
                away = x.data - x.data.mean(at, keepdims=True)
                return x.map(lambda data: shares if is_right else away)

        text = ATTENTION.format(**PARTS).replace("softmax", "shares")
        if not is_right:
            check_rejected(parse(text), "not causal")
            return
        graph = parse(text)
        check_steps(graph, params_for(graph), (2, 1, 1))


def test_a_state_that_later_keys_change_is_rejected():
    graph = imported("qwen3_5_text_square")
    rule = next(n for n in graph if n.op.name == "delta_rule")
    causal = rule.operands[5].node
    rule.set_operand(5, Builder(graph, before=rule).causal(*reversed(causal.operands)))
    check_rejected(graph, "a token would depend on those after it")


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ("st-moe{experts=4 layers=all},specialize{mode=train}", "random numbers"),
        ("decode", "C is a size of the graph"),
    ],
)
def test_noise_and_a_second_decode_are_rejected(passes, says):
    check_rejected(imported("llama_gqa", passes), says)
