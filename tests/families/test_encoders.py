"""t5, switch_transformers, bert and st_moe: graphs, imports and exports of any small config."""

import numpy as np
import pytest
from family_configs import (
    MemoryCheckpoint,
    exported_checkpoint,
    random_checkpoint,
    run_checkpoint,
    small_bert_configs,
    small_encdec_configs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.backend import get_backend
from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.open import open_checkpoint
from moecc.ir import equal, parse, print_graph, verify
from moecc.rewrite.passes import Context
from moecc.testing.data import inputs_for
from moecc.translate.export import export_graph
from moecc.translate.importing import import_checkpoint, unread_tensors
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Source

from .small_config import GOLDEN, golden_arrays, relative_error, small

models = st.one_of(small_encdec_configs(), small_bert_configs())


def tokens_for(graph):
    return inputs_for(graph, 3, {"B": 2, "S": 6, "T": 5})


@given(models, st.booleans())
@settings(max_examples=40)
def test_every_config_builds_a_graph_that_prints_and_parses(config, padding):
    graph = build(config, padding=padding)
    verify(graph)
    assert equal(parse(print_graph(graph)), graph)
    encdec = config.model_type != "bert"
    expected = ["tokens", *(["decoder_tokens"] if encdec else []), *(["mask"] if padding else [])]
    assert list(graph.inputs) == expected
    assert list(graph.outputs) == ["logits" if encdec else "hidden"]
    if encdec:
        lengths = [graph.inputs[name].type["seq"].size for name in expected[:2]]
        assert lengths == ["S", "T"]
        cross = [n for n in graph if n.op.name == "softmax" and "cross_attention" in n.loc]
        assert all(n.result.type["seq"].size == "T" for n in cross)
        assert all(n.result.type["kv_seq"].size == "S" for n in cross)
        assert len(cross) == config.num_decoder_layers


@given(models, st.booleans())
@settings(max_examples=30)
def test_every_config_exports_to_itself_and_to_st_moe(config, padding):
    checkpoint = random_checkpoint(config, seed=2)
    graph = import_checkpoint(checkpoint, padding=padding)
    inputs = tokens_for(graph)
    before = run_checkpoint(graph, checkpoint, inputs)
    for target in {config.model_type, "st_moe"}:
        made = export_graph(graph, target)
        written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
        # A general layout holds its inputs; of the others the reader says whether there is padding.
        again = import_checkpoint(written, padding=padding)
        np.testing.assert_array_equal(run_checkpoint(again, written, inputs), before)
        if target == config.model_type != "st_moe":
            assert made.config == parse_config(config.to_json())
            assert all(isinstance(expr, Source) for _, expr in made.tensors)
        assert list(dict(export_graph(again, target).tensors)) == list(dict(made.tensors))


def upcycled(options, **keys):
    checkpoint = random_checkpoint(parse_config(small("t5", **keys)), seed=5)
    graph = import_checkpoint(checkpoint)
    UpcyclePass(**{"experts": 4, "top_k": 1, "gates": "switch", **options}).apply(graph, Context())
    return graph, checkpoint


@pytest.mark.parametrize(
    ("layers", "counts"), [("all", (4, 4)), ("every:2", (2, 2)), ("1", (1, 1)), ("1,3", (2, 2))]
)
def test_a_zero_router_makes_switch_exact(layers, counts):
    graph, checkpoint = upcycled({"layers": layers, "router_init": "zero"})
    inputs = tokens_for(graph)
    dense = run_checkpoint(import_checkpoint(checkpoint), checkpoint, inputs)
    made = export_graph(graph, "switch_transformers")
    config = made.config
    assert (config.num_sparse_encoder_layers, config.num_sparse_decoder_layers) == counts
    assert config.experts.sequence_capacity == 0
    written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
    found = run_checkpoint(import_checkpoint(written), written, inputs)
    assert relative_error(found, dense) <= 1e-9


@pytest.mark.parametrize(
    ("options", "keys", "words"),
    [
        ({"top_k": 2, "gates": "renormalised"}, {}, "sends a token to one expert"),
        ({"layers": "every:4"}, {}, "spreads the sparse layers"),
        ({"layers": "0"}, {}, "spreads the sparse layers"),
        ({"slots": "capacity"}, {}, "counts capacity in tokens"),
        ({"shared": 0.5}, {}, "no shared expert"),
        ({}, {"feed_forward_proj": "gated-gelu"}, "no gated blocks"),
    ],
)
def test_what_switch_cannot_say_is_told(options, keys, words):
    graph, _ = upcycled(options, **keys)
    with pytest.raises(InputError, match=words):
        export_graph(graph, "switch_transformers")
    assert export_graph(graph, "st_moe").tensors


def test_a_t5_is_tied_as_transformers_ties_it():
    tied = parse_config(small("t5"))
    assert (tied.tie_word_embeddings, tied.scale_outputs) == (True, True)
    apart = parse_config(small("t5", tie_word_embeddings=False))
    assert (apart.tie_word_embeddings, apart.scale_outputs) == (False, False)
    # What version 5 writes of either kind of model.
    keys = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    checkpoint = random_checkpoint(apart, seed=7)
    written = MemoryCheckpoint({**apart.to_json(), **keys}, checkpoint.arrays)
    assert "lm_head.weight" in import_checkpoint(written).params
    arrays = {n: a for n, a in checkpoint.arrays.items() if n != "lm_head.weight"}
    graph = import_checkpoint(MemoryCheckpoint({**tied.to_json(), **keys}, arrays))
    assert "lm_head.weight" not in graph.params
    assert not [n for n in graph if n.op.name == "scale" and n.loc == "head"]
    with pytest.raises(InputError, match="scales its outputs only where"):
        parse_config(small("t5", tie_word_embeddings=False, scale_decoder_outputs=True))


def _drop_layer(arrays, config):
    for name in [n for n in arrays if n.startswith("decoder.block.2.")]:
        del arrays[name]


def _drop_expert(arrays, config):
    del arrays["encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight"]


def _fewer_layers(arrays, config):
    config["num_decoder_layers"] = 2
    config["num_sparse_decoder_layers"] = 1


def _turn(arrays, config):
    name = "encoder.block.0.layer.1.mlp.wi.weight"
    arrays[name] = arrays[name].T.copy()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop_layer, "no tensor of the decoder layers 2"),
        (_drop_expert, "experts.expert_1.wi.weight: this tensor is missing"),
        (_fewer_layers, r"tensors of the decoder layers 2-3[\s\S]*num_decoder_layers = 2"),
        (_turn, "it is transposed"),
    ],
)
def test_damage_is_told_by_stack(damage, words):
    sparse = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    config = parse_config(small("switch_transformers", num_experts=2, **sparse))
    checkpoint = random_checkpoint(config, seed=8)
    damage(checkpoint.arrays, checkpoint.config)
    with pytest.raises(InputError, match=words) as caught:
        import_checkpoint(checkpoint)
    assert len(caught.value.problems) == 1


