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

from .small_config import relative_error, small

LAYER_INPUTS = {"hidden_size_per_layer_input": 2, "num_kv_shared_layers": 2}
KEYS_AS_VALUES = {
    "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
}  # fmt: skip

CONFIGS = [
    small("gpt2", n_inner=12, tie_word_embeddings=False),
    small("opt", word_embed_proj_dim=6, tie_word_embeddings=False),
    small("opt", do_layer_norm_before=False, activation_function="gelu"),
    small("gpt_neox", rotary_pct=0.5),
    small("gpt_neox", rotary_pct=1.0, use_parallel_residual=False),
    small("gpt_neox", attention_bias=False, tie_word_embeddings=True),
    small("bloom", tie_word_embeddings=False),
    small("mpt", attn_config={"clip_qkv": 0.5, "softmax_scale": 0.4}),
    small("gemma3n_text", **LAYER_INPUTS, altup_active_idx=2, vocab_size_per_layer_input=12),
    small("gemma3n_text", intermediate_size=[12, 10, 12, 10], tie_word_embeddings=False),
    small("gemma4_text", **LAYER_INPUTS, use_double_wide_mlp=True, tie_word_embeddings=False),
    small("gemma4_text", **KEYS_AS_VALUES, attention_bias=True, final_logit_softcapping=5.0),
    small("roberta", pad_token_id=3),
    *map(small, ("xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "electra", "albert")),
    small("modernbert", local_attention=4, norm_bias=True),
    small("deberta-v2"),
    small("deberta-v2", type_vocab_size=2, position_buckets=4),
    small("clip_text_model"),
    small("distilbert", activation="relu", dropout=0.2),
    small("vit", image_size=[8, 12], qkv_bias=False),
    small("swin"),
    small("dinov2", use_swiglu_ffn=True, mlp_ratio=2),
    small("dinov3_vit", num_register_tokens=2, use_gated_mlp=True),
    *map(small, ("clip_vision_model", "siglip_vision_model")),
    *map(small, ("whisper", "bart", "mbart", "m2m_100")),
    small("marian", scale_embedding=True),
]
NAMES = [f"{number}-{config['model_type']}" for number, config in enumerate(CONFIGS)]
each = pytest.mark.parametrize("keys", CONFIGS, ids=NAMES)


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
    assert relative_error(found, expected) <= 1e-9


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("roberta", {}),
        ("mpnet", {}),
        ("distilbert", {}),
        ("modernbert", {"local_attention": 4}),
        ("clip_text_model", {}),
        ("deberta-v2", {"share_att_key": True}),
    ],
)
def test_a_mask_hides_the_padding_of_encoders(family, keys):
    checkpoint = random_checkpoint(parse_config(small(family, **keys)), seed=3)
    graph = import_checkpoint(checkpoint, padding=True)
    tokens = np.array([[5, 6, 7, 8, 9, 10]])
    mask = np.arange(6)[None] < 4
    found = run_checkpoint(graph, checkpoint, {"tokens": tokens, "mask": mask})
    short = run_checkpoint(graph, checkpoint, {"tokens": tokens[:, :4], "mask": mask[:, :4]})
    np.testing.assert_allclose(found[:, :4], short, atol=1e-12)


@pytest.mark.parametrize("family", ["vit", "whisper", "gpt_neox"])
def test_other_families_take_no_mask(family):
    with pytest.raises(InputError, match="takes no mask"):
        build(parse_config(small(family)), padding=True)


@pytest.mark.parametrize(
    ("family", "prefix", "architecture", "beside"),
    [
        ("bert", "bert.", "BertForMaskedLM", "cls.predictions.bias"),
        ("xlm-roberta", "roberta.", "XLMRobertaForMaskedLM", "lm_head.bias"),
        ("distilbert", "distilbert.", "DistilBertForMaskedLM", "vocab_projector.bias"),
        ("vit", "vit.", "ViTForImageClassification", "classifier.bias"),
    ],
)
def test_a_model_with_a_head_is_read_without_it(family, prefix, architecture, beside):
    config = parse_config(small(family))
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
    way_out = "moecc convert --via torch keeps them"
    remark = f"no part of the graph, and not converted: {', '.join(head)}; {way_out}"
    assert planned.remarks == (remark,)
    assert planned.left_out == tuple(head)
    made = export_graph(graph, config.model_type)
    assert dict(made.tensors).keys() == bare.arrays.keys()
    whole.arrays[f"{prefix}unknown.weight"] = np.ones(3, np.float32)
    with pytest.raises(InputError, match="has no such tensor"):
        import_checkpoint(whole)


def test_a_remark_names_the_targets_that_keep_a_head():
    bare = random_checkpoint(parse_config(small("vit")), seed=4)
    arrays = {f"vit.{name}": array for name, array in bare.arrays.items()}
    head = {"classifier.bias": np.ones(3, np.float32)}
    head["classifier.weight"] = np.ones((3, bare.config["hidden_size"]), np.float32)
    stated = {**bare.config, "architectures": ["ViTForImageClassification"]}
    whole = MemoryCheckpoint(stated, {**arrays, **head})
    remark = f"no part of the graph: {', '.join(head)}; --to st_moe and --to auto keep them"
    assert OpenedModel(import_checkpoint(whole), "vit", whole).left_out() == [remark]
    assert OpenedModel(import_checkpoint(whole, heads=True), "vit", whole).left_out() == []


def test_a_clip_is_read_as_its_encoder_of_images():
    vision = small("clip_vision_model")
    tower = random_checkpoint(parse_config(vision), seed=4)
    others = {"text_model.final_layer_norm.bias": np.ones(3, np.float32)}
    whole = MemoryCheckpoint(small("clip", vision_config=vision), {**tower.arrays, **others})
    np.testing.assert_array_equal(run(whole), run(tower))
    assert unread_tensors(import_checkpoint(whole), whole) == list(others)
    bare = {name.removeprefix("vision_model."): a for name, a in tower.arrays.items()}
    np.testing.assert_array_equal(run(MemoryCheckpoint(tower.config, bare)), run(tower))


def test_a_gpt2_saved_without_its_head_is_read_as_with_it():
    """The first checkpoints are so, and hold the causal masks as tensors."""
    whole = random_checkpoint(parse_config(small("gpt2")), seed=4)
    arrays = {name.removeprefix("transformer."): array for name, array in whole.arrays.items()}
    bare = MemoryCheckpoint(whole.config, arrays)
    bare.arrays["h.0.attn.bias"] = np.ones((1, 1, 9, 9), np.float32)
    np.testing.assert_array_equal(run(bare), run(whole))
    graph = import_checkpoint(bare)
    assert unread_tensors(graph, bare) == []
    assert {expr.name for _, expr in export_graph(graph, "gpt2").tensors} < set(bare.arrays)
    del bare.arrays["h.1.ln_2.bias"]
    with pytest.raises(InputError, match=r"h\.1\.ln_2\.bias: this tensor is missing"):
        import_checkpoint(bare)


def test_heads_of_single_layers_are_those_of_a_kind_of_layer():
    """As transformers 5.24 writes them; a checkpoint on the hub has two keys."""
    head = {"head_dim": 8, "num_key_value_heads": 1}
    keys = small("gemma4_text", attention_k_eq_v=True)
    expected = parse_config({**keys, "num_global_key_value_heads": 1})
    del keys["global_head_dim"]
    assert parse_config({**keys, "per_layer_config": {"01": head, "03": head}}) == expected


def test_an_odd_number_of_rotated_numbers_is_refused():
    with pytest.raises(InputError, match="even number"):
        replace(parse_config(small("gpt_neox")), rotary_dim=3)
