"""Attention as one operation: what is found, what is left and why, and that nothing changes."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.fuse import FuseAttentionPass

from moecc.ir import Builder, clone
from moecc.model.open import open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import assert_same, laws
from moecc.testing.generate import random_graph
from moecc.testing.steps import attention
from tests.support.attention_graphs import FORMS, Form
from tests.support.tiers import examples, some

ITEM = FuseAttentionPass()
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def fused(graph):
    after = clone(graph)
    result = ITEM.apply(after, Context())
    laws.check_graph(after)
    return after, [str(remark) for remark in result.remarks]


def attentions(graph):
    return [node for node in graph if node.op.attends]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_one_operation_and_means_the_same(name):
    before = FORMS[name].graph()
    after, remarks = fused(before)
    assert remarks == []
    assert [node.op.name for node in after] == ["attention"]
    assert_same(before, after)


@pytest.mark.parametrize("case", some(CASES, "gemma2_caps", "t5_gated_v4", "gpt_oss_limits"))
def test_golden_models_mean_the_same(case):
    with open_model(str(GOLDEN / case)) as model:
        before = clone(model.graph)
    after, remarks = fused(before)
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
    graph = random_graph(seed, steps=[attention])
    laws.check_pass(ITEM, graph)


def left(graph):
    """Return why the one attention of `graph` is left as it is."""
    after, (remark,) = fused(graph)
    assert not attentions(after)
    assert len(after) == len(graph)
    place, _, reason = remark.partition(": this attention is not fused: ")
    assert "layers.0.attention" in place
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
    b = Builder(graph, before=softmax)
    keys = graph.inputs["keep"]
    softmax.set_operand(0, b.mask(softmax.operands[0], b.equal(keys, keys)))
    assert left(graph) == "it has two masks that are neither causal nor of segments"


def test_positions_that_are_inputs_hide_by_a_mask():
    """As in a step of decoding: indices say nothing of positions then."""
    with open_model(str(GOLDEN / "llama_gqa")) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse("decode"))
    after, remarks = fused(graph)
    assert remarks == []
    assert {n.attrs["causal"] for n in attentions(after)} == {()}
    assert {n.attrs["given"] for n in attentions(after)} == {("keep",)}
    assert_same(graph, after)


def test_documents_that_share_a_row_are_segments():
    with open_model(str(GOLDEN / "llama_gqa")) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse("pack-segments"))
    after, remarks = fused(graph)
    assert remarks == []
    assert {n.attrs["given"] for n in attentions(after)} == {("query_segments", "key_segments")}
    assert {n.attrs["causal"] for n in attentions(after)} == {("seq",)}
    assert_same(graph, after)
