"""Configs that are refused: each with its key, what was expected and a way out."""

import json
import math

import pytest
from family_configs import read_config

from moecc import errors
from moecc.errors import InputError
from moecc.families.reader import key_problem
from moecc.families.registry import CONFIGS, parse_config

from .small_config import LLAMA3, MOE, SMALL, YARN, refusal, small


def mscaled(*factors):
    lists = {"short_factor": [1.0, 1.5], "long_factor": [1.25, 4.0]}
    named = dict(zip(("short_mscale", "long_mscale"), factors, strict=False))
    return {"type": "longrope", **lists, **named, "original_max_position_embeddings": 32}


REFUSED = {
    "negative size": (small("llama", hidden_size=-1), "hidden_size", "found: -1"),
    "zero layers": (small("llama", num_hidden_layers=0), "num_hidden_layers", "found: 0"),
    "absurd layers": (small("llama", num_hidden_layers=10**9), "num_hidden_layers", "10,000"),
    "huge number": (small("llama", vocab_size=10**6000), "vocab_size", "bits"),
    "text for a size": (small("llama", vocab_size="40"), "vocab_size", "the text '40'"),
    "truth for a size": (small("llama", vocab_size=True), "vocab_size", "found: true"),
    "number for a truth": (small("llama", tie_word_embeddings=1), "tie_word_embeddings", "true or"),
    "not a number": (small("llama", rms_norm_eps=math.nan), "rms_norm_eps", "finite"),
    "overflowing": (small("llama", rope_theta=10**400), "rope_theta", "finite"),
    "negative eps": (small("llama", rms_norm_eps=-1e-5), "rms_norm_eps", "at least 0"),
    "undivided": (small("llama", hidden_size=18), "head_dim", "not a multiple of 4 heads"),
    "undivided llama": (small("llama", hidden_size=18, head_dim=4), "hidden_size", "a mistral"),
    "kv heads": (small("llama", num_key_value_heads=3), "num_key_value_heads", "divisor of 4"),
    "odd head_dim": (small("llama", head_dim=5), "head_dim", "even"),
    "activation": (small("llama", hidden_act="sillu"), "hidden_act", "did you mean 'silu'?"),
    "dtype": (small("llama", dtype="float8_e4m3fn"), "dtype", "one of bfloat16"),
    "dtype as torch prints it": (
        # transformers looks up the attribute of torch, and finds none of this name.
        small("llama", torch_dtype="torch.bfloat16"),
        "torch_dtype",
        "did you mean 'bfloat16'?",
    ),
    "two dtypes": (small("llama", dtype="float16", torch_dtype="float32"), "dtype", "twice"),
    "padding": (small("llama", pad_token_id=40), "pad_token_id", "outside the vocabulary"),
    "token id": (small("llama", bos_token_id="<s>"), "bos_token_id", "not a token id"),
    "quantised": (
        small("llama", quantization_config={"quant_method": "gptq"}),
        "quantization_config",
        "dequantise first",
    ),
    "another head": (
        small("llama", architectures=["LlamaForSequenceClassification"]),
        "architectures",
        "LlamaForCausalLM",
    ),
    "two thetas": (
        small("llama", rope_theta=1e4, rope_parameters={"rope_theta": 5e5}),
        "rope_theta / rope_parameters",
        "10000.0 in rope_theta, 500000.0 in rope_parameters",
    ),
    "two scalings": (
        small("llama", rope_scaling=YARN, rope_parameters={"rope_type": "linear", "factor": 4}),
        "rope_scaling / rope_parameters",
        "differ",
    ),
    "no scaling and one": (
        small("llama", rope_theta=1e4, rope_scaling=None, rope_parameters=YARN),
        "rope_scaling / rope_parameters",
        "states none",
    ),
    "rope types": (
        small("llama", rope_scaling={"rope_type": "linear", "type": "dynamic", "factor": 2}),
        "rope_type / type",
        "named twice",
    ),
    "rope key": (
        small("llama", rope_scaling={"rope_type": "linear", "factor": 2, "facter": 2}),
        "facter",
        "did you mean 'factor'?",
    ),
    "no factor": (small("llama", rope_scaling={"type": "linear"}), "factor", "found: nothing"),
    "rope by layer": (
        small("qwen3", rope_parameters={"full_attention": {"rope_type": "default"}}),
        "full_attention",
        "per layer type",
    ),
    "phimoe factors": (
        small("phimoe", original_max_position_embeddings=32, rope_scaling=mscaled(1.1, 1.2)),
        "rope_scaling",
        "depends on the length",
    ),
    "phimoe factor": (
        small("phimoe", original_max_position_embeddings=32, rope_scaling=mscaled(1.1, -1.1)),
        "long_mscale",
        "above 0",
    ),
    "llama3 bands": (
        small("llama", rope_scaling={**LLAMA3, "high_freq_factor": 0.5}),
        "rope_scaling",
        "not be below low_freq_factor",
    ),
    "chunks without a length": (
        small("llama4_text", attention_chunk_size=None, layer_types=["chunked_attention"] * 4),
        "layer_types",
        "chunks without a length",
    ),
    "sliding chunks": (
        small("llama4_text", layer_types=["sliding_attention"] * 4),
        "layer_types",
        "unknown kind",
    ),
    "experts beyond": (small("llama4_text", moe_layers=[1, 4]), "moe_layers", "do not exist"),
    "biases of version 5": (
        small("llama4_text", attention_bias=True),
        "attention_bias",
        "transformers 5 alone",
    ),
    "any scaling is llama3": (
        small("llama4_text", rope_scaling={"rope_type": "default"}),
        "rope_scaling",
        "takes whatever stands here for llama3",
    ),
    "length outside": (
        small("llama", rope_scaling=YARN, original_max_position_embeddings=32),
        "original_max_position_embeddings",
        "differently",
    ),
    "partial rotary": (
        small("llama", partial_rotary_factor=0.5),
        "partial_rotary_factor",
        "part of each head",
    ),
    "dynamic of two": (
        small("llama", head_dim=2, rope_scaling={"type": "dynamic", "factor": 2}),
        "head_dim",
        "exponent",
    ),
    "layer types": (
        small("mistral", layer_types=["full_attention"] * 4),
        "layer_types",
        "same attention in every layer",
    ),
    "layer types short": (small("qwen2", layer_types=["full_attention"]), "layer_types", "1 ent"),
    "layer types unknown": (
        small("qwen2", layer_types=["chunked_attention"] * 4),
        "layer_types",
        "unknown kind",
    ),
    "sliding without window": (
        small("qwen3", layer_types=["sliding_attention"] * 4),
        "layer_types",
        "without a window",
    ),
    "two numbers of experts": (
        small("qwen3_moe", num_experts=8, num_local_experts=4),
        "num_experts / num_local_experts",
        "num_experts = 8, num_local_experts = 4",
    ),
    "experts by another name": (
        {"model_type": "qwen2_moe", **SMALL, **MOE, "num_local_experts": 4},
        "num_local_experts",
        "rename the key to num_experts",
    ),
    "too many a token": (
        small("mixtral", num_experts_per_tok=5),
        "num_experts_per_tok",
        "1 to 4",
    ),
    "step of none": (small("qwen3_moe", decoder_sparse_step=0), "decoder_sparse_step", "found: 0"),
    "layer beyond": (small("qwen3_moe", mlp_only_layers=[4]), "mlp_only_layers", "0 to 3"),
    "layers as text": (small("qwen3_moe", mlp_only_layers="0"), "mlp_only_layers", "not a list"),
    "no shared expert": (
        small("qwen2_moe", shared_expert_intermediate_size=0),
        "shared_expert_intermediate_size",
        "found: 0",
    ),
    "unnormalised mixtral": (small("mixtral", norm_topk_prob=False), "norm_topk_prob", "always"),
    "wide qwen2_moe": (small("qwen2_moe", head_dim=6), "head_dim", "heads x head_dim = 16"),
    "null head_dim": (small("qwen3", head_dim=None), "head_dim", "found: null"),
    "deep": (small("llama", remark=eval("[" * 40 + "]" * 40)), "remark", "nested more than"),
    "not JSON": (small("llama", remark={"a": [math.inf]}), "remark", "not a JSON value"),
    **{
        f"both directions in {family}": (
            {"model_type": family, "is_causal": False},
            "is_causal",
            "attends to later ones",
        )
        for family in ("gpt2", "opt", "t5", "switch_transformers", "whisper")
    },
    **{
        f"{family} by {key}": ({"model_type": family, key: 8}, key, "transformers takes it for")
        for family, key in (
            ("gpt2", "num_hidden_layers"),
            ("t5", "head_dim"),
            ("umt5", "num_attention_heads"),
            ("switch_transformers", "num_hidden_layers"),
            ("distilbert", "num_attention_heads"),
            ("whisper", "num_key_value_heads"),
            ("whisper", "num_attention_heads"),
        )
    },
    **{
        f"{family} with wide heads": ({"model_type": family, "head_dim": 7}, "head_dim", "width")
        for family in ("gpt_neox", "vit", "dinov2", "modernbert")
    },
    "base inside": (
        small("llama", rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}),
        "rope_scaling",
        "takes its default",
    ),
    "flat parameters of kinds": (
        small("gemma3_text", rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
        "rope_parameters",
        "by kind of layer alone",
    ),
    "a range of YaRN": (
        small("gemma3_text", rope_theta=1e6, rope_scaling={**YARN, "truncate": False}),
        "rope_scaling",
        "whatever truncate says",
    ),
    "two original lengths": (
        small("phi3", original_max_position_embeddings=16, rope_scaling=mscaled()),
        "rope_scaling: original_max_position_embeddings",
        "the length beside",
    ),
    "scaled windows": (
        small("gemma3_text", rope_parameters={"sliding_attention": {"type": "linear"}}),
        "rope_parameters: sliding_attention",
        "only plain",
    ),
    "a norm of no table": (
        {"model_type": "deberta-v2", "norm_rel_ebd": "layer_norm", "relative_attention": False},
        "norm_rel_ebd / relative_attention",
        "no relative positions",
    ),
    "falcon's width": ({"model_type": "falcon", "n_embed": 64}, "n_embed", "takes it for hidden"),
    "gates that a floor divides": (
        {"model_type": "ernie4_5_moe", "moe_k": 2, "moe_num_experts": 4, "moe_norm_min": 0.6},
        "moe_norm_min",
        "at most 0.5",
    ),
    "smollm3's windows": (
        small(
            "smollm3",
            use_sliding_window=False,
            sliding_window=4,
            layer_types=["sliding_attention", *["full_attention"] * 3],
        ),
        "layer_types",
        "in spite of use_sliding_window",
    ),
    "t5's gate by another key": (
        {"model_type": "t5", "dense_act_fn": "gelu", "is_gated_act": True},
        "dense_act_fn / is_gated_act",
        "tanh approximation",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_key_and_reason(case):
    data, key, reason = REFUSED[case]
    error = refusal(data)
    assert error.exit_code == 1
    assert len(error.problems) == 1, error
    assert str(error.problems[0].where).startswith("config.json: ")
    assert key in str(error.problems[0].where)
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
    assert {str(problem.where).removeprefix("config.json: ") for problem in error.problems} == {
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
    named = refusal({"model_type": "lama", "architectures": ["LlamaForCausalLM"]})
    assert "the class in architectures is that of model_type 'llama'" in str(named)
    unknown = str(refusal({"model_type": "mamba"}))
    assert ", ".join(sorted(CONFIGS)) in unknown
    assert "--load FILE.py" in unknown
    assert "moecc convert --via torch" in unknown
    assert "as a .moe file" in unknown
    (nameless,) = refusal({"architectures": ["Qwen3ForCausalLM"]}).problems
    assert str(nameless.hint).startswith('add "model_type": "qwen3"')
    (nameless,) = refusal({"vocab_size": 3}).problems
    assert nameless.hint == 'add "model_type", which names the family, to the file'
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
