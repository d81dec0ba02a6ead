"""Configs that are refused: each with its key, what was expected and a way out."""

import json
import math

import pytest
from family_configs import read_config

from moecc import errors
from moecc.errors import InputError
from moecc.families.reader import key_problem
from moecc.families.registry import CONFIGS, parse_config

from .small_config import LLAMA3, YARN, refusal, small


def mscaled(*factors):
    lists = {"short_factor": [1.0, 1.5], "long_factor": [1.25, 4.0]}
    named = dict(zip(("short_mscale", "long_mscale"), factors, strict=False))
    return {"type": "longrope", **lists, **named, "original_max_position_embeddings": 32}


def scaled(kind, **factors):
    """Return a change of the rotary positions."""
    return {"rope_scaling": {"rope_type": kind, **factors}}


REFUSED = [
    ("llama", {"hidden_size": -1}, "found: -1"),
    ("llama", {"num_hidden_layers": 0}, "found: 0"),
    ("llama", {"num_hidden_layers": 10**9}, "10,000"),
    ("llama", {"vocab_size": 10**6000}, "bits"),
    ("llama", {"vocab_size": "40"}, "the text '40'"),
    ("llama", {"vocab_size": True}, "found: true"),
    ("llama", {"tie_word_embeddings": 1}, "true or"),
    ("llama", {"rms_norm_eps": math.nan}, "finite"),
    ("llama", {"rope_theta": 10**400}, "finite"),
    ("llama", {"rms_norm_eps": -1e-5}, "at least 0"),
    ("llama", {"hidden_size": 18}, "head_dim", "not a multiple of num_attention_heads 4"),
    ("llama", {"hidden_size": 18, "head_dim": 4}, "hidden_size", "a mistral"),
    ("llama", {"num_key_value_heads": 3}, "divisor of 4"),
    ("llama", {"head_dim": 5}, "even"),
    ("llama", {"hidden_act": "sillu"}, "did you mean 'silu'?"),
    ("llama", {"dtype": "float8_e4m3fn"}, "one of bfloat16"),
    # transformers looks up the attribute of torch, and finds none of this name.
    ("llama", {"torch_dtype": "torch.bfloat16"}, "did you mean 'bfloat16'?"),
    ("llama", {"dtype": "float16", "torch_dtype": "float32"}, "dtype", "twice"),
    ("llama", {"pad_token_id": 40}, "outside the vocabulary"),
    ("llama", {"bos_token_id": "<s>"}, "not a token id"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "dequantise first"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
    (
        "llama",
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        "10000.0 in rope_theta, 500000.0 in rope_parameters",
    ),
    (
        "llama",
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 4}},
        "differ",
    ),
    (
        "llama",
        {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": YARN},
        "rope_scaling / rope_parameters",
        "states none",
    ),
    ("llama", scaled("linear", type="dynamic", factor=2), "rope_type / type", "named twice"),
    ("llama", scaled("linear", factor=2, facter=2), "facter", "did you mean 'factor'?"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor", "found: nothing"),
    (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "full_attention",
        "per layer type",
    ),
    (
        "phimoe",
        {"original_max_position_embeddings": 32, "rope_scaling": mscaled(1.1, 1.2)},
        "rope_scaling",
        "depends on the length",
    ),
    (
        "phimoe",
        {"original_max_position_embeddings": 32, "rope_scaling": mscaled(1.1, -1.1)},
        "long_mscale",
        "above 0",
    ),
    (
        "llama",
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}},
        "not be below low_freq_factor",
    ),
    (
        "llama4_text",
        {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 4},
        "layer_types",
        "chunks without a length",
    ),
    ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, "unknown kind"),
    ("llama4_text", {"moe_layers": [1, 4]}, "do not exist"),
    ("llama4_text", {"attention_bias": True}, "transformers 5 alone"),
    ("llama4_text", scaled("default"), "takes whatever stands here for llama3"),
    (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        "original_max_position_embeddings",
        "differently",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "part of each head"),
    (
        "llama",
        {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}},
        "head_dim",
        "exponent",
    ),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "same attention in every layer"),
    ("qwen2", {"layer_types": ["full_attention"]}, "1 ent"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "unknown kind"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "without a window"),
    (
        "qwen3_moe",
        {"num_experts": 8, "num_local_experts": 4},
        "num_experts = 8, num_local_experts = 4",
    ),
    ("qwen2_moe", {"num_local_experts": 4}, "rename the key to num_experts"),
    (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 5},
        "num_experts_per_tok",
        "1 to 4",
    ),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "found: 0"),
    ("qwen3_moe", {"mlp_only_layers": [4]}, "0 to 3"),
    ("qwen3_moe", {"mlp_only_layers": "0"}, "not a list"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "found: 0"),
    ("mixtral", {"norm_topk_prob": False}, "always"),
    ("qwen2_moe", {"head_dim": 6}, "heads x head_dim = 16"),
    ("qwen3", {"head_dim": None}, "found: null"),
    ("llama", {"remark": eval("[" * 40 + "]" * 40)}, "nested more than"),
    ("llama", {"remark": {"a": [math.inf]}}, "not a JSON value"),
    *(
        (family, {"is_causal": False}, "attends to later ones")
        for family in ("gpt2", "opt", "t5", "switch_transformers", "whisper")
    ),
    *(
        (family, {key: 8}, "transformers takes it for")
        for family, key in (
            ("gpt2", "num_hidden_layers"),
            ("t5", "head_dim"),
            ("umt5", "num_attention_heads"),
            ("switch_transformers", "num_hidden_layers"),
            ("distilbert", "num_attention_heads"),
            ("whisper", "num_key_value_heads"),
            ("whisper", "num_attention_heads"),
        )
    ),
    *((family, {"head_dim": 7}, "width") for family in ("gpt_neox", "vit", "dinov2", "modernbert")),
    ("llama", scaled("linear", factor=2.0, rope_theta=300.0), "takes its default"),
    (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        "by kind of layer alone",
    ),
    (
        "gemma3_text",
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "truncate": False}},
        "rope_scaling",
        "whatever truncate says",
    ),
    (
        "phi3",
        {"original_max_position_embeddings": 16, "rope_scaling": mscaled()},
        "rope_scaling: original_max_position_embeddings",
        "the length beside",
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"type": "linear"}}},
        "rope_parameters: sliding_attention",
        "only plain",
    ),
    (
        "deberta-v2",
        {"norm_rel_ebd": "layer_norm", "relative_attention": False},
        "no relative positions",
    ),
    ("falcon", {"n_embed": 64}, "takes it for hidden"),
    (
        "ernie4_5_moe",
        {"moe_k": 2, "moe_num_experts": 4, "moe_norm_min": 1e-9},
        "moe_norm_min",
        "at most 1e-12",
    ),
    ("ernie4_5_moe", {"moe_k": 2, "num_experts_per_tok": 0}, "num_experts_per_tok", "for moe_k"),
    (
        "granitemoehybrid",
        {"layers_block_type": ["mamba"]},
        "layers_block_type",
        "takes it for layer_types",
    ),
    ("switch_transformers", {"dense_act_fn": "quick_gelu"}, "dense_act_fn", "unknown activation"),
    (
        "stablelm",
        {
            "partial_rotary_factor": 0.3,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.3},
        },
        "rope_parameters",
        "an even number",
    ),
    *[
        (
            family,
            {"rope_scaling": {"type": "linear", "factor": 2.5}},
            "rope_scaling",
            "overlooks type",
        )
        for family in ("gemma3_text", "olmo3")
    ],
    (
        "smollm3",
        {
            "use_sliding_window": False,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", *["full_attention"] * 3],
        },
        "layer_types",
        "in spite of use_sliding_window",
    ),
    ("t5", {"dense_act_fn": "gelu", "is_gated_act": True}, "tanh approximation"),
    ("t5", {"feed_forward_proj": "geglu"}, "feed_forward_proj"),
    ("t5", {"relative_attention_num_buckets": 7}, "halves the buckets"),
    ("t5", {"relative_attention_max_distance": 9}, "reach further"),
    ("t5", {"is_encoder_decoder": False}, "without a decoder"),
    ("t5", {"architectures": ["T5EncoderModel"]}, "another model class"),
    (
        "mt5",
        {"tie_word_embeddings": True, "scale_decoder_outputs": True},
        "scale_decoder_outputs",
        "mt5 scales no outputs",
    ),
    ("switch_transformers", {"router_bias": True}, "router with a bias"),
    ("switch_transformers", {"num_sparse_encoder_layers": 5}, "0 to 4"),
    ("switch_transformers", {"encoder_sparse_step": 3}, "contradicts"),
    ("st_moe", {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok", "that many"),
    ("st_moe", {"sparse_encoder_layers": [3, 1]}, "not ascending"),
    ("st_moe", {"sparse_decoder_layers": [9]}, "0 to 3"),
    ("bert", {"hidden_size": 18}, "heads do not divide"),
    ("bert", {"position_embedding_type": "relative_key"}, "absolute"),
    ("bert", {"is_decoder": True}, "decodes"),
    ("gpt2", {"n_head": 7}, "heads do not divide"),
    ("gpt2", {"add_cross_attention": True}, "reads an encoder"),
    ("gpt_neox", {"rotary_pct": 0.9}, "even number"),
    ("gpt_neox", {"rope_scaling": {"type": "su"}}, "rope_scaling"),
    ("opt", {"enable_bias": False}, "an opt without biases"),
    ("opt", {"layer_norm_eps": 1e-6}, "computes with 1e-5"),
    ("bloom", {"hidden_size": 18}, "n_embed", "takes it for hidden_size"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln", "norms of queries"),
    (
        "gemma4_text",
        {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 0},
        "num_kv_shared_layers",
        "of their own",
    ),
    (
        "gemma4_text",
        {"hidden_size_per_layer_input": 2, "num_kv_shared_layers": 3},
        "num_kv_shared_layers",
        "of each kind before those",
    ),
    ("gemma4_text", {"layer_types": 4 * ["sliding_attention"]}, "last layer see all tokens"),
    ("gemma4_text", {"vocab_size_per_layer_input": 19}, "tokens without an embedding for each"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "see later ones"),
    ("gemma4_text", {"rope_theta": 1e4}, "reads rope_parameters, by kind of layer"),
    (
        "gemma4_text",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 300.0}}},
        "no parameters for sliding",
    ),
    (
        "gemma4_text",
        {"global_head_dim": None, "per_layer_config": {"1": {"head_dim": 4}}},
        "per_layer_config",
        "the same in each layer",
    ),
    ("gemma4_text", {"per_layer_config": {"1": {"sliding_window": 4}}}, "not supported"),
    (
        "gemma4_text",
        {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 4},
        "num_experts",
        "not a usable size",
    ),
    ("gemma3n_text", {"altup_active_idx": 3}, "no such stream"),
    ("gemma3n_text", {"altup_correct_scale": False}, "without a scale"),
    (
        "gemma3n_text",
        {"activation_sparsity_pattern": [0.5, 1, 0, 0]},
        "not a share of the neurons",
    ),
    ("gemma3n_text", {"intermediate_size": [4, 4]}, "not one entry for each layer"),
    ("gemma3n_text", {"rope_scaling": {"factor": 2.0}}, "scaled rotary positions"),
    ("roberta", {"pad_token_id": None}, "count from the id"),
    ("mpnet", {"relative_attention_num_buckets": 16}, "32 buckets"),
    ("mpnet", {"pad_token_id": 0}, "from token 1"),
    ("granitemoe", {"position_embedding_type": "nope"}, "rotary"),
    ("albert", {"inner_group_num": 2}, "inner_group_num"),
    ("deberta-v2", {"conv_kernel_size": 3}, "by --via torch"),
    ("deberta-v2", {"embedding_size": 8}, "usual size"),
    ("deberta-v2", {"position_buckets": 2}, "no such buckets"),
    ("modernbert", {"sliding_window": 3}, "half of local_attention"),
    ("modernbert", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("modernbert", {"rope_parameters": {"full_attention": {"factor": 2}}}, "rope_parameters"),
    ("distilbert", {"n_heads": 7}, "dim / n_heads", "the heads do not divide"),
    ("distilbert", {"layer_norm_eps": 1e-5}, "computes with 1e-12"),
    ("vit", {"patch_size": 3}, "whole patches"),
    ("vit", {"patch_size": [4, 2]}, "square patches"),
    ("vit", {"image_size": [8, 8, 8]}, "height and width"),
    ("dinov2", {"image_size": [8, 12]}, "are square"),
    ("dinov3_vit", {"num_attention_heads": 8}, "multiple of 4"),
    ("clip_vision_model", {"image_size": [8, 12]}, "square"),
    ("swin", {"image_size": 12}, "whole windows"),
    ("swin", {"window_size": 5}, "larger than the image"),
    ("swin", {"num_heads": [2]}, "one entry for each stage"),
    ("swin", {"use_absolute_embeddings": True}, "tables of other sizes"),
    ("clip", {"text_config": {}}, "vision_config", "no encoder of images"),
    ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("marian", {"decoder_vocab_size": 9}, "decoder_vocab_size"),
    ("m2m_100", {"pad_token_id": None}, "count from the id"),
    ("whisper", {"scale_embedding": True}, "does not scale"),
    ("whisper", {"is_encoder_decoder": False}, "halves"),
]
"""A family, changes of its config, the place if it is not that of the changes, and a reason."""


