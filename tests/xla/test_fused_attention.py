"""Attention as one operation, lowered: values and gradients of every form, block by block."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moecc_backends.xla.backend import function
from moecc_backends.xla.kernels import attention as query_blocks
from moecc_backends.xla.kernels.attention import (
    CUDNN_VARIES,
    AttentionArrays,
    AttentionRule,
    cudnn_attention,
    splash_attention,
    splash_kernel,
)
from moecc_backends.xla.trace.context import Options
from moecc_passes.fuse import FuseAttentionPass

from moecc.errors import InputError, UsageError
from moecc.ir import F64, clone
from moecc.ir import attention as attention_blocks
from moecc.ir.attention import AttentionFacts, choose_attention
from moecc.rewrite.passes import Context
from moecc.testing import inputs_for
from tests.support.attention_graphs import FORMS, Form
from tests.support.tiers import few, some

from .models import values_and_gradients


def fused(graph):
    after = clone(graph)
    FuseAttentionPass().apply(after, Context())
    assert any(node.op.attends for node in after)
    return after


def results(graph, inputs):
    """Return the output, and the gradient of a sum of it that weighs every element."""

    def total(outputs):
        y = outputs["y"]
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    with jax.enable_x64(True):
        run = function(graph, dtype=F64)
        outputs, slopes, _ = values_and_gradients(run, {}, inputs, total)
    return {**outputs, **slopes}


def assert_is_its_parts(form, seed):
    graph = form.graph()
    inputs = inputs_for(graph, seed)
    expected, found = results(graph, inputs), results(fused(graph), inputs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("block", few([4, 128]))
@pytest.mark.parametrize("name", some(FORMS, "all", "window", "longer than its keys"))
def test_values_and_gradients_are_those_of_the_parts(name, block, monkeypatch):
    monkeypatch.setattr(attention_blocks, "BLOCK", block)
    assert_is_its_parts(FORMS[name], 0)


@pytest.mark.parametrize(
    "form",
    [
        Form(seq=23, kv_seq=23, causal=True, window=7, bias="seq kv_seq kv_head", sinks=True),
        Form(seq=23, kv_seq=9, bias="batch kv_seq"),
    ],
    ids=["window", "fewer keys"],
)
def test_many_blocks_are_a_loop(form, monkeypatch):
    """Of more blocks than spans several share their keys, one after the other."""
    monkeypatch.setattr(attention_blocks, "BLOCK", 2)
    monkeypatch.setattr(attention_blocks, "MOST_SPANS", 3)
    assert_is_its_parts(form, 1)


@pytest.mark.parametrize("window", [None, 0, 5])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (128, 40), (300, 300), (5000, 4000)])
def test_spans_cover_each_query_once_and_every_key_it_sees(queries, keys, window):
    """Of causal attention with a window or without (0), and of one that sees everything (None)."""
    causal = window is not None
    visits = np.zeros(queries, int)
    for span in attention_blocks.spans(queries, keys, causal=causal, window=window or 0):
        first, last = span.start, span.start + span.blocks * span.size
        visits[first:last] += 1
        assert 0 <= span.first_key < span.last_key <= keys
        if causal:
            assert span.last_key >= min(last, keys)
            assert span.first_key <= (max(first - window + 1, 0) if window else 0)
    assert (visits == 1).all()


def test_what_sees_nothing_is_zero_and_has_no_gradient():
    graph = fused(FORMS["padding"].graph())
    inputs = inputs_for(graph)
    inputs["keep"] = np.zeros_like(inputs["keep"])
    for name, array in results(graph, inputs).items():
        assert not array.any(), name


def test_scores_are_never_whole():
    """No array of a program of 2,048 queries and keys, gradient included, has all scores."""
    graph = fused(Form(seq=2048, kv_seq=2048, causal=True).graph())
    run = function(graph)
    shapes = {n: jax.ShapeDtypeStruct([2, *v.type.sizes[1:]], np.float32)
              for n, v in graph.inputs.items()}  # fmt: skip
    program = jax.jit(jax.grad(lambda i: jnp.sum(jnp.sin(run({}, i)["y"])))).lower(shapes)
    scores = 2 * 2048 * 2048 * 2 * 2 * 4
    assert program.compile().memory_analysis().temp_size_in_bytes < scores / 3


# --- kernels of accelerators: their arithmetic, on a CPU

KERNEL_FORMS = {
    "causal": (AttentionRule(0.2, causal=True), False),
    "window, soft cap and sinks": (AttentionRule(0.2, 3.0, causal=True, window=40), True),
    "full": (AttentionRule(0.2), False),
}


def drawn(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def arrays_of(seq, *, sinks=False, bias=False):
    """Return operands with two key heads, which two query heads share each."""
    return AttentionArrays(
        drawn((2, 2, 2, seq, 16), 0),
        *(drawn((2, 2, seq, 16), seed) for seed in (1, 2)),
        bias=drawn((1, 2, 2, seq, seq), 3) if bias else None,
        sinks=drawn((1, 2, 2, 1, 1), 4) if sinks else None,
    )


def check_kernel(kernel, rule, arrays):
    """Check values and gradients against blocks of queries, which are held to the reference."""

    def run(attend):
        def total(arrays):
            y = attend(rule, arrays)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
        return jax.tree.map(np.asarray, (y, jax.tree.leaves(gradients)))

    (y, gradients), (expected, slopes) = run(kernel), run(query_blocks.block_attention)
    assert np.abs(y - expected).max() <= 2e-6
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert np.abs(gradient - slope).max() <= 5e-6 * np.abs(slope).max()


@pytest.mark.parametrize("name", some(KERNEL_FORMS, "window, soft cap and sinks"))
def test_splash_attention_in_the_interpreter(name):
    rule, sinks = KERNEL_FORMS[name]
    check_kernel(partial(splash_attention, interpret=True), rule, arrays_of(256, sinks=sinks))


BLOCK_RULES = {
    "causal": (2048, 2048, AttentionRule(1.0, causal=True)),
    "small blocks": (384, 384, AttentionRule(1.0, causal=True)),
    "window": (2048, 2048, AttentionRule(1.0, causal=True, window=300)),
    "window of a block": (768, 768, AttentionRule(1.0, causal=True, window=256)),
    "all": (512, 1024, AttentionRule(1.0)),
}


@pytest.mark.parametrize("name", some(BLOCK_RULES, "window", "all"))
def test_splash_attention_meets_the_blocks_that_are_counted(name):
    queries, keys, rule = BLOCK_RULES[name]
    share = attention_blocks.share_of_tpu_blocks(
        queries, keys, causal=rule.causal, window=rule.window
    )
    block = attention_blocks.tpu_block(queries) * attention_blocks.tpu_block(keys)
    kernel = splash_kernel(rule, 4, queries, keys, True)
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        assert np.count_nonzero(info.block_mask) * block == share * queries * keys


@pytest.mark.parametrize("window", [0, 5])
def test_the_call_of_cudnn_means_the_same(window):
    rule = AttentionRule(0.3, causal=True, window=window)
    check_kernel(partial(cudnn_attention, implementation="xla"), rule, arrays_of(24, bias=True))


@pytest.mark.skipif(not CUDNN_VARIES, reason="before jax 0.10.2 cudnn is not taken on a mesh")
def test_gradients_of_keys_that_all_queries_of_a_mesh_share_are_added_up(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)
    rule, split = AttentionRule(1.0, causal=True), jax.sharding.PartitionSpec("data")

    def total(query, key):
        mixed = cudnn_attention(rule, AttentionArrays(query, key, key))
        return jax.lax.psum(jnp.sum(mixed.astype(jnp.float32)), "data")

    whole = jax.sharding.PartitionSpec()
    gradients = jax.shard_map(
        jax.grad(total, (0, 1)), mesh=jax.sharding.AbstractMesh((4,), ("data",)),
        in_specs=(split, whole), out_specs=(split, whole),
    )  # fmt: skip
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4, 2, 1, 64, 32), (1, 2, 64, 32))]
    text = str(jax.make_jaxpr(gradients)(*shapes))
    assert "dot_product_attention_bwd" in text
    assert re.search(r"bf16\[1,2,64,32\] = psum", text), text


def test_a_forced_kernel_is_that_one_or_an_error():
    graph = fused(Form(seq=128, kv_seq=128, causal=True).graph())
    inputs = {n: np.float32(a) for n, a in inputs_for(graph).items()}
    plain, blocks = (
        jax.jit(function(graph, options=Options(attention=name)))({}, inputs)["y"]
        for name in ("plain", "blocks")
    )
    np.testing.assert_allclose(plain, blocks, atol=2e-6)
    with pytest.raises(InputError, match="values are as wide as") as caught:
        function(graph, options=Options(attention="splash"))({}, inputs)
    assert caught.value.problems[0].expected == "auto, blocks, plain"
    with pytest.raises(UsageError, match="unknown attention kernel 'splatter'"):
        Options(attention="splatter")


FACTS = AttentionFacts("tpu", "bf16", 4096, 4096, 128, 128, causal=True)


@pytest.mark.parametrize(
    ("changed", "kernel", "why"),
    [
        ({}, "splash", None),
        ({"capped": True}, "splash", None),
        ({"further": ("bias",)}, "blocks", "it takes no bias"),
        ({"queries": 1000, "keys": 1000}, "blocks", "1000 queries are no multiple of 128"),
        ({"partitioned": True}, "blocks", "XLA's partitioner shards no kernels of Pallas"),
        ({"wide": 64}, "blocks", "its values are as wide as its keys"),
        ({"platform": "gpu"}, "cudnn", None),
        ({"platform": "gpu", "further": ("bias",)}, "cudnn", None),
        ({"platform": "gpu", "dtype": "f32"}, "blocks", "it computes in bf16 or f16, not in f32"),
        ({"platform": "gpu", "capped": True}, "blocks", "it has no soft cap"),
        ({"platform": "gpu", "width": 256, "wide": 256}, "blocks", "heads of 256"),
        ({"platform": "gpu", "is_tracked": True}, "blocks", "how its results vary over a mesh"),
        ({"platform": "cpu"}, "blocks", None),
        ({"platform": "cpu", "laid_out": False}, "plain", "share an axis that the third lacks"),
    ],
)
def test_the_kernel_by_platform_and_form(changed, kernel, why):
    choice = choose_attention(replace(FACTS, **changed))
    assert choice.kernel.name == kernel
    reasons = [reason for _, reason in choice.reasons]
    assert reasons == [] if why is None else why in reasons[0]


def test_the_share_of_scores_is_that_of_the_blocks():
    share = attention_blocks.share_of_scores
    assert share(64, 64, causal=True) == 1
    assert share(256, 256, causal=True) == 3 / 4
    assert share(1024, 1024, causal=True) == 36 / 64
    assert share(1024, 1024, causal=False) == 1
    # Each block sees its own keys and the 127 before them; the first has none before.
    assert share(512, 512, causal=True, window=128) == (128 + 3 * 255) / (4 * 512)
