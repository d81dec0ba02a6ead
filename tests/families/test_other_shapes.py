"""Families of a shape of their own: read as written, exported as they are, shrunk, upcycled."""

from dataclasses import replace

import numpy as np
import pytest
from family_configs import (
    MemoryCheckpoint,
    exported_checkpoint,
    random_checkpoint,
    run_checkpoint,
)
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.analysis import find_ffn_blocks
from moecc.errors import InputError
from moecc.families import build
from moecc.families.describe import describe
from moecc.families.registry import parse_config
from moecc.ir import equal, parse, print_graph, verify
from moecc.jobs.convert import plan
from moecc.model.open import OpenedModel
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.testing.data import inputs_for
from moecc.translate.export import export_graph
from moecc.translate.importing import import_checkpoint, unread_tensors
from moecc.weights.expr import Source

GPT2 = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 9}
NEOX = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 20, "hidden_size": 8, "ffn_dim": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 9,
}  # fmt: skip
BLOOM = {"vocab_size": 20, "n_embed": 12, "n_layer": 2, "num_attention_heads": 3}
MPT = {"vocab_size": 20, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 9}
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
GEMMA4 = {
    **SMALL, "model_type": "gemma4_text", "vocab_size": 20, "num_key_value_heads": 2,
    "head_dim": 6, "global_head_dim": 8, "num_hidden_layers": 4, "sliding_window": 3,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
}  # fmt: skip
LAYER_INPUTS = {"hidden_size_per_layer_input": 2, "num_kv_shared_layers": 2}
KEYS_AS_VALUES = {
    "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
}  # fmt: skip
GEMMA3N = {
    **{k: v for k, v in GEMMA4.items() if k != "global_head_dim"}, "model_type": "gemma3n_text",
    "laurel_rank": 5, "altup_num_inputs": 3, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 2, "vocab_size_per_layer_input": 20,
}  # fmt: skip
BERT = {**SMALL, "vocab_size": 20, "max_position_embeddings": 12}
DISTANCES = {
    "relative_attention": True, "pos_att_type": "c2p|p2c", "norm_rel_ebd": "layer_norm",
    "max_relative_positions": 7,
}  # fmt: skip
NO_TOKENS = {"pad_token_id": None}
DISTILBERT = {
    "model_type": "distilbert", "vocab_size": 20, "dim": 16, "hidden_dim": 24, "n_layers": 2,
    "n_heads": 4, "max_position_embeddings": 12,
}  # fmt: skip
IMAGES = {**SMALL, "image_size": 8, "patch_size": 4}
WHISPER = {
    "d_model": 12, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 24, "vocab_size": 20,
    "num_mel_bins": 6, "max_source_positions": 5, "max_target_positions": 9, "pad_token_id": 0,
}  # fmt: skip

TEXTS = {
    **{key: value for key, value in WHISPER.items() if key[:4] not in ("num_", "max_")},
    "max_position_embeddings": 9,
}

CONFIGS = [
    {"model_type": "gpt2", **GPT2, "n_inner": 12, "tie_word_embeddings": False},
    {"model_type": "opt", **OPT, "word_embed_proj_dim": 6, "tie_word_embeddings": False},
    {"model_type": "opt", **OPT, "do_layer_norm_before": False, "activation_function": "gelu"},
    {"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.5},
    {"model_type": "gpt_neox", **NEOX, "rotary_pct": 1.0, "use_parallel_residual": False},
    {"model_type": "gpt_neox", **NEOX, "attention_bias": False, "tie_word_embeddings": True},
    {"model_type": "bloom", **BLOOM, "tie_word_embeddings": False},
    {"model_type": "mpt", **MPT, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.4}},
    {**GEMMA3N, **LAYER_INPUTS, "altup_active_idx": 2, "vocab_size_per_layer_input": 12},
    {**GEMMA3N, "intermediate_size": [12, 10, 12, 10], "tie_word_embeddings": False},
    {**GEMMA4, **LAYER_INPUTS, "use_double_wide_mlp": True, "tie_word_embeddings": False},
    {**GEMMA4, **KEYS_AS_VALUES, "attention_bias": True, "final_logit_softcapping": 5.0},
    {"model_type": "roberta", **BERT, "pad_token_id": 3},
    {"model_type": "xlm-roberta", **BERT},
    {"model_type": "xlm-roberta-xl", **BERT},
    {"model_type": "camembert", **BERT, "type_vocab_size": 1},
    {"model_type": "mpnet", **BERT},
    {"model_type": "electra", **BERT, "embedding_size": 6},
    {"model_type": "albert", **BERT, "embedding_size": 16, "num_hidden_groups": 2},
    {"model_type": "modernbert", **BERT, **NO_TOKENS, "local_attention": 4, "norm_bias": True},
    {"model_type": "deberta-v2", **BERT, **DISTANCES},
    {"model_type": "deberta-v2", **BERT, **DISTANCES, "type_vocab_size": 2, "position_buckets": 4},
    {"model_type": "clip_text_model", **BERT, **NO_TOKENS},
    {**DISTILBERT, "activation": "relu", "dropout": 0.2},
    {"model_type": "vit", **IMAGES, "image_size": [8, 12], "qkv_bias": False},
    {
        "model_type": "swin",
        "image_size": [8, 16],
        "patch_size": 2,
        "embed_dim": 4,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 2,
        "mlp_ratio": 2,
    },
    {"model_type": "dinov2", **IMAGES, "use_swiglu_ffn": True, "mlp_ratio": 2},
    {"model_type": "dinov3_vit", **IMAGES, "num_register_tokens": 2, "use_gated_mlp": True},
    {"model_type": "clip_vision_model", **IMAGES},
    {"model_type": "siglip_vision_model", **IMAGES},
    {"model_type": "whisper", **WHISPER},
    *({"model_type": name, **TEXTS} for name in ("bart", "mbart", "m2m_100")),
    {"model_type": "marian", **TEXTS, "scale_embedding": True},
]
NAMES = [f"{number}-{config['model_type']}" for number, config in enumerate(CONFIGS)]
each = pytest.mark.parametrize("keys", CONFIGS, ids=NAMES)


