"""The config.json that a GGUF file stands for, and the files that are refused instead."""

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.families.registry import parse_config
from moecc.families.rope import RopeConfig
from moecc.formats.gguf.reader import open_gguf
from moecc.translate.importing import import_checkpoint
from tests.support.rotary_tables import rotary_frequencies


def opened(builder, path):
    return open_gguf(builder.write(path / "x.gguf"))


def refusal(builder, path):
    with pytest.raises(InputError) as caught:
        opened(builder, path)
    return str(caught.value)


def typed(checkpoint):
    return parse_config(checkpoint.config, "x.gguf")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_families_read_it(architecture, tied, small_model, tmp_path):
    biases = ["attn_q", "attn_k", "attn_v"] if architecture == "qwen2" else []
    checkpoint = opened(small_model(architecture, tied=tied, biases=biases), tmp_path)
    config = typed(checkpoint)
    assert config.model_type == architecture
    assert config.tie_word_embeddings is tied
    assert config.qkv_bias is (architecture == "qwen2")
    assert config.qk_norm is (architecture == "qwen3")
    assert set(config.sliding_windows) == {None}
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    # Names, shapes and types of the tensors are what the family's graph asks for.
    graph = import_checkpoint(checkpoint)
    assert len(graph.params) == len(checkpoint.tensors)


def test_sizes_that_are_stated_per_layer(small_model, tmp_path):
    builder = small_model().drop("llama.attention.head_count_kv")
    same = builder.array("llama.attention.head_count_kv", "i32", [2, 2])
    assert typed(opened(same, tmp_path)).num_key_value_heads == 2
    builder.drop("llama.feed_forward_length")
    builder.array("llama.feed_forward_length", "u32", [64, 32])
    assert "the layers differ" in refusal(builder, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("attention.sliding_window", "u32", 4096),
        ("attention.causal", "bool", 0),
        ("attention.clamp_kqv", "f32", 8.0),
        ("nobody_knows_this", "u32", 1),
        ("rope.scaling.attn_factor", "f32", 0.5),
        ("rope.scaling.type", "string", "longrope"),
        ("attention.head_count", "u32", 0),
        ("block_count", "string", "2"),
        ("context_length", "f32", 512.0),
        ("rope.freq_base", "f32", float("nan")),
        ("vocab_size", "u32", 47),
        ("rope.dimension_count", "u32", 4),
        ("attention.value_length", "u32", 4),
    ],
)
def test_refuses_a_value(name, kind, value, small_model, tmp_path):
    builder = small_model().drop(f"llama.{name}").key(f"llama.{name}", kind, value)
    assert f"metadata key 'llama.{name}'" in refusal(builder, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_refuses_a_missing_key(name, small_model, tmp_path):
    text = refusal(small_model().drop(f"llama.{name}"), tmp_path)
    assert f"metadata key 'llama.{name}'" in text
    assert "does not state" in text


@pytest.mark.parametrize("tensor", ["blk.0.ffn_gate.weight", "blk.0.ffn_up.3.weight"])
def test_a_mixture_of_experts_has_its_own_tensors(tensor, small_model, tmp_path):
    builder = small_model().key("llama.expert_count", "u32", 8)
    if tensor.endswith("3.weight"):
        builder.tensor(tensor, (4, 4))
    text = refusal(builder, tmp_path)
    assert f"a mixtral has no tensor {tensor!r}" in text
    assert "llama.expert_used_count" in text


@pytest.mark.parametrize("architecture", ["jamba", "apertus"])
def test_an_architecture_that_is_not_read(architecture, small_model, tmp_path):
    """A file names another model, and not another one of these by a slip of the pen."""
    text = refusal(small_model(architecture), tmp_path)
    assert "one of llama, qwen2, qwen3" in text
    assert "read the folder that the file was made from" in text
    assert "did you mean" not in text


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blk.0.atn_q.weight", "did you mean 'blk.0.attn_q.weight'?"),
        ("blk.00.attn_q.weight", "blk.0.attn_q.weight"),
        ("blk.0.attn_norm.bias", "blk.0.attn_norm.weight"),
    ],
)
def test_a_tensor_that_a_llama_has_not(name, hint, small_model, tmp_path):
    text = refusal(small_model().tensor(name, (4, 4)), tmp_path)
    assert f"has no tensor '{name}'" in text
    assert hint in text


def scaling(name, kind, value):
    return f"llama.rope.scaling.{name}", kind, value


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], {}),
        ([scaling("type", "string", "none"), scaling("factor", "f32", 4.0)], {}),
        ([scaling("factor", "f32", 2.5)], {"type": "linear", "factor": 2.5}),
        ([("llama.rope.scale_linear", "f32", 2.0)], {"type": "linear", "factor": 2.0}),
        (
            [
                scaling("type", "string", "yarn"),
                scaling("factor", "f32", 4.0),
                scaling("original_context_length", "u32", 128),
                scaling("attn_factor", "f32", 1.0),
                scaling("yarn_beta_fast", "f32", 24.0),
            ],
            {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 24.0,
            },
        ),
    ],
)
def test_rope_scaling(keys, expected, small_model, tmp_path):
    builder = small_model()
    for name, kind, value in keys:
        builder.key(name, kind, value)
    assert typed(opened(builder, tmp_path)).rope == RopeConfig(theta=100_000.0, **expected)


def divisors(rope, head_dim):
    """Return what a converter stores for a scaling: by what each frequency is divided."""
    sizes = {"max_position_embeddings": 1 << 17, "length": 1}
    plain = rotary_frequencies(RopeConfig(theta=rope.theta), head_dim, **sizes)
    scaled = rotary_frequencies(rope, head_dim, **sizes)
    return (np.array(plain) / np.array(scaled)).astype("<f4").tobytes()


@pytest.mark.parametrize(("factor", "length"), [(8.0, 8192), (32.0, 8192), (5.5, 4096)])
def test_the_divisors_of_llama_3(factor, length, small_model, tmp_path):
    rope = RopeConfig(
        theta=100_000.0,
        type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=length,
    )
    builder = small_model(head_dim=64).tensor("rope_freqs.weight", (32,), "F32", divisors(rope, 64))
    checkpoint = opened(builder, tmp_path)
    assert typed(checkpoint).rope == rope
    assert not any("rope" in name for name in checkpoint.tensors)


@pytest.mark.parametrize(
    "values", [[1, 2, 3, 4], [0, 1, 1, 1], [1, 1, 1, np.nan], [1, 1, 1, np.inf], [1, 1, 1, -2]]
)
def test_divisors_that_nothing_explains(values, small_model, tmp_path):
    data = np.array(values, "<f4").tobytes()
    builder = small_model().tensor("rope_freqs.weight", (4,), "F32", data)
    assert "config.json cannot express" in refusal(builder, tmp_path)


def test_no_architecture(builder, tmp_path):
    assert "does not state its architecture" in refusal(builder.tensor("t", (1,)), tmp_path)
    builder.key("general.architecture", "u32", 3)
    assert "does not state its architecture" in refusal(builder, tmp_path)
