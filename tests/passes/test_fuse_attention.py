"""Attention as one operation: what is found, what is left and why, and that nothing changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.fuse import FuseAttentionPass

from moecc.ir import Builder
from moecc.testing import assert_same, laws
from moecc.testing.generate import random_graph
from moecc.testing.steps import attention
from tests.support.attention_graphs import FORMS, Form
from tests.support.tiers import examples, some

from .dense_blocks import applied
from .model_graphs import GOLDEN, imported

ITEM = FuseAttentionPass()
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def fused(graph):
    """Return the graph with its attentions fused, which must be all, and mean the same."""
    after, result = applied(ITEM, graph)
    assert result.remarks == []
    assert_same(graph, after)
    return after


def attentions(graph):
    return [node for node in graph if node.op.attends]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_one_operation_and_means_the_same(name):
    assert [node.op.name for node in fused(FORMS[name].graph())] == ["attention"]


@pytest.mark.parametrize("case", some(CASES, "gemma2_caps", "t5_gated_v4", "gpt_oss_limits"))
def test_golden_models_mean_the_same(case):
    before = imported(case)
    after, result = applied(ITEM, before)
    remarks = [str(remark) for remark in result.remarks]
    # The masks of shifted windows are added to logits whose rows have been split.
    is_shifted = case in ("swin_square_v4", "swin_windows")
    assert all("is no sum of products and a bias" in remark for remark in remarks)
    assert bool(remarks) == is_shifted
    softmaxes = [n for n in before if n.op.is_distribution and not n.op.routes]
    inside = [n for n in softmaxes if "attention" in n.loc]
    assert len(attentions(after)) == len(inside) - len(remarks) > 0
    assert_same(before, after)


@settings(max_examples=examples(15, 300))
@given(st.integers(0, 10**6))
def test_random_graphs_with_attention_obey_the_laws(seed):
    laws.check_pass(ITEM, random_graph(seed, steps=[attention]))


def left(graph):
    """Return why the one attention of `graph` is left as it is."""
    after, result = applied(ITEM, graph)
    assert not attentions(after)
    assert len(after) == len(graph)
    (remark,) = result.remarks
    assert "layers.0.attention" in remark.where
    says, _, reason = remark.text.partition(": ")
    assert says == "this attention is not fused"
    return reason


def test_what_is_used_elsewhere_is_left():
    graph = Form().graph()
    graph.set_output("scores", graph.value("scores"))
    assert left(graph) == "%scores is used elsewhere too"
    graph = Form().graph()
    graph.set_output("weights", graph.value("weights"))
    # Weights with a second user are those of no product alone.
    assert "weights" in left(graph)


def test_two_masks_of_ones_own_are_left():
    graph = Form(keep="seq kv_seq").graph()
    (softmax,) = (n for n in graph if n.op.is_distribution)
    b, keys = Builder(graph, before=softmax), graph.inputs["keep"]
    softmax.set_operand(0, b.mask(softmax.operands[0], b.equal(keys, keys)))
    assert left(graph) == "it has two masks that are neither causal nor of segments"


@pytest.mark.parametrize(
    ("passes", "causal", "masks"),
    [
        # In a step of decoding positions are inputs, of which indices say nothing: a mask hides.
        ("decode", (), ("keep",)),
        # Documents that share a row are segments.
        ("pack-segments", ("seq",), ("query_segments", "key_segments")),
    ],
)
def test_what_hides_keys_after_a_pass(passes, causal, masks):
    found = attentions(fused(imported("llama_gqa", passes)))
    assert {(n.attrs["causal"], n.attrs["given"]) for n in found} == {(causal, masks)}