MODERN = {"model_type": "modernbert", **BERT, **NO_TOKENS}


def run(checkpoint):
    graph = import_checkpoint(checkpoint)
    return run_checkpoint(graph, checkpoint, inputs_for(graph, 3, {"B": 2, "S": 6, "T": 5}))


@each
def test_a_config_is_read_as_it_is_written(keys):
    config = parse_config(keys)
    written = config.to_json()
    assert parse_config(written) == config
    assert parse_config(written).to_json() == written
    for spelling in (("rope_parameters", "dtype"), ("rope_scaling", "rotary_pct", "torch_dtype")):
        half = {key: value for key, value in written.items() if key not in spelling}
        assert parse_config(half) == config


@each
def test_a_model_is_exported_as_it_is_and_as_st_moe(keys):
    config = parse_config(keys)
    checkpoint = random_checkpoint(config, seed=2)
    graph = import_checkpoint(checkpoint)
    verify(graph)
    assert equal(parse(print_graph(graph)), graph)
    expected = run(checkpoint)
    own = export_graph(graph, config.model_type)
    assert own.config == config
    assert all(isinstance(expr, Source) and expr.name == name for name, expr in own.tensors)
    for made in (own, export_graph(graph, "st_moe")):
        written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
        np.testing.assert_array_equal(run(written), expected)


@each
def test_an_upcycled_model_is_the_dense_one(keys):
    config = parse_config(keys)
    checkpoint = random_checkpoint(config, seed=6)
    expected = run(checkpoint)
    graph = import_checkpoint(checkpoint)
    assert len(find_ffn_blocks(graph).blocks) == describe(graph).layers
    UpcyclePass(experts=4, top_k=2, router_std=1.0).apply(graph, Context())
    made = export_graph(graph, "st_moe")
    found = run(exported_checkpoint(made.config_json, made.tensors, checkpoint))
    assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()


def test_a_mask_hides_the_padding_of_encoders():
    roberta, mpnet = ({"model_type": name, **BERT} for name in ("roberta", "mpnet"))
    clip = {"model_type": "clip_text_model", **BERT, **NO_TOKENS}
    deberta = {"model_type": "deberta-v2", **BERT, **DISTANCES, "share_att_key": True}
    for keys in (roberta, mpnet, DISTILBERT, {**MODERN, "local_attention": 4}, clip, deberta):
        checkpoint = random_checkpoint(parse_config(keys), seed=3)
        graph = import_checkpoint(checkpoint, padding=True)
        tokens = np.array([[5, 6, 7, 8, 9, 10]])
        mask = np.arange(6)[None] < 4
        found = run_checkpoint(graph, checkpoint, {"tokens": tokens, "mask": mask})
        short = run_checkpoint(graph, checkpoint, {"tokens": tokens[:, :4], "mask": mask[:, :4]})
        np.testing.assert_allclose(found[:, :4], short, atol=1e-12)
    for keys in ({"model_type": "vit", **IMAGES}, {"model_type": "whisper", **WHISPER}):
        with pytest.raises(InputError, match="takes no mask"):
            build(parse_config(keys), padding=True)