def test_what_is_no_part_of_a_graph_is_known():
    with open_checkpoint(GOLDEN / "bert_gelu") as checkpoint:
        graph = import_checkpoint(checkpoint)
        unread = unread_tensors(graph, checkpoint)
    assert unread == ["pooler.dense.bias", "pooler.dense.weight"]
    checkpoint = random_checkpoint(parse_config(small("t5")))
    table = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    arrays = {**checkpoint.arrays, table: np.zeros((32, 4), np.float32)}
    old = MemoryCheckpoint(checkpoint.config, arrays)
    assert unread_tensors(import_checkpoint(old), old) == []
    arrays["pooler.dense.bias"] = np.zeros(3, np.float32)
    with pytest.raises(InputError, match="t5 has no such tensor"):
        import_checkpoint(MemoryCheckpoint(checkpoint.config, arrays))


def test_a_wav2vec2_is_read_under_its_older_names_with_its_head():
    with open_checkpoint(GOLDEN / "wav2vec2_group") as golden:
        arrays = {f"wav2vec2.{n}": np.asarray(golden.read(n)) for n in golden.tensors}
        config = {**golden.config, "architectures": ["Wav2Vec2ForCTC"]}
    prefix = "wav2vec2.encoder.pos_conv_embed.conv."
    for number, older in enumerate(("weight_g", "weight_v")):
        newer = f"{prefix}parametrizations.weight.original{number}"
        arrays[f"{prefix}{older}"] = arrays.pop(newer)
    rng = np.random.default_rng(3)
    arrays["lm_head.weight"] = rng.normal(size=(11, 12))
    arrays["lm_head.bias"] = rng.normal(size=11)
    checkpoint = MemoryCheckpoint(config, arrays)
    graph = import_checkpoint(checkpoint, heads=True)
    params = {n: evaluate(v.weight, checkpoint.read) for n, v in graph.params.items()}
    inputs = golden_arrays("wav2vec2_group", "audio")
    outputs = get_backend("reference").compile(graph).run(params, inputs)
    hidden = np.load(GOLDEN / "wav2vec2_group" / "hidden.npy")
    assert relative_error(outputs["hidden"], hidden) <= 1e-6
    expected = outputs["hidden"] @ arrays["lm_head.weight"].T + arrays["lm_head.bias"]
    assert relative_error(outputs["head.logits"], expected) <= 1e-9