NAMES = [f"{family} {', '.join(changes)}: {rest[-1]}" for family, changes, *rest in REFUSED]


@pytest.mark.parametrize("case", REFUSED, ids=NAMES)
def test_refused_with_key_and_reason(case):
    family, changes, *place, reason = case
    error = refusal(small(family, **changes))
    (problem,) = error.problems
    assert error.exit_code == 1
    assert problem.where.startswith("config.json: ")
    assert (place[0] if place else " / ".join(changes)) in problem.where
    assert reason in str(error)


def test_all_problems_at_once_and_nothing_that_follows_from_them():
    error = refusal(
        small(
            "qwen3_moe",
            hidden_size="wide",
            num_attention_heads=-4,
            hidden_act="sillu",
            rope_scaling={"rope_type": "yarm", "factor": -1},
            quantization_config={},
            num_experts=8,
            num_local_experts=4,
            num_experts_per_tok=9,
            clip_qkv=5.0,
        )
    )
    assert {problem.where.removeprefix("config.json: ") for problem in error.problems} == {
        "hidden_size",
        "num_attention_heads",
        "hidden_act",
        "rope_scaling: rope_type",
        "quantization_config",
        "num_experts / num_local_experts",
        "clip_qkv",
    }


def test_an_unknown_family_is_taken_for_another_by_its_class_alone():
    for name in ("mixtrel", "mamba", "llama2"):
        said = str(refusal({"model_type": name, "architectures": ["MambaForCausalLM"]}))
        assert not any(word in said for word in ("did you mean", "is that of model_type"))
        assert "moecc convert --via torch" in said
    named = refusal({"model_type": "lama", "architectures": ["LlamaForCausalLM"]})
    assert "the class in architectures is that of model_type 'llama'" in str(named)
    unknown = str(refusal({"model_type": "mamba"}))
    assert ", ".join(sorted(CONFIGS)) in unknown
    assert "--load FILE.py" in unknown
    assert "--via torch" not in unknown, "which reads the class that architectures names"
    assert "moecc.torch.convert takes any module" in unknown
    assert "as a .moe file" in unknown
    (nameless,) = refusal({"architectures": ["Qwen3ForCausalLM"]}).problems
    assert nameless.hint.startswith('add "model_type": "qwen3"')
    (nameless,) = refusal({"vocab_size": 3}).problems
    assert nameless.hint.startswith('add "model_type", which names the family')
    assert "the text" in str(refusal({"model_type": "x" * 10_000}))
    for wrong in (None, [], "llama", 3, {"model_type": ["llama"]}, {"model_type": None}):
        assert refusal(wrong).exit_code == 1


def test_reading_a_folder(tmp_path):
    with pytest.raises(InputError):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small("llama")))
    assert read_config(tmp_path) == parse_config(small("llama"))
    path.write_text('{"model_type": "llama", "vocab_size": 0}')
    with pytest.raises(InputError, match="vocab_size") as caught:
        read_config(tmp_path)
    assert str(path) in str(caught.value)
    path.write_text('{"model_type": "llama", "model_type": "qwen2"}')
    with pytest.raises(InputError, match="twice"):
        read_config(tmp_path)


def test_a_mirrored_folder_leaves_the_keys_of_a_problem(monkeypatch):
    monkeypatch.setitem(errors.ALIASES, "/mirror", "s3://bucket")
    problem = key_problem("not so", None, "/mirror/x", "head_dim", "hidden_size")
    assert problem.keys == ("head_dim", "hidden_size")
    assert problem.found == "s3://bucket/x"