@pytest.mark.parametrize(
    ("keys", "prefix", "architecture", "beside"),
    [
        ({"model_type": "bert", **BERT}, "bert.", "BertForMaskedLM", "cls.predictions.bias"),
        (
            {"model_type": "xlm-roberta", **BERT},
            "roberta.",
            "XLMRobertaForMaskedLM",
            "lm_head.bias",
        ),
        (DISTILBERT, "distilbert.", "DistilBertForMaskedLM", "vocab_projector.bias"),
        ({"model_type": "vit", **IMAGES}, "vit.", "ViTForImageClassification", "classifier.bias"),
    ],
)
def test_a_model_with_a_head_is_read_without_it(keys, prefix, architecture, beside):
    config = parse_config(keys)
    bare = random_checkpoint(config, seed=4)
    arrays = {f"{prefix}{name}": array for name, array in bare.arrays.items()}
    head = {beside: np.ones(3, np.float32), f"{prefix}pooler.dense.bias": np.ones(3, np.float32)}
    if "" not in config.head_steps:
        del head[f"{prefix}pooler.dense.bias"]
    stated = {**config.to_json(), "architectures": [architecture]}
    whole = MemoryCheckpoint(stated, {**arrays, **head})
    np.testing.assert_array_equal(run(whole), run(bare))
    graph = import_checkpoint(whole)
    assert unread_tensors(graph, whole) == list(head)
    planned = plan(OpenedModel(graph, "with a head", whole), Pipeline.parse(""), config.model_type)
    (remark,) = planned.remarks
    assert remark == f"no part of the graph, and not converted: {', '.join(head)}"
    made = export_graph(graph, config.model_type)
    assert {name for name, _ in made.tensors} == set(bare.arrays)
    whole.arrays[f"{prefix}unknown.weight"] = np.ones(3, np.float32)
    with pytest.raises(InputError, match="has no such tensor"):
        import_checkpoint(whole)


def test_a_clip_is_read_as_its_encoder_of_images():
    tower = random_checkpoint(parse_config({"model_type": "clip_vision_model", **IMAGES}), seed=4)
    others = {"text_model.final_layer_norm.bias": np.ones(3, np.float32)}
    config = {"model_type": "clip", "vision_config": {**IMAGES, "model_type": "clip_vision_model"}}
    whole = MemoryCheckpoint(config, {**tower.arrays, **others})
    np.testing.assert_array_equal(run(whole), run(tower))
    assert unread_tensors(import_checkpoint(whole), whole) == list(others)
    bare = {name.removeprefix("vision_model."): a for name, a in tower.arrays.items()}
    np.testing.assert_array_equal(run(MemoryCheckpoint(tower.config, bare)), run(tower))


def without(config, prefix):
    """Return a random checkpoint as its base model would be saved alone."""
    made = random_checkpoint(config, seed=4)
    arrays = {name.removeprefix(prefix): array for name, array in made.arrays.items()}
    return MemoryCheckpoint(config.to_json(), arrays)


def test_a_gpt2_saved_without_its_head_is_read_as_with_it():
    """The first checkpoints are so, and hold the causal masks as tensors."""
    config = parse_config({"model_type": "gpt2", **GPT2})
    bare = without(config, "transformer.")
    bare.arrays["h.0.attn.bias"] = np.ones((1, 1, 9, 9), np.float32)
    np.testing.assert_array_equal(run(bare), run(random_checkpoint(config, seed=4)))
    graph = import_checkpoint(bare)
    assert unread_tensors(graph, bare) == []
    assert {expr.name for _, expr in export_graph(graph, "gpt2").tensors} < set(bare.arrays)
    del bare.arrays["h.1.ln_2.bias"]
    with pytest.raises(InputError, match=r"h\.1\.ln_2\.bias: this tensor is missing"):
        import_checkpoint(bare)


def test_heads_of_single_layers_are_those_of_a_kind_of_layer():
    """As transformers 5.24 writes them; a checkpoint on the hub has two keys."""
    head = {"head_dim": 8, "num_key_value_heads": 1}
    layers = {"01": dict(head), "03": dict(head)}
    keys = {"attention_k_eq_v": True, "global_head_dim": 8}
    short = {k: v for k, v in GEMMA4.items() if k != "global_head_dim"}
    stated = parse_config({**short, "attention_k_eq_v": True, "per_layer_config": layers})
    assert stated == parse_config({**short, **keys, "num_global_key_value_heads": 1})


def test_what_a_family_cannot_say_is_refused():
    for keys, words in (
        ({"model_type": "gpt2", "n_head": 7}, "heads do not divide"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "reads an encoder"),
        ({"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.9}, "even number"),
        ({"model_type": "opt", **OPT, "enable_bias": False}, "enable_bias: an opt without biases"),
        ({"model_type": "opt", **OPT, "layer_norm_eps": 1e-6}, "computes with 1e-5"),
        ({"model_type": "bloom", **BLOOM, "hidden_size": 16}, "takes it for hidden_size"),
        ({"model_type": "mpt", **MPT, "attn_config": {"qk_ln": True}}, "qk_ln: norms of queries"),
        ({**GEMMA4, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 0}, "of their own"),
        ({**GEMMA4, **LAYER_INPUTS, "num_kv_shared_layers": 3}, "of each kind before those"),
        ({**GEMMA4, "layer_types": 4 * ["sliding_attention"]}, "last layer see all tokens"),
        ({**GEMMA4, "vocab_size_per_layer_input": 19}, "tokens without an embedding for each"),
        ({**GEMMA4, "use_bidirectional_attention": "all"}, "see later ones"),
        ({**GEMMA4, "rope_theta": 1e4}, "reads rope_parameters, by kind of layer"),
        ({**GEMMA4, "rope_parameters": {"full_attention": {}}}, "no parameters for sliding"),
        ({**GEMMA4, "per_layer_config": {"1": {"head_dim": 4}}}, "the same in each layer"),
        ({**GEMMA4, "per_layer_config": {"1": {"sliding_window": 4}}}, "not supported"),
        ({**GEMMA4, "enable_moe_block": True}, "num_experts: not a usable size"),
        ({**GEMMA3N, "altup_active_idx": 3}, "no such stream"),
        ({**GEMMA3N, "altup_correct_scale": False}, "without a scale"),
        ({**GEMMA3N, "activation_sparsity_pattern": [0.5, 1, 0, 0]}, "not a share of the neurons"),
        ({**GEMMA3N, "intermediate_size": [4, 4]}, "not one entry for each layer"),
        ({**GEMMA3N, "rope_scaling": {"factor": 2.0}}, "scaled rotary positions"),
        ({"model_type": "mt5", "scale_decoder_outputs": True}, "mt5 scales no outputs"),
        ({"model_type": "roberta", **BERT, "pad_token_id": None}, "count from the id"),
        ({"model_type": "mpnet", **BERT, "relative_attention_num_buckets": 16}, "32 buckets"),
        ({"model_type": "mpnet", **BERT, "pad_token_id": 0}, "from token 1"),
        ({"model_type": "granitemoe", "position_embedding_type": "nope"}, "rotary"),
        ({"model_type": "albert", **BERT, "inner_group_num": 2}, "inner_group_num"),
        ({"model_type": "deberta-v2", **BERT, "conv_kernel_size": 3}, "by --via torch"),
        ({"model_type": "deberta-v2", **BERT, **DISTANCES, "embedding_size": 8}, "usual size"),
        (
            {"model_type": "deberta-v2", **BERT, **DISTANCES, "position_buckets": 2},
            "no such buckets",
        ),
        ({**MODERN, "sliding_window": 3}, "half of local_attention"),
        ({**MODERN, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({**MODERN, "rope_parameters": {"full_attention": {"factor": 2}}}, "rope_parameters"),
        ({**DISTILBERT, "n_heads": 7}, "dim / n_heads: the heads do not divide"),
        ({**DISTILBERT, "layer_norm_eps": 1e-5}, "computes with 1e-12"),
        ({"model_type": "vit", **IMAGES, "patch_size": 3}, "whole patches"),
        ({"model_type": "vit", **IMAGES, "patch_size": [4, 2]}, "square patches"),
        ({"model_type": "vit", **IMAGES, "image_size": [8, 8, 8]}, "height and width"),
        ({"model_type": "dinov2", **IMAGES, "image_size": [8, 12]}, "are square"),
        ({"model_type": "dinov3_vit", **IMAGES, "num_attention_heads": 8}, "multiple of 4"),
        ({"model_type": "clip_vision_model", **IMAGES, "image_size": [8, 12]}, "square"),
        ({"model_type": "swin", "image_size": 256}, "whole windows"),
        ({"model_type": "swin", "window_size": 57}, "larger than the image"),
        ({"model_type": "swin", "num_heads": [3, 6]}, "one entry for each stage"),
        ({"model_type": "swin", "use_absolute_embeddings": True}, "tables of other sizes"),
        ({"model_type": "clip", "text_config": {}}, "no encoder of images"),
        ({"model_type": "bart", **TEXTS, "tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"model_type": "marian", **TEXTS, "decoder_vocab_size": 9}, "decoder_vocab_size"),
        ({"model_type": "m2m_100", **TEXTS, "pad_token_id": None}, "count from the id"),
        ({"model_type": "whisper", **WHISPER, "scale_embedding": True}, "does not scale"),
        ({"model_type": "whisper", **WHISPER, "is_encoder_decoder": False}, "halves"),
        ({"model_type": "gpt_neox", **NEOX, "rope_scaling": {"type": "su"}}, "rope_scaling"),
    ):
        with pytest.raises(InputError, match=words):
            parse_config(keys)
    config = parse_config({"model_type": "gpt_neox", **NEOX})
    with pytest.raises(InputError, match="even number"):
        replace(config, rotary_dim=3)
    with pytest.raises(InputError, match="takes no mask"):
        build(config, padding=True)
